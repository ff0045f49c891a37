"""Pictures' raw material: samples of the prior, reconstructions, interpolations, the latent manifold."""

from __future__ import annotations

import torch
from pyro.distributions import Normal
from torch import Tensor, nn

from ..traces import evaluating, forked_noise, generate, guide_sites
from .chunks import check_rows


def sample_prior(structure: nn.Module, num_samples: int, like: Tensor, *, y: Tensor | None = None) -> Tensor:
    """E[x | z] for z ~ p(z): `[num_samples, D]`.

    Args:
        like: any data `[N, D]` of the model's kind; the model reads its length, dtype and device.
        y: labels `[num_samples, ...]` for models that are conditional on them.

    Raises:
        ValueError: the prior cannot be drawn from, as that of an autoencoder.
    """
    like, _ = check_rows(structure, like)
    x, y = check_rows(structure, like[:1].expand(num_samples, -1), y)
    if not can_generate(structure, like, y):
        raise ValueError(f"{type(structure).__name__} has no prior to draw from; `reconstruct` decodes codes of data")
    with evaluating(structure):
        return generate(structure, x, {}, y)["x"][0].mean


def can_generate(structure: nn.Module, like: Tensor, y: Tensor | None = None) -> bool:
    """Whether every latent's prior can be drawn from; that of an autoencoder is flat."""
    like, y = check_rows(structure, like[:1], None if y is None else y[:1])
    with evaluating(structure), forked_noise(like.device):
        try:
            generate(structure, like, {}, y)
        except NotImplementedError:
            return False
    return True


def reconstruct(structure: nn.Module, x: Tensor, *, y: Tensor | None = None) -> Tensor:
    """E[x | z] for one draw z ~ q(z|x): `[N, D]`."""
    x, y = check_rows(structure, x, y)
    with evaluating(structure):
        latents = {name: value for name, (_, value) in guide_sites(structure, x, y).items()}
        return generate(structure, x, latents, y)["x"][0].mean


def interpolate(
    structure: nn.Module, start: Tensor, stop: Tensor, steps: int = 10, *, y: Tensor | None = None
) -> Tensor:
    """E[x | z] on straight lines between draws of q(z|start) and q(z|stop), every layer at once.

    Args:
        start, stop: data `[N, D]`.
        y: labels `[N, ...]` of both ends, for models that are conditional on them.
        steps: points on each line, its ends included.

    Returns:
        `[N, steps, D]`.
    """
    (start, y), (stop, _) = check_rows(structure, start, y), check_rows(structure, stop)
    if start.shape != stop.shape or steps < 2:
        raise ValueError(
            f"start {tuple(start.shape)} and stop {tuple(stop.shape)} must have the same shape, and steps={steps} "
            "be at least 2"
        )
    with evaluating(structure):
        ends = [guide_sites(structure, x, y) for x in (start, stop)]
        return torch.stack([_between(structure, start, ends, t, y) for t in torch.linspace(0, 1, steps).tolist()], 1)


def manifold(structure: nn.Module, like: Tensor, size: int = 20) -> Tensor:
    """E[x | z] on a grid over a 2-D top layer, the unit square through the inverse normal CDF.

    (Kingma & Welling 2014, appendix A.) Layers below take their conditional means.

    Returns:
        `[size, size, D]`, rows from the top of the picture down.

    Raises:
        ValueError: the top layer is no two-dimensional standard normal.
    """
    like, _ = check_rows(structure, like)
    name = planar_layer(structure, like)
    if name is None:
        raise ValueError("a manifold needs a top layer N(0, I) of two dimensions: train with a last z_dim of 2")
    quantiles = (torch.arange(size, dtype=like.dtype, device=like.device) + 0.5) / size
    grid = torch.special.ndtri(quantiles)
    z = torch.stack(torch.meshgrid(-grid, grid, indexing="ij")[::-1], -1).reshape(-1, 2)
    x = like[:1].expand(len(z), -1)
    with evaluating(structure):
        return generate(structure, x, {name: z}, mean=True)["x"][0].mean.reshape(size, size, -1)


def planar_layer(structure: nn.Module, like: Tensor) -> str | None:
    """The name of the top layer, the first that the model samples, if it is N(0, I) in two dimensions."""
    like, _ = check_rows(structure, like)
    if not can_generate(structure, like):
        return None
    with evaluating(structure), forked_noise(like.device):
        name, (p, _) = next(iter(generate(structure, like[:1], {}).items()))
    is_planar = not p.support.is_discrete and p.event_shape == (2,)
    return name if is_planar and _is_standard(p) else None


def _is_standard(p) -> bool:
    p = getattr(p, "base_dist", p)
    return isinstance(p, Normal) and bool((p.mean == 0).all() and (p.variance == 1).all())


def _between(structure: nn.Module, like: Tensor, ends: list[dict], t: float, y: Tensor | None) -> Tensor:
    latents = {}
    for name, (_, a) in ends[0].items():
        b = ends[1][name][1]
        latents[name] = torch.lerp(a, b, t) if a.is_floating_point() else (a if t < 0.5 else b)
    return generate(structure, like, latents, y)["x"][0].mean
