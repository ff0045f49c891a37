import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import replace
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import STRUCTURES
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

from pyro_lvae import (
    IWAE,
    VAE,
    Callback,
    CheckpointError,
    ConstrainedELBO,
    ContractError,
    DataError,
    Dataset,
    HierarchicalVAE,
    KLBalanced,
    LadderVAE,
    NonFiniteLoss,
    cyclical,
    fit,
    linear,
    load,
    load_checkpoint,
    load_weights,
)
from pyro_lvae.conditionals import Normal
from pyro_lvae.results import read_metrics
from pyro_lvae.traces import evaluating, fixed_noise, ledger

QUIET = dict(callbacks=())


def ladder():
    torch.manual_seed(0)
    return LadderVAE(12, (5, 3, 2), (16, 8, 8))


class StopAfter(Callback):
    """Asks for a stop, as Ctrl-C would, after so many batches."""

    def __init__(self, batches):
        self.left = batches

    def on_batch(self, epoch, batch):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


class Watch(Callback):
    def __init__(self):
        self.seen = []

    def on_start(self, epoch, epochs, num_batches):
        self.seen.append(("start", epoch, epochs, num_batches))

    def on_epoch(self, metrics):
        self.seen.append(metrics)

    def on_end(self):
        self.seen.append("end")


def test_training_improves_the_elbo_and_reports_it():
    data, watch = load("digits"), Watch()
    structure = LadderVAE(64, (8, 4), (64, 32))
    history = fit(structure, data, epochs=6, callbacks=[watch])
    assert history[-1].test_elbo > history[0].test_elbo + 3
    assert watch.seen == [("start", 0, 6, 12), *history, "end"]
    last = history[-1]
    assert (last.epoch, last.step, set(last.kl), set(last.beta.values())) == (6, 72, {"z1", "z2"}, {1.0})
    assert last.objective == pytest.approx(last.train_elbo, abs=3)
    assert structure.training
    assert len(pyro.get_param_store()) == 0


def test_structures_of_every_kind_train(structure, tiny):
    history = fit(structure, tiny, epochs=2, batch_size=16, beta=linear(0, 1, epochs=1), **QUIET)
    assert len(history) == 2


@pytest.mark.parametrize(
    "estimator",
    [Trace_ELBO(), TraceMeanField_ELBO(), IWAE(3), RenyiELBO(num_particles=3, vectorize_particles=True)],
    ids=lambda e: type(e).__name__,
)
def test_estimators_train_and_are_not_changed(estimator, tiny):
    before = dict(vars(estimator))
    fit(ladder(), tiny, estimator, epochs=1, batch_size=16, **QUIET)
    assert vars(estimator) == before


def test_the_objective_is_annealed_and_the_elbo_is_not(tiny):
    structure = LadderVAE(12, (5, 3, 2), (16, 8, 8), batch_norm=False)
    (m,) = fit(structure, tiny, beta=0.0, epochs=1, batch_size=45, optimizer=partial(torch.optim.SGD, lr=0.0), **QUIET)
    assert m.objective > m.train_elbo + 0.5 * sum(m.kl.values())
    assert set(m.beta.values()) == {0.0}


def test_beta_by_site_and_by_step(tiny):
    beta = {"z1": linear(0, 1, steps=5), "z3": 0.5}
    history = fit(ladder(), tiny, beta=beta, epochs=2, batch_size=15, **QUIET)
    assert [m.beta for m in history] == [{"z3": 0.5, "z2": 1.0, "z1": 0.6}, {"z3": 0.5, "z2": 1.0, "z1": 1.0}]


def test_learning_rate_schedule_and_clipping(tiny):
    norms = []

    class Watched(torch.optim.SGD):
        def step(self):
            grads = [p.grad for g in self.param_groups for p in g["params"]]
            norms.append((torch.stack([g.norm() for g in grads]).norm(), max(g.abs().max() for g in grads)))
            super().step()

    options = dict(clip_norm=0.5, clip_value=0.05, epochs=3, batch_size=45)
    optimizer, decay = partial(Watched, lr=0.1), partial(ExponentialLR, gamma=0.5)
    history = fit(ladder(), tiny, optimizer=optimizer, lr_scheduler=decay, **options, **QUIET)
    assert [m.lr for m in history] == [0.1, 0.05, 0.025]
    assert all(norm <= 0.5 + 1e-6 and largest <= 0.05 + 1e-6 for norm, largest in norms)
    assert any(largest > 0.049 for _, largest in norms)


def test_global_sites_count_once(tiny):
    """N rows of which each batch is a part: the gradient of the global site's KL is that of one epoch, over N."""

    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loc, self.z = torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.zeros(()))

        def model(self, x, y=None):
            w = pyro.sample("w", dist.Normal(x.new_zeros(()), 0.1))
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z1", dist.Normal(x.new_zeros(12), 1e-3).to_event(1))
                pyro.sample("x", dist.Normal(w + z, 1.0).to_event(1), obs=x)

        def guide(self, x, y=None):
            pyro.sample("w", dist.Normal(self.loc, 0.001))
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z1", dist.Normal(self.z.expand(12), 1e-3).to_event(1))

    for estimator in (Trace_ELBO(), IWAE(2)):
        structure = Mean()
        optimizer = partial(torch.optim.Adam, lr=0.003)
        history = fit(structure, tiny, estimator, epochs=150, batch_size=15, optimizer=optimizer, **QUIET)
        x = tiny.x_train
        exact = x.sum() / (x.numel() + 1 / 0.1**2)  # the conjugate posterior mean of w
        assert structure.loc.item() == pytest.approx(exact.item(), abs=0.03)
        # Counted once per batch of 15, the prior would pull three times as hard.
        wrong = x.sum() / (x.numel() + 3 / 0.1**2)
        assert abs(exact - wrong) > 0.06
        # The global site's KL is part of the objective and of the ELBO alike; their noise is some 0.1 nats.
        assert history[-1].train_elbo == pytest.approx(history[-1].objective, abs=1)

    with pytest.raises(ValueError, match=r"RenyiELBO weighs whole batches.*'w' lies; use pyro_lvae.IWAE"):
        fit(Mean(), tiny, RenyiELBO(), **QUIET)


def test_without_global_sites_their_kl_is_zero_and_has_no_sign(tiny):
    assert str(fit(ladder(), tiny, epochs=1, **QUIET)[-1].global_kl) == "0.0"


# ---------------------------------------------------------------------- refusals and warnings


def test_a_warning_when_training_ends_before_warm_up_does(tiny):
    with pytest.warns(UserWarning, match=r"only after 5 epochs, and training ends after 2 epochs \(6 steps\): "):
        fit(ladder(), tiny, epochs=2, batch_size=16, beta=linear(0, 1, epochs=5), **QUIET)
    with pytest.warns(UserWarning, match="only after 2 epochs"):  # the second has 0.5
        fit(ladder(), tiny, epochs=2, batch_size=16, beta=linear(0, 1, epochs=2), **QUIET)
    with pytest.warns(UserWarning, match="9 steps"):
        fit(ladder(), tiny, epochs=2, batch_size=16, beta={"z2": cyclical(steps=9)}, **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(ladder(), tiny, epochs=2, batch_size=16, beta=linear(0, 1, epochs=1), **QUIET)


def test_mean_field_on_a_bottom_up_guide_is_refused(tiny):
    structure = HierarchicalVAE(12, (5, 3), (16, 8))
    with pytest.raises(ValueError, match=r"the guide samples 'z1', 'z2' and the model 'z2', 'z1'.*not be a bound"):
        fit(structure, tiny, TraceMeanField_ELBO(), **QUIET)


def test_mean_field_on_a_delta_guide_is_refused(tiny):
    class Point(HierarchicalVAE):
        def guide(self, x, y=None):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z1", dist.Delta(self.bottom_up[0](x).mean, event_dim=1))

    with pytest.raises(ValueError, match=r"drops the log-density of a Delta, and 'z1' has one"):
        fit(Point(12, (3,), (8,)), tiny, TraceMeanField_ELBO(), **QUIET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(epochs=0), "epochs is 0"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(beta=-1.0), "beta is -1"),
        (dict(beta={"z7": 1.0}), r"beta names \['z7'\]; the latent sites are \['z3', 'z2', 'z1'\]"),
        (dict(resume=True), "give out="),
    ],
)
def test_bad_arguments_are_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        fit(ladder(), tiny, **{**QUIET, **options})


def test_bad_data_and_structures_are_refused_before_training(tiny, tmp_path):
    with pytest.raises(DataError, match="data is a Tensor; expected a Dataset"):
        fit(ladder(), tiny.x_train, **QUIET)
    with pytest.raises(DataError, match="has no labels"):
        fit(ladder(), Dataset("x", tiny.x_train, tiny.x_test, tiny.y_train), supervised=True, **QUIET)
    with pytest.raises(ContractError):
        fit(LadderVAE(64), tiny, out=tmp_path, **QUIET)
    assert not list(tmp_path.iterdir())


def test_an_existing_run_is_not_overwritten(tiny, tmp_path):
    fit(ladder(), tiny, epochs=1, out=tmp_path, **QUIET)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(FileExistsError, match="already holds a run"):
        fit(ladder(), tiny, epochs=1, out=tmp_path, **QUIET)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_nan_loss_stops_the_run_and_says_where(tiny, tmp_path):
    structure = ladder()

    class PoisonNextEpoch(Callback):
        def on_batch(self, epoch, batch):
            if (epoch, batch) == (2, 0):
                with torch.no_grad():
                    structure.likelihood.logits.weight.fill_(float("nan"))

    with pytest.raises(NonFiniteLoss) as caught:
        fit(structure, tiny, epochs=5, batch_size=15, out=tmp_path, callbacks=[PoisonNextEpoch()])
    text = str(caught.value)
    assert "the loss is nan" in text
    assert "in step 8 (epoch 3)" in text
    assert "log_p of 'x'" in text
    assert f"{tmp_path / 'checkpoint.pt'}, of step 6" in text
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["epoch"] == 2
    assert all(torch.isfinite(v).all() for v in state["structure"].values())


def test_a_nan_gradient_of_a_finite_loss_is_caught_before_the_step(tiny, tmp_path):
    structure, batches = ladder(), []

    def poison(grad):
        batches.append(1)
        return grad * float("nan") if len(batches) == 6 else grad

    structure.likelihood.logits.bias.register_hook(poison)
    with pytest.raises(NonFiniteLoss, match="the gradient's norm nan in step 6") as caught:
        fit(structure, tiny, epochs=5, batch_size=15, out=tmp_path, **QUIET)
    assert "of step 3" in str(caught.value)
    assert all(torch.isfinite(p).all() for p in structure.parameters())


def test_an_enumerated_model_is_refused_by_estimators_that_would_not_sum(tiny):
    from test_enumeration import Mixture

    data = Dataset("rows", torch.randn(20, 4).double(), torch.randn(5, 4).double())
    for estimator in (Trace_ELBO(), TraceMeanField_ELBO()):
        with pytest.raises(ValueError, match="the model enumerates 'c' and .* would draw from the prior"):
            fit(Mixture(), data, estimator, **QUIET)
    enum = TraceEnum_ELBO(max_plate_nesting=1)
    with pytest.raises(ValueError, match="beta anneals .* use beta=1"):
        fit(Mixture(), data, enum, beta=linear(0, 1, epochs=2), **QUIET)
    (enumerated,) = fit(Mixture(), data, enum, epochs=1, **QUIET)
    ours, _ = fit(Mixture(), data, IWAE(1), beta=linear(0, 1, epochs=1), epochs=2, **QUIET)
    assert set(enumerated.kl) == set(ours.kl) == {"c", "z1"}


def test_plate_nesting_as_a_command_line_gives_it(tiny):
    fit(ladder(), tiny, TraceEnum_ELBO(max_plate_nesting=1.0, strict_enumeration_warning=False), epochs=1, **QUIET)


@pytest.mark.parametrize("estimator", ["IWAE", IWAE])
def test_an_estimator_is_an_instance(tiny, estimator):
    with pytest.raises(ValueError, match="expected an instance of a pyro.infer.ELBO"):
        fit(ladder(), tiny, estimator, **QUIET)


def test_batches_of_one_row_and_batch_norm_are_refused(tiny):
    with pytest.raises(ValueError, match="batches of one row"):
        fit(ladder(), tiny, batch_size=1, **QUIET)
    fit(LadderVAE(12, (5, 3), (16, 8), batch_norm=False), tiny, batch_size=1, epochs=1, **QUIET)


def test_what_is_no_module_is_refused_with_the_contracts_words(tiny):
    with pytest.raises(ContractError, match="a structure is an nn.Module, this is a str"):
        fit("ladder", tiny, **QUIET)


# ---------------------------------------------------------------------- stopping and going on

RUN = dict(epochs=6, batch_size=16, beta=linear(0, 1, epochs=4), lr_scheduler=partial(ExponentialLR, gamma=0.9))


def _weights(structure):
    return structure.state_dict()


def _same(first, second):
    return first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


def _timeless(history):
    return [{k: v for k, v in vars(m).items() if k not in ("seconds", "images_per_second")} for m in history]


@pytest.mark.parametrize(("batches", "average"), [(1, None), (5, None), (6, 0.9), (7, 0.9), (17, None)])
def test_ctrl_c_leaves_a_checkpoint_that_goes_on_bit_for_bit(tiny, tmp_path, batches, average):
    tiny = load("digits") if batches == 17 else tiny
    make = (lambda: (torch.manual_seed(0), LadderVAE(64, (4,), (8,)))[1]) if batches == 17 else ladder
    whole, run = make(), RUN | dict(average=average)
    history = fit(whole, tiny, **run, **QUIET)
    stopped, handler = make(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {batches}"):
        fit(stopped, tiny, **run, out=tmp_path, callbacks=[StopAfter(batches)])
    assert signal.getsignal(signal.SIGINT) is handler
    torch.manual_seed(12345)  # whatever the new process does before
    resumed = LadderVAE(64, (4,), (8,)) if batches == 17 else LadderVAE(12, (5, 3, 2), (16, 8, 8))
    again = fit(resumed, tiny, **run, out=tmp_path, resume=True, **QUIET)
    assert _same(_weights(whole), _weights(resumed))
    assert _timeless(history) == _timeless(again) == _timeless(read_metrics(tmp_path / "metrics.jsonl"))


SCRIPT = """
    import sys, time, torch
    from pyro_lvae import Callback, Dataset, LadderVAE, fit, linear

    class Slow(Callback):
        def on_batch(self, epoch, batch):
            time.sleep(0.1 if "--slow" in sys.argv else 0)

    torch.manual_seed(0)
    x = (torch.rand(60, 12) > 0.5).float()
    data = Dataset("tiny", x[:45], x[45:])
    structure = LadderVAE(12, (5, 3, 2), (16, 8, 8))
    fit(structure, data, epochs=8, batch_size=15, beta=linear(0, 1, epochs=4), out=sys.argv[1],
        resume="--resume" in sys.argv, callbacks=[Slow()])
"""


def _script(folder, *flags, **options):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), *flags], **options)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    assert _script(tmp_path / "whole").wait(timeout=120) == 0
    killed = _script(tmp_path / "killed", "--slow")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(read_metrics(metrics)) < 3:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert 3 <= len(read_metrics(metrics)) < 8
    assert _script(tmp_path / "killed", "--resume").wait(timeout=120) == 0
    whole, resumed = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "killed"))
    assert _same(whole["structure"], resumed["structure"])
    assert torch.equal(whole["rng"]["cpu"], resumed["rng"]["cpu"])
    for ours, theirs in zip(whole["optimizer"]["state"].values(), resumed["optimizer"]["state"].values(), strict=True):
        assert _same(ours, theirs)
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")]
    assert _timeless(lines[0]) == _timeless(lines[1])


def test_an_average_of_the_weights_is_what_is_left_and_measured(tiny, tmp_path):
    plain, averaged = ladder(), ladder()
    torch.manual_seed(1)
    fit(plain, tiny, epochs=4, batch_size=16, **QUIET)
    torch.manual_seed(1)
    history = fit(averaged, tiny, epochs=4, batch_size=16, average=0.99, out=tmp_path, **QUIET)
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt")
    assert _same(checkpoint["trained"], _weights(plain))
    assert _same(checkpoint["structure"], _weights(averaged))
    assert not _same(_weights(plain), _weights(averaged))
    x, _ = tiny.test_rows(1000)
    with evaluating(averaged), fixed_noise(x.device):
        measured = ledger(averaged.model, averaged.guide, x).local_log_weight().mean().item()
    assert measured == pytest.approx(history[-1].test_elbo, abs=1e-5)
    with pytest.raises(ValueError, match="average was 0.99 and is None"):
        fit(averaged, tiny, epochs=5, batch_size=16, out=tmp_path, resume=True, **QUIET)
    before = {name: value.clone() for name, value in _weights(averaged).items()}
    fit(averaged, tiny, epochs=4, batch_size=16, average=0.99, out=tmp_path, resume=True, **QUIET)
    assert _same(before, _weights(averaged))


def test_more_epochs_after_the_end(tiny, tmp_path):
    whole, twice = ladder(), ladder()
    torch.manual_seed(1)
    fit(whole, tiny, epochs=4, batch_size=16, **QUIET)
    torch.manual_seed(1)
    fit(twice, tiny, epochs=2, batch_size=16, out=tmp_path, **QUIET)
    history = fit(twice, tiny, epochs=4, batch_size=16, out=tmp_path, resume=True, **QUIET)
    assert [m.epoch for m in history] == [1, 2, 3, 4]
    assert _same(_weights(whole), _weights(twice))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(optimizer=partial(torch.optim.Adam, lr=1e-5)), r"optimizer was 'FusedAdam' and is 'Adam'; lr was 0.001"),
        (dict(rows=20), "rows was 45 and is 20"),
    ],
)
def test_a_run_is_not_resumed_with_other_data_or_another_optimiser(tiny, tmp_path, change, message):
    fit(ladder(), tiny, epochs=1, batch_size=16, out=tmp_path, **QUIET)
    rows = change.pop("rows", 45)
    data, structure = Dataset("rows", tiny.x_train[:rows], tiny.x_test), ladder()
    before = {k: v.clone() for k, v in structure.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit(structure, data, epochs=2, batch_size=16, out=tmp_path, resume=True, **change, **QUIET)
    assert _same(before, structure.state_dict())


def test_batches_change_between_epochs_only(tiny, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(ladder(), tiny, epochs=2, batch_size=16, out=tmp_path, callbacks=[StopAfter(2)])
    with pytest.raises(ValueError, match="batch_size was 16 and is 10"):
        fit(ladder(), tiny, epochs=2, batch_size=10, out=tmp_path, resume=True, **QUIET)
    fit(ladder(), tiny, epochs=2, batch_size=16, out=tmp_path, resume=True, **QUIET)
    assert fit(ladder(), tiny, epochs=3, batch_size=10, out=tmp_path, resume=True, **QUIET)[-1].step == 11


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VAE(12, 3, 8, likelihood=Normal), r"p\(x\) was 'Bernoulli' and is 'Normal'"),
        (lambda: VAE(12, 3, 8, activation=nn.Tanh), r"module decoder.2 was 'LeakyReLU' and is 'Tanh'"),
        (lambda: STRUCTURES["LadderVAE"](), r"structure was 'VAE' and is 'LadderVAE'"),
    ],
)
def test_another_structure_is_not_trained_on(make, message, tiny, tmp_path):
    fit(VAE(12, 3, 8), tiny, epochs=1, out=tmp_path, **QUIET)
    with pytest.raises(CheckpointError, match=message):
        fit(make(), tiny, epochs=2, out=tmp_path, resume=True, **QUIET)
    moved = replace(tiny, x_train=tiny.x_train.flip(0)), replace(tiny, y_train=torch.arange(len(tiny.x_train)))
    for data in moved:
        with pytest.raises(CheckpointError, match="checksum of the training data was '[0-9a-f]{8}' and is"):
            fit(VAE(12, 3, 8), data, epochs=2, out=tmp_path, resume=True, **QUIET)
    assert len(fit(VAE(12, 3, 8), tiny, epochs=2, out=tmp_path, resume=True, **QUIET)) == 2


def test_a_checkpoint_that_names_no_modules_is_gone_on_with(tiny, tmp_path):
    """As those written before they did."""
    fit(VAE(12, 3, 8), tiny, epochs=1, out=tmp_path, **QUIET)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    del state["identity"]
    torch.save(state, tmp_path / "checkpoint.pt")
    assert len(fit(VAE(12, 3, 8), tiny, epochs=2, out=tmp_path, resume=True, **QUIET)) == 2


@pytest.mark.parametrize("device", ["gpu", "cuda:77"])
def test_a_device_that_there_is_not_is_named(device, tiny):
    with pytest.raises(ValueError, match=f"device is '{device}' and cannot be used: .*; give 'cpu', or leave it out"):
        fit(VAE(12, 3, 8), tiny, epochs=1, device=device, **QUIET)


def test_balancing_that_would_never_begin_is_warned_of(tiny):
    with pytest.warns(UserWarning, match="KLBalanced moves KL weights while beta is below 1, and it never is"):
        fit(ladder(), tiny, KLBalanced(), epochs=1, **QUIET)


def test_overwriting_a_run_replaces_it(tiny, tmp_path):
    fit(ladder(), tiny, epochs=3, out=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="beta is -1"):
        fit(ladder(), tiny, epochs=1, beta=-1.0, out=tmp_path, overwrite=True, **QUIET)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    fit(ladder(), tiny, epochs=1, out=tmp_path, overwrite=True, **QUIET)
    assert [m.epoch for m in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 1


def test_checkpoints_are_read_without_unpickling_and_damage_is_named(tiny, tmp_path):
    fit(ladder(), tiny, epochs=1, out=tmp_path, **QUIET)
    path = tmp_path / "checkpoint.pt"
    torch.load(path, weights_only=True)
    with pytest.raises(CheckpointError, match=r"weights of another structure than this LadderVAE"):
        load_weights(STRUCTURES["LadderVAE-unshared"](), path)
    with pytest.raises(CheckpointError, match=r"is a folder; name the file within it"):
        load_weights(ladder(), tmp_path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is damaged or is no checkpoint$"):
        load_weights(ladder(), path)
    path.write_text("no checkpoint at all")
    with pytest.raises(CheckpointError, match="is damaged or is no checkpoint$"):  # without torch's advice to trust it
        load_weights(ladder(), path)
    torch.save({}, path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is damaged or is no checkpoint"):
        fit(ladder(), tiny, epochs=2, out=tmp_path, resume=True, **QUIET)
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        fit(ladder(), tiny, epochs=2, out=tmp_path / "elsewhere", resume=True, **QUIET)


def test_metrics_are_json_lines(tiny, tmp_path):
    history = fit(ladder(), tiny, epochs=2, out=tmp_path, **QUIET)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [vars(m) for m in history]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "st')  # a crash in the middle of a line
    assert read_metrics(tmp_path / "metrics.jsonl") == history


def test_a_multiplier_is_learned_in_a_copy_kept_in_the_checkpoint_and_gone_on_with(tiny, tmp_path):
    estimator, options = ConstrainedELBO(0.5, rate=0.05), dict(batch_size=15, **QUIET)
    whole = fit(ladder(), tiny, estimator, epochs=4, **options)
    assert estimator.multiplier == 1.0
    torch.manual_seed(0)
    fit(ladder(), tiny, estimator, epochs=2, out=tmp_path, **options)
    parts = fit(ladder(), tiny, estimator, epochs=4, out=tmp_path, resume=True, **options)
    assert [m.learned["multiplier"] for m in whole] == [m.learned["multiplier"] for m in parts]
    assert whole[0].learned["multiplier"] != whole[1].learned["multiplier"]
    assert load_checkpoint(tmp_path / "checkpoint.pt")["estimator"]["multiplier"] == parts[-1].learned["multiplier"]
    fit(ladder(), tiny, IWAE(2), epochs=5, out=tmp_path, resume=True, **options)  # another estimator learns its own


def test_training_stops_after_so_many_seconds(tiny, tmp_path):
    history = fit(ladder(), tiny, epochs=100_000, max_seconds=0.2, out=tmp_path, checkpoint_every=1000, **QUIET)
    assert history[-1].seconds >= 0.2 > history[-2].seconds
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == len(history)
    again = fit(ladder(), tiny, epochs=100_000, max_seconds=0.2, out=tmp_path, resume=True, **QUIET)
    assert len(again) == len(history)  # the time was used up
    with pytest.raises(ValueError, match="max_seconds is 0"):
        fit(ladder(), tiny, max_seconds=0, **QUIET)


@pytest.mark.parametrize(
    "name", ["ReweightedWakeSleep", "TraceTailAdaptive_ELBO", "JitTrace_ELBO", "JitTraceGraph_ELBO"]
)
def test_estimators_of_pyros_that_would_fail_in_the_middle_are_refused_before(name, tiny):
    with pytest.raises(ValueError, match=f"{name} (does not work here|needs num_particles)"):
        fit(ladder(), tiny, getattr(pyro.infer, name)(), epochs=1, **QUIET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(clip_norm=0), "clip_norm is 0; give a number above 0"),
        (dict(clip_norm=-1.0), "clip_norm is -1.0; give"),
        (dict(clip_value=-1), "clip_value is -1; give"),
        (dict(batch_size=12.5), "batch_size is 12.5; it must be a whole number"),
        (dict(beta="1"), "beta is '1'; expected a number or a schedule"),
        (dict(beta=lambda step, epoch: 1.0), "beta is a function; expected a number or a schedule"),
        (dict(optimizer="adam"), "optimizer is 'adam'; expected what makes one"),
        (
            dict(optimizer=pyro.optim.Adam({"lr": 1e-3})),
            "optimizer is a PyroOptim that makes a NoneType; expected",
        ),
        (dict(optimizer=torch.optim.Adam([torch.zeros(1)])), "optimizer is a Adam; expected what makes one"),
        (dict(lr_scheduler="cosine"), "lr_scheduler is 'cosine'; expected"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options, message, tiny):
    with pytest.raises(ValueError, match=message):
        fit(VAE(12, 3, 8), tiny, epochs=1, **QUIET | options)


def test_every_row_is_held_against_the_likelihood(tiny):
    """Also those that training comes to late, or never."""
    late = torch.cat([tiny.x_train[:44], torch.full((1, 12), 0.5), tiny.x_train[44:]])
    with pytest.raises(DataError, match="row 44 of x_train has values from 0.5 to 0.5, which the likelihood"):
        fit(VAE(12, 3, 8), Dataset("own", late, tiny.x_test), epochs=1, **QUIET)
    test = tiny.x_test.clone()
    test[7] = torch.arange(12) % 4
    with pytest.raises(DataError, match="row 7 of x_test has values from 0 to 3, which"):
        fit(VAE(12, 3, 8), Dataset("own", tiny.x_train, test), epochs=1, **QUIET)
    fit(VAE(12, 3, 8, likelihood=Normal), Dataset("own", late, tiny.x_test), epochs=1, **QUIET)


class Bounded(nn.Module):
    """x is uniform within one of z on either side: what it may be is another matter for every row."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))

    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z1", dist.Normal(x.new_zeros(1), 100.0).to_event(1))
            pyro.sample("x", dist.Uniform(z - 9, z + 9).to_event(1), obs=x)

    def guide(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z1", dist.Normal(x, self.scale).to_event(1))


def test_a_support_of_each_row_is_left_to_the_likelihood():
    x = torch.arange(9.0)[:, None] * 30
    assert len(fit(Bounded(), Dataset("far", x, x[:5]), epochs=1, **QUIET)) == 1
