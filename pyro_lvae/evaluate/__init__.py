"""Evaluation of any structure, from its traces."""

from .annealed import Bracket, ais_log_likelihood, bidirectional_monte_carlo, check_annealable
from .calibration import Calibration, calibration, reliability
from .latents import Activity, active_units, encode, kl_per_layer, posterior_activity, posterior_samples
from .likelihood import elbo, log_likelihood, refuse_global_sites
from .samples import interpolate, manifold, planar_layer, reconstruct, sample_prior
from .summary import summarize
from .topics import nearest_words, npmi, perplexity, topics
from .weights import (
    LayerSummary,
    Predictive,
    predictive_log_likelihood,
    prune,
    signal_to_noise,
    weight_kl,
    weight_summary,
)

__all__ = [
    "Activity",
    "Bracket",
    "Calibration",
    "LayerSummary",
    "Predictive",
    "active_units",
    "ais_log_likelihood",
    "bidirectional_monte_carlo",
    "calibration",
    "check_annealable",
    "elbo",
    "encode",
    "interpolate",
    "kl_per_layer",
    "log_likelihood",
    "manifold",
    "nearest_words",
    "npmi",
    "perplexity",
    "planar_layer",
    "posterior_activity",
    "posterior_samples",
    "predictive_log_likelihood",
    "prune",
    "reconstruct",
    "refuse_global_sites",
    "reliability",
    "sample_prior",
    "signal_to_noise",
    "summarize",
    "topics",
    "weight_kl",
    "weight_summary",
]
