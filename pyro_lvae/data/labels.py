"""Data sets of which most labels are hidden."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from .dataset import DataError, Dataset


def check_labels(data: Dataset) -> None:
    """Raise `DataError` where train or test data have no labels."""
    if data.y_train is None or data.y_test is None:
        raise DataError(
            f"{data.name} has no labels for both train and test, and the structure takes them (or supervised=True asks "
            "for them); give y_train and y_test, or take a structure without labels"
        )


def few_labels(data: Dataset, count: int, *, seed: int = 0, share: float = 0.0) -> Dataset:
    """The same data with `count` training labels, as many of each class; the others are -1.

    Args:
        data: with integer labels `[N]`.
        count: labels that stay, a multiple of the number of classes.
        seed: of which rows keep theirs.
        share: rows with a label are repeated until they are at least this share of the training rows; 0 repeats none.
            Rare labels make for noisy steps.

    Raises:
        DataError: there are no such labels, or too few of a class.

    >>> from pyro_lvae import load
    >>> (few_labels(load("digits"), 100).y_train >= 0).sum()
    tensor(100)
    """
    y = data.y_train
    if y is None or y.ndim != 1 or y.is_floating_point():
        raise DataError(f"{data.name} has no integer labels [N] of its training rows, of which some could be hidden")
    if not 0 <= share < 1:
        raise DataError(f"share is {share}; expected 0 <= share < 1")
    classes = y[y >= 0].unique()
    if len(classes) == 0:
        raise DataError(f"all labels of {data.name} are hidden already")
    each, rest = divmod(count, len(classes))
    if rest or each < 1:
        raise DataError(f"count is {count}, and there are {len(classes)} classes; give a multiple of that")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    kept = [order[y[order] == c][:each] for c in classes]
    if short := [int(c) for c, rows in zip(classes, kept, strict=True) if len(rows) < each]:
        raise DataError(f"class(es) {short} have fewer than {each} rows; give a smaller count")
    rows = torch.cat(kept)
    labels = torch.full_like(y, -1)
    labels[rows] = y[rows]
    times = max(0, math.ceil((share * len(y) - count) / (count * (1 - share))))
    more = rows.repeat(times)
    return replace(data, x_train=torch.cat([data.x_train, data.x_train[more]]), y_train=torch.cat([labels, y[more]]))
