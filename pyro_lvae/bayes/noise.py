"""How the randomness of weights reaches the layers: one handler on linear and convolutional operations.

Gradient noise of the weights' posterior, from one draw shared by a whole batch, is large. Drawing for each
datum anew has the same expectation and less noise:

    local reparameterization   y = N(x mu, x^2 sigma^2), the output drawn in place of the weights
                               (Kingma et al. 2015, eq. 6); for linear layers, convolutions take flipout
    flipout                    y = x mu + ((x r) (w - mu)) s, random signs r and s a datum (Wen et al. 2018, eq. 4)

Where the rows of an operation are not the data, one each, the shared draw is used as it is: it is right everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Noise = Literal["shared", "local_reparameterization", "flipout"]
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
LAYERS = {F.linear, *_CONVOLUTIONS, *_TRANSPOSED}


@dataclass
class Drawn:
    """A weight as the guide has drawn it.

    Attributes:
        name: of the parameter.
        value: the draw, `[...]` or `[S, ...]`.
        mu, sigma: of its posterior, where that is Normal, entry by entry.
        uses: "own", where a layer has drawn noise of its own from it; "shared", where the draw itself went somewhere.
    """

    name: str
    value: Tensor
    mu: Tensor | None = None
    sigma: Tensor | None = None
    uses: list[str] = field(default_factory=list)

    def use(self, kind: str) -> None:
        """Note a use; noise of its own goes with no other use, for then the weight would be two weights."""
        self.uses.append(kind)
        if "own" in self.uses and len(self.uses) > 1:
            raise ValueError(
                f"weight {self.name!r} is used twice for a datum, and each use would draw noise of its own: that is "
                "not one weight; use noise='shared', or leave it out of where"
            )


class LayerNoise(TorchFunctionMode):
    """Linear and convolutional layers take their noise from the posterior of their weights, for each datum anew.

    Args:
        drawn: the weights that are in use.
        rows: B, the rows that are data.
        noise: "local_reparameterization" or "flipout".
    """

    def __init__(self, drawn: list[Drawn], rows: int, noise: Noise):
        super().__init__()
        self.drawn = {id(d.value): d for d in drawn if d.mu is not None}
        self.rows = rows
        self.noise = noise

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        used = [] if func in _HARMLESS else _among(self.drawn, args, kwargs)
        if not used:
            return func(*args, **kwargs)
        is_own = func in LAYERS and self._is_of_data(func, args[0] if args else kwargs["input"])
        for d in used:
            d.use("own" if is_own else "shared")
        if not is_own:
            return func(*args, **kwargs)
        x, weight, bias, args, kwargs = _read(args, kwargs)
        drawn = [self.drawn.get(id(t)) for t in (weight, bias)]
        mu, sigma = zip(*map(_moments, (weight, bias), drawn), strict=True)
        # The pixels of a datum share the weights: drawn one by one they would not vary together.
        is_local = self.noise == "local_reparameterization" and func is F.linear
        layer = _locally_reparameterized if is_local else _flipout
        return layer(lambda *given: func(*given, *args, **kwargs), x, (weight, bias), mu, sigma)

    def _is_of_data(self, func, x: Tensor) -> bool:
        """Whether each datum has one row of the input."""
        rows = x.shape[:-1] if func is F.linear else x.shape[:1]
        return len(rows) > 0 and math.prod(rows) == self.rows and rows[-1] == self.rows


class ManyWeights(TorchFunctionMode):
    """Layers with S draws `[S, ...]` of their weights, each for its part of the rows: one batched product.

    The rows `[..., S B, D]` hold the batch S times over, draw by draw; or `[..., S B, H, W, D]`, with places after
    them. The last dim of just that size is taken for that of the rows, else the last of a multiple of it.

    Args:
        drawn: the weights that are in use.
        batch: B.
    """

    def __init__(self, drawn: list[Drawn], batch: int):
        super().__init__()
        self.drawn = {id(d.value): d for d in drawn}
        self.batch = batch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in LAYERS:
            x, weight, bias, args, kwargs = _read(args, kwargs)
            many = [self.drawn.get(id(t)) for t in (weight, bias)]
            if any(many):
                return _many(func, x, weight, bias, many, self.batch, args, kwargs)
            return func(x, weight, bias, *args, **kwargs)
        if func not in _HARMLESS and (used := _among(self.drawn, args, kwargs)):
            raise ValueError(
                f"weight {used[0].name!r} goes into {getattr(func, '__name__', func)}, which cannot take several draws "
                "of it: linear and convolutional layers can. Use num_weights=1, or leave it out of where"
            )
        return func(*args, **kwargs)


_HARMLESS = {
    Tensor.dim,
    Tensor.size,
    Tensor.is_floating_point,
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "requires_grad", "ndim", "grad_fn")),
    *(getattr(Tensor, name).__get__ for name in ("_version", "is_leaf", "layout", "is_cuda", "is_sparse")),
}


def _among(drawn: dict[int, Drawn], args: tuple, kwargs: dict) -> list[Drawn]:
    """The weights that an operation is given."""
    return [drawn[id(t)] for t in tree_leaves((args, kwargs)) if id(t) in drawn]


def _read(args: tuple, kwargs: dict) -> tuple:
    """(input, weight, bias, other arguments) of a layer's operation."""
    names, kwargs = ("input", "weight", "bias"), dict(kwargs)
    first = [*args[:3], *(kwargs.pop(name, None) for name in names[len(args[:3]) :])]
    return *first, args[3:], kwargs


def _moments(t: Tensor | None, drawn: Drawn | None) -> tuple[Tensor | None, Tensor | None]:
    """Mean and standard deviation; `None` for one that is 0."""
    return (t, None) if drawn is None else (drawn.mu, drawn.sigma)


def _locally_reparameterized(layer, x: Tensor, drawn, mu, sigma) -> Tensor:
    mean = layer(x, *mu)
    weight = torch.zeros_like(mu[0]) if sigma[0] is None else sigma[0].square()
    variance = layer(x.square(), weight, None if sigma[1] is None else sigma[1].square())
    return mean + (variance + _tiny(variance)).sqrt() * torch.randn_like(mean)


def _flipout(layer, x: Tensor, drawn, mu, sigma) -> Tensor:
    mean = layer(x, *mu)
    off = [None if s is None else value - m for value, m, s in zip(drawn, mu, sigma, strict=True)]
    weight = torch.zeros_like(mu[0]) if off[0] is None else off[0]
    is_image = weight.ndim > 2
    return mean + layer(x * _signs(x, is_image), weight, off[1]) * _signs(mean, is_image)


def _signs(like: Tensor, is_image: bool) -> Tensor:
    """-1 or 1 for each row and channel; those of an image are shared over its pixels."""
    shape = (*like.shape[:2], *[1] * (like.ndim - 2)) if is_image else like.shape
    return 1.0 - 2.0 * (torch.rand(shape, dtype=like.dtype, device=like.device) < 0.5).to(like.dtype)


def _tiny(t: Tensor) -> float:
    return torch.finfo(t.dtype).tiny ** 0.5  # the root of 0 has no gradient


def _many(func, x: Tensor, weight: Tensor, bias: Tensor | None, many, batch: int, args, kwargs) -> Tensor:
    if func is F.linear:
        return _many_linear(x, weight, bias, *many, batch)
    return _many_convolution(func, x, weight, bias, many, batch, args, kwargs)


def _many_linear(x: Tensor, weight: Tensor, bias: Tensor | None, w: Drawn | None, b: Drawn | None, batch: int):
    count = len((w or b).value)
    multiples = [d for d, size in enumerate(x.shape[:-1]) if size % (count * batch) == 0]
    of_rows = [d for d in multiples if x.shape[d] == count * batch] or multiples
    if not of_rows:
        raise ValueError(
            f"an input of shape {tuple(x.shape)} reaches a linear layer of which there are {count} draws of the "
            "weights: each draw needs the rows of the data. Use num_weights=1, or leave that layer out of where"
        )
    if of_rows[-1] != x.ndim - 2:
        return _many_linear(x.movedim(of_rows[-1], -2), weight, bias, w, b, batch).movedim(-2, of_rows[-1])
    rows = _parts(x.flatten(0, -2), count, batch)  # [S, rows, in]
    weight = weight if w else weight.expand(count, *weight.shape)
    product = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(-2), rows, weight.mT)
    return _together(product, batch).reshape(*x.shape[:-1], product.shape[-1])


def _many_convolution(func, x, weight, bias, many, batch: int, args, kwargs) -> Tensor:
    """S convolutions as S groups of one."""
    w, b = many
    count = len((w or b).value)
    given = dict(zip(("stride", "padding", "dilation", "groups"), args, strict=False))
    if func in _TRANSPOSED:
        given = dict(zip(("stride", "padding", "output_padding", "groups", "dilation"), args, strict=False))
    given |= kwargs
    given["groups"] = given.get("groups", 1) * count
    weight = (weight if w else weight.expand(count, *weight.shape)).flatten(0, 1)
    bias = bias if bias is None else (bias if b else bias.expand(count, *bias.shape)).flatten()
    rows = _parts(x, count, batch)  # [S, rows, C, ...]
    found = func(rows.transpose(0, 1).flatten(1, 2), weight, bias, **given)
    return _together(found.unflatten(1, (count, -1)).transpose(0, 1), batch)


def _parts(x: Tensor, count: int, batch: int) -> Tensor:
    """`[K S B, ...]` as `[S, K B, ...]`."""
    if len(x) % (count * batch):
        raise ValueError(
            f"{len(x)} rows reach a layer of which there are {count} draws of the weights: each draw needs the rows "
            "of the data. Use num_weights=1, or leave that layer out of where"
        )
    return x.unflatten(0, (-1, count, batch)).transpose(0, 1).flatten(1, 2)


def _together(x: Tensor, batch: int) -> Tensor:
    """The inverse of `_parts`."""
    return x.unflatten(1, (-1, batch)).transpose(0, 1).flatten(0, 2)
