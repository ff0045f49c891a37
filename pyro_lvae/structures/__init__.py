"""The latent structures, one a file. A new one is imported here and listed in `STRUCTURES`."""

from .autoencoder import AE
from .base import Structure
from .beta import BetaVAE
from .conditional import ConditionalVAE
from .denoising import DenoisingVAE
from .flows import FlowVAE
from .hierarchy import GaussianHierarchy, HierarchicalVAE
from .ladder import LadderVAE
from .mixture import MixturePrior
from .nvdm import NVDM
from .prodlda import ProdLDA
from .sparse import SparseVAE
from .vade import VaDE
from .vae import VAE
from .vamp import VampPrior

STRUCTURES = (
    VAE,
    HierarchicalVAE,
    LadderVAE,
    AE,
    BetaVAE,
    ConditionalVAE,
    VaDE,
    NVDM,
    ProdLDA,
    SparseVAE,
    MixturePrior,
    VampPrior,
    FlowVAE,
    DenoisingVAE,
)

__all__ = ["STRUCTURES", "GaussianHierarchy", "Structure", *(cls.__name__ for cls in STRUCTURES)]
