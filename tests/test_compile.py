"""The compiled step: the eager step's losses, weights and statistics, to float rounding."""

import copy
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import nn

import pyro_lvae.auto
import pyro_lvae.compile
from pyro_lvae import (
    CIWAE,
    GECO,
    IWAE,
    MIWAE,
    PIWAE,
    RWS,
    STL,
    TVO,
    VAE,
    AnalyticELBO,
    BayesianWeights,
    BetaELBO,
    Callback,
    ConstrainedELBO,
    Dataset,
    DReG,
    FreeBits,
    KLBalanced,
    LadderVAE,
    Renyi,
    SampledELBO,
    fit,
    ledger,
    linear,
    log_likelihood,
    predictive_log_likelihood,
)
from pyro_lvae.compile import CompiledStep, CompileError, _Replayed
from pyro_lvae.optim import FusedAdam
from pyro_lvae.step import Step, matmul_precision
from pyro_lvae.traces import evaluating, forked_noise

ESTIMATORS = {
    "SampledELBO": SampledELBO,
    "AnalyticELBO": AnalyticELBO,
    "IWAE": partial(IWAE, 3),
    "Renyi": partial(Renyi, 0.5, 3),
    "CIWAE": partial(CIWAE, 0.5, 3),
    "MIWAE": partial(MIWAE, 2, 2),
    "PIWAE": partial(PIWAE, 2, 2),
    "STL": STL,
    "DReG": partial(DReG, 3),
    "DReG-prior": partial(DReG, 3, prior=True),
    "RWS": partial(RWS, 3),
    "TVO": partial(TVO, 3),
    "BetaELBO": BetaELBO,
    "FreeBits": FreeBits,
    "KLBalanced": KLBalanced,
    "ConstrainedELBO": partial(ConstrainedELBO, 2.0),
    "GECO": partial(GECO, 5.0),
}


@pytest.fixture
def traced_only(monkeypatch):
    """Runs the traced graph as it is: what is checked then is the tracing, without a minute of C++ compilation.

    Its kernels are the eager ones, since Adam's first steps magnify rounding a million times, where a gradient is zero
    but for it; `test_kernels.py` has one step of every structure with the others.
    """
    import torch._inductor

    monkeypatch.setattr(pyro_lvae.compile, "decompositions", lambda device: {})
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options=None: graph)


def pair(structure, x, steps: int, compiled: bool, estimator, **options):
    """Losses of `steps` steps with beta rising, and what they leave behind."""
    structure, estimator = copy.deepcopy(structure), copy.deepcopy(estimator)
    names = latents(structure, x)
    optimizer, step = (
        FusedAdam([p for p in structure.parameters() if p.requires_grad]),
        Step(structure, estimator, **options),
    )
    torch.manual_seed(1)
    step = CompiledStep(step, (x,), dict.fromkeys(names, 0.5)) if compiled else step
    losses = []
    for i in range(steps):
        loss, norm = step((x,), dict.fromkeys(names, (i + 1) / steps))
        optimizer.step()
        losses.append(torch.stack([loss, norm]))
    return torch.stack(losses), structure, estimator


def latents(structure, x):
    """Names of the latent sites."""
    with evaluating(structure), forked_noise(x.device):
        return list(ledger(structure.model, structure.guide, x).latents)


def check_equal(structure, x, estimator, steps, **options):
    eager, structure_1, estimator_1 = pair(structure, x, steps, False, estimator, **options)
    compiled, structure_2, estimator_2 = pair(structure, x, steps, True, estimator, **options)
    torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-9)
    for name, value in structure_1.state_dict().items():
        torch.testing.assert_close(structure_2.state_dict()[name], value, rtol=1e-7, atol=1e-9)
    for name, value in estimator_1.state_dict().items():
        torch.testing.assert_close(estimator_2.state_dict()[name], value)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_traced_step_of_every_estimator(name, x, traced_only):
    structure = LadderVAE(12, (5, 3), (8, 8), num_hidden=1).double()
    check_equal(structure, x.double(), ESTIMATORS[name](), 10)


def test_traced_step_of_every_structure(structure, x, traced_only):
    check_equal(structure.double(), x.double(), SampledELBO(), 10, clip_norm=2.0, clip_value=0.5)


def test_traced_step_of_resampled_particles(x, traced_only):
    structure = LadderVAE(12, (5, 3), (8, 8), num_hidden=1).double()
    check_equal(structure, x.double(), DReG(6, prior=True, resampled=2), 10)


class WeightedVAE(VAE):
    """With one global site, whose log-density counts once."""

    def model(self, x, y=None):
        pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        return super().model(x)

    def guide(self, x, y=None):
        pyro.sample("w", dist.Normal(self.decoder[0].bias.sum(), 1.0))
        super().guide(x)


def test_traced_step_with_global_site(x, traced_only):
    check_equal(WeightedVAE(12, 3, 8, batch_norm=False).double(), x.double(), IWAE(3), 20, size=100)


def test_frozen_parameters_stay(x, traced_only):
    vae = VAE(12, 3, 8).double()
    vae.decoder.requires_grad_(False)
    check_equal(vae, x.double(), SampledELBO(), 5)


needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


@needs_compiler
def test_compiled_and_eager_losses_agree_over_100_steps(x):
    check_equal(VAE(12, 3, 8).double(), x.double(), SampledELBO(), 100, clip_norm=5.0)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["SampledELBO", "IWAE", "DReG", "GECO"])
def test_compiled_ladder_agrees_over_100_steps(name, x):
    structure = LadderVAE(12, (5, 3), (16, 8)).double()
    check_equal(structure, x.double(), ESTIMATORS[name](), 100)


class Said(Callback):
    def __init__(self):
        self.messages = []

    def on_message(self, message):
        self.messages.append(message)


@needs_compiler
@pytest.mark.parametrize(
    "make",
    [lambda: VAE(12, 3, 8), lambda: BayesianWeights(VAE(12, 3, 8), noise="local_reparameterization")],
    ids=["VAE", "VAE-bayesian"],
)
def test_fit_compiles_and_the_smaller_last_batch_works(make, tiny):
    runs = []
    for compile in (True, False):
        torch.manual_seed(0)
        said = Said()
        options = dict(batch_size=16, epochs=3, beta=linear(0, 1, steps=5), compile=compile, callbacks=[said])
        runs.append([m.objective for m in fit(make(), tiny, **options)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)
    assert not said.messages


def test_auto_leaves_a_short_run_alone(tiny):
    said = Said()
    fit(VAE(12, 3, 8), tiny, batch_size=5, epochs=2, callbacks=[said])
    assert len(said.messages) == 1
    assert "training eagerly" in said.messages[0]


def test_auto_compiles_what_pays(tiny, monkeypatch, traced_only):
    monkeypatch.setattr(pyro_lvae.auto, "pays", lambda *args: (True, "pays"))
    said = Said()
    fit(VAE(12, 3, 8), tiny, batch_size=5, epochs=2, callbacks=[said])
    assert said.messages[0] == "compiling the training step pays"
    assert said.messages[1].startswith("compiled in")


class Wilful(VAE):
    """Its control flow depends on a value."""

    def guide(self, x, y=None):
        if x.sum() > -1:
            super().guide(x)


def test_value_dependent_control_flow_trains_eagerly_and_says_so(tiny):
    said = Said()
    history = fit(Wilful(12, 3, 8), tiny, epochs=1, batch_size=16, compile=True, callbacks=[said])
    assert len(history) == 1
    assert "cannot be traced" in said.messages[0]
    assert "control" not in said.messages[0].split(":")[0]


def test_who_asked_for_compiling_and_watches_nothing_is_warned(tiny):
    with pytest.warns(UserWarning, match="training eagerly: .* cannot be traced"):
        fit(Wilful(12, 3, 8), tiny, epochs=1, batch_size=16, compile=True, callbacks=())
    fit(Wilful(12, 3, 8), tiny, epochs=1, batch_size=5, callbacks=())  # nobody asked, nobody is told


@pytest.mark.parametrize("estimator", [Trace_ELBO(), RenyiELBO(num_particles=2)])
def test_estimators_that_wait_train_eagerly(tiny, estimator):
    said = Said()
    fit(VAE(12, 3, 8), tiny, estimator, epochs=1, batch_size=16, compile=True, callbacks=[said])
    assert "training eagerly" in said.messages[0]
    assert type(estimator).__name__ in said.messages[0]


def test_no_compiler_trains_eagerly_and_says_so(tmp_path):
    code = """
import torch
from pyro_lvae import VAE, Callback, Dataset, fit
class Said(Callback):
    def on_message(self, message): print(message)
x = torch.ones(40, 12)
print(len(fit(VAE(12, 3, 8), Dataset("ones", x, x), epochs=1, batch_size=10, compile=True, callbacks=[Said()])))
"""
    env = {**os.environ, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PATH": "/nowhere"}
    done = subprocess.run([sys.executable, "-c", code], env=env, timeout=300, capture_output=True, text=True)
    assert "compiler" in done.stdout, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "1"


def test_other_shapes_do_not_fit(x, traced_only):
    step = CompiledStep(Step(VAE(12, 3, 8), SampledELBO()), (x,), {"z1": 1.0})
    assert step.fits((x,))
    assert not step.fits((x[:3],))
    step.step.structure.eval()
    assert not step.fits((x,))


def test_another_share_of_the_batch_does_not_fit(x, traced_only):
    """With several processes the loss is that of a part of the batch, and what part it is stands in the graph."""
    eager = Step(VAE(12, 3, 8), SampledELBO())
    eager.share = 0.5
    step = CompiledStep(eager, (x,), {"z1": 1.0})
    assert step.fits((x,))
    eager.share = 0.6
    assert not step.fits((x,))


def test_tracing_draws_no_noise_and_leaves_everything_as_it_was(x, traced_only):
    vae, estimator = VAE(12, 3, 8), GECO(5.0)
    before, noise = copy.deepcopy(vae.state_dict()), torch.get_rng_state()
    CompiledStep(Step(vae, estimator), (x,), {"z1": 1.0})
    assert torch.equal(torch.get_rng_state(), noise)
    assert all(torch.equal(v, before[n]) for n, v in vae.state_dict().items())
    assert all(isinstance(p, nn.Parameter) for p in vae.parameters())
    assert estimator.multiplier == 1.0
    assert all(p.grad is None for p in vae.parameters())


def test_a_batch_of_other_modes_is_refused_by_name(x):
    with pytest.raises(CompileError, match="differentiable_loss"):
        CompiledStep(Step(VAE(12, 3, 8), RenyiELBO(num_particles=2)), (x,), {"z1": 1.0})


def test_a_failed_capture_is_told_and_leaves_everything_as_it_was(monkeypatch):
    def failing(compiled, inputs):
        inputs[0].add_(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("pyro_lvae.compile._captured", failing)
    monkeypatch.setattr("torch.cuda.device", lambda device: nullcontext())
    statistics = torch.zeros(3)
    with pytest.raises(CompileError, match="cannot become a CUDA graph: operation not permitted"):
        _Replayed(None, [statistics, torch.ones(1)], 1)
    assert (statistics == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", [AnalyticELBO(), IWAE(4), DReG(4), GECO(6.0)])
def test_cuda_graph_agrees_with_eager(estimator):
    """A replay draws what the same step draws eagerly: losses, weights, statistics and multipliers agree."""
    x = (torch.rand(32, 12, device="cuda") > 0.5).double()
    check_equal(LadderVAE(12, (5, 3), (16, 8)).double().cuda(), x, estimator, 20)


@pytest.mark.gpu
def test_a_replay_waits_for_no_value():
    x = (torch.rand(32, 12, device="cuda") > 0.5).float()
    step = CompiledStep(Step(VAE(12, 3, 8).cuda(), SampledELBO()), (x,), {"z1": 0.5})
    step((x,), {"z1": 0.6})
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = step((x,), {"z1": 0.7})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.gpu
def test_fit_on_cuda():
    rows = (torch.rand(200, 12) > 0.5).float()
    data = Dataset("rows", rows[:150], rows[150:])
    history = fit(
        LadderVAE(12, (5, 3), (16, 8)), data, epochs=5, batch_size=32, device="cuda", compile=True, callbacks=()
    )
    assert history[-1].objective > history[0].objective


def test_compiled_evaluation_is_the_eager_one(x, traced_only):
    """In chunks of equal size and a smaller last one, from the same noise."""
    vae, rows = VAE(12, 3, 8).double(), x.double().repeat(3, 1)
    found = []
    for compile in (False, True):
        torch.manual_seed(2)
        found.append(log_likelihood(vae, rows, 50, memory=300_000, compile=compile))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)


def test_compiled_evaluation_of_several_draws_is_the_eager_one(x, traced_only):
    draws, rows = [VAE(12, 3, 8).double() for _ in range(2)], x.double()
    found = []
    for compile in (False, True):
        torch.manual_seed(2)
        found.append(predictive_log_likelihood(draws, rows, 50, compile=compile).log_likelihoods)
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)


def test_evaluation_that_cannot_be_compiled_warns_and_goes_on(x):
    with pytest.warns(UserWarning, match="evaluating eagerly: Wilful cannot be traced"):
        assert log_likelihood(Wilful(12, 3, 8), x, 10, compile=True).isfinite().all()


@pytest.mark.parametrize("compile", [False, True])
def test_bfloat16_trains_to_nearly_the_same_bound(tiny, traced_only, compile):
    """Weights and evaluation stay float32; the bounds differ by less than 2 %."""
    found = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        vae = VAE(12, 3, 8)
        options = dict(batch_size=15, epochs=20, callbacks=(), compile=compile)
        found.append(fit(vae, tiny, precision=precision, **options)[-1].train_elbo)
        assert all(p.dtype == torch.float32 for p in vae.parameters())
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.02)


@pytest.mark.parametrize("estimator", [IWAE(4), STL(2), DReG(4), DReG(4, prior=True), RWS(4), PIWAE(2, 2)])
def test_gradients_in_bfloat16_are_nearly_those_in_float32(x, estimator):
    """Estimators that set a draw's gradient need draws of one precision; the products' rounding stays small."""
    torch.manual_seed(0)
    ladder, found = LadderVAE(12, (5, 3), (16, 8)), []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(1)
        Step(ladder, estimator, precision=precision)((x,), {})
        found.append(nn.utils.parameters_to_vector(p.grad for p in ladder.parameters()))
    assert 0 < (found[1] - found[0]).norm() < 0.3 * found[0].norm()


def test_tf32_is_set_while_training_alone(tiny, monkeypatch):
    seen = []

    class Watch(Callback):
        def on_batch(self, epoch, batch):
            seen.append(torch.get_float32_matmul_precision())

    before = torch.get_float32_matmul_precision()
    fit(VAE(12, 3, 8), tiny, epochs=1, precision="tf32", callbacks=[Watch()])
    assert set(seen) == {"high"}
    assert torch.get_float32_matmul_precision() == before


def test_tf32_where_torch_was_told_by_its_newer_names():
    """After which it refuses to tell by the older what it does."""
    cuda, other = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = cuda.fp32_precision, other.fp32_precision
    cuda.fp32_precision, other.fp32_precision = "ieee", "tf32"
    try:
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        with matmul_precision("tf32"):
            assert cuda.fp32_precision == "tf32"
        assert cuda.fp32_precision == "ieee"
    finally:
        cuda.fp32_precision, other.fp32_precision = before


def test_torchs_own_settings_of_tf32_are_left_alone(tiny):
    """Where they were set by torch's newer names, it refuses to tell them by the older."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        fit(VAE(12, 3, 8), tiny, epochs=1, callbacks=())
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_unknown_settings_are_refused(tiny):
    for options, message in (({"precision": "half"}, "precision is 'half'"), ({"compile": "on"}, "compile is 'on'")):
        with pytest.raises(ValueError, match=message):
            fit(VAE(12, 3, 8), tiny, **options)
