"""Pictures' raw material: samples of the prior, reconstructions, interpolations, traversals, the latent manifold."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
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
    with evaluating(structure):
        try:
            p = generate(structure, x, {}, y)["x"][0]
        except NotImplementedError as error:
            name = type(structure).__name__
            raise ValueError(f"{name} has no prior to draw from; `reconstruct` decodes codes of data") from error
        return expected(p)


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
        return expected(generate(structure, x, latents, y)["x"][0])


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


def traverse(
    structure: nn.Module,
    x: Tensor,
    layer: str | None = None,
    *,
    units: Sequence[int] | None = None,
    low: float = -3.0,
    high: float = 3.0,
    steps: int = 7,
    draw: bool = False,
    y: Tensor | None = None,
) -> Tensor:
    """E[x | z] with the units of one layer moved from `low` to `high`, one at a time (Higgins et al. 2017, figure 1).

    The other units of the layer, and the layers above it, stay at the means of q(z|x) (each given the means of those
    that the guide has before it). Layers below, which the model draws after it, take their conditional means: held at
    the posterior of `x`, they would hide what is moved above them. What is discrete, or has no known mean, is drawn.

    Args:
        x: data `[N, D]` to start from.
        layer: name of a continuous site; the first that the model samples, which is the top one, if left out.
        units: which units to move, in this order; all if left out.
        low, high: values of the moved unit, in its own units (prior standard deviations where the prior is N(0, I)).
        steps: values between them, ends included.
        draw: what stays is a draw of q(z|x) instead of means.
        y: labels `[N, ...]`, for models that are conditional on them.

    Returns:
        `[N, units, steps, D]`.

    Raises:
        ValueError: no such continuous layer, or no such unit.
    """
    x, y = check_rows(structure, x, y)
    with evaluating(structure):
        held = guide_sites(structure, x, y, mean=not draw)
        values = {name: value for name, (_, value) in held.items()}
        order = [name for name in generate(structure, x, values, y) if name in held]
        layer = _continuous_layer(layer, order, held, len(x))
        z = held[layer][1]
        moved = _moved(z.reshape(len(x), -1), layer, units, torch.linspace(low, high, steps).to(z))

        def repeated(v: Tensor) -> Tensor:
            return v.repeat_interleave(moved.shape[1] * steps, 0)

        above = {name: held[name] for name in order[: order.index(layer)]}
        latents = {n: repeated(v) if _is_local(q, len(x)) else v for n, (q, v) in above.items()}
        latents[layer] = moved.reshape(-1, *z.shape[1:])
        found = generate(structure, repeated(x), latents, None if y is None else repeated(y), mean=True)
        mean = expected(found["x"][0])
    return mean.reshape(*moved.shape[:3], -1)


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
        return expected(generate(structure, x, {name: z}, mean=True)["x"][0]).reshape(size, size, -1)


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
    return expected(generate(structure, like, latents, y)["x"][0])


def expected(p: dist.TorchDistribution) -> Tensor:
    """E[x]; of class numbers their mean; the mode of Student's t with df <= 1, and a draw where no mean is known."""
    entries = p
    while isinstance(entries, (dist.Independent, dist.MaskedDistribution)):
        entries = entries.base_dist
    if isinstance(entries, dist.Categorical):
        return (entries.probs * torch.arange(entries.probs.shape[-1]).to(entries.probs)).sum(-1)
    try:
        mean = entries.mean
        return torch.where(mean.isnan(), entries.mode, mean) if mean.isnan().any() else mean
    except NotImplementedError:
        return entries.sample()


def _is_local(q: dist.TorchDistribution, rows: int) -> bool:
    return q.batch_shape[-1:] == (rows,)


def _continuous_layer(layer: str | None, order: list[str], held: dict, rows: int) -> str:
    layers = [n for n in order if not held[n][0].support.is_discrete and _is_local(held[n][0], rows)]
    if not layers or layer not in (None, *layers):
        raise ValueError(f"layer is {layer!r}; the continuous layers are {', '.join(map(repr, layers)) or 'none'}")
    return layer or layers[0]


def _moved(z: Tensor, layer: str, units: Sequence[int] | None, values: Tensor) -> Tensor:
    """`z` `[N, d]` with one unit at each of the values: `[N, units, steps, d]`."""
    units = list(range(z.shape[1]) if units is None else units)
    if not units or not all(0 <= u < z.shape[1] for u in units) or not len(values):
        raise ValueError(f"units {units} at {len(values)} steps; {layer!r} has units 0 to {z.shape[1] - 1}, name some")
    moved = z[:, None, None].repeat(1, len(units), len(values), 1)
    moved[:, torch.arange(len(units)), :, units] = values
    return moved
