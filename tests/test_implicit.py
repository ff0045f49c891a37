"""Posteriors and likelihoods without a density, against exact answers. Seeds are fixed; without, each of the trained
tests would fail in fewer than one run of twenty."""

import copy
import math
from functools import partial

import pyro
import pytest
import torch
from pyro.distributions import Normal
from torch import nn

from pyro_lvae import (
    IWAE,
    PIWAE,
    RWS,
    STL,
    TVO,
    VAE,
    CriticAdam,
    Dataset,
    DenoisingVAE,
    DReG,
    FlowVAE,
    FusedAdam,
    ImplicitLikelihoodVAE,
    ImplicitPosteriorVAE,
    Renyi,
    SampledELBO,
    check,
    elbo,
    fit,
    ledger,
    log_likelihood,
)
from pyro_lvae.objectives import backward
from pyro_lvae.traces import evaluating, generate, guide_sites

SIGMA = 0.5
WIDE = 1.0


class Squares(nn.Module):
    """x = z^2 + noise: of every x > 0 the posterior has four modes in two dims, and is known."""

    def __init__(self, in_dim, x_dim):
        super().__init__()

    def forward(self, z):
        return Normal(z.square(), WIDE).to_event(1)


def _squares(make):
    return make(2, likelihood=Squares, decoder_num_hidden=0)


def _log_p_of_squares(x):
    """log p(x): the dims are apart, so one integral over a grid each."""
    z = torch.linspace(-6, 6, 4001, dtype=torch.double)
    log_joint = Normal(0.0, 1.0).log_prob(z) + Normal(z.square(), WIDE).log_prob(x.double()[..., None])
    return (log_joint.logsumexp(-1) + math.log(z[1] - z[0])).sum(-1)


@pytest.fixture(scope="module")
def squares():
    ends = torch.tensor([1.0, 2.0])
    x = torch.cartesian_prod(ends, ends)
    return Dataset("squares", x.repeat(400, 1), x.repeat(100, 1))


@pytest.fixture(scope="module")
def implicit(squares):
    torch.manual_seed(0)
    structure = _squares(partial(ImplicitPosteriorVAE, z_dim=2, hidden_dim=64, noise_dim=4))
    adam = partial(FusedAdam, lr=5e-4)
    critic = dict(critic_steps=5, critic_optimizer=partial(CriticAdam, lr=3e-3))
    fit(structure, squares, epochs=40, batch_size=200, optimizer=adam, compile=False, callbacks=(), **critic)
    return structure


@pytest.mark.slow
def test_the_implicit_posterior_finds_the_modes_that_a_gaussian_does_not(squares, implicit):
    torch.manual_seed(0)
    gaussian = _squares(partial(VAE, z_dim=2, hidden_dim=64, batch_norm=False))
    fit(gaussian, squares, epochs=40, batch_size=50, callbacks=())
    x = squares.x_test
    gaps = [_log_p_of_squares(x).mean() - elbo(s, x, 50).mean() for s in (gaussian, implicit)]
    assert gaps[0] > 0.45 > 0.35 > gaps[1].abs()
    with evaluating(implicit):
        z = guide_sites(implicit, torch.full((2000, 2), 2.0))["z1"][1]
    signs = (z > 0).float()
    corners = torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0))
    assert min((signs == corner).all(-1).float().mean() for corner in corners) > 0.1  # 1/4 each


@pytest.mark.slow
def test_the_critics_density_is_that_of_the_draws(implicit):
    """Against a histogram of the first unit, its partner summed over a grid."""
    x = torch.tensor([[1.0, 1.0]])
    with evaluating(implicit):
        q = implicit._posterior(x)
        draws = q.rsample((20_000,))[:, 0, 0]
        grid = torch.linspace(-4, 4, 81)
        cells = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 1, 2)
        density = q.log_prob(cells).exp().reshape(81, 81).sum(1) * (grid[1] - grid[0])
    counts = torch.histc(draws, 8, -4, 4) / 20_000
    expected = density[:-1].reshape(8, 10).sum(1) * (grid[1] - grid[0])
    assert (counts - expected).abs().sum() / 2 < 0.15  # total variation
    assert density.sum() * (grid[1] - grid[0]) == pytest.approx(1.0, abs=0.2)


def test_without_a_contrast_it_is_the_prior(x):
    structure = ImplicitPosteriorVAE(12, 2, 16, adaptive_contrast=False).double()
    site = ledger(structure.model, structure.guide, x.double(), num_particles=3)["z1"]
    log_ratio = structure.critic(x.double(), site.value)
    torch.testing.assert_close(site.log_q - site.log_p, log_ratio)


def test_the_guide_learns_through_its_draws_alone(x):
    """Its parameters are in no density: the gradient of the bound at given draws leaves them alone."""
    structure = ImplicitPosteriorVAE(12, 2, 16)
    site = ledger(structure.model, structure.guide, x)["z1"]
    gradient = torch.autograd.grad(
        site.q.log_prob(site.value.detach()).sum() + 0 * site.value.sum(), structure.out.weight
    )[0]
    assert gradient.abs().sum() == 0


# ---------------------------------------------------------------------- likelihood-free

WEIGHT = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.6, -0.6]])


def linear_simulator(z):
    """x = W z + noise: its posterior is Gaussian, and known."""
    return z @ WEIGHT.to(z).T + SIGMA * torch.randn(*z.shape[:-1], 3, dtype=z.dtype)


def _posterior(x):
    precision = torch.eye(2) + WEIGHT.T @ WEIGHT / SIGMA**2
    covariance = precision.inverse()
    return x @ WEIGHT @ covariance.T / SIGMA**2, covariance


def _log_p(x):
    covariance = WEIGHT @ WEIGHT.T + SIGMA**2 * torch.eye(3)
    return torch.distributions.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)


@pytest.fixture(scope="module")
def inferred():
    torch.manual_seed(0)
    x = linear_simulator(torch.randn(2400, 2))
    data = Dataset("linear", x[:2000], x[2000:])
    structure = ImplicitLikelihoodVAE(3, linear_simulator, 2, 64)
    critic = dict(critic_steps=3, critic_optimizer=partial(CriticAdam, lr=3e-3))
    adam = partial(FusedAdam, lr=5e-4)
    fit(structure, data, epochs=20, batch_size=100, optimizer=adam, compile=False, callbacks=(), **critic)
    return structure, data.x_test


def test_likelihood_free_inference_finds_the_posterior_mean(inferred):
    structure, x = inferred
    loc, covariance = _posterior(x)
    with torch.no_grad():
        q = structure.encoder(x)
    assert (q.mean - loc).square().mean().sqrt() < 0.2 < 0.5 < loc.std()
    # The best independent Gaussian has the precisions of the exact one.
    best = covariance.inverse().diagonal().reciprocal().sqrt()
    torch.testing.assert_close(q.variance.sqrt().mean(0), best, rtol=0.25, atol=0)


def test_the_ratio_is_the_likelihood_relative_to_the_data(inferred):
    """The data are the simulator's own: q_data(x) = p(x), and E[log p(x|z) - log p(x)] is known at every z."""
    structure, x = inferred
    with evaluating(structure):
        site = ledger(structure.model, structure.guide, x)["x"]
        z = ledger(structure.model, structure.guide, x)["z1"].value
        ratio = structure._likelihood(z).log_prob(x)
    exact = Normal(z @ WEIGHT.T, SIGMA).to_event(1).log_prob(x) - _log_p(x)
    assert (ratio - exact).mean().abs() < 0.4
    assert torch.corrcoef(torch.stack([ratio, exact]))[0, 1] > 0.8
    assert site.log_p.shape == (len(x),)
    assert abs(elbo(structure, x, 10).mean()) < 0.4  # -KL of two nearly equal joints
    assert log_likelihood(structure, x, 50).mean().abs() < 0.4


def test_draws_of_the_model_are_the_simulators(inferred):
    structure, _ = inferred
    drawn = generate(structure, torch.zeros(6000, 3), {})["x"][1]
    exact = WEIGHT @ WEIGHT.T + SIGMA**2 * torch.eye(3)
    torch.testing.assert_close(drawn.T.cov(), exact, rtol=0.1, atol=0.06)


def test_the_bound_is_minus_the_critic(x):
    structure = ImplicitLikelihoodVAE(12, lambda z: z.repeat_interleave(4, -1), 3, 16).double()
    x = x.double()
    check(structure, x)
    sites = ledger(structure.model, structure.guide, x, num_particles=2)
    torch.testing.assert_close(sites.local_log_weight(), -structure.critic(x, sites["z1"].value))


class Scored(nn.Module):
    """The simulator's model with its exact likelihood, relative to that of the data; the guide is that of `other`."""

    def __init__(self, other):
        super().__init__()
        self.encoder = other.encoder

    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z1", Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", Normal(z @ WEIGHT.to(x).T, SIGMA).to_event(1), obs=x)

    def guide(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z1", self.encoder(x))


class ExactCritic(nn.Module):
    """log q(z|x) - log p(z) - log p(x|z), the ratio of joints but for the data's own density."""

    def __init__(self, encoder):
        super().__init__()
        self.held = [copy.deepcopy(encoder)]  # no gradient goes to it

    def forward(self, x, z):
        prior = Normal(x.new_zeros(2), 1.0).to_event(1).log_prob(z)
        return self.held[0](x).log_prob(z) - prior - Normal(z @ WEIGHT.to(x).T, SIGMA).to_event(1).log_prob(x)


@pytest.mark.parametrize(
    "estimator", [SampledELBO(2), IWAE(4), DReG(4), STL(2), RWS(4), TVO(4), PIWAE(2, 2), Renyi(0.5, 4)]
)
def test_gradients_with_the_exact_ratio_are_those_of_the_likelihood(estimator):
    structure = ImplicitLikelihoodVAE(3, linear_simulator, 2, 8).double()
    structure.critic = ExactCritic(structure.encoder)
    x, found = torch.randn(5, 3, dtype=torch.double), []
    for pair in (structure, Scored(structure)):
        pair.zero_grad()
        torch.manual_seed(1)
        loss = backward(copy.copy(estimator), pair, (x,), per=5)
        found.append([loss, *(p.grad.clone() for p in structure.encoder.parameters())])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", [IWAE(3), Renyi(0.5, 3), PIWAE(2, 2), RWS(3)])
def test_estimators_that_need_scores_are_refused_for_implicit_posteriors(estimator, x):
    structure = ImplicitPosteriorVAE(12, 2, 8)
    with pytest.raises(ValueError, match="is a critic's"):
        estimator.differentiable_loss(structure.model, structure.guide, x)
    DReG(3).differentiable_loss(structure.model, structure.guide, x)


def test_refusals():
    simulator = partial(ImplicitLikelihoodVAE, simulator=lambda z: z.repeat_interleave(4, -1), z_dim=3)
    for around in (FlowVAE, DenoisingVAE):
        with pytest.raises(ValueError, match="guide of its own"):
            around(12, simulator)
    with pytest.raises(ValueError, match=r"makes \(2, 3, 6\).*expected \(2, 3, 12\)"):
        ImplicitLikelihoodVAE(12, lambda z: z.repeat_interleave(2, -1), 3)
    with pytest.raises(ValueError, match="num_contrast=1"):
        ImplicitPosteriorVAE(12, num_contrast=1)
