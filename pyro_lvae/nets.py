"""Tensor -> Tensor: the deterministic networks, which take any number of leading dims.

A particle plate turns a latent sample from `[B, z]` into `[K, B, z]`. Linear layers broadcast by
themselves; batch norm does not, so the version here flattens the leading dims and restores them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALL = 0.1  # initial gain of Gaussian heads in deep structures, whose distributions hardly depend on d at first


def linear(in_dim: int, out_dim: int, *, bias: bool = True, gain: float = 1.0) -> nn.Linear:
    """A linear layer with Glorot-normal weights, times `gain`, and zero bias (Glorot & Bengio 2010)."""
    return _glorot(nn.Linear(in_dim, out_dim, bias=bias), gain)


def _units(width: int, activation: Callable[[], nn.Module]) -> int:
    """Units before a nonlinearity that leaves `width`: one half of a gated unit's input gates the other."""
    return 2 * width if isinstance(activation(), nn.GLU) else width


def _glorot(layer: nn.Module, gain: float) -> nn.Module:
    nn.init.xavier_normal_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Conv(nn.Conv2d):
    """A convolution over any leading dims, `[..., in_channels, H, W]`, initialised as `linear` is.

    Args:
        in_channels, out_channels: maps that come and go.
        kernel: its side, an odd number of pixels; the borders are padded, so that height and width stay.
        stride: 2 halves height and width, rounded up.
        size: (height, width) that the input is first repeated to, each pixel by its nearest.
        gain: of the initial weights.

    >>> Conv(3, 8, stride=2)(torch.randn(5, 4, 3, 7, 6)).shape
    torch.Size([5, 4, 8, 4, 3])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        size: tuple[int, int] | None = None,
        bias: bool = True,
        gain: float = 1.0,
    ):
        super().__init__(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=bias)
        self.size = size
        _glorot(self, gain)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, *x.shape[-3:])
        rows = super().forward(rows if self.size is None else F.interpolate(rows, self.size))
        return rows.reshape(*x.shape[:-3], *rows.shape[1:])


class Residual(nn.Sequential):
    """h -> h + f(h), f being activation, layer, activation, layer (He et al. 2016).

    Args:
        layer: `(in, out, gain=) -> nn.Module`, such as `linear` or `Conv`.
        width: what goes in and comes out of the layers.
        gain: of the last layer's initial weights. In a path of N blocks, 1 / sqrt(N) keeps the sum of what they add
            from growing with depth, which trains without normalisation (Child 2021).
        activation: makes the nonlinearity, which keeps the width.

    Raises:
        ValueError: of a gated activation (`nn.GLU`), which halves the width.
    """

    def __init__(
        self,
        layer: Callable[..., nn.Module],
        width: int,
        *,
        gain: float = 1.0,
        activation: Callable[[], nn.Module] = nn.LeakyReLU,
    ):
        if isinstance(activation(), nn.GLU):
            raise ValueError("activation is nn.GLU, which halves the width; a residual block needs one that keeps it")
        super().__init__(activation(), layer(width, width), activation(), layer(width, width, gain=gain))

    def forward(self, h: Tensor) -> Tensor:
        return h + super().forward(h)


def concatenated(inputs: Sequence[Tensor]) -> Tensor:
    """Tensors side by side in the last dim; leading dims broadcast.

    >>> concatenated([torch.zeros(4, 3), torch.zeros(5, 1, 2)]).shape
    torch.Size([5, 4, 5])
    """
    lead = torch.broadcast_shapes(*(t.shape[:-1] for t in inputs))
    return torch.cat([t.expand(*lead, -1) for t in inputs], -1)


class Concat(nn.Sequential):
    """Modules one after another, of which the first sees several inputs, `concatenated`.

    >>> Concat(nn.Linear(5, 8))(torch.zeros(4, 3), torch.zeros(4, 2)).shape
    torch.Size([4, 8])
    """

    def forward(self, *inputs: Tensor):
        return super().forward(concatenated(inputs))


class Onwards(nn.Module):
    """A step of a deterministic path that latent layers feed: (d, z) -> f(d + g(z)), and f(g(z)) where it begins.

    With residual blocks for f, whatever has entered stays in d: every z has a skip connection to all that follows.

    Args:
        inlet: g, from the last dim of z (of several, one after another in that dim) to what d is.
        blocks: f.
    """

    def __init__(self, inlet: nn.Module, blocks: nn.Module):
        super().__init__()
        self.inlet, self.blocks = inlet, blocks

    def forward(self, d: Tensor | None, *z: Tensor) -> Tensor:
        entering = self.inlet(torch.cat(z, -1))
        return self.blocks(entering if d is None else d + entering)


class BatchNorm(nn.BatchNorm1d):
    """Batch norm of the last dim, over all leading dims together (Ioffe & Szegedy 2015).

    With `synchronised`, which `fit` sets in several processes, the statistics are those of all their rows.

    `nn.BatchNorm1d` reads `[K, B, D]` as K rows of B channels: it fails, or, where B happens to
    equal D, silently normalises the batch.

    Args:
        num_features: D.
        gain: whether the result is scaled by a parameter, or shifted alone.

    >>> BatchNorm(3)(torch.randn(5, 4, 3)).shape
    torch.Size([5, 4, 3])
    """

    synchronised = False

    def __init__(self, num_features: int, *, gain: bool = True):
        super().__init__(num_features)
        if not gain:
            del self.weight
            self.register_buffer("weight", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        found = self._over_processes(rows) if self.synchronised and self.training else super().forward(rows)
        return found if x.ndim == 2 else found.reshape(x.shape)

    def _over_processes(self, x: Tensor) -> Tensor:
        from torch.distributed.nn.functional import all_reduce

        x = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 does not count rows
        sums = all_reduce(torch.cat([x.new_full((1,), len(x)), x.sum(0)]))
        count, mean = sums[0].detach(), sums[1:] / sums[0].detach()
        variance = all_reduce((x - mean).square().sum(0)) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


class MLP(nn.Sequential):
    """`num_layers` times linear -> batch norm -> activation; with `num_layers=0`, the identity.

    Args:
        in_dim: size of the last dim of the input, `[..., in_dim]`.
        hidden_dim: width of every layer, and of the output `[..., hidden_dim]`; or a width for each.
        num_layers: number of hidden layers, where `hidden_dim` is one width.
        batch_norm: normalise before each activation; the linear layers then have no bias.
        activation: makes the nonlinearity. With `nn.GLU` (Dauphin et al. 2017), or a class derived from it, the linear
            layers have twice the width: one half gates the other.

    Attributes:
        out_dim: size of the last dim of the output.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int | Sequence[int],
        num_layers: int = 2,
        *,
        batch_norm: bool = True,
        activation: Callable[[], nn.Module] = nn.LeakyReLU,
    ):
        layers: list[nn.Module] = []
        for width in [hidden_dim] * num_layers if isinstance(hidden_dim, int) else hidden_dim:
            units = _units(width, activation)
            layers.append(linear(in_dim, units, bias=not batch_norm))
            layers.extend([BatchNorm(units)] if batch_norm else [])
            layers.append(activation())
            in_dim = width
        super().__init__(*layers)
        self.out_dim = in_dim


class JointMLP(nn.Module):
    """An `MLP` of several inputs side by side, whose leading dims broadcast.

    The first layer is a sum of linear maps, one of each input: what `MLP(sum(in_dims), ...)` of the concatenated
    inputs computes, but for an input without a dim the map is done once.

    Args:
        in_dims: sizes of the inputs `[..., in_dim]`.
        hidden_dim, num_layers, batch_norm, activation: as for `MLP`, with one layer at least.

    Attributes:
        out_dim: size of the last dim of the output.

    >>> JointMLP((3, 2), 8, 1)(torch.zeros(4, 3), torch.zeros(5, 1, 2)).shape
    torch.Size([5, 4, 8])
    """

    def __init__(
        self,
        in_dims: Sequence[int],
        hidden_dim: int,
        num_layers: int = 2,
        *,
        batch_norm: bool = True,
        activation: Callable[[], nn.Module] = nn.LeakyReLU,
    ):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}; several inputs need one hidden layer at least")
        units = _units(hidden_dim, activation)
        whole = linear(sum(in_dims), units)
        has_bias = [i == 0 and not batch_norm for i in range(len(in_dims))]
        self.first = nn.ModuleList(linear(d, units, bias=b) for d, b in zip(in_dims, has_bias, strict=True))
        for layer, weight in zip(self.first, whole.weight.detach().split(list(in_dims), 1), strict=True):
            layer.weight.data.copy_(weight)  # Glorot's variance is that of all inputs together
        self.norm = BatchNorm(units) if batch_norm else nn.Identity()
        self.activation = activation()
        self.rest = MLP(hidden_dim, hidden_dim, num_layers - 1, batch_norm=batch_norm, activation=activation)
        self.out_dim = hidden_dim

    def forward(self, *inputs: Tensor) -> Tensor:
        h = sum(layer(u) for layer, u in zip(self.first, inputs, strict=True))
        return self.rest(self.activation(self.norm(h)))


class Shared(nn.Module):
    """A network that two callers ask about the very same tensors: the second gets the first's answer.

    The guide of a ladder needs p(z_i | z_{i+1}) for its merge, and the model, replayed against the
    guide, needs it again at the same z_{i+1}. Computing it once halves that work, and moves
    batch-norm statistics once a step.

    The answer is handed out once, and only where it is certain to be the same: the same tensor
    objects, the same parameters at the same version, the same train/eval and gradient mode.
    Anything else is computed afresh.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self._kept: tuple | None = None

    def forward(self, *inputs: Tensor | None):
        key = self._key(inputs)
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] == key:
            return kept[2]
        out = self.net(*inputs)
        self._kept = (key, inputs, out)  # the inputs stay alive, so that no other has their identity
        return out

    def _key(self, inputs: tuple) -> tuple:
        weights = [(id(p), p._version) for p in self.net.parameters()]
        return (torch.is_grad_enabled(), self.training, *map(id, inputs), *weights)

    def __getstate__(self) -> dict:
        # A kept answer belongs to one step: copies and pickles start without it.
        return {**self.__dict__, "_kept": None}


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for as long as a block lasts; every submodule's own mode is restored afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
