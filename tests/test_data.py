import gzip
import pickle

import numpy as np
import pytest
import torch

from pyro_lvae import DataError, Dataset, few_labels, load
from pyro_lvae.data.norb import STEMS, read_mat


def test_digits_are_the_default():
    data = load()
    assert (data.name, data.shape, data.x_dim) == ("digits", (8, 8), 64)
    assert len(data.x_train) == 1437
    assert len(data.x_test) == len(data.y_test) == 360
    assert data.binarize
    assert set(data.x_test.unique().tolist()) == {0, 1}
    assert len(data.x_train.unique()) == 17


def test_the_test_set_is_binarised_once_from_a_fixed_seed():
    torch.manual_seed(1)
    first, rng = load("digits"), torch.get_rng_state()
    assert torch.equal(rng, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first.x_test, load("digits").x_test)


def test_batches_cover_an_epoch_and_draw_it_anew():
    data = load("digits")
    epochs = []
    for _ in range(2):
        order = data.order()
        batches = list(data.batches(100, order))
        assert [len(x) for x, _ in batches] == [100] * 14 + [37]
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.equal(y, data.y_train[order])
        assert set(x.unique().tolist()) == {0, 1}
        assert not (x * (data.x_train[order] == 0)).any(), "black stays black"
        epochs.append(x[order.argsort()])
    assert not torch.equal(*epochs)
    mean = torch.stack([torch.cat([x for x, _ in data.batches(500, torch.arange(1437))]) for _ in range(40)]).mean(0)
    # A mean of 40 Bernoulli draws strays by 6 standard errors with probability below 1e-5 over all pixels.
    assert ((mean - data.x_train).abs() <= 6 * 0.5 / 40**0.5).all()


@pytest.mark.parametrize(("rows", "size", "lengths"), [(7, 3, [3, 4]), (6, 3, [3, 3]), (8, 3, [3, 3, 2]), (1, 3, [1])])
def test_no_batch_of_one(rows, size, lengths):
    data = Dataset("rows", torch.rand(rows, 2), torch.rand(2, 2))
    assert data.num_batches(size) == len(lengths)
    assert [len(x) for x, _ in data.batches(size, data.order())] == lengths


def test_skipped_batches_are_the_first():
    data = Dataset("rows", torch.rand(10, 2), torch.rand(2, 2))
    order = data.order()
    whole = [x for x, _ in data.batches(4, order)]
    assert torch.equal(next(iter(data.batches(4, order, skip=2)))[0], whole[2])


@pytest.mark.parametrize("labels", [torch.arange(10).repeat_interleave(200), torch.arange(10).repeat(200)])
def test_rows_for_evaluation_are_spread_over_sorted_and_periodic_data(labels):
    x = torch.arange(4000.0).view(2000, 2)
    data = Dataset("ordered", x, x[:1999], labels, labels[:1999])
    for rows in (data.train_rows, data.test_rows):
        found, y = rows(200)
        assert len(found.unique(dim=0)) == 200
        assert torch.equal(y, labels[(found[:, 0] / 2).long()])
        # of a class, 20 in expectation with a standard deviation of at most 4.3: 4 standard deviations
        assert all(abs((y == c).sum() - 20) <= 17 for c in range(10))
        assert torch.equal(found, rows(200)[0])
    for count in (2000, 5000):
        assert torch.equal(data.train_rows(count)[0], x)
    assert data.train_rows(1999)[0].unique(dim=0).shape == (1999, 2)


@pytest.mark.parametrize("binarize", [False, True])
def test_rows_are_held_out_of_training_for_the_choice_of_settings(binarize):
    x = torch.arange(20).float().unsqueeze(1) / 20
    data = Dataset("own", x, (x > 0.5).float(), torch.arange(20), binarize=binarize)
    kept = data.held_out(5)
    assert sorted([*kept.y_train.tolist(), *kept.y_test.tolist()]) == list(range(20))
    torch.testing.assert_close(kept.x_train, x[kept.y_train])
    assert kept.is_binary == binarize
    assert binarize or torch.equal(kept.x_test, x[kept.y_test])
    assert torch.equal(data.held_out(5).x_test, kept.x_test)
    assert data.held_out(19).x_train.shape == (1, 1)


@pytest.mark.parametrize("count", [0, 20])
def test_as_many_rows_as_there_are_cannot_be_held_out(count):
    with pytest.raises(DataError, match="1 to 19"):
        Dataset("own", torch.rand(20, 2), torch.rand(3, 2)).held_out(count)


def test_rows_are_held_out_before_labels_are_hidden():
    x, y = torch.rand(20, 2), torch.arange(20) % 2
    data = Dataset("own", x, x[:3], y, y[:3])
    with pytest.raises(DataError, match=r"few_labels\(data.held_out\(5\), ...\)"):
        few_labels(data, 4, share=0.5).held_out(5)
    assert (few_labels(data.held_out(5), 4).y_test >= 0).all()
    with pytest.raises(DataError, match="1 to 19"):
        data.held_out(5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_checksum_is_of_every_row_and_label(dtype):
    x, y = torch.rand(30, 4).to(dtype), torch.arange(30)
    found = Dataset("a", x, x, y, y).checksum()
    assert found == Dataset("b", x.clone(), x[:3], y.clone(), y[:3]).checksum()
    other = x.clone()
    other[17, 2] += 1
    assert len({found, Dataset("c", other, x, y, y).checksum(), Dataset("d", x, x, y.flip(0), y).checksum()}) == 3


def test_own_npz(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 5), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", x_train=images[:15], x_test=images[15:], y_train=np.arange(15), y_test=np.arange(5))
    data = load(str(tmp_path / "own.npz"))
    assert (data.name, data.shape, data.binarize) == ("own", (4, 5), False)
    torch.testing.assert_close(data.x_train[3], torch.tensor(images[3].reshape(-1) / 255, dtype=torch.float32))
    assert data.y_train.tolist() == list(range(15))
    drawn = load(str(tmp_path / "own.npz"), binarize=True)
    assert drawn.binarize
    assert set(drawn.x_test.unique().tolist()) == {0, 1}


def test_own_files_are_looked_for_under_root(tmp_path, monkeypatch):
    np.savez(tmp_path / "own.npz", x_train=np.ones((3, 2)), x_test=np.ones((1, 2)))
    assert load("own.npz", tmp_path).x_dim == 2
    monkeypatch.setenv("PYRO_LVAE_DATA", str(tmp_path))
    assert load("own.npz").x_dim == 2
    with pytest.raises(DataError, match=r"The file other.npz was not found. Looked for:"):
        load("other.npz")


def test_own_npy_is_split(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 3))
    np.save(tmp_path / "own.npy", x)
    data = load(str(tmp_path / "own.npy"))
    assert (len(data.x_train), len(data.x_test), data.shape) == (27, 3, (3,))
    both = torch.cat([data.x_train, data.x_test])
    torch.testing.assert_close(both.sum(0), torch.tensor(x.sum(0), dtype=torch.float32), rtol=1e-4, atol=1e-4)
    assert torch.equal(load(str(tmp_path / "own.npy")).x_test, data.x_test)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(x_train=np.ones((3, 2))), r"holds \['x_train'\] and lacks \['x_test'\]"),
        (dict(x_train=np.ones((3, 2)), x_test=np.ones((3, 4))), r"\(3, 2\).*\(3, 4\).* same dims"),
        (dict(x_train=np.ones((3, 2)), x_test=np.full((3, 2), np.nan)), "x_test holds NaN"),
        (dict(x_train=np.ones((3, 2)), x_test=np.ones((1, 2)), y_train=np.ones(2)), "y_train has 2 labels for 3 rows"),
        (dict(x_train=np.array([["a", "b"]]), x_test=np.ones((1, 2))), "dtype <U1; expected numbers"),
        (dict(x_train=np.ones((1, 2)), x_test=np.ones((1, 2)), y_train=np.array(["a"])), "number the classes"),
        (dict(x_train=np.ones((0, 2)), x_test=np.ones((1, 2))), "N >= 1"),
    ],
)
def test_damaged_own_files_say_what_is_wrong(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load(str(tmp_path / "bad.npz"))


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    np.save(tmp_path / "bomb.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    (tmp_path / "bomb.npz").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.npy", "bomb.npz"):
        with pytest.raises(DataError, match="cannot be read"):
            load(str(tmp_path / name))


def test_binarisation_wants_grey_values(tmp_path):
    np.savez(tmp_path / "own.npz", x_train=np.full((3, 2), 7.5), x_test=np.ones((3, 2)))
    with pytest.raises(DataError, match=r"runs from 7.5 to 7.5; scale it to \[0, 1\]"):
        load(str(tmp_path / "own.npz"), binarize=True)


def test_arrays_are_taken_for_tensors():
    data = Dataset("arrays", np.ones((5, 4), "f4"), np.zeros((2, 4), "f4"), np.arange(5), np.arange(2))
    assert (data.x_train.dtype, data.y_train.dtype, data.shape) == (torch.float32, torch.int64, (4,))
    flipped = np.eye(4, dtype="f4")[:, ::-1]
    assert torch.equal(Dataset("flipped", flipped, flipped).x_test, torch.eye(4).flip(1))
    assert repr(data) == (
        "Dataset('arrays', x_train [5, 4], x_test [2, 4], y_train [5], y_test [2], shape (4,), torch.float32)"
    )


@pytest.mark.parametrize(
    ("x_train", "x_test", "message"),
    [
        ([[0.0]], torch.zeros(1, 1), "x_train is a list; expected a tensor or an array of numbers"),
        (np.array([["a"]]), torch.zeros(1, 1), "x_train is an array of <U1; expected a tensor"),
        (torch.zeros(1, 1), np.zeros((1, 1)), "x_train is torch.float32 and x_test torch.float64; give both one dtype"),
    ],
)
def test_data_of_the_wrong_kind_are_refused(x_train, x_test, message):
    with pytest.raises(DataError, match=message):
        Dataset("wrong", x_train, x_test)


def test_load_takes_no_arrays():
    with pytest.raises(DataError, match="name is a ndarray; load takes a name or a path"):
        load(np.ones((3, 2)))


def test_unknown_names_are_answered_with_the_known():
    with pytest.raises(DataError, match="no data set is called 'cifar'; known are digits, mnist"):
        load("cifar")


@pytest.mark.parametrize(
    "name", ["binarized_mnist", "omniglot", "freyfaces", "norb", "dsprites", "20newsgroups", "20newsgroups_prodlda"]
)
def test_a_missing_file_says_where_and_how(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="was not found. Looked for:") as caught:
        load(name, tmp_path)
    text = str(caught.value)
    assert str(tmp_path) in text
    assert "PYRO_LVAE_DATA" in text
    assert any(word in text for word in ("Download", "savez"))


def test_missing_mnist_says_where_and_why(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(MNIST, "mirrors", ["file:///nowhere/"])
    with pytest.raises(DataError, match="MNIST was not found") as caught:
        load("mnist", tmp_path / "data")
    assert "train-images-idx3-ubyte.gz" in str(caught.value)
    assert "file:///nowhere/" in str(caught.value)


def test_mnist_by_environment_variable_and_damage_by_checksum(data_root, tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (data_root / "MNIST" / "raw").glob("*.gz"):
        (raw / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv("PYRO_LVAE_DATA", str(tmp_path))
    assert load("mnist").y_test[:5].tolist() == [7, 2, 1, 0, 4]
    damaged = raw / "t10k-labels-idx1-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz is damaged: its MD5 is not"):
        load("mnist")


@pytest.mark.parametrize(
    ("name", "train", "test", "shape", "binarize"),
    [
        ("mnist", 60000, 10000, (28, 28), True),
        ("binarized_mnist", 50000, 10000, (28, 28), False),
        ("omniglot", 24345, 8115, (28, 28), True),
        ("freyfaces", 1765, 200, (28, 20), False),
    ],
)
def test_real_data(data_root, name, train, test, shape, binarize):
    data = load(name, data_root)
    assert (len(data.x_train), len(data.x_test), data.shape, data.binarize) == (train, test, shape, binarize)
    assert data.x_train.min() >= 0
    assert data.x_train.max() <= 1
    if name != "freyfaces":
        assert set(data.x_test.unique().tolist()) == {0, 1}


def test_dsprites_come_with_their_factors(data_root):
    """Every image is a row of the grid of factors, once; and what a factor is, the images say."""
    data = load("dsprites", data_root)
    assert (len(data.x_train), len(data.x_test), data.shape, data.binarize) == (41472, 4608, (64, 64), False)
    assert set(data.x_test.unique().tolist()) == {0, 1}
    both = torch.cat([data.y_train, data.y_test])
    assert (both.dtype, both.shape) == (torch.int64, (46080, 5))
    assert (both.amax(0) + 1).tolist() == [3, 6, 10, 16, 16]
    assert len(both.unique(dim=0)) == 46080
    ink = data.x_test.sum(1)
    scale = [ink[data.y_test[:, 1] == s].mean() for s in range(6)]
    assert scale == sorted(scale), "larger sprites have more ink"
    images = data.x_test.reshape(-1, 64, 64)
    for factor, axis in ((3, 1), (4, 2)):
        centre = (images.sum(axis) * torch.arange(64)).sum(1) / ink
        assert torch.corrcoef(torch.stack([data.y_test[:, factor].float(), centre]))[0, 1] > 0.99


def _write_norb(path, array):
    codes = {np.dtype("u1"): 0x1E3D4C55, np.dtype("i4"): 0x1E3D4C54}
    dims = [*array.shape, *[1] * max(0, 3 - array.ndim)]
    header = np.array([codes[array.dtype], array.ndim, *dims], "<i4").tobytes()
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(header + array.tobytes())


@pytest.fixture
def norb(tmp_path):
    rng = np.random.default_rng(0)
    for stem, ext in zip(STEMS.values(), ("", ".gz"), strict=True):
        _write_norb(tmp_path / f"{stem}-dat.mat{ext}", rng.integers(0, 256, (3, 2, 96, 96), dtype=np.uint8))
        _write_norb(tmp_path / f"{stem}-cat.mat{ext}", np.array([4, 0, 2], dtype=np.int32))
    return tmp_path


def test_norb_in_its_own_format(norb):
    data = load("norb", norb)
    assert (data.shape, data.x_train.shape, data.binarize) == ((32, 32), (6, 1024), False)
    assert data.y_train.tolist() == [4, 4, 0, 0, 2, 2]
    raw = read_mat(norb / f"{STEMS['train']}-dat.mat")
    expected = raw[1, 0, 3:6, 6:9].mean() / 255
    assert data.x_train[2].reshape(32, 32)[1, 2].item() == pytest.approx(expected)


def test_damaged_norb_is_refused(norb):
    path = norb / f"{STEMS['train']}-dat.mat"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="its header says 55296"):
        load("norb", norb)
    for broken in (b"MATLAB 5.0 MAT-file", b"", b"\x55\x4c\x3d\x1e"):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="does not begin like a NORB"):
            load("norb", norb)
    path.unlink()
    for broken in (gzip.compress(b"x" * 1000)[:-20], b"MATLAB 5.0 MAT-file"):
        path.with_name(path.name + ".gz").write_bytes(broken)
        with pytest.raises(DataError, match="cannot be unpacked"):
            load("norb", norb)


def test_a_grey_test_set_is_refused_where_it_must_be_binary():
    with pytest.raises(DataError, match="x_test must hold 0 and 1 alone"):
        Dataset("rows", torch.rand(5, 2), torch.rand(5, 2), binarize=True)


def test_bytes_of_one_file_are_scaled_alike(tmp_path):
    train, test = np.full((3, 2), 200, np.uint8), np.ones((2, 2), np.uint8)
    np.savez(tmp_path / "own.npz", x_train=train, x_test=test)
    data = load(str(tmp_path / "own.npz"))
    assert (data.x_train[0, 0].item(), data.x_test[0, 0].item()) == pytest.approx((200 / 255, 1 / 255))


# ------------------------------------------------------------------ documents


def _save_corpus(folder, **changed):
    """Documents "bee bee", "" and "ape cat cat cat" to train, and "cat" to test."""
    rows = dict(data=np.array([2, 1, 3], np.uint16), indices=np.array([1, 0, 2]), indptr=np.array([0, 1, 1, 3]))
    arrays = {f"train_{k}": v for k, v in rows.items()} | dict(train_label=np.array([1, 2, 20], np.uint8))
    arrays |= dict(test_data=np.array([1]), test_indices=np.array([2]), test_indptr=np.array([0, 1]))
    folder = folder / "20newsgroups" / "nvdm"
    folder.mkdir(parents=True)
    np.savez(folder / "20news_nvdm2000.npz", **(arrays | dict(test_label=np.array([3], np.uint8)) | changed))
    (folder / "vocab.new").write_text("ape 12\nbee 10\ncat 7\n")


def test_a_corpus_becomes_dense_counts_without_empty_documents(tmp_path):
    _save_corpus(tmp_path)
    data = load("20newsgroups", tmp_path)
    assert data.vocabulary == ("ape", "bee", "cat")
    assert data.x_train.tolist() == [[0, 2, 0], [1, 0, 3]]
    assert data.x_test.tolist() == [[0, 0, 1]]
    assert (data.y_train.tolist(), data.y_test.tolist()) == ([0, 19], [2])
    assert (data.shape, data.binarize, data.x_train.dtype) == ((3,), False, torch.float32)
    assert data.to("cpu").vocabulary == data.vocabulary


@pytest.mark.parametrize(
    "changed",
    [
        dict(train_indices=np.array([1, 0, 3])),
        dict(train_indptr=np.array([0, 1, 4])),
        dict(train_indptr=np.array([0, 2, 1, 3])),
        dict(test_data=np.array([1, 1])),
    ],
    ids=["unknown word", "too many", "backwards", "no column"],
)
def test_damaged_sparse_rows_are_refused(changed, tmp_path):
    _save_corpus(tmp_path, **changed)
    with pytest.raises(DataError, match="do not fit together as sparse rows"):
        load("20newsgroups", tmp_path)


def test_own_documents_bring_their_vocabulary(tmp_path):
    np.savez(tmp_path / "own.npz", x_train=np.ones((3, 2)), x_test=np.ones((1, 2)), vocabulary=np.array(["ape", "bee"]))
    assert load("own.npz", tmp_path).vocabulary == ("ape", "bee")
    np.savez(tmp_path / "own.npz", x_train=np.ones((3, 2)), x_test=np.ones((1, 2)), vocabulary=np.array(["ape"]))
    with pytest.raises(DataError, match="1 words for 2 columns"):
        load("own.npz", tmp_path)


@pytest.mark.parametrize(
    ("name", "rows", "tokens", "word"),
    [
        ("20newsgroups", [11268, 7505], [1_128_881, 720_898], ("people", 5914)),
        ("20newsgroups_prodlda", [11258, 7487], [991_493, 629_312], None),
    ],
)
def test_20newsgroups(data_root, name, rows, tokens, word):
    data = load(name, data_root)
    assert [len(data.x_train), len(data.x_test)] == rows
    assert [int(data.x_train.sum()), int(data.x_test.sum())] == tokens
    assert (data.x_train.sum(1) > 0).all()
    assert len(data.vocabulary) == len(set(data.vocabulary)) == data.x_dim
    if word is not None:  # the vocabulary file of the paper states this total beside the word
        assert data.x_train[:, data.vocabulary.index(word[0])].sum() == word[1]
        assert set(data.y_train.tolist()) == set(range(20))


def test_is_binary():
    grey, binary = torch.rand(5, 4), (torch.rand(5, 4) > 0.5).float()
    assert Dataset("drawn anew", grey, binary, binarize=True).is_binary
    assert Dataset("drawn once", binary, binary).is_binary
    assert not Dataset("grey", grey, binary).is_binary
    assert not Dataset("grey", binary, grey).is_binary
