"""Draws of a structure's latents as ArviZ data."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from .evaluate.chunks import check_rows
from .results import Comparison
from .traces import evaluating, ledger


def to_inference_data(structure: nn.Module, x: Tensor, num_samples: int = 100, *, y: Tensor | None = None):
    """Draws of q(z|x), with their densities, for ArviZ.

    Groups: `posterior` holds every latent as `[1 chain, num_samples, N, z_i]`, drawn from the guide
    (an approximation: weigh by `log_weight` for the exact posterior); `sample_stats` holds
    `log_weight` = log p(x, z) - log q(z|x); `log_likelihood` holds log p(x|z); `observed_data` x.
    Densities are nats, `[1, num_samples, N]`.

    Raises:
        ValueError: a site is global, or enumerated.

    Returns:
        `arviz.InferenceData`, or, from ArviZ 1.0 on, an `xarray.DataTree`.
    """
    x, y = check_rows(structure, x, y)
    with evaluating(structure):
        args = (x,) if y is None else (x, y)
        sites = ledger(structure.model, structure.guide, *args, num_particles=num_samples)
    if odd := [n for n, s in sites.items() if not s.is_local or s.is_enumerated]:
        raise ValueError(f"site(s) {', '.join(map(repr, odd))}: neither global nor enumerated sites can be converted")
    groups = {
        "posterior": {name: _chain(site.value) for name, site in sites.latents.items()},
        "log_likelihood": {"x": _chain(sites["x"].log_p)},
        "sample_stats": {"log_weight": _chain(sites.local_log_weight())},
        "observed_data": {"x": x.cpu().numpy()},
    }
    return _from_dict(groups)


def comparison_draws(comparison: Comparison):
    """What each estimator drew in a comparison, for ArviZ.

    Group `posterior` holds `value` (nats per datum) and `gradient_norm_model`, `..._guide`,
    `..._shared` as `[1 chain, draw, estimator]`.

    Returns:
        `arviz.InferenceData`, or, from ArviZ 1.0 on, an `xarray.DataTree`.
    """
    names = [row.estimator for row in comparison.rows]
    draws = {"value": np.stack([row.values for row in comparison.rows], -1)[None]}
    for group in comparison.num_parameters:
        norms = [row.gradient_norms[group] for row in comparison.rows]
        draws[f"gradient_norm_{group}"] = np.stack(norms, -1)[None]
    dims = {name: ["estimator"] for name in draws}
    return _from_dict({"posterior": draws}, coords={"estimator": names}, dims=dims)


def _from_dict(groups: dict, **options):
    import arviz

    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict(groups, **options)
    return arviz.from_dict(**groups, **options)


def _chain(draws: Tensor):
    return draws.detach().cpu().numpy()[None]


def save_draws(path: Path, draws) -> None:
    """Write ArviZ data as NetCDF, whole or not at all; `arviz.from_netcdf` reads it."""
    partial = path.with_name(path.name + ".partial")
    draws.to_netcdf(str(partial))
    os.replace(partial, path)
