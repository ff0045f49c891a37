"""The latent structures, one a file. A new one is imported here and listed in `STRUCTURES`."""

from .base import Structure
from .hierarchy import GaussianHierarchy, HierarchicalVAE
from .ladder import LadderVAE
from .nvdm import NVDM
from .prodlda import ProdLDA
from .vae import VAE

STRUCTURES = (VAE, HierarchicalVAE, LadderVAE, NVDM, ProdLDA)

__all__ = ["NVDM", "STRUCTURES", "VAE", "GaussianHierarchy", "HierarchicalVAE", "LadderVAE", "ProdLDA", "Structure"]
