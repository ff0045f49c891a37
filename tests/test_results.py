"""The tables of results, in words."""

from dataclasses import replace

import pytest

from pyro_lvae import LadderVAE, fit, summarize
from pyro_lvae.results import GradientQuality, Summary, _below, _beyond_noise

SUMMARY = Summary(
    data="digits", structure="VAE", estimator="SampledELBO", epochs=2, seconds=3.0, images_per_second=100.0,
    num_parameters=1234, train_elbo=-25.0, test_elbo=-26.0, test_log_likelihood=-22.781,
    test_log_likelihood_stderr=0.193, num_samples=1000, num_images=360, kl_per_layer={"z1": 4.0},
    active_units={"z1": 3}, units={"z1": 4},
)  # fmt: skip


def test_summary_in_words():
    rows = dict(SUMMARY.rows())
    assert rows["training"] == "2 epochs by SampledELBO in 3 s"
    assert rows["test log p(x)"] == "-22.78 ± 0.19 nats (standard error; 1,000 samples, 360 images)"
    assert "beta" not in rows
    alone = dict(replace(SUMMARY, epochs=1, num_images=1, test_log_likelihood_stderr=None, beta=0.1).rows())
    assert alone["training"].startswith("1 epoch by")
    assert alone["test log p(x)"] == "-22.78 nats (1,000 samples, 1 image)"
    assert alone["beta"] == "0.1 at the end of training; figures below are at 1"


def test_the_beta_furthest_from_one_is_kept(tiny):
    ladder = LadderVAE(12, (5, 3), (16, 8))
    history = fit(ladder, tiny, epochs=1, beta={"z1": 1.0, "z2": 0.5}, callbacks=())
    assert summarize(ladder, tiny, history, num_samples=2).beta == 0.5
    assert summarize(ladder, tiny, [], num_samples=2).beta == 1.0


@pytest.mark.parametrize(
    ("bound", "said"), [(20.3, "< 21"), (0.0043, "< 0.0043"), (1234.0, "< 1300"), (0.0149, "< 0.015")]
)
def test_bounds_are_numbers_that_one_reads(bound, said):
    assert _below(bound) == said


def test_what_is_lost_in_noise_is_bounded():
    assert (_beyond_noise(3.0, 1.0), _beyond_noise(0.5, 1.0), _beyond_noise(0.0, 0.0)) == ("3", "< 1", "0")


def test_a_gradient_lost_in_noise_is_not_called_zero(comparison):
    quality = GradientQuality(0.0, 18.1, 0.0, 0.6, 1.0, 0.1, None, None)
    assert comparison._gradient(quality)[:3] == ["< 11", "18.1", "< 0.6"]
    assert comparison._gradient(replace(quality, norm=20.0, snr=20 / 18.1))[:3] == ["20", "18.1", "1.1"]


@pytest.fixture
def comparison():
    from pyro_lvae.results import Comparison

    return Comparison("VAE", 2, {}, -1.0, 5, None, None, 10, {}, [], {})
