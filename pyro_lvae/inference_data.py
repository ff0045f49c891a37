"""Draws of a structure's latents as ArviZ data."""

from __future__ import annotations

from torch import Tensor, nn

from .evaluate.chunks import check_rows
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
    import arviz

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
    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict(groups)
    return arviz.from_dict(**groups)


def _chain(draws: Tensor):
    return draws.detach().cpu().numpy()[None]
