import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_lvae import IWAE, VAE, anneal, ledger
from pyro_lvae.annealing import subsample
from pyro_lvae.traces import evaluating, fixed_noise
from pyro_lvae.traces.messengers import in_float32


class GlobalWeight(nn.Module):
    """x = w z + noise, with a global weight w and one deterministic site outside the plate."""

    def __init__(self, size=None, subsample=None):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([0.3, -0.2]).double())
        self.full_size, self.subsample = size, subsample

    def plate(self, x):
        return pyro.plate("data", self.full_size or len(x), subsample_size=self.subsample, dim=-1)

    def model(self, x, y=None):
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.deterministic("w_doubled", 2 * w)
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * w, 0.5).to_event(1), obs=x)

    def guide(self, x, y=None):
        pyro.sample("w", dist.Normal(self.loc, 0.1).to_event(1))
        with self.plate(x):
            pyro.sample("z", dist.Normal(0.2 * x, 0.8).to_event(1))


def by_hand(x, w, z, beta=1.0, scale=1.0):
    """(local log-weight [..., B], global log-weight) of GlobalWeight at w and z."""
    n = torch.distributions.Normal
    loc = torch.tensor([0.3, -0.2]).double()
    latent = n(0.0, 1.0).log_prob(z) - n(0.2 * x, 0.8).log_prob(z)
    local = (n(z * w, 0.5).log_prob(x) + beta * latent).sum(-1)
    return local, beta * (n(0.0, 1.0).log_prob(w) - n(loc, 0.1).log_prob(w)).sum()


@pytest.fixture
def x2():
    return torch.randn(6, 2, dtype=torch.double)


@pytest.mark.parametrize("particles", [None, 1, 4])
def test_ledger_against_hand_derived_densities(x2, particles):
    s = GlobalWeight()
    sites = ledger(s.model, s.guide, x2, num_particles=particles)
    shape = (6,) if particles is None else (particles, 6)
    assert sites["z"].value.shape == (*shape, 2)
    assert sites["w"].value.shape == (2,), "a global site keeps one draw"
    local, outer = by_hand(x2, sites["w"].value, sites["z"].value)
    torch.testing.assert_close(sites.local_log_weight(), local)
    torch.testing.assert_close(sites.global_log_weight(), outer)
    assert set(sites.global_sites) == {"w"}
    assert list(sites.latents) == ["w", "z"]
    assert sites.guide_order == ("w", "z")


def test_iwae_is_per_datum_with_beta_inside_and_scale_and_global_sites_outside(x2):
    s, k = GlobalWeight(), 5
    for beta, size in ((1.0, None), (0.5, None), (0.5, 60)):
        with anneal(beta=beta), subsample(size) if size else nullcontext():
            torch.manual_seed(4)
            sites = ledger(s.model, s.guide, x2, num_particles=k)
            torch.manual_seed(4)
            loss = IWAE(k).loss(s.model, s.guide, x2)
        local, outer = by_hand(x2, sites["w"].value, sites["z"].value, beta)
        expected = (size or 6) / 6 * (local.logsumexp(0) - math.log(k)).sum() + outer
        assert -loss == pytest.approx(expected.item(), abs=1e-6)


def test_a_plate_that_subsamples_by_itself_counts_n_over_b_times():
    s, x = GlobalWeight(size=60, subsample=6), torch.randn(6, 2, dtype=torch.double)
    sites = ledger(s.model, s.guide, x, num_particles=3)
    assert sites.plate_scale() == 10
    local, _ = by_hand(x, sites["w"].value, sites["z"].value)
    torch.testing.assert_close(sites.local_log_weight(), local)


@pytest.mark.parametrize("size", [None, 60])
def test_one_particle_is_pyros_trace_elbo(x2, size):
    s, losses = GlobalWeight(), []
    for estimator in (Trace_ELBO(), IWAE(1)):
        torch.manual_seed(5)
        with anneal(beta=0.3), subsample(size) if size else nullcontext():
            losses.append(estimator.loss(s.model, s.guide, x2))
    assert losses[0] == pytest.approx(losses[1])


def test_masked_and_scaled_sites(x2):
    s = GlobalWeight()
    mask = torch.tensor([True, True, False, True, False, True])
    with poutine.mask(mask=mask), poutine.scale(scale=0.25):
        sites = ledger(s.model, s.guide, x2)
    n = torch.distributions.Normal
    by_row = n(sites["z"].value * sites["w"].value, 0.5).log_prob(x2).sum(-1)
    torch.testing.assert_close(sites["x"].log_p, by_row * mask)
    torch.testing.assert_close(sites["x"].log_ratio, 0.25 * by_row * mask)
    assert not sites["z"].log_ratio[~mask].any()


def test_a_latent_that_the_guide_leaves_out_is_drawn_from_its_prior(x2):
    s = GlobalWeight()

    def guide(x):
        pyro.sample("w", dist.Normal(s.loc, 0.1).to_event(1))

    sites = ledger(s.model, guide, x2, num_particles=3)
    assert sites["z"].q is None
    assert not sites["z"].log_ratio.any()
    assert sites.local_log_weight().shape == (3, 6)


def test_evaluating_restores_every_mode():
    vae = VAE(4, 2, 8)
    vae.decoder.eval()
    with evaluating(vae):
        assert not any(m.training for m in vae.modules())
        assert not torch.is_grad_enabled()
    assert vae.training
    assert not vae.decoder.training
    assert vae.bottom_up.training


def test_fixed_noise_leaves_the_callers_random_state_alone():
    before = torch.get_rng_state()
    with fixed_noise(torch.device("cpu")):
        first = torch.randn(3)
    with fixed_noise(torch.device("cpu")):
        assert torch.equal(torch.randn(3), first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["logits", "probs"])
def test_class_probabilities_of_few_digits_are_normalised_anew_in_float32(kind):
    few = dist.Categorical(**{kind: torch.rand(50, 10).bfloat16()}, validate_args=False)
    assert few.probs.dtype == torch.bfloat16  # and are kept from now on
    found = in_float32(dist.MixtureSameFamily(few, dist.Normal(torch.zeros(50, 10), torch.ones(50, 10))))
    mixing = found.mixture_distribution
    assert mixing.probs.dtype == mixing.logits.dtype == torch.float32
    torch.testing.assert_close(mixing.probs.sum(-1), torch.ones(50), rtol=0, atol=1e-6)
    torch.testing.assert_close(mixing.logits.logsumexp(-1), torch.zeros(50), rtol=0, atol=1e-6)
    assert few.probs.dtype == torch.bfloat16  # the caller's own is as it was


def test_in_float32_leaves_alone_what_is_in_it():
    fn = dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1)
    assert in_float32(fn) is fn
