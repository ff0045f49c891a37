"""Estimators and evaluation against closed-form answers, in float64.

The statistical tests draw from a fixed seed; with a fresh seed each would fail less than once in
1,000 runs (bounds are at least 3.3 standard errors wide, one-sided where the theory is).
"""

import math

import pytest
import torch
from linear_gaussian import ExactPosterior, make_linear, marginal

from pyro_lvae import IWAE, VAE, HierarchicalVAE, LadderVAE, elbo, kl_per_layer, log_likelihood
from pyro_lvae.conditionals import Normal
from pyro_lvae.traces import evaluating, fixed_noise, ledger

OPTIONS = dict(num_hidden=0, batch_norm=False, likelihood=Normal)
CASES = {
    "VAE": lambda: VAE(4, 2, 8, **OPTIONS),
    "HierarchicalVAE": lambda: HierarchicalVAE(4, (3, 2), (8, 8), **OPTIONS),
    "LadderVAE": lambda: LadderVAE(4, (3, 2), (8, 8), **OPTIONS),
    "LadderVAE-unshared": lambda: LadderVAE(4, (3, 2, 2), (8, 8, 8), share_top_down=False, **OPTIONS),
    "HierarchicalVAE-skip": lambda: HierarchicalVAE(4, (3, 2), (8, 8), skip=True, **OPTIONS),
    "LadderVAE-skip": lambda: LadderVAE(4, (3, 2, 2), (8, 8, 8), skip=True, **OPTIONS),
}


@pytest.fixture(params=CASES)
def linear(request):
    return make_linear(CASES[request.param]())


@pytest.fixture
def exact():
    return ExactPosterior()


def test_importance_sampling_finds_the_marginal_likelihood(linear):
    p = marginal(linear)
    x = p.sample((20,))
    estimate = log_likelihood(linear, x, num_samples=40_000)
    torch.testing.assert_close(estimate, p.log_prob(x), atol=0.25, rtol=0)
    # Datum by datum the error is that of 40,000 weights; their own spread tells its size.
    with evaluating(linear):
        log_w = ledger(linear.model, linear.guide, x, num_particles=40_000).local_log_weight()
    w = (log_w - log_w.logsumexp(0)).exp()
    stderr = (w.square().sum(0) - 1 / len(w)).clamp_min(0).sqrt()
    assert ((estimate - p.log_prob(x)).abs() < 5 * stderr + 1e-3).all()


def test_bounds_are_ordered(linear):
    """ELBO <= IWAE_5 <= IWAE_50 <= log p, each within 3.3 standard errors."""
    p = marginal(linear)
    x, repeats = p.sample((50,)), 60
    with evaluating(linear):
        bounds = [
            torch.tensor([-IWAE(k).loss(linear.model, linear.guide, x) / len(x) for _ in range(repeats)])
            for k in (1, 5, 50)
        ]
    truth = p.log_prob(x).mean()
    for lower, upper in zip(bounds, [*bounds[1:], None], strict=True):
        above = truth if upper is None else upper.mean()
        spread = lower.var() / repeats + (0 if upper is None else upper.var() / repeats)
        assert lower.mean() <= above + 3.3 * math.sqrt(spread)


def test_elbo_is_reconstruction_less_kl(linear):
    """With the same noise the three agree to rounding."""
    x, same = marginal(linear).sample((30,)), dict(num_samples=20, memory=2**40)
    with evaluating(linear), fixed_noise(x.device):
        sites = ledger(linear.model, linear.guide, x, num_particles=20)
    with fixed_noise(x.device):
        kl = kl_per_layer(linear, x, **same)
    with fixed_noise(x.device):
        bound = elbo(linear, x, **same).mean().item()
    assert bound == pytest.approx(sites["x"].log_p.mean().item() - sum(kl.values()))


def test_an_exact_posterior_makes_every_estimate_exact(exact):
    x = 2 * torch.randn(9, 4, dtype=torch.double)
    truth = exact.log_prob(x)
    torch.testing.assert_close(log_likelihood(exact, x, 3), truth)
    torch.testing.assert_close(elbo(exact, x, 1), truth)
    assert IWAE(4).loss(exact.model, exact.guide, x) == pytest.approx(-truth.sum().item())


def test_kl_shares_of_an_exact_posterior_sum_to_its_kl(exact):
    """E_p(x)[KL(q(z|x)||p(z))] is the mutual information, here 0.5 (log|C_x| - log|noise|) for x and z1."""
    g = torch.Generator().manual_seed(3)
    n = 4000
    z2 = torch.randn(n, 2, generator=g).double()
    z1 = z2 @ exact.a.T.detach() + exact.s1**0.5 * torch.randn(n, 3, generator=g).double()
    x = z1 @ exact.w.T.detach() + exact.sx**0.5 * torch.randn(n, 4, generator=g).double()
    c1 = exact.a @ exact.a.T + exact.s1 * torch.eye(3).double()
    cov = exact.w @ c1 @ exact.w.T + exact.sx * torch.eye(4).double()
    information = 0.5 * (torch.logdet(cov) - 4 * math.log(exact.sx)).item()
    kl = kl_per_layer(exact, x, num_samples=5)
    assert list(kl) == ["z1", "z2"]
    assert sum(kl.values()) == pytest.approx(information, abs=0.1)


def test_chunks_do_not_change_the_answer(exact):
    x = torch.randn(5, 4, dtype=torch.double)
    torch.testing.assert_close(log_likelihood(exact, x, 7, memory=1), exact.log_prob(x))
    torch.testing.assert_close(log_likelihood(exact, x, 7, memory=2**40), exact.log_prob(x))
