"""Hierarchical and ladder variational autoencoders, and their family, as Pyro model/guide pairs."""

from ._version import __version__
from .annealing import Schedule, anneal, constant, cyclical, linear
from .callbacks import Callback, JSONLines, ProgressBar, TensorBoard
from .checkpoint import CheckpointError, load_checkpoint, load_weights
from .comparison import compare, compare_training
from .contract import ContractError, check
from .data import DataError, Dataset, load
from .evaluate import (
    active_units,
    ais_log_likelihood,
    bidirectional_monte_carlo,
    elbo,
    encode,
    interpolate,
    kl_per_layer,
    log_likelihood,
    manifold,
    posterior_activity,
    reconstruct,
    sample_prior,
    summarize,
)
from .inference_data import to_inference_data
from .loop import NonFiniteLoss
from .objectives import (
    CIWAE,
    GECO,
    IWAE,
    MIWAE,
    PIWAE,
    RWS,
    STL,
    TVO,
    AnalyticELBO,
    BetaELBO,
    ConstrainedELBO,
    DReG,
    FreeBits,
    KLBalanced,
    LedgerELBO,
    Renyi,
    SampledELBO,
)
from .results import Comparison, EpochMetrics, Summary, TrainingComparison
from .structures import VAE, GaussianHierarchy, HierarchicalVAE, LadderVAE, Structure
from .svi import for_svi
from .traces import ledger
from .train import FusedAdam, fit
