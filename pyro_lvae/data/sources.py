"""load(name): the data sets known by name, and the user's own .npz and .npy files."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from .dataset import DataError, Dataset, binarized
from .newsgroups import corpus_arrays
from .norb import norb_arrays

ENVIRONMENT = "PYRO_LVAE_DATA"
SPLIT_SEED = 0  # for data that comes without a split of its own


def load(name: str = "digits", root: str | os.PathLike | None = None, *, binarize: bool | None = None) -> Dataset:
    """Load a data set by name, or a file of your own.

    Args:
        name: one of `DATASETS`, or the path of a file, from the current folder or `root`. An `.npz`
            holds `x_train`, `x_test` and optionally `y_train`, `y_test`, `vocabulary`; an `.npy` is one array
            `[N, ...]`, of which a tenth (at random, fixed seed) becomes the test set. Bytes are
            scaled to [0, 1].
        root: folder to look in; else the environment variable PYRO_LVAE_DATA, else the user's
            cache folder. MNIST alone is downloaded when it is in none of them.
        binarize: draw every training batch as Bernoulli(x) anew; the test set is drawn once, from
            a fixed seed. `None` is the custom for the data set: grey digits and characters yes,
            everything else no.

    Raises:
        DataError: the file is missing or damaged: what was looked for, where, and how to get it.

    >>> load("digits").shape
    (8, 8)
    """
    if not isinstance(name, str | os.PathLike):
        raise DataError(f"name is a {type(name).__name__}; load takes a name or a path, Dataset(name, x, x) takes data")
    if name in DATASETS:
        arrays, custom = DATASETS[name](_roots(root))
    elif Path(name).suffix in (".npz", ".npy"):
        arrays, custom = _own_file(Path(name), _roots(root)), False
    else:
        raise DataError(
            f"no data set is called {name!r}; known are {', '.join(DATASETS)}, or give the path of an .npz or .npy"
        )
    return _dataset(Path(name).stem, arrays, custom if binarize is None else binarize)


def _dataset(name: str, arrays: dict[str, np.ndarray], binarize: bool) -> Dataset:
    for key in ("x_train", "x_test"):
        if arrays[key].ndim < 2 or arrays[key].shape[1:] != arrays["x_train"].shape[1:]:
            shapes = {k: arrays[k].shape for k in ("x_train", "x_test")}
            raise DataError(f"{name}: {shapes}; expected [N, ...] and [M, ...] with the same dims after the first")
    shape = _image_shape(arrays["x_train"].shape[1:])
    in_bytes = all(arrays[k].dtype == np.uint8 for k in ("x_train", "x_test"))
    scale = 255 if in_bytes and max(arrays[k].max(initial=0) for k in ("x_train", "x_test")) > 1 else 1
    rows = {k: _rows(f"{name}: {k}", v, scale) for k, v in arrays.items() if k[0] == "x"}
    labels = {k: _labels(f"{name}: {k}", v) for k, v in arrays.items() if k[0] == "y"}
    words = tuple(arrays["vocabulary"].tolist()) if "vocabulary" in arrays else None
    data = Dataset(name, **rows, **labels, shape=shape, vocabulary=words)
    return replace(data, x_test=binarized(data.x_test), binarize=True) if binarize else data


def _image_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(s for s in shape if s != 1) or (1,)


def _rows(name: str, x: np.ndarray, scale: float) -> torch.Tensor:
    """Float32 rows; bytes that are not just 0 and 1 are grey values, scaled to [0, 1]."""
    if x.dtype.kind not in "fiub":
        raise DataError(f"{name} has dtype {x.dtype}; expected numbers")
    return torch.from_numpy(np.array(x.reshape(len(x), math.prod(x.shape[1:])), dtype=np.float32)).div_(scale)


def _labels(name: str, y: np.ndarray) -> torch.Tensor:
    if y.dtype.kind not in "fiub":
        raise DataError(f"{name} has dtype {y.dtype}; number the classes")
    return torch.from_numpy(y.astype(np.int64) if y.dtype.kind in "iu" else y)


def _split(x: np.ndarray, num_test: int, y: np.ndarray | None = None) -> dict[str, np.ndarray]:
    order = np.random.default_rng(SPLIT_SEED).permutation(len(x))
    train, test = order[num_test:], order[:num_test]
    labels = {} if y is None else {"y_train": y[train], "y_test": y[test]}
    return {"x_train": x[train], "x_test": x[test], **labels}


# ------------------------------------------------------------------ finding and reading files


def _roots(root: str | os.PathLike | None) -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pyro_lvae"
    named = [root] if root is not None else [os.environ[ENVIRONMENT]] if ENVIRONMENT in os.environ else []
    return [*map(Path, named), cache]


def _find(what: str, names: list[str], roots: list[Path], remedy: str) -> Path:
    places = [folder / name for folder in roots for name in names]
    for place in places:
        if place.exists():
            return place
    raise _missing(what, places, remedy)


def _missing(what: str, places: list[Path], remedy: str) -> DataError:
    looked = "".join(f"\n  {place}" for place in places)
    folder = f"Name its folder with root= (--root) or {ENVIRONMENT}."
    return DataError(f"{what} was not found. Looked for:{looked}\n{remedy}\n{folder}")


def _arrays(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of an .npz; nothing in it is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:
        raise DataError(f"{path} cannot be read as an .npz of arrays ({error}); save it with numpy.savez") from error
    if absent := [key for key in keys if key not in arrays]:
        raise DataError(f"{path} holds {sorted(arrays)} and lacks {absent}; save it with those names")
    return arrays


def _own_file(path: Path, roots: list[Path]) -> dict[str, np.ndarray]:
    path = _find(f"The file {path.name}", [str(path)], [Path.cwd(), *roots], "Check the path.")
    if path.suffix == ".npz":
        arrays = _arrays(path, ("x_train", "x_test"))
        return {k: arrays[k] for k in ("x_train", "x_test", "y_train", "y_test", "vocabulary") if k in arrays}
    try:
        x = np.load(path, allow_pickle=False)
    except Exception as error:
        raise DataError(f"{path} cannot be read as an .npy of numbers ({error}); save it with numpy.save") from error
    if x.ndim < 2 or len(x) < 2:
        raise DataError(f"{path} holds an array of shape {x.shape}; expected [N, ...] with N >= 2")
    return _split(x, max(1, len(x) // 10))


# ------------------------------------------------------------------ the data sets by name


def _digits(roots: list[Path]) -> tuple[dict, bool]:
    """8x8 digits that come with scikit-learn: 1,437 train, 360 test (fixed split), drawn as Bernoulli."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return _split((bunch.images / 16).astype(np.float32), 360, bunch.target), True


def _mnist(roots: list[Path]) -> tuple[dict, bool]:
    """28x28 digits: 60,000 train, 10,000 test, drawn as Bernoulli (downloaded if absent)."""
    from torchvision.datasets import MNIST

    for root in roots:
        raw = root / "MNIST" / "raw"
        plain, packed = ([raw / f"{Path(n).stem}{ext}" for n, _ in MNIST.resources] for ext in ("", ".gz"))
        if all(p.exists() for p in plain):
            return _mnist_arrays(MNIST, root), True
        if all(p.exists() for p in packed):
            return _mnist_packed(MNIST, packed), True
    try:
        MNIST(roots[0], download=True)
    except Exception as error:
        places = [root / "MNIST" / "raw" / name for root in roots for name, _ in MNIST.resources]
        remedy = f"Downloading from {', '.join(MNIST.mirrors)} into {roots[0]} failed: {error}."
        raise _missing("MNIST", places, remedy) from error
    return _mnist_arrays(MNIST, roots[0]), True


def _mnist_packed(MNIST, files: list[Path]) -> dict[str, np.ndarray]:
    """From the .gz files, unpacked beside nothing of the user's: their folder may be read-only."""
    from torchvision.datasets.utils import check_integrity, extract_archive

    for file, (_, md5) in zip(files, MNIST.resources, strict=True):
        if not check_integrity(file, md5):
            raise DataError(f"{file} is damaged: its MD5 is not {md5}; delete it and download it again")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "MNIST", "raw")
        raw.mkdir(parents=True)
        for file in files:
            extract_archive(str(file), str(raw))
        return _mnist_arrays(MNIST, folder)


def _mnist_arrays(MNIST, root) -> dict[str, np.ndarray]:
    try:
        train, test = MNIST(root, train=True), MNIST(root, train=False)
    except Exception as error:
        raise DataError(f"MNIST under {root} is damaged ({error}); delete it and download it again") from error
    arrays = {"x_train": train.data, "y_train": train.targets, "x_test": test.data, "y_test": test.targets}
    return {k: v.numpy() for k, v in arrays.items()}


def _binarized_mnist(roots: list[Path]) -> tuple[dict, bool]:
    """28x28 digits binarised once and for all by Larochelle: 50,000 train, 10,000 test; no labels."""
    path = _find(
        "Statically binarised MNIST",
        ["binarized_mnist/binarized_mnist.npz", "binarized_mnist.npz"],
        roots,
        "Make it from binarized_mnist_train.amat and _test.amat of Larochelle's page "
        "(www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist): numpy.savez(..., train=, test=), 0/1 bytes.",
    )
    arrays = _arrays(path, ("train", "test"))
    return {"x_train": arrays["train"].reshape(-1, 28, 28), "x_test": arrays["test"].reshape(-1, 28, 28)}, False


def _omniglot(roots: list[Path]) -> tuple[dict, bool]:
    """28x28 characters of 50 alphabets (the labels), drawn as Bernoulli."""
    path = _find(
        "OMNIGLOT at 28x28",
        ["omniglot/omniglot28_derived.npz", "omniglot28_derived.npz", "omniglot.npz"],
        roots,
        "Reduce the drawings of github.com/brendenlake/omniglot to 28x28, ink bright: "
        "numpy.savez(..., train=, test=, train_alphabet=, test_alphabet=), bytes.",
    )
    arrays = _arrays(path, ("train", "test"))
    labels = {f"y_{k}": arrays[f"{k}_alphabet"] for k in ("train", "test") if f"{k}_alphabet" in arrays}
    return {"x_train": arrays["train"], "x_test": arrays["test"], **labels}, True


def _freyfaces(roots: list[Path]) -> tuple[dict, bool]:
    """28x20 grey frames of a face: 1,765 train, 200 test (fixed split), in [0, 1]; wants a Normal likelihood."""
    path = _find(
        "Frey Face",
        ["freyfaces/freyfaces.npz", "freyfaces.npz"],
        roots,
        "Save the 1965 frames (28x20 bytes; cs.nyu.edu/~roweis/data.html) with numpy.savez(..., images=).",
    )
    return _split(_arrays(path, ("images",))["images"], 200), False


def _norb(roots: list[Path]) -> tuple[dict, bool]:
    """32x32 grey toys, both cameras: 48,600 train, 48,600 test, in [0, 1]; wants a Normal likelihood."""
    return norb_arrays(roots, _find), False


def _dsprites(roots: list[Path]) -> tuple[dict, bool]:
    """64x64 binary sprites: 41,472 train, 4,608 test (fixed split); labels are shape, scale, orientation, x, y."""
    path = _find(
        "dSprites",
        ["dsprites/dsprites_grid46080.npz", "dsprites_grid46080.npz"],
        roots,
        "From dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz of github.com/google-deepmind/dsprites-dataset take "
        "orientations 0, 4 ... 36 and positions 0, 2 ... 30: numpy.savez(..., imgs=, latents_classes=), five classes "
        "each, numbered from 0 in steps of 1.",
    )
    arrays = _arrays(path, ("imgs", "latents_classes"))
    return _split(arrays["imgs"], 4608, arrays["latents_classes"]), False


def _newsgroups(roots: list[Path]) -> tuple[dict, bool]:
    """Counts of 2,000 words in 11,268 train and 7,505 test posts of 20 groups (Miao et al. 2016); wants BagOfWords."""
    return corpus_arrays(roots, _find, _arrays, "nvdm/20news_nvdm2000.npz", "vocab.new"), False


def _newsgroups_prodlda(roots: list[Path]) -> tuple[dict, bool]:
    """Counts of 1,995 words in 11,258 train and 7,487 test posts (Srivastava & Sutton 2017); wants BagOfWords."""
    return corpus_arrays(roots, _find, _arrays, "prodlda/20news_prodlda1995.npz", "vocab.txt"), False


DATASETS: dict[str, Callable[[list[Path]], tuple[dict, bool]]] = {
    "digits": _digits,
    "mnist": _mnist,
    "binarized_mnist": _binarized_mnist,
    "omniglot": _omniglot,
    "freyfaces": _freyfaces,
    "norb": _norb,
    "dsprites": _dsprites,
    "20newsgroups": _newsgroups,
    "20newsgroups_prodlda": _newsgroups_prodlda,
}
