"""Small NORB (LeCun et al. 2004) from its .mat files, which are not MATLAB's.

The format, as the data set's page gives it, little-endian: int32 magic (0x1E3D4C55 for bytes,
0x1E3D4C54 for int32), int32 number of dims, one int32 a dim but never fewer than three, then the
values, last dim fastest.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .dataset import DataError

STEMS = {"train": "smallnorb-5x46789x9x18x6x2x96x96-training", "test": "smallnorb-5x01235x9x18x6x2x96x96-testing"}
DTYPES = {0x1E3D4C55: np.dtype("u1"), 0x1E3D4C54: np.dtype("<i4")}
REDUCTION = 3  # 96x96 -> 32x32


def norb_arrays(roots: list[Path], find: Callable[..., Path]) -> dict[str, np.ndarray]:
    """`x_train`, `x_test` `[2 n, 32, 32]` in [0, 1], both cameras of each pair, and their categories."""
    arrays = {}
    for split, stem in STEMS.items():
        pairs, category = (read_mat(_file(roots, find, f"{stem}-{kind}.mat")) for kind in ("dat", "cat"))
        if pairs.ndim != 4 or pairs.shape[1] != 2 or len(pairs) != len(category):
            raise DataError(
                f"{stem}: images of shape {pairs.shape} and {len(category)} categories; expected [n, 2, 96, 96] and [n]"
            )
        arrays[f"x_{split}"] = _reduced(pairs.reshape(-1, *pairs.shape[2:]))
        arrays[f"y_{split}"] = np.repeat(category, 2)
    return arrays


def read_mat(path: Path) -> np.ndarray:
    """One array of a NORB .mat file, plain or gzipped; raises `DataError` where it is damaged."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked ({error}); download it again") from error
    magic, ndim = np.frombuffer(raw[:8].ljust(8, b"\0"), "<i4").tolist()
    dtype, stored = DTYPES.get(magic), max(3, ndim)
    if dtype is None or not 1 <= ndim <= 8 or len(raw) < 8 + 4 * stored:
        raise DataError(f"{path} does not begin like a NORB .mat file; download it again")
    shape = tuple(np.frombuffer(raw[8 : 8 + 4 * stored], "<i4")[:ndim].tolist())
    values, expected = raw[8 + 4 * stored :], int(np.prod(shape)) * dtype.itemsize
    if len(values) != expected:
        raise DataError(f"{path} holds {len(values)} bytes of values, its header says {expected}; download it again")
    return np.frombuffer(values, dtype).reshape(shape)


def _file(roots: list[Path], find: Callable[..., Path], name: str) -> Path:
    names = [f"{folder}{name}{ext}" for folder in ("", "norb/", "smallnorb/") for ext in ("", ".gz")]
    remedy = "Download small NORB from cs.nyu.edu/~ylclab/data/norb-v1.0-small."
    return find(f"Small NORB's {name}", names, roots, remedy)


def _reduced(images: np.ndarray) -> np.ndarray:
    """Means of 3x3 blocks, in [0, 1]; a thousand images at a time."""
    n, height, width = images.shape
    blocks = (height // REDUCTION, REDUCTION, width // REDUCTION, REDUCTION)
    out = np.empty((n, blocks[0], blocks[2]), np.float32)
    for i in range(0, n, 1000):
        out[i : i + 1000] = images[i : i + 1000].reshape(-1, *blocks).mean((2, 4)) / 255
    return out
