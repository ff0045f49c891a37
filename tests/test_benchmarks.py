"""The benchmarks' own arithmetic; their figures are no matter of tests."""

import json
import time

import pytest

from benchmarks.__main__ import main
from benchmarks.measure import Contender, Timing, interleave, ratio, repeated, without
from benchmarks.nodes import speedups


def test_contenders_are_timed_in_turn_and_missing_peers_skipped(capsys):
    contenders = {
        "slow": Contender(lambda: repeated(lambda: time.sleep(0.004))),
        "fast, two units a call": Contender(lambda: repeated(lambda: time.sleep(0.004)), unit=2),
        "absent": Contender(lambda: repeated(lambda: None), needs=("no_such_peer",)),
    }
    timings, skipped = interleave(contenders, steps=4, repeats=3)
    assert [len(t.seconds) for t in timings.values()] == [3, 3]
    assert 0.2 < ratio(timings["fast, two units a call"], timings["slow"]) < 0.9
    assert "no_such_peer" in skipped["absent"]
    assert "skipped absent" in capsys.readouterr().out


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


def test_startup_is_measured_and_kept(tmp_path):
    main(["startup", "--out", str(tmp_path)])
    assert "settings" in json.loads((tmp_path / "startup.json").read_text())
