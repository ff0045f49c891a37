"""Latent features in scikit-learn's convention: its own checks, and exact answers."""

import pickle
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from linear_gaussian import make_linear, marginal
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from pyro_lvae import VAE, BayesianWeights, HierarchicalVAE, LadderVAE, LatentFeatures, encode
from pyro_lvae.conditionals import Bernoulli, StudentT
from pyro_lvae.conditionals import Normal as NormalLikelihood
from pyro_lvae.features import _Best

QUICK = dict(epochs=2, num_draws=5, num_samples=5, random_state=0)
SMALL = partial(LadderVAE, z_dims=(3, 2), hidden_dims=(8, 8), likelihood=NormalLikelihood)
VAE_1 = partial(VAE, z_dim=2, hidden_dim=8, likelihood=NormalLikelihood)


@pytest.fixture
def rows():
    """Columns of means and scales far from 0 and 1."""
    g = np.random.default_rng(0)
    return g.normal(size=(60, 2)) @ g.normal(size=(2, 5)) * [1, 10, 100, 0.1, 1] + [0, 50, -3, 0, 1e3]


@parametrize_with_checks([LatentFeatures(VAE_1, **QUICK | dict(epochs=1))])
@pytest.mark.filterwarnings("ignore:Skipping check check_array_api_input")  # asks for an environment variable
def test_keeps_scikit_learns_convention(estimator, check):
    check(estimator)


@pytest.mark.parametrize("make", [LadderVAE, HierarchicalVAE])
def test_log_density_is_that_of_the_columns_as_they_came(make, rows):
    """Against the closed form of a linear-Gaussian hierarchy, with the Jacobian of the standardisation.

    5,000 samples of weights that vary little (their log has a spread below 1): standard error below 0.03.
    """
    maker = partial(
        make, z_dims=(2, 2), hidden_dims=(4, 4), num_hidden=0, batch_norm=False, likelihood=NormalLikelihood
    )
    found = LatentFeatures(maker, **QUICK | dict(num_samples=5000)).fit(rows)
    p = marginal(make_linear(found.structure_))
    mean, scale = rows.mean(0), rows.std(0)
    exact = p.log_prob(torch.as_tensor((rows - mean) / scale)).detach().numpy() - np.log(scale).sum()
    np.testing.assert_allclose(found.score_samples(rows), exact, atol=0.15)
    assert found.score(rows) == pytest.approx(exact.mean(), abs=0.1)


def test_the_density_integrates_to_one():
    """A column in other units is another density: its integral over the line stays 1.

    All points meet the same noise, so its error does not average out over them: 1 % with 5,000 samples.
    """
    x = np.random.default_rng(0).gamma(2.0, 300.0, size=(200, 1))
    found = LatentFeatures(VAE_1, epochs=5, num_samples=5000, random_state=0).fit(x)
    line = np.linspace(-6_000, 12_000, 601)
    assert np.trapezoid(np.exp(found.score_samples(line[:, None])), line) == pytest.approx(1, abs=0.04)


def test_binary_columns_may_stay_as_they_are():
    x = (np.random.default_rng(0).random((50, 4)) < [0.1, 0.5, 0.5, 0.9]).astype(np.float64)
    make = partial(VAE, z_dim=2, hidden_dim=8)
    found = LatentFeatures(make, standardize=False, **QUICK | dict(num_samples=5000)).fit(x)
    every = np.array([[i >> b & 1 for b in range(4)] for i in range(16)], dtype=float)
    assert isinstance(found.structure_.likelihood, Bernoulli)
    assert np.exp(found.score_samples(every)).sum() == pytest.approx(1, abs=0.05)
    assert set(found.inverse_transform(found.transform(x)).round().ravel()) <= {0, 1}


def test_features_are_posterior_means(rows):
    """Of one layer exactly those of the guide; of the upper layers within Monte Carlo error of others' draws."""
    found = LatentFeatures(VAE_1, **QUICK).fit(rows)
    x = torch.as_tensor((rows - rows.mean(0)) / rows.std(0))
    mlp, head = found.structure_.bottom_up[0]
    np.testing.assert_allclose(found.transform(rows), head.moments(mlp(x))[0].detach(), atol=1e-6)

    found = LatentFeatures(SMALL, **QUICK | dict(num_draws=2000)).fit(rows)
    codes = encode(found.structure_, x, 2000)
    np.testing.assert_allclose(found.transform(rows), torch.cat([codes["z1"], codes["z2"]], 1), atol=0.1)


def test_a_row_does_not_depend_on_its_neighbours(rows, monkeypatch):
    """Alone, in other company, and in chunks of a few rows."""
    found = LatentFeatures(SMALL, **QUICK).fit(rows)
    features, scores = found.transform(rows), found.score_samples(rows)
    np.testing.assert_allclose(found.transform(rows[7:8]), features[7:8], atol=1e-7)
    np.testing.assert_allclose(found.score_samples(rows[::-2]), scores[::-2], rtol=1e-9)
    monkeypatch.setattr("pyro_lvae.features.MEMORY", 1)
    np.testing.assert_allclose(found.score_samples(rows), scores, rtol=1e-9)
    assert np.unique(scores).size == len(rows)


def test_layers_are_chosen_and_named(rows):
    every = LatentFeatures(SMALL, **QUICK).fit(rows)
    assert every.get_feature_names_out().tolist() == ["z1_0", "z1_1", "z1_2", "z2_0", "z2_1"]
    for layers, columns in (("z2", [3, 4]), (["z2", "z1"], [3, 4, 0, 1, 2])):
        found = LatentFeatures(SMALL, layers=layers, **QUICK).fit(rows)
        np.testing.assert_array_equal(found.transform(rows), every.transform(rows)[:, columns])
        assert found.get_feature_names_out().tolist() == every.get_feature_names_out()[columns].tolist()


def test_features_are_decoded_in_the_units_of_the_columns(rows):
    found = LatentFeatures(SMALL, **QUICK).fit(rows)
    z = np.random.default_rng(1).normal(size=(4, 5))
    structure, (z1, z2) = found.structure_, torch.as_tensor(z).split([3, 2], 1)
    by_hand = structure.likelihood(structure.decoder(z1)).mean.detach().numpy() * rows.std(0) + rows.mean(0)
    np.testing.assert_allclose(found.inverse_transform(z), by_hand, rtol=1e-9)
    top = LatentFeatures(SMALL, layers="z2", **QUICK).fit(rows)
    by_hand = structure.likelihood(structure.decoder(structure.top_down[0](z2).mean)).mean.detach().numpy()
    np.testing.assert_allclose(top.inverse_transform(z2.numpy()), by_hand * rows.std(0) + rows.mean(0), rtol=1e-9)
    with pytest.raises(ValueError, match=r"X has 5 columns; the features are the 2 of"):
        top.inverse_transform(z)


def test_random_numbers_are_its_own(rows, capfd):
    torch.manual_seed(3)
    before, of_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two = (LatentFeatures(SMALL, **QUICK).fit(rows) for _ in "ab")
    other = LatentFeatures(SMALL, **QUICK | dict(random_state=1)).fit(rows)
    np.testing.assert_array_equal(one.transform(rows), two.transform(rows))
    np.testing.assert_array_equal(one.score_samples(rows), one.score_samples(rows))
    one.inverse_transform(one.transform(rows))
    assert not np.allclose(one.transform(rows), other.transform(rows))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == of_numpy).all()
    assert capfd.readouterr() == ("", "")


def test_copies_are_as_good(rows):
    found = LatentFeatures(SMALL, **QUICK).fit(rows)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found)).transform(rows), found.transform(rows))
    np.testing.assert_array_equal(clone(found).fit(rows).transform(rows), found.transform(rows))


def test_in_pipelines_and_cross_validation():
    """Clusters far apart in six columns stay apart in two features (by chance 0.33)."""
    x, labels = make_blobs(120, n_features=6, centers=3, cluster_std=0.5, random_state=0)
    found = LatentFeatures(VAE_1, epochs=30, learning_rate=0.01, num_draws=1, num_samples=5, random_state=0)
    assert cross_val_score(make_pipeline(found, LogisticRegression()), x, labels, cv=2).mean() > 0.9
    assert np.isfinite(cross_val_score(clone(found).set_params(epochs=1), x, cv=2)).all()


@pytest.mark.parametrize(
    "make",
    [
        partial(LadderVAE, z_dims=(3, 2), hidden_dims=(8, 8), likelihood=StudentT),
        lambda x_dim: BayesianWeights(SMALL(x_dim), where="likelihood"),
        None,
    ],
    ids=["Student-t", "Bayesian", "default"],
)
def test_other_structures(make, rows):
    found = LatentFeatures(make, **QUICK).fit(rows.astype(np.float32))
    codes = found.transform(rows.astype(np.float32))
    assert codes.dtype == np.float32
    assert np.isfinite(found.score_samples(rows)).all()
    assert found.inverse_transform(codes).shape == rows.shape


def test_constant_columns_do_no_harm(rows):
    rows[:, 2] = 7.0
    found = LatentFeatures(SMALL, **QUICK).fit(rows)
    assert np.isfinite(found.score_samples(rows)).all()


def test_the_best_epoch_is_kept():
    layer = torch.nn.Linear(2, 1)
    best, kept = _Best(layer), None
    for epoch, elbo in enumerate([-3.0, -1.0, float("nan"), -2.0], 1):
        with torch.no_grad():
            layer.weight.fill_(epoch)
        best.on_epoch(SimpleNamespace(epoch=epoch, test_elbo=elbo))
    kept = best.restore()
    assert kept == 2
    assert layer.weight.unique().item() == 2


def test_held_out_rows_choose_the_epoch(rows):
    found = LatentFeatures(SMALL, **QUICK | dict(epochs=40, learning_rate=0.1)).fit(rows)
    elbos = [m.test_elbo for m in found.history_]
    assert found.best_epoch_ == 1 + int(np.argmax(elbos)) < 40, "such steps overshoot"
    assert LatentFeatures(SMALL, validation_fraction=0, **QUICK).fit(rows).best_epoch_ == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(layers=("z1", "z3")), r"layers is \('z1', 'z3'\); expected some of \['z1', 'z2'\]"),
        (dict(layers=()), r"layers is \(\)"),
        (dict(validation_fraction=1.0), "validation_fraction is 1.0"),
        (dict(structure=VAE(5, 2, 4)), r"structure is a VAE; give what makes one: lambda x_dim: VAE\(x_dim, ...\)"),
        (dict(structure=torch.nn.LazyLinear), "breaks 2 rule"),
        (dict(epochs=0), "epochs is 0"),
    ],
)
def test_arguments_are_checked(options, message, rows):
    with pytest.raises(ValueError, match=message):
        LatentFeatures(**dict(structure=SMALL) | QUICK | options).fit(rows)
