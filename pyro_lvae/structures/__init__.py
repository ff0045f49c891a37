"""The latent structures, one a file. A new one is imported here and listed in `STRUCTURES`."""

from .base import Structure
from .beta import BetaVAE
from .hierarchy import GaussianHierarchy, HierarchicalVAE
from .ladder import LadderVAE
from .vae import VAE

STRUCTURES = (VAE, HierarchicalVAE, LadderVAE, BetaVAE)

__all__ = ["STRUCTURES", "BetaVAE", "GaussianHierarchy", "HierarchicalVAE", "LadderVAE", "Structure", "VAE"]
