from functools import partial

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MixtureSameFamily
from torch.distributions import Normal as TorchNormal

from pyro_lvae import VAE, calibration
from pyro_lvae.conditionals import Bernoulli, Normal, StudentT, mixture, normal, precision_merge
from pyro_lvae.evaluate.chunks import _MadeBytes

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
    "conditional",
    [
        *(Bernoulli, Normal, partial(Normal, scale=0.3), partial(Normal, batch_norm=True)),
        *(partial(Normal, heteroscedastic=False), partial(Normal, heteroscedastic=False, batch_norm=True)),
        *(StudentT, partial(StudentT, df=4.0, scale=0.3), partial(StudentT, heteroscedastic=False)),
    ],
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


def test_a_variance_may_be_that_of_the_entry_for_all_data():
    head = Normal(5, 2, heteroscedastic=False, min_variance=0.25).double()
    with torch.no_grad():
        head.entry_variance.copy_(torch.tensor([-100.0, 1.0]))
    p = head(torch.randn(3, 4, 5).double())
    torch.testing.assert_close(p.variance.reshape(-1, 2).unique(dim=0)[0], torch.tensor([0.25, 1.5632617]).double())
    assert sum(q.numel() for q in head.parameters()) == 2 * 5 + 2 + 2


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


@pytest.mark.parametrize("mean", [0.25, torch.tensor([0.0, 0.25, 0.5, 1.0])])
def test_a_bernoulli_starts_at_the_mean_of_the_data(mean):
    head, h = Bernoulli(3, 4, mean=mean), torch.zeros(2, 3)
    expected = torch.as_tensor(mean).clamp(0.001, 0.999).expand(2, 4)
    torch.testing.assert_close(head(h).base_dist.probs, expected)


@pytest.mark.parametrize("mean", [1.5, -0.1, float("nan"), torch.full((3,), 0.5)])
def test_a_mean_of_binary_data_is_checked(mean):
    with pytest.raises(ValueError, match="mean is .*expected a number or \\[4\\]"):
        Bernoulli(3, 4, mean=mean)


STUDENT_T = {
    "learned": {},
    "one scale an entry": dict(heteroscedastic=False),
    "fixed": dict(df=3.0, scale=0.75),
}


def _student_t(name):
    """A likelihood whose parameters are all at random places, features `[3, 4, 5]`, and its (nu, mu, sigma) by hand."""
    head, h = StudentT(5, 6, **STUDENT_T[name]).double(), torch.randn(3, 4, 5).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    values = {n: p.detach().numpy() for n, p in head.named_parameters()}
    mu = h.numpy() @ values["mu.weight"].T + values["mu.bias"]
    nu, sigma = 3.0, 0.75
    if "raw_df" in values:
        nu = 2.1 + 97.9 / (1 + np.exp(-values["raw_df"]))
    if "entry_scale" in values:
        sigma = np.log1p(np.exp(values["entry_scale"])) + 3e-3
    if "raw_scale.weight" in values:
        raw = h.numpy() @ values["raw_scale.weight"].T + values["raw_scale.bias"]
        sigma = np.log1p(np.exp(raw)) + 3e-3
    return head(h), (nu, mu, sigma)


@pytest.mark.parametrize("name", STUDENT_T)
def test_student_t_is_scipys(name):
    """Density, distribution function and moments, to double precision and far into the tails."""
    p, (nu, mu, sigma) = _student_t(name)
    reference, tolerance = scipy.stats.t(nu, mu, sigma), dict(rtol=1e-10, atol=1e-10)
    x = torch.as_tensor(mu + 50 * np.random.default_rng(0).standard_normal(mu.shape) * (np.arange(6) > 2))
    np.testing.assert_allclose(p.log_prob(x).detach(), reference.logpdf(x.numpy()).sum(-1), **tolerance)
    np.testing.assert_allclose(p.base_dist.cdf(x).detach(), reference.cdf(x.numpy()), **tolerance)
    np.testing.assert_allclose(p.mean.detach(), reference.mean(), **tolerance)
    np.testing.assert_allclose(p.variance.detach(), reference.var() * np.ones_like(mu), **tolerance)


def test_student_t_keeps_its_floors():
    head, h = StudentT(5, 6, min_scale=0.25, min_df=2.5), torch.zeros(2, 5)
    torch.testing.assert_close(head.df, torch.full((6,), 5.5), atol=0.05, rtol=0)
    with torch.no_grad():
        head.raw_scale.bias.fill_(-100)
        head.raw_df.fill_(-100)
    p = head(h).base_dist
    assert p.scale.min() == 0.25
    assert p.df.min() == 2.5
    assert torch.isfinite(p.variance).all()


def test_student_t_normaliser_is_exact_enough_in_single_precision():
    """A learned nu ends where lgamma((nu+1)/2) - lgamma(nu/2) would begin to cancel."""
    head = StudentT(5, 6)
    with torch.no_grad():
        head.raw_df.fill_(100)
    h, x = torch.randn(4, 5), torch.randn(4, 6)
    torch.testing.assert_close(
        head(h).log_prob(x), head.double()(h.double()).log_prob(x.double()).float(), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(df=2.0), "df is 2.0; it must be above 2"),
        (dict(min_df=1.0), "min_df is 1.0; .* below 100"),
        (dict(scale=0.0), "scale is 0.0"),
        (dict(min_scale=0.0), "min_scale is 0.0"),
    ],
)
def test_student_t_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        StudentT(5, 6, **options)


def test_student_t_learns_the_tails_of_data():
    """Of 2,000 draws of t_3 and N(0, 1), the fitted nu are near 3 (standard error about 0.25) and large."""
    x = torch.stack([torch.distributions.StudentT(3.0).sample((2000,)), torch.randn(2000)], -1)
    head, h = StudentT(1, 2, heteroscedastic=False), torch.zeros(2000, 1)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        (-head(h).log_prob(x).mean()).backward()
        optimizer.step()
    assert head.df[0].item() == pytest.approx(3, abs=1)
    assert head.df[1] > 12
    torch.testing.assert_close(head(h[:1]).base_dist.scale[0], torch.ones(2), atol=0.1, rtol=0)


def test_student_t_is_calibrated_on_its_own_draws():
    """F(x) is uniform over 4,800 draws x ~ p(x | z), z from the guide: standard error of a level below 0.0072."""
    vae = VAE(12, 3, 16, batch_norm=False, likelihood=partial(StudentT, df=2.5, scale=0.5))
    with torch.no_grad():
        vae.likelihood.mu.weight.zero_()  # z carries nothing, so that prior and guide agree about x
    x = vae.likelihood(torch.zeros(400, 16)).sample()
    found = calibration([vae], x, num_samples=1, num_bins=5)
    torch.testing.assert_close(found.observed, found.predicted, atol=0.03, rtol=0)


def log_p_of_mixture(log_prob, spread, batch, dtype):
    """A mixture of 7 normals in 5 dims at values near them, and the gradients, both of entries of about one."""
    torch.manual_seed(0)
    logits, loc, z = torch.randn(7), torch.randn(7, 5), torch.randn(3, 4, 5)
    z = loc[torch.arange(12).reshape(3, 4) % 7] + spread * z
    scale = spread * (0.5 + torch.rand(7, 5))
    given = [t.to(dtype).requires_grad_() for t in (logits, loc, scale, z)]
    p = mixture(given[0], dist.Normal(*given[1:3]).to_event(1)).expand(batch)
    log_p = log_prob(p, given[3])
    return log_p.detach().double(), [spread * g.double() for g in torch.autograd.grad(log_p.sum(), given)]


@pytest.mark.parametrize("batch", [(), (4,), (3, 4)])
@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
def test_mixtures_of_normals_have_the_density_that_torch_gives_in_float64(spread, batch):
    log_p, grads = log_p_of_mixture(lambda p, z: p.log_prob(z), spread, batch, torch.float)
    exact, exact_grads = log_p_of_mixture(MixtureSameFamily.log_prob, spread, batch, torch.double)
    torch.testing.assert_close(log_p, exact, rtol=1e-6, atol=1e-6)
    for found, expected in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_mixtures_of_normals_make_no_tensor_of_all_components_and_dims():
    p = mixture(torch.zeros(64), dist.Normal(torch.zeros(64, 32), torch.ones(64, 32)).to_event(1)).expand((1000,))
    z = torch.zeros(1000, 32)
    with _MadeBytes() as counter:
        p.log_prob(z)
    assert counter.bytes < 1000 * 64 * 32 * 4


def test_mixtures_of_other_components_have_torchs_density():
    laplaces = mixture(torch.randn(7), dist.Laplace(torch.randn(7, 5), 1.0).to_event(1))
    one_a_row = mixture(torch.randn(4, 7), dist.Normal(torch.randn(4, 7, 5), torch.rand(4, 7, 5) + 0.1).to_event(1))
    z = torch.randn(4, 5)
    for p in (laplaces, one_a_row):
        torch.testing.assert_close(p.log_prob(z), MixtureSameFamily.log_prob(p, z), rtol=0, atol=0)


def test_mixtures_of_normals_refuse_values_that_are_none():
    p = mixture(torch.zeros(2), dist.Normal(torch.zeros(2, 3), 1.0).to_event(1))
    with pytest.raises(ValueError, match="support"):
        p.log_prob(torch.full((3,), float("nan")))
