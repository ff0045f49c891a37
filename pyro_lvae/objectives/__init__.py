"""ELBO estimators; each one is a `pyro.infer.ELBO`. Pyro's own plug in as they are."""

from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from .base import LedgerELBO, backward, check_supported
from .iwae import IWAE

# What `pyro-lvae list` names, with a line on each.
ESTIMATORS = {
    Trace_ELBO: "the ELBO, every density at a sample (the default)",
    TraceMeanField_ELBO: "the ELBO with analytic KL; guide and model in the same order",
    TraceEnum_ELBO: "the ELBO, discrete latents marked for enumeration summed out",
    TraceGraph_ELBO: "the ELBO with score-function gradients where a site has no rsample",
    RenyiELBO: "Renyi bound of order alpha; alpha=0 is IWAE, for local sites without subsampling",
    IWAE: "importance-weighted bound per datum, also with global sites and subsampling",
}

__all__ = ["ESTIMATORS", "IWAE", "LedgerELBO", "backward", "check_supported"]
