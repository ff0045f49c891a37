"""Draws of a structure's latents as ArviZ data."""

from __future__ import annotations

from torch import Tensor, nn

from .evaluate.chunks import check_rows, chunked_ledgers


def to_inference_data(structure: nn.Module, x: Tensor, num_samples: int = 100, *, y: Tensor | None = None):
    """Draws of q(z|x), with their densities, for ArviZ.

    Groups: `posterior` holds every latent as `[1 chain, num_samples, N, z_i]`, drawn from the guide
    (an approximation: weigh by `log_weight` for the exact posterior); `sample_stats` holds
    `log_weight` = log p(x, z) - log q(z|x); `log_likelihood` holds log p(x|z); `observed_data` x.
    Densities are nats, `[1, num_samples, N]`.

    Returns:
        `arviz.InferenceData`, or, from ArviZ 1.0 on, an `xarray.DataTree`.
    """
    import arviz

    x = check_rows(structure, x)
    parts = list(chunked_ledgers(structure, x, y, num_samples, memory=2**62))
    if len(parts) != 1 or parts[0][2].global_sites:
        raise ValueError("only structures whose every site lies in the data plate can be converted")
    sites = parts[0][2]
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
