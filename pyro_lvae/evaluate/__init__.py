"""Evaluation of any structure, from its traces."""

from .annealed import Bracket, ais_log_likelihood, bidirectional_monte_carlo, check_annealable
from .calibration import Calibration, calibration, reliability
from .clusters import cluster_probabilities, clustering_accuracy, label_probabilities
from .codes import RateDistortion, rate_distortion
from .disentanglement import DCI, dci, factor_vae_score, mutual_information, mutual_information_gap
from .latents import Activity, active_units, encode, kl_per_layer, kl_per_unit, posterior_activity, posterior_samples
from .likelihood import elbo, has_likelihood, log_likelihood, refuse_global_sites
from .samples import can_generate, interpolate, manifold, planar_layer, reconstruct, sample_prior, traverse
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
    "DCI",
    "LayerSummary",
    "Predictive",
    "RateDistortion",
    "active_units",
    "ais_log_likelihood",
    "bidirectional_monte_carlo",
    "calibration",
    "can_generate",
    "check_annealable",
    "cluster_probabilities",
    "label_probabilities",
    "clustering_accuracy",
    "dci",
    "elbo",
    "encode",
    "factor_vae_score",
    "has_likelihood",
    "interpolate",
    "kl_per_layer",
    "kl_per_unit",
    "log_likelihood",
    "manifold",
    "mutual_information",
    "mutual_information_gap",
    "nearest_words",
    "npmi",
    "perplexity",
    "planar_layer",
    "posterior_activity",
    "posterior_samples",
    "predictive_log_likelihood",
    "prune",
    "rate_distortion",
    "reconstruct",
    "refuse_global_sites",
    "reliability",
    "sample_prior",
    "signal_to_noise",
    "summarize",
    "topics",
    "traverse",
    "weight_kl",
    "weight_summary",
]
