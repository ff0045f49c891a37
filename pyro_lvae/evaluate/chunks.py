"""Rows and samples in chunks that stay under a memory bound, for any structure."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..traces import Ledger, evaluating, ledger

MEMORY = 2**29  # bytes; see `chunked_ledgers`


class _OutputBytes(TorchDispatchMode):
    """Adds up the bytes of every tensor that operations make."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else (out,)
        self.bytes += sum(t.numel() * t.element_size() for t in made if isinstance(t, Tensor))
        return out


def bytes_per_draw(structure: nn.Module, x: Tensor, y: Tensor | None) -> int:
    """Bytes that one draw for one row makes, as if nothing were freed on the way: an upper bound."""
    draws = 8
    with _OutputBytes() as made, torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        ledger(structure.model, structure.guide, *args_of(x[:1], y, slice(0, 1)), num_particles=draws)
    return -(-made.bytes // draws)


def chunked_ledgers(
    structure: nn.Module, x: Tensor, y: Tensor | None, num_samples: int, memory: int = MEMORY
) -> Iterator[tuple[slice, int, Ledger]]:
    """`num_samples` draws for every row of `x`, as `(rows, draws, ledger)` of at most `memory` bytes each.

    Evaluation mode, no gradients. The chunks of a row follow each other.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; at least 1 is needed")
    with evaluating(structure):
        pairs = max(1, memory // bytes_per_draw(structure, x, y))
        draws = min(num_samples, pairs)
        rows_at_once = max(1, pairs // draws)
        for start in range(0, len(x), rows_at_once):
            rows = slice(start, min(start + rows_at_once, len(x)))
            for done in range(0, num_samples, draws):
                count = min(draws, num_samples - done)
                args = args_of(x, y, rows)
                yield rows, count, ledger(structure.model, structure.guide, *args, num_particles=count)


def args_of(x: Tensor, y: Tensor | None, rows: slice) -> tuple:
    """The arguments of model and guide for some rows."""
    return (x[rows],) if y is None else (x[rows], y[rows])


def check_rows(structure: nn.Module, x: Tensor) -> Tensor:
    """`x` as `[N, D]` on the structure's device, or a `ValueError`."""
    if not isinstance(x, Tensor) or x.ndim != 2 or len(x) == 0:
        what = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(f"x is {what}; expected a tensor [N, D] with N >= 1; flatten images to rows")
    parameter = next(structure.parameters(), x)
    return x.to(device=parameter.device)
