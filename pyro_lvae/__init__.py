"""Hierarchical and ladder variational autoencoders, and their family, as Pyro model/guide pairs."""

import sys
from importlib import import_module
from typing import Any

from ._version import __version__

# The public names by the module each is in. Torch and Pyro take seconds to load, so they wait for the first use.
_NAMES = {
    "annealing": "anneal",
    "bayes": "SWAG BayesianWeights generative laplace",
    "callbacks": "Callback JSONLines ProgressBar TensorBoard",
    "checkpoint": "CheckpointError load_checkpoint load_weights",
    "comparison": "compare compare_training",
    "compile": "CompileError",
    "conditionals": "",  # used as pyro_lvae.conditionals.Normal
    "contract": "ContractError check",
    "data": "DataError Dataset few_labels load",
    "evaluate": "active_units ais_log_likelihood bidirectional_monte_carlo calibration cluster_probabilities "
    "clustering_accuracy dci elbo encode factor_vae_score interpolate kl_per_layer kl_per_unit label_probabilities "
    "log_likelihood manifold mutual_information mutual_information_gap nearest_words npmi perplexity "
    "posterior_activity predictive_log_likelihood prune rate_distortion reconstruct sample_prior signal_to_noise "
    "summarize topics traverse weight_kl weight_summary",
    "features": "LatentFeatures",
    "inference_data": "to_inference_data weights_to_inference_data",
    "loop": "NonFiniteLoss",
    "nets": "",  # used as pyro_lvae.nets.linear
    "objectives": "CIWAE GECO IWAE MIWAE PIWAE RWS STL TVO AnalyticELBO BetaELBO BetaTCELBO ConstrainedELBO DReG "
    "FreeBits KLBalanced LedgerELBO Renyi SampledELBO",
    "optim": "CriticAdam FusedAdam",
    "results": "Comparison EpochMetrics Summary TrainingComparison",
    "schedules": "Schedule constant cyclical linear",
    "structures": "ADGM AE NVDM SDGM VAE BetaVAE BidirectionalLadderVAE ConditionalVAE ConvLadderVAE "
    "DenoisingVAE FactorVAE FlowVAE GaussianHierarchy HierarchicalVAE ImplicitLikelihoodVAE ImplicitPosteriorVAE "
    "LadderVAE MixturePrior OptimalPriorVAE ProdLDA SemiSupervisedVAE SparseVAE Structure VaDE VampPrior VariationalGP",
    "svi": "for_svi",
    "traces": "ledger",
    "train": "fit",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [*_MODULE_OF]


def __getattr__(name: str) -> Any:
    """Load a public name, or one of the modules above, at its first use."""
    if name in _NAMES:
        return import_module(f".{name}", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # the next use comes here no more
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *__all__})
