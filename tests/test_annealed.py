"""Annealed importance sampling against closed forms; seeds are fixed, failure rates with a fresh one are stated."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import ExactPosterior, make_linear, marginal
from torch import nn

from pyro_lvae import VAE, LadderVAE, VariationalGP, ais_log_likelihood, bidirectional_monte_carlo, log_likelihood
from pyro_lvae.conditionals import Normal

SHORT = dict(num_chains=16, num_temperatures=60, num_leapfrog=4)


def linear_ladder():
    options = dict(num_hidden=0, batch_norm=False, likelihood=Normal)
    return make_linear(LadderVAE(4, (3, 2), (8, 8), **options))


def stderr(values):
    return values.std().item() / math.sqrt(len(values))


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_finds_log_p_of_a_linear_gaussian_hierarchy(start):
    """In the mean within 0.15 nats below and not above, beyond 3.3 standard errors; each row within 2."""
    structure = linear_ladder()
    p = marginal(structure)
    x = p.sample((40,))
    error = ais_log_likelihood(structure, x, start=start, **SHORT) - p.log_prob(x)
    assert error.abs().max() < 2.0
    assert -0.15 - 3.3 * stderr(error) < error.mean() < 3.3 * stderr(error)


@pytest.mark.parametrize(("start", "many"), [("prior", 40), ("guide", 100)])
def test_both_directions_bracket_log_p(start, many):
    """lower <= log p <= upper in the mean, and the gap closes with more temperatures.

    Each within 3.3 standard errors a side: a failure rate of 1 in 1,000 for each comparison.
    """
    structure, gaps = linear_ladder(), []
    for temperatures in (2, many):
        options = dict(num_temperatures=temperatures, num_leapfrog=4, start=start)
        found = bidirectional_monte_carlo(structure, torch.zeros(150, 4), 4, **options)
        truth = marginal(structure).log_prob(found.x)
        below, above = truth - found.lower, found.upper - truth
        assert below.mean() > -3.3 * stderr(below)
        assert above.mean() > -3.3 * stderr(above)
        gaps.append(found.gap)
    assert gaps[0].mean() - gaps[1].mean() > 3.3 * math.hypot(stderr(gaps[0]), stderr(gaps[1]))
    assert gaps[1].mean() < 0.6


def test_is_exact_from_an_exact_posterior():
    structure, x = ExactPosterior(), torch.randn(5, 4, dtype=torch.double)
    found = ais_log_likelihood(structure, x, 2, 3, 2, start="guide")
    torch.testing.assert_close(found, structure.log_prob(x))


def test_weights_are_unbiased_even_with_few_temperatures():
    """E[w] = p(x) for any number of them: 3 temperatures, 100,000 chains; a z-score of 4.5 is rarer than 1 in 10^5."""
    structure = linear_ladder()
    x = marginal(structure).sample((1,))
    log_w = torch.stack([ais_log_likelihood(structure, x, 5000, 3, 2)[0] for _ in range(20)])
    w = (log_w - marginal(structure).log_prob(x)[0]).exp()
    assert abs(w.mean() - 1).item() < 4.5 * stderr(w) + 1e-3


class GammaPoisson(nn.Module):
    """z ~ Gamma(2, 1.5), x ~ Poisson(z): p(x) is negative binomial; z is positive and moves as its logarithm."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([2.0, 3.0]).double())

    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Gamma(self.a, 1.5).to_event(1))
            pyro.sample("x", dist.Poisson(z).to_event(1), obs=x)

    def guide(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.LogNormal((x + 1).log(), 0.7).to_event(1))


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_constrained_sites_move_in_unconstrained_coordinates(start):
    structure = GammaPoisson()
    x = torch.tensor([[0.0, 1.0], [4.0, 2.0], [1.0, 7.0]]).double()
    exact = torch.distributions.NegativeBinomial(structure.a.detach(), probs=torch.tensor(1 / 2.5).double())
    found = ais_log_likelihood(structure, x, 400, 60, 4, start=start)
    torch.testing.assert_close(found, exact.log_prob(x).sum(-1), atol=0.1, rtol=0)


def test_rows_in_chunks_and_the_callers_mode_and_gradients():
    structure, x = VAE(6, 2, 4), (torch.rand(5, 6) > 0.5).float()
    found = ais_log_likelihood(structure, x, 2, 3, 2, memory=1)
    assert found.shape == (5,)
    assert structure.training
    assert all(p.grad is None for p in structure.parameters())


class Switch(nn.Module):
    """A discrete site, enumerated or not."""

    def __init__(self, infer):
        super().__init__()
        self.infer, self.p = infer, nn.Parameter(torch.tensor(0.3))

    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.Bernoulli(self.p), infer=self.infer)
            pyro.sample("x", dist.Normal(c.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            if not self.infer:
                pyro.sample("c", dist.Bernoulli(self.p))


@pytest.mark.parametrize("infer", [{}, {"enumerate": "parallel"}], ids=["sampled", "enumerated"])
@pytest.mark.parametrize("estimate", [ais_log_likelihood, bidirectional_monte_carlo])
def test_discrete_sites_are_refused_by_name(infer, estimate):
    with pytest.raises(ValueError, match="'c': Hamiltonian Monte Carlo moves continuous sites"):
        estimate(Switch(infer), torch.zeros(3, 1), 2, 2, 1)


@pytest.mark.parametrize(
    "options", [dict(num_chains=0), dict(num_temperatures=0), dict(num_leapfrog=0), dict(start="z")]
)
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ais_log_likelihood(VAE(6, 2, 4), torch.zeros(2, 6), **options)


class Dependent(nn.Module):
    """z1 ~ U(0, z2): where z1 can be depends on z2."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(()))

    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Uniform(x.new_full((1,), 0.5), 3.0).to_event(1))
            z1 = pyro.sample("z1", dist.Uniform(torch.zeros_like(z2), z2).to_event(1))
            pyro.sample("x", dist.Normal(z1, 0.3).to_event(1), obs=x)

    def guide(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Uniform(x.new_full((1,), 0.5), 3.0).to_event(1))
            pyro.sample("z1", dist.Uniform(torch.zeros_like(z2), z2).to_event(1))


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_a_support_may_depend_on_other_latents(start):
    """Against importance sampling with 100,000 samples, within 0.15 nats."""
    x = torch.tensor([[0.5], [1.0], [2.0]])
    found = ais_log_likelihood(Dependent(), x, 200, 60, 4, start=start)
    torch.testing.assert_close(found, log_likelihood(Dependent(), x, 100_000), atol=0.15, rtol=0)


class Labelled(nn.Module):
    """z ~ N(0, 1), y ~ N(z, 0.3), x ~ N(z, 0.5)."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.ones(()).double())

    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), self.p).to_event(1))
            pyro.sample("y", dist.Normal(z, 0.3).to_event(1), obs=y)
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.5 * (x + y), 0.5).to_event(1))


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_labels_that_are_a_site_are_drawn_with_the_data(start):
    """Mean bounds over 400 rows bracket the mean of log p(x, y), minus the entropy, within 3.3 standard errors."""
    x, y = torch.full((400, 1), 9.0).double(), torch.full((400, 1), 2.0).double()
    found = bidirectional_monte_carlo(Labelled(), x, 4, 10, 3, start=start, y=y)
    cov = torch.ones(2, 2).double() + torch.diag(torch.tensor([0.25, 0.09]).double())
    entropy = torch.distributions.MultivariateNormal(torch.zeros(2).double(), cov).entropy().item()
    assert found.lower.mean() < -entropy + 3.3 * stderr(found.lower)
    assert found.upper.mean() > -entropy - 3.3 * stderr(found.upper)
    assert -3.3 * stderr(found.gap) < found.gap.mean() < 1.5


class LabelOrLatent(nn.Module):
    """y is a label where one is given, and a latent where none is."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.ones((), dtype=torch.double))

    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Normal(x.new_zeros(1), self.mean).to_event(1), obs=y)
            z = pyro.sample("z1", dist.Normal(y, 0.5).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Normal(0.7 * x, 0.6).to_event(1)) if y is None else y
            pyro.sample("z1", dist.Normal(0.5 * (x + y), 0.4).to_event(1))


def test_a_label_that_is_not_given_is_a_latent():
    """p(x) = N(0, 1.5). 0.15 nats are more than ten standard errors of 100 chains."""
    x = torch.tensor([[0.0], [1.0], [2.5]], dtype=torch.double)
    truth = dist.Normal(0.0, 1.5**0.5).log_prob(x).squeeze(-1)
    found = ais_log_likelihood(LabelOrLatent(), x, 100, 60, 4, start="prior")
    torch.testing.assert_close(found, truth, rtol=0, atol=0.15)


def test_every_row_is_validated():
    x = torch.full((3, 6), 0.5)
    x[0] = 1.0
    with pytest.raises(ValueError, match="does not admit values from 0.5 to 1"):
        ais_log_likelihood(VAE(6, 2, 4), x, 4, 4)


def test_like_gives_the_form_alone():
    bracket = bidirectional_monte_carlo(VAE(6, 2, 4), torch.full((3, 6), 0.5), 4, 4)
    assert bracket.lower.isfinite().all()


def test_chains_start_with_auxiliary_variables_that_follow_the_data():
    """E[w] = p(x) with 3 temperatures, 40,000 chains; 4.5 standard errors: fewer than one in 10^4 fail."""
    options = dict(num_points=3, num_hidden=0, batch_norm=False, likelihood=Normal)
    structure = make_linear(VariationalGP(4, (3, 2), (8, 8), **options))
    structure.auxiliary[1].head[0].weight.data[:6, :4] = 3.0  # r follows x
    x = marginal(structure).sample((1,))
    log_w = torch.stack([ais_log_likelihood(structure, x, 5000, 3, 2)[0] for _ in range(8)])
    w = (log_w - marginal(structure).log_prob(x)[0]).exp()
    assert abs(w.mean() - 1).item() < 4.5 * stderr(w) + 1e-3
