"""A mixture latent: c is in the model alone and enumerated; Pyro's TraceEnum_ELBO is the oracle."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import nn

from pyro_lvae import IWAE, check, elbo, kl_per_layer, ledger, log_likelihood


class Mixture(nn.Module):
    """c ~ Cat(pi), z1 | c ~ N(m_c, 1), x | z1 ~ N(W z1, 0.5^2); `marginal` sums c out by itself."""

    def __init__(self, marginal=False):
        super().__init__()
        g = torch.Generator().manual_seed(2)
        self.marginal = marginal
        self.logits = nn.Parameter(torch.randn(3, generator=g).double())
        self.means = nn.Parameter(3 * torch.randn(3, 2, generator=g).double())
        self.w = nn.Parameter(torch.randn(4, 2, generator=g).double())

    def model(self, x, y=None):
        one = x.new_ones(())
        with pyro.plate("data", len(x), dim=-1):
            if self.marginal:
                parts = dist.Normal(self.means, one).to_event(1)
                z = pyro.sample("z1", dist.MixtureSameFamily(dist.Categorical(logits=self.logits), parts))
            else:
                c = pyro.sample("c", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})
                z = pyro.sample("z1", dist.Normal(self.means[c], one).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.w.T, 0.5 * one).to_event(1), obs=x)

    def guide(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z1", dist.Normal(x @ self.w, x.new_ones(())).to_event(1))


@pytest.fixture
def x4():
    return torch.randn(6, 4, dtype=torch.double)


def test_keeps_the_contract(x4):
    check(Mixture(), x4)


def test_ledger_sums_out_what_pyro_sums_out(x4):
    mixture, losses = Mixture(), []
    for estimator in (TraceEnum_ELBO(max_plate_nesting=1), IWAE(1)):
        torch.manual_seed(1)
        mixture.zero_grad()
        loss = estimator.differentiable_loss(mixture.model, mixture.guide, x4)
        loss.backward()
        losses.append([loss.detach(), *(p.grad.clone() for p in mixture.parameters())])
    for ours, pyros in zip(*losses, strict=True):
        torch.testing.assert_close(ours, pyros)


@pytest.mark.parametrize("particles", [None, 5])
def test_ledger_equals_the_hand_marginalised_model(x4, particles):
    weights = []
    for mixture in (Mixture(), Mixture(marginal=True)):
        torch.manual_seed(1)
        weights.append(ledger(mixture.model, mixture.guide, x4, num_particles=particles).local_log_weight())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("evaluate", [lambda s, x: log_likelihood(s, x, 50), lambda s, x: elbo(s, x, 50)])
def test_evaluation_equals_the_hand_marginalised_model(x4, evaluate):
    results = []
    for mixture in (Mixture(), Mixture(marginal=True)):
        torch.manual_seed(1)
        results.append(evaluate(mixture, x4))
    torch.testing.assert_close(*results)


def test_kl_shares_sum_to_reconstruction_less_elbo(x4):
    mixture = Mixture()
    torch.manual_seed(1)
    kl = kl_per_layer(mixture, x4, 50)
    torch.manual_seed(1)
    bound = elbo(mixture, x4, 50).mean()
    torch.manual_seed(1)
    sites = ledger(mixture.model, mixture.guide, x4, num_particles=50)
    assert set(kl) == {"z1", "c"}
    # The likelihood given z1 does not depend on c.
    assert sum(kl.values()) == pytest.approx((sites["x"].log_p.mean() - bound).item())


def test_a_guide_that_samples_a_discrete_site_is_refused_by_iwae(x4):
    class Sampled(Mixture):
        def guide(self, x, y=None):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z1", dist.Normal(x @ self.w, x.new_ones(())).to_event(1))
                pyro.sample("c", dist.Categorical(logits=self.logits.expand(len(x), 3)))

    from pyro_lvae.objectives import check_supported

    structure = Sampled()
    sites = ledger(structure.model, structure.guide, x4)
    check_supported(Trace_ELBO(), sites)
    with pytest.raises(ValueError, match=r"IWAE .*'c' cannot be reparameterised; use pyro_lvae.RWS or TVO"):
        check_supported(IWAE(3), sites)
