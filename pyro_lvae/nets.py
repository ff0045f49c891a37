"""Tensor -> Tensor: the deterministic networks, which take any number of leading dims.

A particle plate turns a latent sample from `[B, z]` into `[K, B, z]`. Linear layers broadcast by
themselves; batch norm does not, so the version here flattens the leading dims and restores them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def linear(in_dim: int, out_dim: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer with Glorot-normal weights and zero bias (Glorot & Bengio 2010)."""
    layer = nn.Linear(in_dim, out_dim, bias=bias)
    nn.init.xavier_normal_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


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
        rows = x.reshape(-1, x.shape[-1])
        found = self._over_processes(rows) if self.synchronised and self.training else super().forward(rows)
        return found.reshape(x.shape)

    def _over_processes(self, x: Tensor) -> Tensor:
        from torch.distributed.nn.functional import all_reduce

        sums = all_reduce(torch.cat([x.new_tensor([len(x)]), x.sum(0)]))
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
        activation: makes the nonlinearity.

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
            layers.append(linear(in_dim, width, bias=not batch_norm))
            layers.extend([BatchNorm(width)] if batch_norm else [])
            layers.append(activation())
            in_dim = width
        super().__init__(*layers)
        self.out_dim = in_dim


class Shared(nn.Module):
    """A network that two callers ask about the very same tensor: the second gets the first's answer.

    The guide of a ladder needs p(z_i | z_{i+1}) for its merge, and the model, replayed against the
    guide, needs it again at the same z_{i+1}. Computing it once halves that work, and moves
    batch-norm statistics once a step.

    The answer is handed out once, and only where it is certain to be the same: the same tensor
    object, the same parameters at the same version, the same train/eval and gradient mode.
    Anything else is computed afresh.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self._kept: tuple | None = None

    def forward(self, x: Tensor):
        key = self._key(x)
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] is x and kept[1] == key:
            return kept[2]
        out = self.net(x)
        self._kept = (x, key, out)
        return out

    def _key(self, x: Tensor) -> tuple:
        weights = [(id(p), p._version) for p in self.net.parameters()]
        return (torch.is_grad_enabled(), self.training, *weights)

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
