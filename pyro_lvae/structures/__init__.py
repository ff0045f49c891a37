"""The latent structures, one a file. A new one is imported here and listed in `STRUCTURES`."""

from .base import Structure
from .hierarchy import GaussianHierarchy, HierarchicalVAE
from .ladder import LadderVAE
from .vae import VAE

STRUCTURES = (VAE, HierarchicalVAE, LadderVAE)

__all__ = ["STRUCTURES", "GaussianHierarchy", "HierarchicalVAE", "LadderVAE", "Structure", "VAE"]
