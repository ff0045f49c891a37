"""When a step is compiled, and when it stays eager."""

import math

import pytest

from pyro_lvae import VAE, Dataset, FusedAdam, SampledELBO, auto, loop
from pyro_lvae.auto import TRIAL, AutoStep, pays, saved_of_a_step
from pyro_lvae.compile import CompileError
from pyro_lvae.distributed import Processes


class Stub:
    """A step that takes a second by the clock."""

    parameters = (None,) * 8

    def __init__(self):
        self.clock, self.calls = 0.0, 0

    def __call__(self, args, beta):
        self.calls += 1
        self.clock += 1.0 if self.calls > 1 else 50.0  # the first is no measure
        return "eager", args


class Graph:
    def __init__(self, step, args, beta):
        self.args = args

    def fits(self, args):
        return args == self.args

    def __call__(self, args, beta):
        return "compiled", args


@pytest.fixture
def make(monkeypatch):
    """An `AutoStep` of stubs, what it has said, and its step."""

    def made(compile, hindrance=None, graph=Graph):
        step, said = Stub(), []
        monkeypatch.setattr(auto, "CompiledStep", graph)
        monkeypatch.setattr(auto.time, "perf_counter", lambda: step.clock)
        return AutoStep(step, compile, hindrance, lambda text, unasked=False: said.append((text, unasked))), said, step

    return made


def test_asked_for_it_compiles_at_the_first_regular_batch(make):
    run, said, _ = make(True)
    assert run("odd", {}, num_left=None)[0] == "eager"
    assert run("batch", {}, num_left=lambda seconds: 1)[0] == "compiled"
    assert run("odd", {}, num_left=None)[0] == "eager"
    assert said == [("compiled in 0 s", False)]


@pytest.mark.parametrize(("steps", "how"), [(10_000, "compiled"), (3, "eager")])
def test_auto_judges_by_the_median_of_a_few_steps(make, steps, how):
    run, said, _ = make("auto")
    given = []
    for _ in range(TRIAL):
        assert run("batch", {}, num_left=lambda seconds: given.append(seconds) or steps)[0] == "eager"
    assert not given
    assert run("batch", {}, num_left=lambda seconds: given.append(seconds) or steps)[0] == how
    assert given == [1.0]
    assert not any(unasked for _, unasked in said)
    assert f"of {steps} s" in said[0][0]
    run("batch", {}, num_left=lambda seconds: given.append(seconds) or 10**6)
    assert len(given) == 1  # it is decided once


@pytest.mark.parametrize(("compile", "unasked"), [(True, True), ("auto", False)])
def test_what_hinders_is_said_once(make, compile, unasked):
    run, said, _ = make(compile, hindrance="no way")
    for _ in range(3):
        assert run("batch", {}, num_left=lambda seconds: 10**6)[0] == "eager"
    assert said == [("training eagerly: no way", unasked)]


def test_what_cannot_be_compiled_stays_eager(make):
    def fails(*args):
        raise CompileError("no compiler")

    run, said, step = make(True, graph=fails)
    assert run("batch", {}, num_left=lambda seconds: 1)[0] == "eager"
    assert run("batch", {}, num_left=lambda seconds: 1)[0] == "eager"
    assert said == [("training eagerly: no compiler", True)]
    assert step.calls == 2


def test_without_compiling_nothing_is_asked(make):
    run, said, _ = make(False, hindrance="no way")
    assert run("batch", {}, num_left=lambda seconds: 1 / 0)[0] == "eager"
    assert not said


@pytest.fixture
def training(x):
    """A `Loop` over 35 rows in batches of 16, at its beginning."""

    def made(structure=None, **options):
        structure = VAE(12, 3, 8) if structure is None else structure
        defaults = dict(
            batch_size=16, clip_norm=None, clip_value=None, supervised=False, monitor_size=1, has_global_sites=False,
            compile=True, precision="float32", out=None, critic_optimizer=FusedAdam, critic_steps=1,
        )  # fmt: skip
        rows = Dataset("rows", x.repeat(35, 1)[:35], x[:2])
        optimizer = FusedAdam(structure.parameters())
        return loop.Loop(structure, rows, SampledELBO(), optimizer, None, {}, **defaults | options)

    return made


def test_steps_that_are_left(training):
    run = training()
    run.planned, run.step = (30, math.inf), 12
    assert run._num_left(0.5) == 18
    run.planned, run.seconds = (30, 10.0), 4.0
    assert run._num_left(0.5) == 12
    assert run._num_left(0.1) == 18


def test_batch_norm_over_several_processes_hinders(training):
    vae = VAE(12, 3, 8, batch_norm=True)
    assert training(vae, processes=Processes(0, 2)).gradient.hindrance is None
    for module in vae.modules():
        module.synchronised = True
    assert training(vae).gradient.hindrance is None
    assert "batch norm" in training(vae, processes=Processes(0, 2)).gradient.hindrance


def test_pays():
    assert pays(330.0, 1000.0, 78) == (True, "would save about 330 s of 1000 s and take about 44 s")
    worth_it, why = pays(60.0, 180.0, 78)
    assert not worth_it
    assert why == "would save about 60 s of 180 s and take about 44 s; it is done from 66 s saved on"


@pytest.mark.parametrize(("seconds", "saved"), [(0.038, 0.012), (0.075, 0.012), (0.214, 0.022), (0.494, 0.048)])
def test_what_is_expected_to_be_saved_of_a_step_was_measured(seconds, saved):
    assert saved_of_a_step(seconds) == pytest.approx(saved, rel=0.4)
