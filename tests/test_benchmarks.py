"""`python -m benchmarks`: its arithmetic, and its sub-commands in tiny settings; the figures are no matter of tests."""

import json
import sys
import time
from pathlib import Path

import pyro
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # `pytest` alone does not put the checkout there

from benchmarks.__main__ import main
from benchmarks.contenders import MODELS, Products
from benchmarks.measure import Contender, Timing, interleave, repeated, without
from benchmarks.nodes import speedups
from benchmarks.precision import ImitatedTF32, rounded
from benchmarks.tables import as_rows, ratio


def test_contenders_are_timed_in_turn_and_missing_peers_skipped(capsys):
    timings, skipped = interleave(_sleepers, steps=4, repeats=3, skip=["left"])
    assert [len(t.seconds) for t in timings.values()] == [3, 3]
    assert timings["slow"].first >= 0.1
    assert 0.2 < ratio(timings["fast, two units a call"], timings["slow"]) < 0.9
    assert "no_such_peer" in skipped["absent"]
    assert "skipped absent" in capsys.readouterr().out


def _sleepers():
    def make():
        time.sleep(0.1)
        return repeated(lambda: time.sleep(0.004))

    return {
        "slow": Contender(make),
        "fast, two units a call": Contender(make, unit=2),
        "absent": Contender(make, needs=("no_such_peer",)),
        "left out": Contender(make),
    }


def _broken():
    return {"broken": Contender(lambda: 1 / 0)}


def test_a_contender_that_fails_is_named(capfd):
    with pytest.raises(RuntimeError, match="'broken' failed"):
        interleave(_broken, steps=1, repeats=1)
    assert "ZeroDivisionError" in capfd.readouterr().err


def _placed():
    kind = torch.zeros(1).device.type

    def call():
        assert torch.zeros(1).device.type == "cpu"

    def make():
        assert torch.zeros(1).device.type == kind == "meta"
        return repeated(call)

    return {"any": Contender(make), "by its kind": Contender(make, only="meta"), "other": Contender(make, only="cpu")}


def test_contenders_are_built_on_the_device_and_called_as_users_do():
    timings, skipped = interleave(_placed, steps=1, repeats=1, device="meta")
    assert set(timings) == {"any", "by its kind"}
    assert skipped == {"other": "for cpu alone"}


def test_time_in_kernels_stands_beside_the_step():
    timings = {"a": Timing(1.0, [0.004, 0.002, 0.003], kernels=0.001)}
    assert as_rows(timings, [])["a"] == {"ms": 3.0, "ms_best": 2.0, "kernels": 1.0, "first_call_s": 1.0}


def test_a_device_that_there_is_not_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["step", "--device", "cuda:77"])
    assert "device is 'cuda:77' and cannot be used" in capsys.readouterr().err


def test_ratio_is_the_median_of_ratios():
    assert ratio(Timing(0, [2.0, 9.0, 4.0]), Timing(0, [1.0, 3.0, 4.0])) == 2.0
    assert ratio(Timing(0, [1.0]), None) is None


def test_without_leaves_out_by_word():
    assert list(without({"Pyro SVI": 1, "NumPyro, step": 2, "ours": 3}, ["numpyro"])) == ["Pyro SVI", "ours"]


def test_simulated_speedup():
    """Without a network's cost, n processes are n times faster but for what is fixed."""
    free = speedups(0.0, 1e-3, 64, 10**6, 8, float("inf"), 0.0)
    assert free == pytest.approx({"strong": 8.0, "weak": 8.0})
    assert speedups(1.0, 0.0, 64, 10**6, 8, float("inf"), 0.0)["strong"] == 1.0
    assert speedups(0.0, 1e-3, 64, 10**6, 8, 1e7, 0.0)["weak"] < 8


@pytest.mark.slow
def test_startup_is_measured_and_kept(tmp_path):
    main(["startup", "--repeats", "1", "--out", str(tmp_path)])
    assert "settings" in json.loads((tmp_path / "startup.json").read_text())


@pytest.fixture
def found(tmp_path):
    """Runs a sub-command in tiny settings, without compiling, and returns what it wrote."""

    def run(command, *options, name=None):
        main([command, "--repeats", "1", "--out", str(tmp_path), *options, "--skip", "compile", "epoch of"])
        pyro.clear_param_store()
        return json.loads((tmp_path / f"{name or command}.json").read_text())

    return run


def test_step_goes_on_without_a_peer(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "numpyro", None)
    monkeypatch.delitem(sys.modules, "benchmarks.in_numpyro", raising=False)
    vae = found("step", "--model", "vae", "--steps", "1", "--no_memory")["vae"]
    assert vae["contenders"]["pyro_lvae, eager"]["ms"] > 0
    assert vae["contenders"]["PyTorch by hand, Adam"]["ratio_to PyTorch by hand, Adam"] == 1
    assert set(vae["skipped"]) == {"NumPyro, jitted step", "NumPyro, jitted epoch"}


def test_scaling_goes_over_its_points(found):
    sweep = found("scaling", "--quick", "--sweeps", "L", name="scaling_L")
    assert list(sweep["contenders"]) == ["L=1, eager", "L=2, eager"]


def test_likelihood_is_compared_with_the_same_by_hand(found):
    vae = found("likelihood", "--model", "vae", "--images", "1", "--num_samples", "20")["vae"]
    assert set(vae["contenders"]) == {"PyTorch by hand", "pyro_lvae, eager"}


def test_products_of_a_step_are_made_again_and_nothing_else():
    """Four dense layers: one product forwards and two backwards each, but for the gradient of the data."""
    model, x = MODELS["vae"].plain(), torch.rand(8, 784)
    found = Products(lambda: model(x).backward())
    assert len(found.calls) == 11
    with Calls() as again:
        found()
    assert [name for name, _ in again.made] == [str(call.func) for call in found.calls]
    forwards = {((8, d), (d, e)) for d, e in ((784, 400), (400, 40), (20, 400), (400, 784))}
    assert {shapes for _, shapes in again.made} > forwards


def test_tf32_is_imitated_in_products():
    """As if the factors had been rounded by hand, forwards and backwards; other arithmetic is untouched."""
    x, w, b = torch.randn(8, 5), torch.randn(5, 3, requires_grad=True), torch.randn(3)
    with ImitatedTF32():
        y = torch.addmm(b, x, w)
        (found,) = torch.autograd.grad(y.exp().sum(), w)
    torch.testing.assert_close(y, b + rounded(x) @ rounded(w))
    torch.testing.assert_close(found, rounded(x).t() @ rounded(y.exp()))
    error = (rounded(x) / x - 1).abs()
    assert 2**-13 < error.max() <= 2**-11
    with ImitatedTF32():
        assert torch.equal(x.double() @ w.double(), x.double() @ w.double())


@pytest.mark.slow
def test_precision_is_measured_and_kept(tmp_path):
    few = ("--data", "digits", "--epochs", "1", "--seeds", "0", "--images", "9", "--num_samples", "9")
    main(["precision", *few, "--out", str(tmp_path)])
    runs = json.loads((tmp_path / "precision.json").read_text())["runs"]
    assert list(runs) == [f"{p}, seed 0" for p in ("float32", "tf32", "bfloat16")]
    assert -60 < runs["float32, seed 0"]["test ELBO"] < 0


class Calls(TorchDispatchMode):
    """Operations with the shapes of their matrices, in turn."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.made.append((str(operation), tuple(tuple(a.shape) for a in args if a.dim() == 2)))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "latents"), [("vae", 1), ("ladder", 5)])
def test_the_models_by_hand_are_those_of_the_library(name, latents):
    model = MODELS[name]
    ours, plain = model.ours(), model.plain()
    assert sorted(p.shape for p in ours.parameters()) == sorted(p.shape for p in plain.parameters())
    logits, terms = plain.down(plain.up(torch.ones(3, 784)))
    assert logits.shape == (3, 784)
    assert len(terms) == latents
