"""Evaluation of any structure, from its traces."""

from .latents import Activity, active_units, encode, kl_per_layer, posterior_activity, posterior_samples
from .likelihood import elbo, log_likelihood
from .samples import interpolate, manifold, reconstruct, sample_prior
from .summary import summarize

__all__ = [
    "Activity",
    "active_units",
    "elbo",
    "encode",
    "interpolate",
    "kl_per_layer",
    "log_likelihood",
    "manifold",
    "posterior_activity",
    "posterior_samples",
    "reconstruct",
    "sample_prior",
    "summarize",
]
