"""Evaluation of any structure, from its traces."""

from .annealed import Bracket, ais_log_likelihood, bidirectional_monte_carlo, check_annealable
from .latents import Activity, active_units, encode, kl_per_layer, posterior_activity, posterior_samples
from .likelihood import elbo, log_likelihood, refuse_global_sites
from .samples import interpolate, manifold, planar_layer, reconstruct, sample_prior
from .summary import summarize

__all__ = [
    "Activity",
    "Bracket",
    "active_units",
    "ais_log_likelihood",
    "bidirectional_monte_carlo",
    "check_annealable",
    "elbo",
    "encode",
    "interpolate",
    "kl_per_layer",
    "log_likelihood",
    "manifold",
    "planar_layer",
    "posterior_activity",
    "posterior_samples",
    "reconstruct",
    "refuse_global_sites",
    "sample_prior",
    "summarize",
]
