from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal as TorchNormal

from pyro_lvae.conditionals import Bernoulli, Normal, normal, precision_merge

means, variances = st.floats(-5, 5), st.floats(1e-3, 50)


@given(means, variances, means, variances)
@settings(max_examples=50, deadline=None)
def test_precision_merge_is_the_product_of_the_densities(mu_1, var_1, mu_2, var_2):
    """log N_1 + log N_2 - log N_merged is the same at every point."""
    args = [torch.tensor(v, dtype=torch.double) for v in (mu_1, var_1, mu_2, var_2)]
    mu, var = precision_merge(*args)
    at = mu + var.sqrt() * torch.linspace(-3, 3, 7, dtype=torch.double)
    one, two, merged = (TorchNormal(m, v.sqrt()).log_prob(at) for m, v in (args[:2], args[2:], (mu, var)))
    rest = one + two - merged
    torch.testing.assert_close(rest, rest[:1].expand(7), rtol=1e-8, atol=1e-8)


def test_precision_merge_gives_the_variance_that_the_paper_prints_as_sigma():
    mu, var = precision_merge(*(torch.tensor(v) for v in (1.0, 0.25, 3.0, 1.0)))
    assert var.item() == pytest.approx(1 / (1 / 0.25 + 1))
    assert mu.item() == pytest.approx((1 / 0.25 + 3) / (1 / 0.25 + 1))


@pytest.mark.parametrize(
    "conditional", [Bernoulli, Normal, partial(Normal, scale=0.3), partial(Normal, batch_norm=True)]
)
@pytest.mark.parametrize("lead", [(4,), (3, 4)])
def test_conditionals_declare_their_event_dim(conditional, lead):
    p = conditional(5, 6)(torch.randn(*lead, 5))
    assert (p.batch_shape, p.event_shape) == (lead, (6,))
    assert p.log_prob(torch.ones(*lead, 6)).shape == lead


def test_normal_variance_starts_at_softplus_of_one_and_keeps_its_floor():
    head = Normal(5, 6, min_variance=0.25)
    _, var = head.moments(torch.zeros(2, 5))
    torch.testing.assert_close(var, torch.full((2, 6), 1.3132617 + 0.25))
    with torch.no_grad():
        head.head[0].bias.fill_(-100)
    assert head.moments(torch.zeros(2, 5))[1].min() == 0.25


def test_fixed_scale_is_a_standard_deviation_and_is_saved():
    head = Normal(5, 6, scale=0.3)
    assert head(torch.randn(2, 5)).base_dist.scale.unique().item() == pytest.approx(0.3)
    assert "scale" in head.state_dict()
    assert "scale" not in Normal(5, 6).state_dict()
    with pytest.raises(ValueError, match="scale is -1"):
        Normal(5, 6, scale=-1)


def test_normal_is_parameterised_by_the_variance():
    assert normal(torch.zeros(3), torch.full((3,), 4.0)).variance.unique().item() == 4


def test_grey_values_are_scored_by_their_cross_entropy():
    head, h, x = Bernoulli(3, 4, grey=True).double(), torch.randn(5, 3).double(), torch.rand(5, 4).double()
    p = head.logits(h).sigmoid()
    expected = (x * p.log() + (1 - x) * (1 - p).log()).sum(-1)
    torch.testing.assert_close(head(h).log_prob(x), expected)
    torch.testing.assert_close(head(h).expand((2, 5)).log_prob(x), expected.expand(2, 5))
    with pytest.raises(ValueError, match="within the support"):
        Bernoulli(3, 4)(h.float()).log_prob(x.float())
