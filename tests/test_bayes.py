"""Posteriors over weights: against conjugate answers, NUTS, hand-written sums and draws one at a time, in float64."""

import copy
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive
from pyro.nn import PyroModule, PyroSample, pyro_method
from test_compile import ESTIMATORS, check_equal, traced_only  # noqa: F401
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.nn import functional as F

from pyro_lvae import (
    IWAE,
    SWAG,
    VAE,
    BayesianWeights,
    Dataset,
    HierarchicalVAE,
    SampledELBO,
    check,
    elbo,
    fit,
    generative,
    laplace,
    ledger,
    log_likelihood,
    predictive_log_likelihood,
    prune,
    signal_to_noise,
    weight_kl,
    weight_summary,
    weights_to_inference_data,
)
from pyro_lvae.annealing import subsample
from pyro_lvae.bayes import POSTERIORS, PRIORS, posteriors, priors
from pyro_lvae.bayes.distributions import DiagonalNormal, Draws, LowRankNormal, MatrixNormal
from pyro_lvae.bayes.noise import Drawn, LayerNoise, ManyWeights
from pyro_lvae.conditionals import Normal
from pyro_lvae.evaluate import LayerSummary
from pyro_lvae.evaluate.calibration import calibration, reliability
from pyro_lvae.optim import FusedAdam
from pyro_lvae.step import Step
from pyro_lvae.traces import log_densities

NOISES = ("shared", "local_reparameterization", "flipout")
IN, NOISE = 3, 0.5


class Regression(nn.Module):
    """x = c W^T + N(0, 0.5^2) for given inputs c, which stand as y: W has a conjugate posterior."""

    def __init__(self, outputs: int = 1):
        super().__init__()
        self.linear = nn.Linear(IN, outputs, bias=False, dtype=torch.double)

    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(self.linear(y), NOISE).to_event(1), obs=x)

    def guide(self, x, y=None):
        pass


@pytest.fixture
def regression():
    """Data of a regression, with the exact posterior mean and covariance of W under N(0, 1), and log p(x)."""
    c = torch.randn(20, IN).double() * torch.tensor([1.0, 0.5, 0.2]).double()
    x = c @ torch.tensor([[1.0], [-0.5], [0.3]]).double() + NOISE * torch.randn(20, 1).double()
    precision = torch.eye(IN).double() + c.T @ c / NOISE**2
    mean = torch.linalg.solve(precision, c.T @ x / NOISE**2)
    evidence = MultivariateNormal(torch.zeros(20).double(), NOISE**2 * torch.eye(20).double() + c @ c.T)
    return x, c, mean.T, torch.linalg.inv(precision), evidence.log_prob(x[:, 0])


def _flat(fn, value):
    return fn.event_shape.numel(), value.flatten(-len(fn.event_shape))


def _gaussians():
    a, b = torch.randn(4, 4).double().tril(), torch.randn(6, 6).double().tril()
    for m in (a, b):
        m.diagonal().abs_().add_(0.3)
    loc = torch.randn(4, 3, 2).double()
    factor, scale = torch.randn(24, 2).double(), torch.rand(4, 3, 2).double() + 0.2
    yield DiagonalNormal(loc, scale), scale.flatten().square().diag()
    yield LowRankNormal(loc, scale, factor), scale.flatten().square().diag() + factor @ factor.T
    yield MatrixNormal(loc, a, b), torch.kron(a @ a.T, b @ b.T)


@pytest.mark.parametrize("which", range(3))
def test_gaussians_over_tensors(which):
    """Densities, entropies and marginal variances against the dense covariance; KLs against the dense formula."""
    q, covariance = list(_gaussians())[which]
    dense = MultivariateNormal(q.mean.flatten(), covariance)
    value = q.rsample((5,))
    torch.testing.assert_close(q.log_prob(value), dense.log_prob(value.flatten(1)))
    torch.testing.assert_close(q.entropy(), dense.entropy())
    torch.testing.assert_close(q.variance.flatten(), covariance.diagonal())
    p = dist.Normal(0.3 * torch.ones(4, 3, 2).double(), 0.7).to_event(3)
    other = MultivariateNormal(torch.full((24,), 0.3).double(), 0.49 * torch.eye(24).double())
    torch.testing.assert_close(kl_divergence(q, p), kl_divergence(dense, other))
    torch.testing.assert_close(kl_divergence(Draws(q, 3), Draws(p, 3)), 3 * kl_divergence(dense, other))


@pytest.mark.parametrize("which", range(3))
def test_draws_of_gaussians_have_their_covariance(which):
    """5 sigma in each of 300 entries: one failure in some 5,000 seeds."""
    q, covariance = list(_gaussians())[which]
    w = q.rsample((40_000,)).flatten(1)
    products = torch.einsum("ni,nj->nij", w - q.mean.flatten(), w - q.mean.flatten())
    assert ((products.mean(0) - covariance).abs() < 5.5 * products.std(0) / 200).all()


@pytest.mark.parametrize("which", range(3))
def test_kl_to_a_laplace_prior(which):
    """Against the mean of 200,000 draws, 5 standard errors."""
    q, _ = list(_gaussians())[which]
    p = dist.Laplace(torch.zeros(4, 3, 2).double(), 0.5).to_event(3)
    w = q.rsample((100_000,))
    found = q.log_prob(w) - p.log_prob(w)
    assert (kl_divergence(q, p) - found.mean()).abs() < 5 * found.std() / math.sqrt(len(found))


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.01), (2.5, 3.0)])
def test_kl_of_a_precision_by_quadrature(a, b):
    q, p = dist.LogNormal(torch.tensor(0.4).double(), 0.3), dist.Gamma(torch.tensor(a).double(), b)
    u = torch.linspace(0.4 - 3, 0.4 + 3, 4001).double()  # log alpha, ten standard deviations to either side
    each = (q.log_prob(u.exp()) + u).exp() * (q.log_prob(u.exp()) - p.log_prob(u.exp()))
    torch.testing.assert_close(kl_divergence(q, p), torch.trapezoid(each, u))


def test_the_kl_of_a_precision_counts_in_closed_form(x):
    b = BayesianWeights(vae(), where="decoder.*", prior=priors.HierarchicalPrecision)
    sites = ledger(b.model, b.guide, x.double()).global_sites
    assert len(sites) == 2 * len(b.names)
    assert all(site.has_closed_form for site in sites.values())


@pytest.mark.parametrize("posterior", [partial(posteriors.LowRank, rank=IN), posteriors.MatrixNormal])
def test_at_the_exact_posterior_every_draw_gives_the_evidence(posterior, regression):
    """log p(x, w) - log q(w) is then log p(x), whatever w was drawn."""
    x, c, mean, covariance, evidence = regression
    b = BayesianWeights(Regression(), posterior=posterior)
    q = b.posterior("linear.weight")
    root = torch.linalg.cholesky(covariance)
    with torch.no_grad():
        q.mu.copy_(mean)
        if isinstance(q, posteriors.MatrixNormal):
            q.rows.rho.fill_(math.log(math.expm1(1)))
            q.columns.below.copy_(root)
            q.columns.rho.copy_(torch.log(torch.expm1(root.diagonal())))
        else:
            smallest = 0.9 * torch.linalg.eigvalsh(covariance)[0]
            q.rho.fill_(torch.log(torch.expm1(smallest.sqrt())))
            q.factor.copy_(torch.linalg.cholesky(covariance - smallest * torch.eye(IN).double()))
    sites = ledger(b.model, b.guide, x, c)
    sampled = sites.local_log_weight().sum() + sum(s.log_ratio for s in sites.global_sites.values())
    torch.testing.assert_close(sampled, evidence)
    expected = evidence + kl_divergence(sites["weights.linear.weight"].q, sites["weights.linear.weight"].p)
    data = torch.stack([ledger(b.model, b.guide, x, c).local_log_weight().sum() for _ in range(500)])
    assert (data.mean() - expected).abs() < 5 * data.std() / math.sqrt(500)  # 5 standard errors


@pytest.mark.parametrize("noise", NOISES)
def test_training_finds_the_conjugate_posterior(noise, regression):
    """The best independent Normal has the exact means, and 1 / sqrt of the precision's diagonal as sigma."""
    x, c, mean, covariance, _ = regression
    b = BayesianWeights(Regression(), noise=noise)
    _train(b, (x, c), 800)
    q = b.posterior("linear.weight")
    torch.testing.assert_close(q.mu.detach(), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(
        q.sigma.detach()[0], torch.linalg.inv(covariance).diagonal().rsqrt(), atol=0.02, rtol=0.05
    )


def _train(b, args, steps, lr=0.05):
    step, adam = Step(b, SampledELBO(), size=len(args[0])), FusedAdam(b.parameters(), lr=lr)
    for i in range(steps):
        adam.param_groups[0]["lr"] = lr * (1 - i / steps)
        beta = dict.fromkeys([*(f"weights.{n}" for n in b.names), "z1"], 1.0)
        step(args, beta)
        adam.step()


def test_nuts_on_the_model_agrees_with_the_conjugate_posterior(regression):
    """`BayesianWeights.model` is an ordinary Pyro model: 300 draws, means within 5 standard errors of 100."""
    x, c, mean, covariance, _ = regression
    b = BayesianWeights(Regression()).eval()
    mcmc = MCMC(NUTS(b.model), num_samples=300, warmup_steps=100, disable_progbar=True)
    mcmc.run(x, c)
    w = mcmc.get_samples()["weights.linear.weight"][:, 0]
    sd = covariance.diagonal().sqrt()
    assert ((w.mean(0) - mean[0]).abs() < 5 * sd / 10).all()  # NUTS gives at least 100 effective draws of 300
    assert ((w.std(0) / sd).log().abs() < 0.3).all()


class Factor(nn.Module):
    """x = w z + N(0, 0.5^2), one factor z ~ N(0, 1); the guide is linear in x."""

    def __init__(self, x_dim):
        super().__init__()
        self.decoder = nn.Linear(1, x_dim, bias=False, dtype=torch.double)
        self.encoder = nn.Linear(x_dim, 1, bias=False, dtype=torch.double)
        self.log_tau = nn.Parameter(torch.zeros(1).double())

    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z1", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), NOISE).to_event(1), obs=x)

    def guide(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z1", dist.Normal(self.encoder(x), self.log_tau.exp()).to_event(1))


def _coordinate_ascent(x, w):
    """The optimum of the same bound by alternating closed forms: means and variances of w, and variance of z."""
    m, s2 = w.clone(), torch.full_like(w, 0.01)
    for _ in range(500):
        tau2 = 1 / (1 + (m.square() + s2).sum() / NOISE**2)
        mu = tau2 * x @ m / NOISE**2
        s2 = torch.full_like(w, 1) / (1 + (mu.square() + tau2).sum() / NOISE**2)
        m = s2 * (x * mu[:, None]).sum(0) / NOISE**2
    return m, s2, tau2


@pytest.mark.parametrize("noise", ["shared", "local_reparameterization"])
def test_a_bayesian_factor_model_finds_what_coordinate_ascent_finds(noise):
    w = torch.tensor([1.0, -0.8, 0.5, 0.2]).double()
    x = torch.randn(60, 1).double() * w + NOISE * torch.randn(60, 4).double()
    b = BayesianWeights(Factor(4), where="decoder", noise=noise)
    _train(b, (x,), 1200, lr=0.03)
    q = b.posterior("decoder.weight")
    m, s2, tau2 = _coordinate_ascent(x, q.mu.detach()[:, 0])  # from the same of the two signs
    torch.testing.assert_close(q.mu.detach()[:, 0], m, atol=0.03, rtol=0)
    torch.testing.assert_close(q.sigma.detach()[:, 0], s2.sqrt(), atol=0, rtol=0.1)
    torch.testing.assert_close(b.structure.log_tau.detach().exp()[0], tau2.sqrt(), atol=0, rtol=0.05)


class ExactFactor(Factor):
    """With q(z|x, w) = p(z|x, w), so that the bound is that on w alone."""

    def guide(self, x, y=None):
        w = self.decoder.weight[:, 0]
        variance = 1 / (1 + w.square().sum() / NOISE**2)
        with pyro.plate("data", len(x), dim=-1):
            loc = variance * (x @ w / NOISE**2)
            pyro.sample("z1", dist.Normal(loc[:, None], variance.sqrt()).to_event(1))


@pytest.mark.slow
def test_a_bayesian_factor_model_finds_what_nuts_finds():
    """One sign of w; means within 0.05, standard deviations within 25 %, for the posterior is not quite Normal."""
    w = torch.tensor([1.0, -0.8, 0.5, 0.2]).double()
    x = torch.randn(60, 1).double() * w + NOISE * torch.randn(60, 4).double()
    mcmc = MCMC(
        NUTS(BayesianWeights(Factor(4), where="decoder").eval().model),
        num_samples=1000,
        warmup_steps=300,
        disable_progbar=True,
    )
    mcmc.run(x)
    drawn = mcmc.get_samples()["weights.decoder.weight"][..., 0]
    drawn = drawn * (drawn @ w).sign()[:, None]
    for posterior in (partial(posteriors.LowRank, rank=4), posteriors.MatrixNormal):
        b = BayesianWeights(ExactFactor(4), where="decoder", posterior=posterior)
        _train(b, (x,), 2000, lr=0.03)
        found = b.posterior("decoder.weight")().rsample((20_000,))[..., 0].detach()
        found = found * (found.mean(0) @ w).sign()
        torch.testing.assert_close(found.mean(0), drawn.mean(0), atol=0.05, rtol=0)
        assert ((found.std(0) / drawn.std(0)).log().abs() < 0.22).all()


def _gradients(b, x, c, repeats):
    """`[repeats, parameters]` of mu and rho."""
    step, found = Step(b, SampledELBO(), size=len(x)), []
    for _ in range(repeats):
        step((x, c), {f"weights.{name}": 1.0 for name in b.names})
        found.append(torch.cat([p.grad.flatten() for p in b.parameters()]))
    return torch.stack(found)


def test_gradients_are_unbiased_and_ordered_in_variance(regression):
    """Against the exact gradient, 5 standard errors (one failure in some 100,000 seeds); local < flipout < shared, and
    three draws < one."""
    x, c, *_ = regression
    total = {}
    for noise in (*NOISES, "three draws"):
        torch.manual_seed(0)
        options = dict(num_weights=3) if noise == "three draws" else dict(noise=noise)
        b = BayesianWeights(Regression(), posterior=partial(posteriors.MeanField, sigma=0.5), **options)
        found = _gradients(b, x, c, 1000)
        exact = torch.cat([g.flatten() for g in _exact_gradient(b.posterior("linear.weight"), x, c)])
        assert ((found.mean(0) - exact).abs() < 5 * found.std(0) / math.sqrt(1000)).all()
        total[noise] = found.var(0).sum()
    assert total["local_reparameterization"] < total["flipout"] < total["shared"]
    assert total["three draws"] < 0.5 * total["shared"]


class Convolution(nn.Module):
    """x = c * W + N(0, 0.5^2) for given images c, which stand as y."""

    def __init__(self, transposed):
        super().__init__()
        self.layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(2, 3, 3, bias=False, dtype=torch.double)

    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(self.layer(y).flatten(1), NOISE).to_event(1), obs=x)

    def guide(self, x, y=None):
        pass


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("options", [dict(noise="shared"), dict(noise="flipout"), dict(num_weights=3)], ids=str)
def test_gradients_of_convolutions_are_unbiased(options, transposed):
    """Against the exact gradient, 5 standard errors."""
    structure, c = Convolution(transposed), torch.randn(8, 2, 5, 4).double()
    x = structure.layer(c).detach().flatten(1)
    convolve = F.conv_transpose2d if transposed else F.conv2d
    b = BayesianWeights(structure, posterior=partial(posteriors.MeanField, sigma=0.5), **options)
    found = _gradients(b, x, c, 600)
    q = b.posterior("layer.weight")
    exact = torch.cat([g.flatten() for g in _exact_gradient(q, x, c, lambda c, w: convolve(c, w).flatten(1))])
    assert ((found.mean(0) - exact).abs() < 5 * found.std(0) / math.sqrt(600)).all()


def _exact_gradient(q, x, c, layer=F.linear):
    """That of x = layer(c, w), whose variance is layer(c^2, sigma^2)."""
    mu, rho = q.mu.detach().requires_grad_(), q.rho.detach().requires_grad_()
    s2 = F.softplus(rho).square()
    fit = ((x - layer(c, mu)).square().sum() + layer(c.square(), s2).sum()) / (2 * NOISE**2)
    kl = 0.5 * (s2 + mu.square() - 1 - s2.log()).sum()
    return torch.autograd.grad((fit + kl) / len(x), (mu, rho))


LAYERS = {
    "linear": (F.linear, (5, 6), (4, 6), {}),
    "conv1d": (F.conv1d, (5, 4, 7), (6, 4, 3), {"padding": 1}),
    "conv2d": (F.conv2d, (5, 4, 7, 6), (6, 2, 3, 3), {"stride": 2, "groups": 2}),
    "conv_transpose2d": (F.conv_transpose2d, (5, 4, 3, 3), (4, 6, 3, 3), {"stride": 2, "output_padding": 1}),
}


def _layer(name):
    layer, x, weight, options = LAYERS[name]
    out = weight[1] if "transpose" in name else weight[0]
    given = [torch.randn(*shape).double() for shape in (x, weight, (out,))]
    return layer, *given, options


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("lead", [(), (3,)], ids=["rows", "particles"])
def test_several_weights_in_one_batched_product(name, lead):
    """The S parts of the rows each meet their own weights, as in a loop."""
    layer, x, weight, bias, options = _layer(name)
    s = 3
    weights, biases = torch.randn(s, *weight.shape).double(), torch.randn(s, *bias.shape).double()
    rows = torch.randn(*lead, s * 5, *x.shape[1:]).double()
    if name != "linear":  # networks flatten leading dims before a convolution
        rows = rows.flatten(0, len(lead))
    for w, b in ((weights, biases), (weights, None), (weights, bias), (weight, biases)):
        drawn = [Drawn("w", t) for t in (w, b) if t is not None and t is not weight and t is not bias]
        with ManyWeights(drawn, 5):
            found = layer(rows, w, b, **options)
        parts = rows.reshape(*lead, s, 5, *x.shape[1:])
        for i in range(s):
            wi = w if w is weight else w[i]
            bi = b if b is None or b is bias else b[i]
            part = parts[..., i, :, :] if name == "linear" else parts.select(len(lead), i).flatten(0, len(lead))
            expected = layer(part, wi, bi, **options)
            mine = found.reshape(*lead, s, 5, *found.shape[1 + len(lead) :]) if name == "linear" else None
            mine = mine[..., i, :, :] if name == "linear" else _part(found, lead, s, i)
            torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize(
    ("shape", "dim"), [((15, 4, 2), 0), ((15, 30, 2), 0), ((15, 30, 45, 2), 0), ((2, 15, 4, 2), 1), ((4, 30, 2), 1)]
)
def test_several_weights_where_the_rows_have_places(shape, dim):
    """A linear layer on `[S B, H, W, C]` meets the weights of each row, not of each place."""
    x, w, s = torch.randn(shape).double(), torch.randn(3, 6, 2).double(), 3
    with ManyWeights([Drawn("w", w)], 5):
        found = F.linear(x, w)
    for n in range(shape[dim]):
        expected = F.linear(x.select(dim, n), w[n // 5 % s])
        torch.testing.assert_close(found.select(dim, n), expected)


def test_several_weights_without_a_dimension_of_the_rows():
    w = torch.randn(3, 6, 2)
    with ManyWeights([Drawn("w", w)], 5), pytest.raises(ValueError, match=r"of shape \(5, 3, 2\).*needs the rows"):
        F.linear(torch.randn(5, 3, 2), w)


def _part(found, lead, s, i):
    return found.reshape(*lead, s, 5, *found.shape[1:]).select(len(lead), i).flatten(0, len(lead))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("noise", NOISES[1:])
def test_noise_of_a_layer_has_the_moments_of_its_weights(name, noise):
    """Mean and variance of every output over 4,000 draws, 5.5 standard errors: one failure in some 10,000 seeds."""
    layer, x, mu, bias_mu, options = _layer(name)
    sigma, bias_sigma = 0.3 * torch.rand_like(mu), 0.3 * torch.rand_like(bias_mu)
    variance = layer(x.square(), sigma.square(), bias_sigma.square(), **options)
    outputs = []
    for _ in range(4000):
        w, b = (m + s * torch.randn_like(m) for m, s in ((mu, sigma), (bias_mu, bias_sigma)))
        with LayerNoise([Drawn("w", w, mu, sigma), Drawn("b", b, bias_mu, bias_sigma)], len(x), noise):
            outputs.append(layer(x, w, b, **options))
    off = torch.stack(outputs) - layer(x, mu, bias_mu, **options)
    assert (off.mean(0).abs() < 5.5 * (variance / 4000).sqrt()).all()
    squares = off.square()
    assert ((squares.mean(0) - variance).abs() < 5.5 * squares.std(0) / math.sqrt(4000)).all()
    rows = off.flatten(2)  # with noise of its own, a datum does not follow another's
    follow = (rows[:, 0] * rows[:, 1]).mean(0) / (rows[:, 0].std(0) * rows[:, 1].std(0))
    assert follow.abs().max() < 0.1


def test_the_progress_bar_does_without_latents(regression):
    x, c, *_ = regression
    rows = Dataset("regression", x, x, c, c)
    assert fit(Regression(), rows, epochs=1, supervised=True)[0].beta == {}


@pytest.mark.parametrize("again", [F.linear, lambda x, w: x @ w.T, lambda x, w: F.linear(x.repeat(2, 1), w)])
@pytest.mark.parametrize("first", [True, False])
def test_a_weight_used_twice_is_refused(again, first):
    """By a layer for each datum, and in whatever other way."""
    w, x = torch.randn(4, 4), torch.randn(3, 4)
    one, other = (F.linear, again) if first else (again, F.linear)
    with LayerNoise([Drawn("twice", w, w, w.abs())], 3, "flipout"):
        one(x, w)
        with pytest.raises(ValueError, match="'twice' is used twice"):
            other(x, w)


@pytest.mark.parametrize("noise", NOISES[1:])
def test_pixels_of_a_datum_share_their_weights(noise):
    """A convolution by one weight of an image of ones: all its pixels are that weight."""
    x, w = torch.ones(6, 1, 5), torch.randn(1, 1, 1)
    with LayerNoise([Drawn("w", w, torch.zeros_like(w), torch.ones_like(w))], 6, noise):
        found = F.conv1d(x, w)
    assert (found == found[:, :, :1]).all()


def test_inputs_without_rows():
    w, x = torch.randn(3, 4), torch.randn(4)
    with LayerNoise([Drawn("w", w, w, w.abs())], 1, "flipout"):
        torch.testing.assert_close(F.linear(x, w), w @ x)
    many = torch.randn(2, 3, 4)
    with ManyWeights([Drawn("w", many)], 5), pytest.raises(ValueError, match="needs the rows of the data"):
        F.linear(x, many)
    with ManyWeights([Drawn("w", many)], 5), pytest.raises(ValueError, match="'w' goes into cat"):
        torch.cat([many, many])


def test_rows_that_are_not_data_take_the_shared_draw():
    w, x = torch.randn(4, 4), torch.randn(6, 3, 4)
    with LayerNoise([Drawn("w", w, w + 1, w.abs())], 3, "flipout"):
        torch.testing.assert_close(F.linear(x, w), x @ w.T)


def vae(**options):
    return VAE(12, 3, 8, num_hidden=1, batch_norm=False, **options).double()


def test_several_draws_of_the_weights_each_see_the_whole_batch(x):
    """Row by row, the densities are those of the structure with that draw put in."""
    b = BayesianWeights(vae(), num_weights=3)
    x = x.double()
    sites = ledger(b.model, b.guide, x, num_particles=2)
    drawn = {n: sites[f"weights.{n}"].value for n in b.names}
    for s in range(3):
        structure = b.put({n: w[s] for n, w in drawn.items()})
        rows = slice(s * len(x), (s + 1) * len(x))
        z = sites["z1"].value[:, rows]
        torch.testing.assert_close(
            log_densities(structure.model, {"z1": z}, x, num_particles=2)["x"], sites["x"].log_p[:, rows]
        )
        torch.testing.assert_close(
            log_densities(structure.guide, {"z1": z}, x, num_particles=2)["z1"], sites["z1"].log_q[:, rows]
        )


@pytest.mark.parametrize("num_weights", [1, 3])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_kl_of_the_weights_counts_once(num_weights, name, x):
    """Loss and gradient: N/B sum of the data's part, less the closed-form KL once, times its beta."""
    b, x = BayesianWeights(vae(), num_weights=num_weights), x.double()
    losses, gradients = [], []
    for beta in (1.0, 3.0):
        torch.manual_seed(4)
        loss, _ = Step(b, ESTIMATORS[name](), size=70)((x,), {f"weights.{n}": beta for n in b.names} | {"z1": 1.0})
        losses.append(loss)
        gradients.append([p.grad for p in b.parameters()])
    kl = sum(kl_divergence(b.posterior(n)(), b.prior(n)("")) for n in b.names) / 70
    torch.testing.assert_close(losses[1] - losses[0], 2 * kl.detach())
    for one, three, g in zip(*gradients, torch.autograd.grad(kl, list(b.parameters())), strict=True):
        torch.testing.assert_close(three - one, 2 * g)


class Switches(nn.Module):
    """x ~ B(net(z)), z of three Bernoulli switches, which have no rsample."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(3, 12).double(), nn.Linear(12, 3).double()

    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z1", dist.Bernoulli(x.new_full((3,), 0.4)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z1", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


@pytest.mark.parametrize("structure", [vae, Switches], ids=["reparameterised", "discrete"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_points_learn_as_plain_parameters_do(name, structure, x):
    """Under Delta, and without the prior, every estimator gives the very gradient of the plain structure."""
    plain, x = structure(), x.double()
    if structure is Switches and name not in ("RWS", "TVO"):
        pytest.skip("needs an rsample")
    b = BayesianWeights(plain, posterior=posteriors.Delta)
    if name in ("AnalyticELBO", "PIWAE", "STL", "DReG", "DReG-prior"):
        pytest.skip(
            "refuses Delta; or gives drawn weights the guide's gradient, or keeps the scores of what follows them"
        )
    for module, beta in ((plain, {"z1": 0.7}), (b, {"z1": 0.7} | {f"weights.{n}": 0.0 for n in b.names})):
        torch.manual_seed(6)
        Step(module, ESTIMATORS[name]())((x,), beta)
    for n, p in plain.named_parameters():
        torch.testing.assert_close(b.posterior(n).mu.grad, p.grad, msg=lambda m, n=n: f"{n}: {m}")


def test_fit_anneals_weights_apart_from_latents(tiny):
    b = BayesianWeights(VAE(12, 3, 8))
    history = fit(b, tiny, epochs=1, beta={"z*": 0.5, "weights.*": 0.25}, callbacks=())
    assert history[0].beta == {"z1": 0.5, "global": 0.25}
    with pytest.raises(ValueError, match="beta names \\['wieghts"):
        fit(b, tiny, epochs=1, beta={"wieghts.*": 0.25}, callbacks=())
    with pytest.raises(ValueError, match="decide no site"):
        fit(b, tiny, epochs=1, beta={"*": 1.0, "weights.*": 0.25}, callbacks=())


@pytest.mark.parametrize("prior", PRIORS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("posterior", POSTERIORS, ids=lambda c: c.__name__)
def test_every_prior_with_every_posterior(prior, posterior, x):
    b, x = BayesianWeights(vae(), prior=prior, posterior=posterior), x.double()
    check(b, x)
    for estimator in (SampledELBO(), IWAE(2)):
        loss, norm = Step(b, estimator, size=50)(
            (x,), dict.fromkeys(ledger(b.model, b.guide, x).latents, torch.tensor(1.0).double())
        )
        assert torch.isfinite(loss)
        assert torch.isfinite(norm)
        missing = [n for n, p in b.named_parameters() if p.grad is None]
        assert not missing
    assert isinstance(b.draw(), VAE)


@pytest.mark.parametrize("prior", [partial(priors.Normal, learned=True, over_fan_in=True), priors.Horseshoe])
def test_learned_scales_move_towards_the_weights(prior):
    """Weights of 0.01 under a prior of scale 1: its scale falls."""
    structure = vae()
    for p in structure.parameters():
        p.data.mul_(0.01 / p.data.abs().mean().clamp_min(1e-3))
    b = BayesianWeights(structure, where="*.weight", prior=prior)
    name = b.names[0]
    parameter = b.prior(name).log_scale if hasattr(b.prior(name), "log_scale") else b.prior(name).tau.mu
    before, x = parameter.item(), (torch.rand(20, 12) > 0.5).double()
    _train_all(b, x)
    assert parameter.item() < before - 0.1


def _train_all(b, x):
    names = list(ledger(b.model, b.guide, x).latents)
    step, adam = Step(b, SampledELBO(), size=len(x)), FusedAdam(b.parameters(), lr=0.02)
    for _ in range(30):
        step((x,), dict.fromkeys(names, 1.0))
        adam.step()


def test_the_scale_mixture_is_blundells():
    w = torch.randn(5, 4).double()
    p = priors.ScaleMixture(w, 4, pi=0.25, scale_1=0.8, scale_2=0.1)("w")
    found, drawn = p.log_prob(w), p.sample((5000,))
    parts = [dist.Normal(0.0, s).log_prob(w).exp() for s in (0.8, 0.1)]
    torch.testing.assert_close(found, (0.25 * parts[0] + 0.75 * parts[1]).log().sum())
    variance = 0.25 * 0.8**2 + 0.75 * 0.1**2
    squares = drawn.square()  # 5.5 standard errors in 20 entries
    assert ((squares.mean(0) - variance).abs() < 5.5 * squares.std(0) / math.sqrt(5000)).all()


def test_where_chooses(x):
    structure = VAE(12, 3, 8, num_hidden=1, batch_norm=False)
    every = [n for n, _ in structure.named_parameters()]
    assert BayesianWeights(structure).names == every
    assert BayesianWeights(structure, "decoder").names == ["decoder.0.weight", "decoder.0.bias"]
    assert set(BayesianWeights(structure, ["*.bias", "likelihood"]).names) == {
        n for n in every if n.endswith("bias") or n.startswith("likelihood")
    }
    assert BayesianWeights(structure, lambda n, p: p.ndim > 1).names == [n for n in every if n.endswith("weight")]
    theta = generative(structure, x)
    assert set(theta) == {n for n in every if n.startswith(("decoder", "likelihood"))}
    b = BayesianWeights(structure, theta)
    points = {n for n, _ in b.structure.named_parameters()}
    assert points == set(every) - set(theta)


def test_the_structure_is_left_alone_and_comes_back(x):
    structure = VAE(12, 3, 8)
    before = copy.deepcopy(structure.state_dict())
    b = BayesianWeights(structure, posterior=partial(posteriors.MeanField, sigma=1e-6))
    fit(b, Dataset("d", x, x), epochs=1, callbacks=())
    for name, value in before.items():
        assert torch.equal(structure.state_dict()[name], value)
    c = BayesianWeights(structure, posterior=partial(posteriors.MeanField, sigma=1e-6))
    for back in (c.mean(), c.draw()):
        assert type(back) is VAE
        for name, value in structure.named_parameters():
            torch.testing.assert_close(dict(back.named_parameters())[name], value, atol=1e-4, rtol=0)


class Declared(PyroModule):
    """A structure with a global scale of its own, declared as Pyro's modules do."""

    def __init__(self):
        super().__init__()
        self.inner = VAE(12, 3, 8)
        self.shift = PyroSample(dist.Normal(0.0, 1.0))

    @pyro_method
    def drawn(self):
        return self.shift

    def model(self, x, y=None):
        shift = self.drawn()
        return self.inner.model(x + 0 * shift)

    def guide(self, x, y=None):
        pyro.sample("shift", dist.Normal(0.0, 0.1))
        self.inner.guide(x)


def test_it_is_a_pyro_module_whose_weights_are_pyro_samples(x):
    bayesian = BayesianWeights(VAE(12, 3, 8), where="decoder", prior=partial(priors.Normal, learned=True))
    assert all(isinstance(m, PyroModule) for m in (bayesian, bayesian.weights))
    pyro.clear_param_store()
    sites = [name for name, s in poutine.trace(bayesian.model).get_trace(x).nodes.items() if s["type"] == "sample"]
    assert sites[: len(bayesian.names)] == ["weights." + name for name in bayesian.names]  # before the data plate
    bayesian.guide(x)
    assert not list(pyro.get_param_store().keys())

    again = copy.deepcopy(bayesian)
    name = bayesian.names[0]
    with torch.no_grad():
        again.prior(name).log_scale.fill_(-20.0)
    first, second = (getattr(b.weights, name).std() for b in (bayesian, again))  # outside a model: a draw of the prior
    assert first > 100 * second


def test_within_a_pyro_module_the_sites_keep_their_names(x):
    class Outer(PyroModule):
        def __init__(self):
            super().__init__()
            self.inner = BayesianWeights(VAE(12, 3, 8), where="decoder")

        @pyro_method
        def model(self, x, y=None):
            return self.inner.model(x)

        @pyro_method
        def guide(self, x, y=None):
            return self.inner.guide(x)

    outer = Outer()
    check(outer, x)
    assert "weights.decoder.0.weight" in ledger(outer.model, outer.guide, x)


def test_pyros_predictive_runs_on_it(x):
    bayesian = BayesianWeights(VAE(12, 3, 8), where="decoder")  # with batch norm
    for mode in (bayesian.train(), bayesian.eval()):
        drawn = Predictive(mode.model, guide=mode.guide, num_samples=3)(x)
        assert {"z1", "weights.decoder.0.weight"} <= drawn.keys()


def test_a_pyro_module_within_keeps_its_sites(x):
    structure = Declared()
    before = set(poutine.trace(structure.model).get_trace(x).nodes)  # it has run: Pyro would refuse to adopt it
    bayesian = BayesianWeights(structure, where="inner.decoder")
    after = set(poutine.trace(bayesian.model).get_trace(x).nodes)
    assert after == before | {"weights." + name for name in bayesian.names}
    assert ledger(bayesian.model, bayesian.guide, x).keys() >= {"shift", "z1"}


def test_weights_given_from_outside_are_used(x):
    """`poutine.condition` on the model, as on any Pyro model; no noise is added to them."""
    b, x = BayesianWeights(vae(), noise="flipout"), x.double()
    given = {f"weights.{n}": b.posterior(n).mean.detach() for n in b.names}
    ledger(b.model, b.guide, x)
    sites = ledger(poutine.condition(b.model, data=given), poutine.block(b.guide, hide=list(given)), x)
    expected = log_densities(b.mean().model, {"z1": sites["z1"].value[None]}, x, num_particles=1)["x"][0]
    torch.testing.assert_close(sites["x"].log_p, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(where="decodr"), "where names 'decodr', which fits no parameter; the structure's parts are decoder, "),
        (dict(where=lambda n, p: False), "where chooses no parameter"),
        (dict(noise="local"), "noise is 'local'; expected one of 'shared'"),
        (dict(num_weights=0), "num_weights=0"),
        (dict(num_weights=2, noise="flipout"), "several draws need noise='shared'"),
        (dict(noise="flipout", posterior=posteriors.LowRank), "needs independent Normal entries"),
        (dict(posterior=partial(posteriors.MeanField, sigma=0.0)), "sigma is 0.0"),
        (dict(prior=partial(priors.Normal, scale=-1.0)), "scale is -1.0"),
        (dict(prior=partial(priors.ScaleMixture, pi=1.5)), "pi must lie between"),
        (dict(posterior=partial(posteriors.LowRank, rank=0)), "rank is 0"),
        (dict(prior="Normal"), "prior is 'Normal'; expected what makes one .* prior=priors.Normal"),
        (dict(prior=priors.Normal(torch.zeros(2), 1)), "prior is a Normal; expected what makes one"),
        (dict(prior=dist.Normal(0.0, 1.0)), "prior is a Normal; expected what makes one"),
        (dict(where=None), "where is None; expected names, patterns, or a function of name and parameter"),
        (dict(structure=VAE), "structure is the class VAE; expected an nn.Module with model and guide, an instance"),
        (dict(posterior=posteriors.MeanField(torch.zeros(2), 1)), "posterior is a MeanField; .*=posteriors.MeanField"),
        (dict(structure="VAE"), "structure is a str; expected an nn.Module"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        BayesianWeights(**dict(structure=vae()) | options)


@pytest.mark.parametrize("read", [weight_summary, signal_to_noise, weight_kl, partial(prune, fraction=0.5)])
def test_plain_structures_have_no_posterior(read):
    with pytest.raises(ValueError, match=r"a VAE has no posterior over its weights; give a BayesianWeights\(VAE"):
        read(vae())


def test_recurrent_layers_are_refused():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.GRU(3, 4)

    with pytest.raises(ValueError, match="of a recurrent layer"):
        BayesianWeights(Recurrent())


def test_batch_norm_cannot_take_several_draws(x):
    b = BayesianWeights(VAE(12, 3, 8), num_weights=2)
    with pytest.raises(ValueError, match=r"'.*\.1\.weight' goes into batch_norm"):
        ledger(b.model, b.guide, x)
    ledger(*_pair(BayesianWeights(VAE(12, 3, 8), lambda n, p: p.ndim > 1, num_weights=2)), x)


def _pair(b):
    return b.model, b.guide


@pytest.mark.parametrize(
    "options", [dict(noise="flipout"), dict(num_weights=2), dict(prior=priors.Horseshoe, posterior=posteriors.LowRank)]
)
def test_traced_step(options, x, traced_only):  # noqa: F811
    check_equal(BayesianWeights(vae(), **options), x.double(), SampledELBO(), 10, size=100)


def test_subsampling_scales_the_copies_of_a_batch(x):
    """The rows stand for B, or for the N that a subsample is of, whatever the number of draws."""
    b = BayesianWeights(vae(), num_weights=3)
    assert ledger(b.model, b.guide, x.double()).rows == pytest.approx(7)
    with subsample(70):
        assert ledger(b.model, b.guide, x.double()).rows == pytest.approx(70)


# ---------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("is_ensemble", [False, True])
def test_predictive_log_likelihood_averages_over_weights(is_ensemble, x):
    b, x = BayesianWeights(vae(), posterior=partial(posteriors.MeanField, sigma=0.3)), x.double()
    draws = [vae() if is_ensemble else b.draw() for _ in range(4)]
    torch.manual_seed(5)
    found = predictive_log_likelihood(draws, x, 50)
    torch.manual_seed(5)
    each = torch.stack([log_likelihood(d, x, 50, compile=False) for d in draws])
    torch.testing.assert_close(found.log_likelihoods, each)
    torch.testing.assert_close(found.averaged, each.exp().mean(0).log())
    mean = each.exp().mean(0).log().mean().item()
    assert repr(found) == f"Predictive(4 draws of the weights, 7 data: mean {mean:.2f} nats)"
    torch.testing.assert_close(found.conditional, each.mean(0))
    assert (found.averaged >= found.conditional).all()
    assert ((found.effective_draws >= 1) & (found.effective_draws <= 4 + 1e-9)).all()
    torch.testing.assert_close(found.waic, each.mean(0) - each.var(0))
    with pytest.raises(ValueError, match="there are no draws"):
        predictive_log_likelihood([], x)
    with pytest.raises(ValueError, match="give an iterable"):
        predictive_log_likelihood(b, x)
    with pytest.raises(ValueError, match=r"give bayesian.draw\(\)"):
        log_likelihood(b, x)


def test_pruning_removes_the_lowest_signal_to_noise():
    b = BayesianWeights(vae())
    with torch.no_grad():
        for n in b.names:
            b.posterior(n).rho.normal_()
    ratios = torch.cat([r.flatten() for r in signal_to_noise(b).values()])
    pruned = torch.cat([p.flatten() for p in _in_order(prune(b, 0.5), b)])
    kept = torch.cat([b.posterior(n).mean.flatten() for n in b.names])
    half = len(ratios) // 2
    assert (pruned[ratios.argsort()[:half]] == 0).all()
    torch.testing.assert_close(pruned[ratios.argsort()[half:]], kept[ratios.argsort()[half:]])
    with pytest.raises(ValueError, match="fraction is 2"):
        prune(b, 2)
    with pytest.raises(ValueError, match="is a point"):
        signal_to_noise(BayesianWeights(vae(), posterior=posteriors.Delta))


def _in_order(structure, b):
    named = dict(structure.named_parameters())
    return [named[n] for n in b.names]


def test_parts_of_a_normalised_weight_are_not_pruned():
    """A direction of zeros would be 0 / 0."""
    structure = vae()
    nn.utils.parametrizations.weight_norm(structure.decoder[0])
    with pytest.raises(ValueError, match="is a part that a weight is computed from"):
        prune(BayesianWeights(structure, "decoder"), 0.5)


def test_weights_in_four_numbers():
    b = BayesianWeights(vae(), "decoder", posterior=partial(posteriors.MeanField, sigma=0.5))
    found = weight_summary(b)["decoder.0.weight"]
    q, p = b.posterior("decoder.0.weight"), b.prior("decoder.0.weight")
    ratio = q.mu.abs() / 0.5
    assert found.entries == 24
    assert found.snr == pytest.approx(ratio.median().item())
    assert found.uncertain == pytest.approx((ratio < 1).double().mean().item())
    assert found.kl == pytest.approx(kl_divergence(q(), p("")).item())
    assert weight_kl(b) == pytest.approx(sum(s.kl for s in weight_summary(b).values()))
    b.num_weights = 3
    assert weight_summary(b)["decoder.0.weight"].kl == pytest.approx(found.kl)
    said = repr(LayerSummary(24, 0.123456, 0.5, 12.34567))
    assert said == "24 weights: |mu|/sigma 0.123, 50% uncertain, KL 12.35 nats"


def test_restarts_as_chains_of_arviz(x):
    """R-hat is 1 where two restarts have one posterior, and large where they have not."""
    arviz = pytest.importorskip("arviz")
    b, c = (BayesianWeights(vae(), "decoder") for _ in range(2))
    c.load_state_dict(b.state_dict())
    same = weights_to_inference_data([b, c], x, 50, raw=True)
    assert same.posterior["decoder.0.weight"].shape == (2, 50, 8, 3)
    assert same.log_likelihood["x"].shape == (2, 50, 7)
    snr = weight_summary(b)["decoder.0.weight"].snr
    assert same.constant_data["snr.decoder.0.weight"].values == pytest.approx([snr, snr])
    assert arviz.rhat(same)["rms.decoder.0.weight"].item() < 1.1
    with torch.no_grad():
        c.posterior("decoder.0.weight").mu.mul_(2)
    assert arviz.rhat(weights_to_inference_data([b, c], x, 50))["rms.decoder.0.weight"].item() > 1.5
    with pytest.raises(ValueError, match="over other parameters"):
        weights_to_inference_data([b, BayesianWeights(vae())], x)


def test_data_unlike_the_training_data_has_low_scores():
    """A linear-Gaussian model knows the directions that it has seen: the AUROC of each score against others is high."""
    torch.manual_seed(1)
    x = torch.randn(200, 2).double() @ torch.randn(2, 12).double() + 0.1 * torch.randn(200, 12).double()
    structure = VAE(12, 3, 16, num_hidden=1, batch_norm=False, likelihood=partial(Normal, min_variance=0.01)).double()
    b = BayesianWeights(structure, noise="local_reparameterization", prior=partial(priors.Normal, over_fan_in=True))
    _train(b, (x,), 400, lr=0.02)
    other = 3 * torch.randn(200, 12).double()
    draws = [b.draw() for _ in range(8)]
    inside, outside = (predictive_log_likelihood(draws, rows, 20) for rows in (x, other))
    for score in ("averaged", "conditional", "waic", "effective_draws"):
        higher = getattr(inside, score)[:, None] > getattr(outside, score)
        assert higher.double().mean() > 0.9, score
    bounds = [elbo(prune(b, fraction), x, 20).mean() for fraction in (0.0, 0.3, 0.9)]
    assert bounds[0] - bounds[1] < 1 < bounds[0] - bounds[2]  # weights without a signal are not missed


def test_the_laplace_approximation_of_a_regression(regression):
    """Its Fisher information is c^T c / noise^2 / B exactly; here from 1,200 gradients, within 30 %."""
    _, c, *_ = regression
    c = c.repeat(60, 1)
    structure = Regression()
    b = BayesianWeights(structure, posterior=posteriors.Delta, prior=partial(priors.Normal, scale=0.7))
    q = laplace(b, c[:, :1], c, size=20).posterior("linear.weight")
    exact = 1 / (20 * c.square().mean(0) / NOISE**2 + 1 / 0.7**2)
    torch.testing.assert_close(q.sigma.detach()[0].square(), exact, rtol=0.3, atol=0)
    torch.testing.assert_close(q.mu, b.posterior("linear.weight").mu)
    with pytest.raises(ValueError, match="curvature of Normal priors"):
        laplace(BayesianWeights(structure, prior=priors.Laplace), c[:, :1], c)


def test_swag_has_the_moments_of_the_path():
    structure, path = Regression(), torch.randn(8, IN).double()
    swag = SWAG(structure, start=0, rank=3)
    means = []
    for i, w in enumerate(path, 1):
        structure.linear.weight.data.copy_(w)
        swag.collect()
        means.append(path[:i].mean(0))
    torch.testing.assert_close(swag.first, path.mean(0))
    d = torch.stack([w - m for w, m in zip(path[-3:], means[-3:], strict=True)], 1)
    covariance = 0.5 * path.var(0, correction=0).diag() + 0.5 * d @ d.T / 2
    draws = torch.cat([swag.draw().linear.weight.detach() for _ in range(3000)])
    off = draws - path.mean(0)
    products = torch.einsum("ni,nj->nij", off, off)
    assert ((products.mean(0) - covariance).abs() < 5 * products.std(0) / math.sqrt(3000)).all()


def test_swag_keeps_small_variances_in_float32():
    structure = nn.Linear(50, 1, bias=False)
    swag = SWAG(structure, start=0)
    for _ in range(60):
        structure.weight.data.normal_(1.0, 1e-4)
        swag.collect()
    assert ((swag.squares / 60).sqrt() - 1e-4).abs().max() < 6e-5


def test_the_laplace_approximation_reaches_every_layer_of_a_hierarchy(x):
    structure = HierarchicalVAE(12, (4, 2), (8, 8), num_hidden=1, batch_norm=False)
    b = laplace(BayesianWeights(structure, generative(structure, x), posterior=posteriors.Delta), x, size=10**5)
    for name in b.names:
        if name.endswith("weight"):
            assert b.posterior(name).sigma.median() < 0.5, name


def test_fan_in_of_other_layers():
    layers = {
        "linear": (nn.Linear(6, 3), 6),
        "convolution": (nn.Conv2d(6, 4, 3), 54),
        "transposed": (nn.ConvTranspose2d(6, 4, 3), 54),
        "embedding": (nn.Embedding(10, 4), 1),
        "gain": (nn.BatchNorm1d(7), 1),
    }
    b = BayesianWeights(
        nn.ModuleDict({n: layer for n, (layer, _) in layers.items()}), prior=partial(priors.Normal, over_fan_in=True)
    )
    for name, (_, fan_in) in layers.items():
        assert b.prior(f"{name}.weight").scale.item() == pytest.approx(fan_in**-0.5)


def test_the_generative_parameters_are_found_without_a_trace(x):
    structure = VAE(12, 3, 8)
    structure.decoder[1].eval()
    state = torch.get_rng_state()
    with torch.no_grad():
        generative(structure, x)
    assert structure.training
    assert not structure.decoder[1].training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_prior_is_not_a_matter_of_the_checkpoint():
    """Its settings are those that it was made with; what it has learned is loaded."""
    b = BayesianWeights(vae(), prior=partial(priors.Normal, scale=0.1))
    b.load_state_dict(BayesianWeights(vae()).state_dict())
    assert b.prior("decoder.0.weight").scale.item() == pytest.approx(0.1)


def test_swag_watches_fit(tiny):
    structure = VAE(12, 3, 8)
    swag = SWAG(structure, start=1)
    with pytest.raises(ValueError, match="has seen 0"):
        swag.draw()
    fit(structure, tiny, epochs=4, callbacks=[swag])
    assert swag.count == 3
    assert elbo(swag.draw(), tiny.x_test).shape == (15,)


def test_reliability_by_hand():
    found = reliability(torch.tensor([0.1, 0.2, 0.8, 0.9]), torch.tensor([0, 1, 1, 1]), 2)
    torch.testing.assert_close(found.predicted, torch.tensor([0.15, 0.85]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.observed, torch.tensor([0.5, 1.0]).double())
    assert found.error == pytest.approx(0.5 * 0.35 + 0.5 * 0.15)


class Decoder(nn.Module):
    """p(x|z) that does not depend on z, of a given distribution."""

    def __init__(self, fn):
        super().__init__()
        self.fn, self.z = fn, nn.Parameter(torch.zeros(()))

    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", self.fn.expand([len(x), x.shape[1]]).to_event(1), obs=x)

    def guide(self, x, y=None):
        pass


@pytest.mark.parametrize("name", ["binary", "continuous"])
def test_a_likelihood_that_made_the_data_is_calibrated(name):
    """And one that did not is not."""
    right, wrong = {
        "binary": (dist.Bernoulli(0.3), dist.Bernoulli(0.6)),
        "continuous": (dist.Normal(0.0, 1.0), dist.Normal(0.0, 3.0)),
    }[name]
    x = right.sample((500, 12))
    assert calibration([Decoder(right)], x, 1).error < 0.02
    assert calibration([Decoder(wrong)], x, 1).error > 0.1


class Choice(nn.Module):
    """x_d = 1 with probability .9 where c = 1, else .1; c by the model alone, or by the guide too."""

    def __init__(self, by_guide: bool):
        super().__init__()
        self.by_guide, self.logit = by_guide, nn.Parameter(torch.tensor(0.0))

    def component(self, probability, marked: bool):
        return pyro.sample("c", dist.Bernoulli(probability), infer={"enumerate": "parallel"} if marked else {})

    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            c = self.component(torch.tensor(0.25), not self.by_guide)
            pyro.sample("x", dist.Bernoulli(0.1 + 0.8 * c[..., None].expand(*c.shape, 6)).to_event(1), obs=x)

    def guide(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            if self.by_guide:
                self.component(self.logit.sigmoid(), True)


@pytest.mark.parametrize(("by_guide", "probability"), [(False, 0.3), (True, 0.5)])
def test_calibration_averages_over_an_enumerated_site(by_guide, probability):
    """.25 .9 + .75 .1 by p(c); .5 .9 + .5 .1 by q(c)."""
    found = calibration([Choice(by_guide)], torch.ones(5, 6), 2, num_bins=1)
    assert found.predicted.tolist() == pytest.approx([probability])


def test_calibration_says_what_it_cannot_read():
    with pytest.raises(ValueError, match="likelihood is Poisson"):
        calibration([Decoder(dist.Poisson(4.0))], torch.ones(5, 3))
    with pytest.raises(ValueError, match="likelihood is StudentT"):
        calibration([Decoder(dist.StudentT(4.0))], torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"draws is a Decoder; give a list of structures: \[structure\]"):
        calibration(Decoder(dist.StudentT(4.0)), torch.ones(5, 3))
    with pytest.raises(ValueError, match="between -3 and 1.7"):
        reliability(torch.tensor([1.7, -3.0]), torch.ones(2))
