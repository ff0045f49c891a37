import copy
import json
import math
from dataclasses import asdict

import arviz
import pytest
import torch
from linear_gaussian import ExactPosterior, make_linear, marginal
from pyro.infer import Trace_ELBO
from test_enumeration import Mixture
from test_estimators import Discrete, ExactGuide

from pyro_lvae import (
    AE,
    IWAE,
    RWS,
    STL,
    TVO,
    VAE,
    BayesianWeights,
    ConstrainedELBO,
    ContractError,
    DReG,
    HierarchicalVAE,
    LadderVAE,
    SampledELBO,
    compare,
    compare_training,
    plots,
)
from pyro_lvae.comparison import parameter_groups
from pyro_lvae.comparison.memory import PeakBytes
from pyro_lvae.conditionals import Normal
from pyro_lvae.inference_data import comparison_draws, save_draws
from pyro_lvae.objectives import label, parse
from pyro_lvae.results import write_json

QUICK = dict(num_repeats=5, num_samples=20, reference_particles=10, num_temperatures=0)


def test_parameters_are_grouped_by_who_reads_them(x):
    ladder = LadderVAE(12, (5, 3), (16, 8))
    names = {id(p): name for name, p in ladder.named_parameters()}
    groups = {g: {names[id(p)].split(".")[0] for p in members} for g, members in parameter_groups(ladder, x).items()}
    assert groups == {"model": {"decoder", "likelihood"}, "guide": {"bottom_up", "evidence"}, "shared": {"top_down"}}
    assert set(parameter_groups(LadderVAE(12, (5, 3), (16, 8), share_top_down=False), x)) == {"model", "guide"}
    assert set(parameter_groups(HierarchicalVAE(12, (5, 3), (16, 8)), x)) == {"model", "guide"}


def test_an_exact_guide_has_no_gap_and_sticking_the_landing_no_noise():
    structure, x = ExactGuide(), torch.randn(6, 4, dtype=torch.double)
    truth = structure.log_prob(x).mean().item()
    found = compare(structure, x, [SampledELBO(1), STL(1)], num_repeats=10, num_samples=10, num_temperatures=0)
    plain, stl = found.rows
    assert found.log_p == pytest.approx(truth)
    assert plain.value == pytest.approx(truth)
    assert plain.stderr < 1e-9
    assert stl.gradients["guide"].std < 1e-9 < 1e-3 < plain.gradients["guide"].std
    # The mean is 0 for both, and the plain estimator's noise of 1/sqrt(10) is subtracted from its norm.
    assert plain.gradients["guide"].norm < plain.gradients["guide"].std
    assert plain.gradients["guide"].own_bias == 0


def test_the_reference_is_the_gradient_of_log_p():
    """Exact by autograd through the closed form; the reference's distance to it stays within 4 standard errors."""
    structure, x = ExactPosterior(), torch.randn(8, 4, dtype=torch.double)
    structure.log_prob(x).mean().backward()
    exact = torch.cat([p.grad.flatten() for p in structure.parameters()]).norm().item()
    structure.zero_grad()
    found = compare(structure, x, [IWAE(20)], **QUICK | dict(num_repeats=400, reference_particles=4000))
    assert set(found.num_parameters) == {"shared"}  # the exact posterior reads the model's own parameters
    assert found.reference_norm["shared"] == pytest.approx(exact, rel=0.1)
    quality = found.rows[0].gradients["shared"]
    assert quality.bias < 4 * quality.bias_noise
    assert quality.norm == pytest.approx(exact, rel=0.2)


def test_values_gaps_and_biases_of_a_linear_ladder():
    options = dict(num_hidden=0, batch_norm=False, likelihood=Normal)
    structure = make_linear(LadderVAE(4, (3, 2), (8, 8), **options))
    p = marginal(structure)
    x = p.sample((10,))
    options = dict(num_repeats=200, num_samples=20_000, reference_particles=500, num_temperatures=30, num_chains=8)
    found = compare(structure, x, "SampledELBO, IWAE(5), DReG(5), IWAE(50)", **options)
    truth = p.log_prob(x).mean().item()
    assert found.log_p == pytest.approx(truth, abs=0.05)
    assert found.log_p_annealed == pytest.approx(truth, abs=0.4)
    assert found.annealed_gap < 1.5
    elbo, iwae5, dreg5, iwae50 = found.rows
    assert elbo.value < iwae5.value < iwae50.value < truth + 4 * iwae50.stderr
    assert iwae5.value == pytest.approx(dreg5.value, abs=5 * math.hypot(iwae5.stderr, dreg5.stderr))
    assert elbo.gradients["model"].bias > iwae50.gradients["model"].bias
    assert dreg5.gradients["guide"].own_bias < 4 * dreg5.gradients["guide"].own_bias_noise
    assert elbo.peak_bytes < iwae50.peak_bytes
    assert all(row.seconds > 0 for row in found.rows)


def test_everything_of_the_callers_stays_as_it_was(x):
    structure = LadderVAE(12, (5, 3), (16, 8))
    for p in structure.parameters():
        p.grad = torch.ones_like(p)
    before, noise = copy.deepcopy(structure.state_dict()), torch.get_rng_state()
    estimator = ConstrainedELBO(0.1)
    first = compare(structure, x, [estimator, Trace_ELBO()], **QUICK)
    assert estimator.multiplier == 1.0
    assert structure.training
    assert all((p.grad == 1).all() for p in structure.parameters())
    assert torch.equal(noise, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in structure.state_dict().items())
    again = compare(structure, x, [estimator, Trace_ELBO()], **QUICK)
    assert [r.values for r in first.rows] == [r.values for r in again.rows]


def test_what_does_not_suit_is_left_out_of_the_default_and_refused_by_name(x):
    structure = HierarchicalVAE(12, (5, 3), (16, 8))
    found = compare(structure, x, **QUICK)
    assert list(found.skipped) == ["AnalyticELBO(1)"]
    assert "same order" in found.skipped["AnalyticELBO(1)"]
    for named in ("AnalyticELBO", [DReG(5, prior=True)]):
        with pytest.raises(ValueError, match="same order"):
            compare(structure, x, named, **QUICK)


@pytest.mark.parametrize(
    ("estimators", "message"),
    [
        ("IWEA(5)", "there is no estimator 'IWEA'; known are SampledELBO"),
        ("IWAE(k=5)", r"IWAE\(k=5\): .*the arguments are IWAE\(num_particles: int = 5, resampled: "),
        ("IWAE(0)", "at least 1"),
        ("IWAE(5", "is no list of estimators"),
        ("IWAE(__import__('os'))", "IWAE"),
        ("nowhere.Estimator", "there is no estimator 'nowhere.Estimator'"),
        ("IWAE(5), IWAE(5)", r"IWAE\(5\) stands twice"),
        ([IWAE], "is no estimator; give instances"),
    ],
)
def test_estimators_in_words(estimators, message, x):
    with pytest.raises(ValueError, match=message):
        compare(VAE(12, 2, 4), x, estimators, **QUICK)


def test_labels_can_be_read_again():
    text = "SampledELBO(1), Renyi(-inf, 5), PIWAE(2, 3), DReG(5, prior=True), BetaELBO({'z1': 0.5}, 1), Trace_ELBO(1)"
    assert ", ".join(map(label, parse(text))) == text
    assert isinstance(parse("[STL, pyro.infer.RenyiELBO(0.5)]")[0], STL)


def test_peak_memory_counts_what_lives_together():
    a = torch.ones(1000)
    with PeakBytes(a.device) as memory:
        b = a + 1
        c = b * 2
        del b
        d = c.reshape(10, 100) + 1  # a view costs nothing
        del c, d
        a.add_(1)
        a * 3
    assert memory.peak == 2 * 4000


def test_results_as_json_pictures_and_arviz_data(x, tmp_path):
    found = compare(LadderVAE(12, (5, 3), (16, 8)), x, "SampledELBO, IWAE(3), DReG(3)", **QUICK)
    write_json(tmp_path / "c.json", found)
    assert json.loads((tmp_path / "c.json").read_text()) == asdict(found)
    for heads, rows in found.tables().values():
        assert {len(heads)} == {len(row) for row in rows}
    plots.save({"c": plots.gradient_quality(found)}, tmp_path)
    save_draws(tmp_path / "draws.nc", comparison_draws(found))
    draws = arviz.from_netcdf(tmp_path / "draws.nc").posterior
    assert list(draws.estimator.values) == ["SampledELBO(1)", "IWAE(3)", "DReG(3)"]
    assert draws["value"].shape == draws["gradient_norm_shared"].shape == (1, 5, 3)
    assert draws["value"].sel(estimator="IWAE(3)").values[0].tolist() == found.rows[1].values


def test_training_by_each_from_the_same_start(tiny, tmp_path):
    structure = LadderVAE(12, (5, 3), (16, 8))
    before = copy.deepcopy(structure.state_dict())
    options = dict(max_seconds=0.3, num_samples=5, num_images=10, batch_size=15)
    found = compare_training(structure, tiny, [SampledELBO(1), Trace_ELBO(), IWAE(5)], **options)
    assert all(torch.equal(v, before[k]) for k, v in structure.state_dict().items())
    ours, pyros, iwae = (h[0] for h in found.histories.values())
    assert ours.test_elbo == pytest.approx(pyros.test_elbo, abs=1e-4)  # one estimator, one start, one noise
    assert ours.test_elbo != pytest.approx(iwae.test_elbo, abs=1e-4)
    for history in found.histories.values():
        assert 0.3 <= history[-1].seconds < 1.5
    assert all(torch.tensor(v).isfinite() for v in found.log_p.values())
    plots.save({"t": plots.training_curves(found)}, tmp_path)
    write_json(tmp_path / "t.json", found)
    (heads, rows), *_ = found.tables().values()
    assert len(rows) == 3
    assert len(heads) == len(rows[0])


def test_training_a_posterior_over_weights(tiny):
    options = dict(max_seconds=0.1, num_samples=5, num_images=10)
    found = compare_training(BayesianWeights(VAE(12, 3, 8), "decoder"), tiny, "SampledELBO, IWAE(3)", **options)
    assert all(math.isfinite(v) for v in found.log_p.values())
    assert found.histories["IWAE(3)"][-1].global_kl > 0


def test_what_has_no_log_p_is_refused_before_anything_trains(tiny, monkeypatch):
    monkeypatch.setattr("pyro_lvae.comparison.training.fit", pytest.fail)
    with pytest.raises(ValueError, match="point mass, .* no estimate of p"):
        compare_training(AE(12, 3, 8), tiny, "SampledELBO")


def test_a_single_image_and_an_estimator_that_fails(tiny):
    class Nan(SampledELBO):
        def bound(self, sites):
            return super().bound(sites) * float("nan")

    structure, options = LadderVAE(12, (5, 3), (16, 8)), dict(max_seconds=0.1, num_samples=5, num_images=1)
    found = compare_training(structure, tiny, [SampledELBO(1), Nan(1)], **options)
    assert found.log_p_stderr == {"SampledELBO(1)": None}
    assert "the loss is nan" in found.skipped["Nan(1)"]
    assert len(next(iter(found.tables().values()))[1]) == 1
    with pytest.raises(ValueError, match=r"Nan\(1\) gives nan on this batch"):
        compare(structure, tiny.x_test[:3], [Nan(1)], **QUICK)


def test_discrete_guides_and_enumerated_sites():
    x = torch.randn(4, 3).double()
    found = compare(Discrete(), x, [RWS(4), TVO(4)], **QUICK)
    assert found.rows[0].gradients["guide"].own_bias is None
    with pytest.raises(ValueError, match="'c' cannot be reparameterised"):
        compare(Discrete(), x, "IWAE(5)", **QUICK)
    found = compare(Mixture(), torch.randn(4, 4).double(), "IWAE(5)", **QUICK | dict(num_temperatures=3))
    assert "'c'" in found.skipped["annealed importance sampling"]
    assert found.log_p_annealed is None


def test_frozen_parameters_are_left_out(x):
    structure = VAE(12, 3, 8)
    for p in [*structure.decoder.parameters(), *structure.likelihood.parameters()]:
        p.requires_grad_(False)
    assert set(compare(structure, x, "IWAE(3), DReG(3)", **QUICK).num_parameters) == {"guide"}


@pytest.mark.parametrize(
    "options", [dict(num_samples=0), dict(num_temperatures=-1), dict(num_repeats=1), dict(reference_particles=1)]
)
def test_arguments_out_of_range_are_refused_before_anything_is_computed(options, x):
    with pytest.raises(ValueError, match=next(iter(options))):
        compare(VAE(12, 3, 8), x, "IWAE(3)", **QUICK | options)
    with pytest.raises(ValueError, match="no estimator is left"):
        compare(VAE(12, 3, 8), x, "", **QUICK)


def test_reference_of_a_discrete_guide_leaves_the_guide_alone():
    """log p(x) does not depend on parameters that the guide alone has: the reference for them is exactly 0."""
    x = torch.randn(4, 3).double()
    found = compare(Discrete(), x, [RWS(20)], num_repeats=3, num_samples=10, reference_particles=50, num_temperatures=0)
    assert found.reference_norm["guide"] == 0


def test_a_structure_that_breaks_the_rules_is_not_compared(x):
    class Partial(VAE):
        def guide(self, x, y=None):
            pass

    with pytest.raises(ContractError):
        compare(Partial(12, 3, 8), x, "IWAE(5)", num_repeats=3)


def test_runs_of_several_estimators_share_no_folder(tiny):
    with pytest.raises(ValueError, match="out: one folder cannot hold several runs"):
        compare_training(VAE(12, 3, 8), tiny, "IWAE(5)", max_seconds=1, out="o")
