"""ELBO estimators; each one is a `pyro.infer.ELBO`. Pyro's own plug in as they are."""

from .base import LedgerELBO, backward, check_supported
from .iwae import IWAE

__all__ = ["IWAE", "LedgerELBO", "backward", "check_supported"]
