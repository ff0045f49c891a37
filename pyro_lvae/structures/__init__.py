"""The latent structures, one a file. A new one is imported here and listed in `STRUCTURES`."""

from .autoencoder import AE
from .auxiliary import ADGM, SDGM
from .base import Structure
from .beta import BetaVAE
from .bidirectional import BidirectionalLadderVAE
from .conditional import ConditionalVAE
from .convolutional import ConvLadderVAE
from .denoising import DenoisingVAE
from .factor import FactorVAE
from .flows import FlowVAE
from .gaussian_process import VariationalGP
from .hierarchy import GaussianHierarchy, HierarchicalVAE
from .implicit import ImplicitPosteriorVAE
from .ladder import LadderVAE
from .mixture import MixturePrior
from .nvdm import NVDM
from .optimal_prior import OptimalPriorVAE
from .prodlda import ProdLDA
from .semi_supervised import SemiSupervisedVAE
from .simulator import ImplicitLikelihoodVAE
from .sparse import SparseVAE
from .vade import VaDE
from .vae import VAE
from .vamp import VampPrior

STRUCTURES = (
    VAE,
    HierarchicalVAE,
    LadderVAE,
    BidirectionalLadderVAE,
    ConvLadderVAE,
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
    VariationalGP,
    FactorVAE,
    OptimalPriorVAE,
    ImplicitPosteriorVAE,
    ImplicitLikelihoodVAE,
    SemiSupervisedVAE,
    ADGM,
    SDGM,
)

__all__ = ["STRUCTURES", "GaussianHierarchy", "Structure", *(cls.__name__ for cls in STRUCTURES)]
