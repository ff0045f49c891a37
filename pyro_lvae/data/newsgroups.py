"""20 Newsgroups as bags of words: counts in sparse rows, and the vocabulary in a file beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from .dataset import DataError

PARTS = ("data", "indices", "indptr")
KEYS = tuple(f"{split}_{part}" for split in ("train", "test") for part in PARTS)


def corpus_arrays(
    roots: list[Path], find: Callable[..., Path], read: Callable[..., dict], name: str, vocabulary: str
) -> dict[str, np.ndarray]:
    """`x_train`, `x_test`: dense counts `[N, V]`; `y_train`, `y_test` where there are labels; and `vocabulary` `[V]`.

    Documents without a word are left out: they hold nothing to be modelled, and have no perplexity.

    Args:
        name: an .npz with the counts (`_data`) of each split, their columns (`_indices`) and where each document
            begins (`_indptr`), and its labels, numbered from 1, if there are any (`_label`).
        vocabulary: a text file beside it with one word a line, in the order of the columns; what follows a space is
            not read.
    """
    what = f"20 Newsgroups ({Path(name).name})"
    remedy = (
        f"Save the counts as sparse rows, numpy.savez(..., {', '.join(f'{key}=' for key in KEYS)}), and the words, one "
        f"a line, in {vocabulary} beside them."
    )
    path = find(what, [f"20newsgroups/{name}", name], roots, remedy)
    lines = find(f"The vocabulary of {what}", [vocabulary], [path.parent], remedy).read_text(encoding="utf-8")
    words = np.array([line.split()[0] for line in lines.splitlines() if line.strip()])
    arrays, found = read(path, KEYS), {"vocabulary": words}
    for split in ("train", "test"):
        x = _dense(*(arrays[f"{split}_{part}"] for part in PARTS), len(words), str(path))
        is_kept = x.any(1)
        found[f"x_{split}"] = x[is_kept]
        if (labels := arrays.get(f"{split}_label")) is not None:
            found[f"y_{split}"] = labels[is_kept].astype(np.int64) - 1
    return found


def _dense(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, num_words: int, name: str) -> np.ndarray:
    lengths, last = np.diff(indptr.astype(np.int64)), indices.max(initial=0)
    fits = len(indptr) and indptr[0] == 0 and indptr[-1] == len(data) == len(indices) and (lengths >= 0).all()
    if not fits or last >= num_words:
        raise DataError(
            f"{name}: {len(data)} counts, columns up to {last}, {len(lengths)} documents and {num_words} words do not "
            "fit together as sparse rows; get the files again"
        )
    x = np.zeros((len(lengths), num_words), np.float32)
    x[np.repeat(np.arange(len(lengths)), lengths), indices] = data
    return x
