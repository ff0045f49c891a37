"""What training and evaluation see of data: whole tensors, batches cut on the device."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

TEST_SEED = 0  # the test set is binarised once, with this seed


class DataError(ValueError):
    """Data that is missing, damaged or of the wrong form; says what was looked for and the remedy."""


@dataclass(frozen=True)
class Dataset:
    """Train and test data, flattened to rows.

    Arrays are taken for tensors; `x_train` and `x_test` must have one dtype.

    Attributes:
        name: what it is called in tables and file names.
        x_train: `[N, D]` float; grey values in [0, 1] when `binarize` is set.
        x_test: `[M, D]` float, ready for evaluation (binarised, where `binarize` is set).
        y_train, y_test: class labels `[N]`, `[M]`, or factors of variation `[N, F]`, `[M, F]`, or `None`.
        shape: shape of one datum, `(height, width)` for images; its product is D.
        binarize: every training batch is drawn as Bernoulli(x) anew, so each epoch sees other
            binary images of the same grey values (dynamic binarisation).
        vocabulary: the words that the columns count, where the data are documents.
    """

    name: str
    x_train: Tensor
    x_test: Tensor
    y_train: Tensor | None = None
    y_test: Tensor | None = None
    shape: tuple[int, ...] = ()
    binarize: bool = False
    vocabulary: tuple[str, ...] | None = None

    def __post_init__(self):
        for name in ("x_train", "x_test", "y_train", "y_test"):
            object.__setattr__(self, name, _as_tensor(f"{self.name}: {name}", getattr(self, name)))
        if not self.shape:
            object.__setattr__(self, "shape", tuple(self.x_train.shape[1:]))
        for name, x in (("x_train", self.x_train), ("x_test", self.x_test)):
            _check_rows(f"{self.name}: {name}", x, self.shape)
        if self.x_train.dtype != self.x_test.dtype:
            raise DataError(
                f"{self.name}: x_train is {self.x_train.dtype} and x_test {self.x_test.dtype}; give both one dtype"
            )
        for name, y, x in (("y_train", self.y_train, self.x_train), ("y_test", self.y_test, self.x_test)):
            if y is not None and len(y) != len(x):
                raise DataError(f"{self.name}: {name} has {len(y)} labels for {len(x)} rows; give one a row")
        if self.vocabulary is not None and len(self.vocabulary) != self.x_dim:
            raise DataError(f"{self.name}: {len(self.vocabulary)} words for {self.x_dim} columns; give one a column")
        if self.binarize:
            self._check_binary()

    def __repr__(self) -> str:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        sizes = ", ".join(f"{name} {list(value.shape)}" for name, value in tensors.items())
        drawn = ", drawn anew as binary in every batch" if self.binarize else ""
        return f"Dataset({self.name!r}, {sizes}, shape {self.shape}, {self.x_train.dtype}{drawn})"

    def _check_binary(self) -> None:
        _check_grey(self.x_train)
        if not self.is_binary:
            raise DataError(f"{self.name}: with binarize, x_test must hold 0 and 1 alone; draw it once beforehand")

    @property
    def is_binary(self) -> bool:
        """Whether batches and test rows hold 0 and 1 alone, as a Bernoulli likelihood wants them."""
        train = self.x_test if self.binarize else self.x_train
        return all(bool(((x == 0) | (x == 1)).all()) for x in (train, self.x_test))

    @property
    def x_dim(self) -> int:
        """D, the size of one row."""
        return self.x_train.shape[1]

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)})

    def num_batches(self, batch_size: int) -> int:
        """Batches an epoch; a last batch of a single row joins the one before it."""
        n = len(self.x_train)
        return max(1, -(-n // batch_size) - (n % batch_size == 1))

    def checksum(self) -> str:
        """Of the training rows and their labels: whether a resumed run has the data that it had."""
        found = 0
        for values in (self.x_train, self.y_train):
            if values is not None:
                found = zlib.crc32(values.cpu().contiguous().view(torch.uint8).numpy(), found)
        return f"{found:08x}"

    def order(self) -> Tensor:
        """A random order of the training rows, from torch's default generator of their device."""
        return torch.randperm(len(self.x_train), device=self.x_train.device)

    def batches(self, batch_size: int, order: Tensor, skip: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """One epoch of `(x, y)` in the given order, from batch number `skip` on, binarised anew.

        A batch of one row would leave batch norm without a variance: a last single row joins the
        batch before.
        """
        count = self.num_batches(batch_size)
        for i in range(skip, count):
            rows = order[i * batch_size : (i + 1) * batch_size if i < count - 1 else None]
            x = self.x_train[rows]
            # a comparison draws Bernoulli(x) in half the time of torch.bernoulli
            yield (
                (torch.rand_like(x) < x).to(x.dtype) if self.binarize else x,
                None if self.y_train is None else self.y_train[rows],
            )

    def train_rows(self, count: int) -> tuple[Tensor, Tensor | None]:
        """`count` training rows spread evenly (data may be sorted), or all; binarised like the test set."""
        rows = _spread(len(self.x_train), count)
        x = self.x_train[rows]
        return binarized(x) if self.binarize else x, None if self.y_train is None else self.y_train[rows]

    def held_out(self, count: int) -> Dataset:
        """For choosing settings: `count` training rows, drawn from a fixed seed, in place of the test rows.

        They are left out of training, and drawn as binary once where batches are drawn anew.

        Labels are hidden afterwards, `few_labels(data.held_out(1000), 100)`, which repeats some rows.

        Raises:
            DataError: no row would be held out, or none left to train on; or labels are hidden already.
        """
        total = len(self.x_train)
        if not isinstance(count, Integral) or not 1 <= count < total:
            raise DataError(f"{self.name}: {count} rows cannot be held out of {total}; give 1 to {total - 1}")
        if self.y_train is not None and not self.y_train.is_floating_point() and (self.y_train < 0).any():
            raise DataError(
                f"{self.name} has hidden labels, -1, and perhaps rows that were repeated; hold rows out first: "
                f"few_labels(data.held_out({count}), ...)"
            )
        order = torch.randperm(total, generator=torch.Generator().manual_seed(TEST_SEED))
        held, rest = (rows.sort().values.to(self.x_train.device) for rows in (order[:count], order[count:]))
        x = self.x_train[held]
        y = dict(y_train=None, y_test=None)
        if self.y_train is not None:
            y = dict(y_train=self.y_train[rest], y_test=self.y_train[held])
        return replace(self, x_train=self.x_train[rest], x_test=binarized(x) if self.binarize else x, **y)

    def test_rows(self, count: int) -> tuple[Tensor, Tensor | None]:
        """`count` test rows spread evenly (data may be sorted), or all, and their labels."""
        rows = _spread(len(self.x_test), count)
        return self.x_test[rows], None if self.y_test is None else self.y_test[rows]


def _spread(total: int, count: int) -> slice | Tensor:
    """One row, drawn from a fixed seed, of each of `count` stretches: neither sorted nor periodic data deceive it."""
    if count >= total:
        return slice(None)
    edges = torch.arange(count + 1) * total // count
    within = torch.rand(count, dtype=torch.double, generator=torch.Generator().manual_seed(TEST_SEED))
    return edges[:-1] + (within * edges.diff()).long()


def binarized(x: Tensor) -> Tensor:
    """One draw of Bernoulli(x) from a fixed seed, the same on every device."""
    _check_grey(x)
    return torch.bernoulli(x.cpu(), generator=torch.Generator().manual_seed(TEST_SEED)).to(x.device)


def _as_tensor(name: str, value) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        what = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        raise DataError(f"{name} is {what}; expected a tensor or an array of numbers")
    return torch.as_tensor(np.ascontiguousarray(value))  # a flipped array has strides that torch does not take


def _check_grey(x: Tensor) -> None:
    low, high = x.min().item(), x.max().item()
    if low < 0 or high > 1:
        raise DataError(
            f"binarisation draws Bernoulli(x), and x runs from {low:g} to {high:g}; scale it to [0, 1], or use "
            "binarize=False"
        )


def _check_rows(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    size = torch.Size(shape).numel()
    if x.ndim != 2 or x.shape[1] != size or len(x) == 0 or not x.is_floating_point():
        raise DataError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)}; expected floating-point rows [N, {size}] with N >= 1"
        )
    if not torch.isfinite(x).all():
        raise DataError(f"{name} holds NaN or infinite values; remove or impute them first")
