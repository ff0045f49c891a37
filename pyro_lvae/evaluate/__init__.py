"""Evaluation of any structure, from its traces."""

from .latents import Activity, active_units, encode, kl_per_layer, posterior_activity
from .likelihood import elbo, log_likelihood
from .samples import interpolate, manifold, reconstruct, sample_prior

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
    "reconstruct",
    "sample_prior",
]
