"""Rows and samples in chunks that stay under a memory bound, for any structure."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from numbers import Integral
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..auto import pays
from ..compile import CompiledFunction, CompileError
from ..malloc import kept_memory
from ..traces import Ledger, evaluating, forked_noise, ledger
from .watched import watched

_SAVED = 0.33  # of the time of a chunk, by compiling (`benchmarks/results/likelihood.json`)
MEMORY = 2**28  # bytes; see `chunked`


class _MadeBytes(TorchDispatchMode):
    """Adds up the bytes of every tensor that operations make; views of their inputs are not made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.bytes += sum(t.numel() * t.element_size() for t in made if _memory(t) not in given)
        return out


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


@dataclass(frozen=True)
class Cost:
    """Bytes made by a pass over B rows with K draws each: fixed + row B + draw B K.

    Counted as if nothing were freed on the way, so a bound on the memory of the pass.
    """

    fixed: int
    row: int
    draw: int

    def __call__(self, rows: int, draws: int) -> int:
        return self.fixed + self.row * rows + self.draw * rows * draws

    def chunk(self, num_samples: int, memory: int) -> tuple[int, int]:
        """The rows and draws of a chunk of at most `memory` bytes, or of one row and one draw."""
        if self(1, num_samples) <= memory:
            return (memory - self.fixed) // (self.row + self.draw * num_samples), num_samples
        return 1, max(1, (memory - self.fixed - self.row) // self.draw)


def cost_of(structure: nn.Module, x: Tensor, y: Tensor | None) -> Cost:
    """Measured on two rows, by three passes."""
    two = x[:1].expand(2, -1), None if y is None else y[:1].expand(2, *y.shape[1:])

    def made(rows: int, draws: int) -> int:
        with _MadeBytes() as counter, forked_noise(x.device):
            ledger(structure.model, structure.guide, *args_of(*two, slice(0, rows)), num_particles=draws)
        return counter.bytes

    try:
        base = made(1, 1)
    except RuntimeError as error:
        if "shapes cannot be multiplied" not in str(error):
            raise
        raise ValueError(
            f"{type(structure).__name__} cannot take rows of {x.shape[1]}: was it made for another size? ({error})"
        ) from error
    draw = max(1, (made(1, 9) - base) // 8)
    row = max(1, made(2, 1) - base - draw)
    return Cost(max(0, base - row - draw), row, draw)


def chunked(
    structure: nn.Module,
    x: Tensor,
    y: Tensor | None,
    num_samples: int,
    read: Callable[[Ledger], Any],
    *,
    memory: int = MEMORY,
    compile: bool | Literal["auto"] = False,
) -> Iterator[tuple[slice, int, Any]]:
    """What `read` takes from `num_samples` draws for every row of `x`, as `(rows, draws, result)`, chunk by chunk.

    Evaluation mode, no gradients; a chunk takes about `memory` bytes at most. All draws of a row fall into one chunk,
    so that it is encoded once, where they fit. The chunks of a row follow each other.
    """
    if not isinstance(num_samples, Integral) or num_samples < 1:
        raise ValueError(f"num_samples is {num_samples!r}; it must be a whole number, at least 1")
    with evaluating(structure), kept_memory():
        rows_at_once, draws = cost_of(structure, x, y).chunk(num_samples, memory)
        if rows_at_once < len(x):  # chunks of one size
            rows_at_once = -(-len(x) // -(-len(x) // rows_at_once))
        step = _Chunk(structure, read, draws, compile, -(-len(x) // rows_at_once) * -(-num_samples // draws))
        starts = product(range(0, len(x), rows_at_once), range(0, num_samples, draws))
        for start, done in watched(list(starts), f"{len(x)} rows x {num_samples} samples"):
            rows = slice(start, min(start + rows_at_once, len(x)))
            count = min(draws, num_samples - done)
            yield rows, count, step(args_of(x, y, rows), count)


def chunked_ledgers(
    structure: nn.Module, x: Tensor, y: Tensor | None, num_samples: int, memory: int = MEMORY
) -> Iterator[tuple[slice, int, Ledger]]:
    """The ledgers themselves, as `(rows, draws, ledger)`."""
    return chunked(structure, x, y, num_samples, lambda sites: sites, memory=memory)


class GuideAlone(nn.Module):
    """A structure's guide with a model that samples nothing, where only q is asked for: no draw is decoded."""

    def __init__(self, structure: nn.Module):
        super().__init__()
        self.structure, self.guide = structure, structure.guide

    def model(self, *args) -> None:
        pass


class _Chunk:
    """One chunk: eagerly, and compiled once that is asked for or pays."""

    def __init__(self, structure: nn.Module, read: Callable, draws: int, compile: bool | str, left: int):
        self.structure, self.read, self.draws, self.compile, self.left = structure, read, draws, compile, left
        self.compiled: CompiledFunction | None = None
        self.seconds: list[float] = []

    def __call__(self, args: tuple[Tensor, ...], draws: int) -> Tensor:
        if self.compile and self.compiled is None and draws == self.draws:
            self._consider(args)
        self.left -= 1
        if self.compiled is not None and draws == self.draws and self.compiled.fits(args):
            return self.compiled(*args)
        started = time.perf_counter()
        found = self._eager(args, draws)
        self.seconds.append(time.perf_counter() - started)
        return found

    def _eager(self, args: tuple, draws: int) -> Tensor:
        return self.read(ledger(self.structure.model, self.structure.guide, *args, num_particles=draws))

    def _consider(self, args: tuple) -> None:
        if self.compile == "auto":
            if len(self.seconds) < 3:
                return
            total = min(self.seconds) * self.left
            self.compile = pays(_SAVED * total, total, len(list(self.structure.parameters())))[0]
            if not self.compile:
                return
        try:
            self.compiled = CompiledFunction(self.structure, lambda *args: self._eager(args, self.draws), args)
        except CompileError as error:
            warnings.warn(f"evaluating eagerly: {error}", stacklevel=2)
            self.compile = False


def args_of(x: Tensor, y: Tensor | None, rows: slice) -> tuple:
    """The arguments of model and guide for some rows."""
    return (x[rows],) if y is None else (x[rows], y[rows])


def check_rows(structure: nn.Module, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """`x` as `[N, D]` in the structure's dtype and on its device, and `y` there; or a `ValueError`."""
    if not isinstance(x, Tensor) or x.ndim != 2 or len(x) == 0:
        what = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        remedy = "flatten images to rows" if isinstance(x, Tensor) else "torch.as_tensor(array) or data.x_test is one"
        raise ValueError(f"x is {what}; expected a tensor [N, D] with N >= 1; {remedy}")
    if not x.isfinite().all():
        raise ValueError("x holds NaN or infinite values; remove or impute them first")
    if y is not None and len(y) != len(x):
        raise ValueError(f"y has {len(y)} labels for {len(x)} rows; give one a row")
    like = next((p for p in structure.parameters() if p.is_floating_point()), None)
    if like is None:
        return x if x.is_floating_point() else x.float(), y
    return x.to(like), None if y is None else y.to(like.device)
