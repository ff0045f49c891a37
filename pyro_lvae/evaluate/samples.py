"""Pictures' raw material: samples of the prior, reconstructions, interpolations, the latent manifold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..traces import evaluating, generate, guide_sites
from .chunks import check_rows


def sample_prior(structure: nn.Module, num_samples: int, like: Tensor, *, y: Tensor | None = None) -> Tensor:
    """E[x | z] for z ~ p(z): `[num_samples, D]`.

    Args:
        like: any data `[N, D]` of the model's kind; the model reads its length, dtype and device.
        y: labels `[num_samples, ...]` for models that are conditional on them.
    """
    like = check_rows(structure, like)
    x = like[:1].expand(num_samples, -1)
    with evaluating(structure):
        return generate(structure, x, {}, y)["x"][0].mean


def reconstruct(structure: nn.Module, x: Tensor, *, y: Tensor | None = None) -> Tensor:
    """E[x | z] for one draw z ~ q(z|x): `[N, D]`."""
    x = check_rows(structure, x)
    with evaluating(structure):
        latents = {name: value for name, (_, value) in guide_sites(structure, x, y).items()}
        return generate(structure, x, latents, y)["x"][0].mean


def interpolate(
    structure: nn.Module, start: Tensor, stop: Tensor, steps: int = 10, *, y: Tensor | None = None
) -> Tensor:
    """E[x | z] on straight lines between draws of q(z|start) and q(z|stop), every layer at once.

    Args:
        start, stop: data `[N, D]`.
        steps: points on each line, its ends included.

    Returns:
        `[N, steps, D]`.
    """
    start, stop = check_rows(structure, start), check_rows(structure, stop)
    if start.shape != stop.shape or steps < 2:
        raise ValueError(
            f"start {tuple(start.shape)} and stop {tuple(stop.shape)} must have the same shape, and steps={steps} "
            "be at least 2"
        )
    with evaluating(structure):
        ends = [guide_sites(structure, x, y) for x in (start, stop)]
        return torch.stack([_between(structure, start, ends, t, y) for t in torch.linspace(0, 1, steps).tolist()], 1)


def manifold(structure: nn.Module, like: Tensor, size: int = 20, *, y: Tensor | None = None) -> Tensor:
    """E[x | z] on a grid over the one 2-D latent, the unit square through the inverse normal CDF.

    (Kingma & Welling 2014, appendix A.) Layers below the 2-D one take their conditional means.

    Returns:
        `[size, size, D]`, rows from the top of the picture down.

    Raises:
        ValueError: no layer, or more than one, that is two-dimensional with a prior of its own.
    """
    like = check_rows(structure, like)
    quantiles = (torch.arange(size, dtype=like.dtype, device=like.device) + 0.5) / size
    grid = torch.special.ndtri(quantiles)
    z = torch.stack(torch.meshgrid(-grid, grid, indexing="ij")[::-1], -1).reshape(-1, 2)
    x = like[:1].expand(len(z), -1)
    with evaluating(structure):
        name = _planar_site(structure, like[:2], y)
        return generate(structure, x, {name: z}, y, mean=True)["x"][0].mean.reshape(size, size, -1)


def _planar_site(structure: nn.Module, x: Tensor, y: Tensor | None) -> str:
    """The top layer's name, if it has two dimensions: the first latent that the model samples."""
    sites = {name: value for name, (_, value) in generate(structure, x, {}, y).items() if name not in ("x", "y")}
    top = next(iter(sites))
    if sites[top].shape[1:] != (2,):
        raise ValueError(
            f"the top layer {top!r} has event shape {tuple(sites[top].shape[1:])}; a manifold needs (2,): "
            "train with a last z_dim of 2"
        )
    return top


def _between(structure: nn.Module, like: Tensor, ends: list[dict], t: float, y: Tensor | None) -> Tensor:
    latents = {}
    for name, (_, a) in ends[0].items():
        b = ends[1][name][1]
        latents[name] = torch.lerp(a, b, t) if a.is_floating_point() else (a if t < 0.5 else b)
    return generate(structure, like, latents, y)["x"][0].mean
