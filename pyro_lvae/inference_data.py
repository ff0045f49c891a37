"""Draws of a structure's latents as ArviZ data."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from .bayes import BayesianWeights
from .evaluate import elbo, weight_summary
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


def weights_to_inference_data(
    restarts: Sequence[BayesianWeights], x: Tensor, num_draws: int = 100, *, raw: bool = False
):
    """Draws of the weights of several trainings of one structure, a chain each, for ArviZ.

    Group `posterior` holds, by parameter, the root mean square of its weights, `rms.NAME`, and with `raw` the weights
    themselves; `log_likelihood` the ELBO of each row of `x` given the weights, by one draw of z (nats, a lower bound
    of log p(x|w)). All are `[restart, num_draws, ...]`. `arviz.rhat` of them says whether trainings from other seeds
    found the same: of the functions, the bound and the sizes, that is; single weights differ by the symmetries of a
    network whatever happens. `constant_data` holds each restart's median signal to noise, `snr.NAME`, `[restart]`.

    Args:
        restarts: trained alike from different seeds; two or more for R-hat.
        x: rows `[N, D]`.
        num_draws: of the weights of each.
        raw: the weights too.

    Returns:
        `arviz.InferenceData`, or, from ArviZ 1.0 on, an `xarray.DataTree`.
    """
    if len({tuple(b.names) for b in restarts}) != 1:
        raise ValueError(f"{len(restarts)} restarts with posteriors over other parameters; give one or more, all alike")
    chains = [_weight_draws(b, x, num_draws, raw) for b in restarts]
    bounds = [chain.pop("x") for chain in chains]
    posterior = {name: np.stack([chain[name] for chain in chains]) for name in chains[0]}
    snr = [{f"snr.{n}": s.snr for n, s in weight_summary(b).items()} for b in restarts]
    constant = {name: np.array([of[name] for of in snr]) for name in snr[0]}
    groups = {"posterior": posterior, "log_likelihood": {"x": np.stack(bounds)}, "constant_data": constant}
    return _from_dict(groups)


def _weight_draws(bayesian: BayesianWeights, x: Tensor, num_draws: int, raw: bool) -> dict[str, np.ndarray]:
    found: dict[str, list] = {}
    for _ in range(num_draws):
        structure = bayesian.draw()
        weights = {n: p.detach() for n, p in structure.named_parameters() if n in bayesian.names}
        numbers = {f"rms.{n}": w.square().mean().sqrt() for n, w in weights.items()} | (weights if raw else {})
        for name, value in (numbers | {"x": elbo(structure, x)}).items():
            found.setdefault(name, []).append(value.cpu().numpy())
    return {name: np.stack(values) for name, values in found.items()}


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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)  # once a day, of its plans
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
