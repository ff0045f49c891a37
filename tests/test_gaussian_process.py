"""The variational Gaussian process against closed forms and independent computations, in float64.

Statistical tests draw from a fixed seed; with a fresh one each would fail less than once in 1,000 runs.
"""

import math
from functools import partial

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import make_linear, marginal
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from torch import nn

from pyro_lvae import IWAE, VAE, MixturePrior, SampledELBO, VampPrior, VariationalGP, check, elbo, fit, log_likelihood
from pyro_lvae.conditionals import Normal
from pyro_lvae.objectives import backward
from pyro_lvae.structures.gaussian_process import GaussianProcess
from pyro_lvae.traces import evaluating, ledger

LINEAR = dict(num_hidden=0, batch_norm=False, likelihood=Normal)


def inverse_softplus(values):
    return torch.as_tensor(values, dtype=torch.double).expm1().log()


def process(omega, amplitude, jitter):
    """A `GaussianProcess` with these hyperparameters."""
    gp = GaussianProcess(len(omega), jitter).double()
    gp.raw_omega.data, gp.raw_amplitude.data = inverse_softplus(omega), inverse_softplus([amplitude])
    return gp


# ------------------------------------------------------------------ the process


def test_the_conditional_distribution_is_that_of_scikit_learn():
    gp = process([0.4, 2.5, 1.0], 1.7, 0.05)
    xi, s, t = torch.randn(3, 2, 3).double(), torch.randn(2, 6, 3).double(), torch.randn(2, 6, 4).double()
    with torch.no_grad():
        q = gp(xi, s, t)
    assert (q.batch_shape, q.event_shape) == ((3, 2), (4,))
    kernel = ConstantKernel(1.7, "fixed") * RBF(gp.omega.detach().rsqrt().numpy(), "fixed")
    for b in range(2):
        oracle = GaussianProcessRegressor(kernel, alpha=1.7 * 0.05, optimizer=None).fit(s[b].numpy(), t[b].numpy())
        mean, std = oracle.predict(xi[:, b].numpy(), return_std=True)
        np.testing.assert_allclose(q.mean[:, b].numpy(), mean, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(q.variance[:, b].numpy(), std**2 + 1.7 * 0.05, rtol=1e-9)  # theirs is without jitter


def test_far_from_its_data_a_process_has_its_prior():
    gp = process([1.0, 1.0], 0.3, 0.1)
    q = gp(torch.full((5, 2), 40.0).double(), torch.randn(5, 4, 2).double(), torch.randn(5, 4, 3).double())
    torch.testing.assert_close(q.mean, torch.zeros(5, 3).double())
    torch.testing.assert_close(q.variance, torch.full((5, 3), 0.3 * 1.1).double())


def test_variances_stay_positive_in_float32_where_inputs_coincide():
    gp, s = GaussianProcess(2, 1e-6), torch.randn(4, 1, 2).repeat(1, 30, 1)
    q = gp(s[:, 0], s, torch.randn(4, 30, 3))
    assert q.variance.min() >= 0.999e-6 * gp.amplitude
    assert torch.isfinite(q.mean).all()


# ------------------------------------------------------------------ the bound


def softplus(u):
    return np.log1p(np.exp(u))


def mlp(net, h):
    """One hidden layer, by hand."""
    h = h @ net[0].weight.detach().numpy().T + net[0].bias.detach().numpy()
    return np.where(h > 0, h, 0.01 * h)


def affine(layer, h):
    return h @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def moments(head, h):
    mean, raw = np.split(affine(head.head[0], h), 2, -1)
    return mean, softplus(raw) + 1e-5


def log_normal(u, mean, variance):
    return (-0.5 * (u - mean) ** 2 / variance - 0.5 * np.log(2 * math.pi * variance)).sum(-1)


def by_hand(s, x, noise, jitter):
    """log p(x, z) r(xi, f|x, z) / q(xi, f, z|x) of a structure of two layers at given standard noise, row by row."""
    omega, amplitude = softplus(s.process.raw_omega.detach().numpy()), softplus(s.process.raw_amplitude.item())

    def k(a, b):
        squares = (omega * (a[:, None] - b[None]) ** 2).sum(-1)
        return amplitude * np.exp(-0.5 * squares)

    h = mlp(s.encoder, x)
    points, values = (affine(layer, h).reshape(len(x), s.num_points, -1) for layer in (s.inputs, s.outputs))
    variance = softplus(affine(s.raw_variance, h)) + 1e-5
    xi, mean_f, var_f = noise["xi"], np.empty_like(noise["f"]), np.empty_like(noise["f"])
    for b in range(len(x)):
        gram = k(points[b], points[b]) + amplitude * jitter * np.eye(s.num_points)
        cross = k(xi[:, b], points[b])
        mean_f[:, b] = cross @ np.linalg.inv(gram) @ values[b]
        explained = np.einsum("kn,nm,km->k", cross, np.linalg.inv(gram), cross)
        var_f[:, b] = (amplitude * (1 + jitter) - explained)[:, None]
    f = mean_f + np.sqrt(var_f) * noise["f"]
    z1 = f + np.sqrt(variance) * noise["z1"]
    upwards = moments(s.bottom_up[0][1], mlp(s.bottom_up[0][0], z1))
    z2 = upwards[0] + np.sqrt(upwards[1]) * noise["z2"]
    log_q = log_normal(xi, 0.0, np.ones(1)) + log_normal(f, mean_f, var_f)
    log_q += log_normal(z1, f, variance) + log_normal(z2, *upwards)
    downwards = moments(s.top_down[0][1], mlp(s.top_down[0][0], z2))
    log_p = log_normal(z2, 0.0, np.ones(1)) + log_normal(z1, *downwards)
    log_p += log_normal(x, *moments(s.likelihood, mlp(s.decoder, z1)))
    h = np.concatenate([np.broadcast_to(mlp(s.features, x), (*z1.shape[:2], 7)), z1], -1)
    mean, var = moments(s.auxiliary[1], mlp(s.auxiliary[0], h))
    c = s.xi_dim
    log_r = log_normal(xi, mean[..., :c], var[..., :c]) + log_normal(f, z1 + mean[..., c:], var[..., c:])
    return log_p + log_r - log_q


def test_the_bound_is_that_written_out_by_hand():
    options = dict(num_points=5, xi_dim=2, jitter=0.03, num_hidden=1, batch_norm=False, likelihood=Normal)
    s = VariationalGP(4, (3, 2), (7, 6), **options).double()
    x = torch.randn(6, 4).double()
    torch.manual_seed(1)
    found = ledger(s.model, s.guide, x, num_particles=3).local_log_weight()
    torch.manual_seed(1)
    sizes = {"xi": 2, "f": 3, "z1": 3, "z2": 2}  # in the guide's order
    noise = {name: torch.normal(torch.zeros(3, 6, n).double(), 1.0).numpy() for name, n in sizes.items()}
    np.testing.assert_allclose(found.detach().numpy(), by_hand(s, x.numpy(), noise, 0.03), rtol=1e-9)


def test_with_a_flat_kernel_and_the_exact_auxiliary_it_is_a_gaussian_guide():
    """f is then one value for all xi: q(z_1|x) = N(mean of t, v + sigma^2), and no draw costs anything beyond that."""
    m, jitter = 3, 0.2
    s = VariationalGP(4, (2,), (8,), num_points=m, jitter=jitter, **LINEAR).double()
    s.process.raw_omega.data.fill_(-50.0)
    s.raw_variance.weight.data.zero_()
    x = torch.randn(9, 4).double()
    with torch.no_grad():
        variance = nn.functional.softplus(s.raw_variance.bias) + 1e-5
        v = s.process.amplitude * (1 + jitter - m / (m + jitter))
        flat, kept = s.outputs.weight.unflatten(0, (m, -1)).sum(0) / (m + jitter), variance / (v + variance)
        offset = s.outputs.bias.unflatten(0, (m, -1)).sum(0) / (m + jitter)
        head = s.auxiliary[1].head[0]
        head.weight.zero_()
        head.weight[2:4] = torch.cat([kept[:, None] * flat, -torch.diag(kept)], 1)  # f|x, z_1, by Bayes' rule
        variances = torch.cat([torch.ones(2), v * kept])
        head.bias.copy_(torch.cat([torch.zeros(2), kept * offset, inverse_softplus(variances - 1e-5)]))
        sites = ledger(s.model, s.guide, x, num_particles=5)
        q = dist.Normal(x @ flat.T + offset, (v + variance).sqrt()).to_event(1)
        expected = sites["x"].log_p + sites["z1"].log_p - q.log_prob(sites["z1"].value)
        torch.testing.assert_close(sites.local_log_weight(), expected)


# ------------------------------------------------------------------ a known marginal likelihood


def linear_gaussian(z_dims, **options):
    """A linear-Gaussian model, and a guide and auxiliary that keep the importance weights even."""
    s = VariationalGP(4, z_dims, (8,) * len(z_dims), num_points=4, jitter=2.0, **LINEAR, **options)
    s = make_linear(s)
    s.likelihood.head[0].weight.data[:4] *= 0.5
    s.outputs.weight.data *= 0.3
    s.raw_variance.weight.data.zero_()
    s.raw_variance.bias.data.fill_(1.5)
    s.process.raw_amplitude.data.zero_()
    c, r = s.xi_dim, s.auxiliary[1].head[0]
    r.weight.data *= 0.1
    r.bias.data.zero_()
    r.weight.data[:c, 4:] += 0.15 * torch.eye(c)
    r.weight.data[c : 2 * c, 4:] -= 0.5 * torch.eye(c)
    return s


@pytest.mark.parametrize(("z_dims", "skip"), [((2,), False), ((3, 2), False), ((3, 2), True)])
def test_bounds_are_ordered_and_importance_sampling_finds_log_p(z_dims, skip):
    """ELBO <= IWAE_5 <= log p within 3.3 standard errors; each row's estimate within 5 of its weights' spread."""
    s = linear_gaussian(z_dims, skip=skip)
    p = marginal(s)
    x = p.sample((20,))
    truth, repeats = p.log_prob(x), 40
    with evaluating(s):
        log_w = ledger(s.model, s.guide, x, num_particles=10_000).local_log_weight()
        bounds = [torch.tensor([-IWAE(k).loss(s.model, s.guide, x) / 20 for _ in range(repeats)]) for k in (1, 5)]
    w = log_w.softmax(0)
    stderr = (w.square().sum(0) - 1 / len(w)).clamp_min(0).sqrt()
    assert ((log_w.logsumexp(0) - math.log(len(w)) - truth).abs() < 5 * stderr + 1e-3).all()
    assert stderr.max() < 0.25  # or it would say little
    torch.testing.assert_close(log_likelihood(s, x, 10_000), truth, atol=0.5, rtol=0)
    spread = (bounds[0].var() + bounds[1].var()) / repeats
    assert bounds[1].mean() - bounds[0].mean() > -3.3 * spread.sqrt()
    assert truth.mean() - bounds[1].mean() > -3.3 * (bounds[1].var() / repeats).sqrt()


# ------------------------------------------------------------------ what it is for


class Squares(nn.Module):
    """x_i = z_i^2 + noise, which has a mode at each sign of each z_i."""

    def __init__(self, in_dim, x_dim):
        super().__init__()

    def forward(self, z):
        return dist.Normal(z.square(), 0.7).to_event(1)


def trained(make, x, steps=400):
    torch.manual_seed(1)
    structure = make()
    optimizer = torch.optim.Adam(structure.parameters(), fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * min(1, 2 * (1 - step / steps))
        optimizer.zero_grad()
        backward(SampledELBO(), structure, (x,), per=len(x))
        optimizer.step()
    return structure


def test_it_bounds_a_posterior_with_several_modes_better_than_a_gaussian_guide():
    """log p(x) is -3.19 nats. The Gaussian keeps to one of four modes; standard errors are below 0.02 nats."""
    x = torch.full((64, 2), 1.5)
    options = dict(num_hidden=1, decoder_num_hidden=0, batch_norm=False, likelihood=Squares)
    gaussian = trained(lambda: VAE(2, 2, 16, **options), x)
    process = trained(lambda: VariationalGP(2, (2,), (16,), **options), x)
    bounds = [elbo(structure, x, 200).mean().item() for structure in (gaussian, process)]
    assert -4.5 < bounds[0] < -4.2
    assert bounds[0] + 0.2 < bounds[1] < -3.19


# ------------------------------------------------------------------ with other parts


def test_structures_around_it(x):
    base = partial(VariationalGP, z_dims=(3, 2), hidden_dims=(8, 8), num_points=3)
    check(MixturePrior(12, base, 4), x)
    vamp = VampPrior(12, base, 4)
    check(vamp, x)
    backward(SampledELBO(), vamp, (x,), per=7)
    assert vamp.raw.grad.abs().max() > 0, "its posteriors differ by the pseudo-input, xi at its mean"


def test_trains_in_bfloat16(tiny):
    s = VariationalGP(12, (3,), (8,), num_points=4)
    history = fit(s, tiny, epochs=1, batch_size=15, precision="bfloat16", callbacks=())
    assert math.isfinite(history[-1].train_elbo)


@pytest.mark.parametrize("options", [dict(num_points=0), dict(xi_dim=0), dict(jitter=0.0)])
def test_sizes_are_checked(options):
    with pytest.raises(ValueError, match="sizes must be at least 1, and the jitter above 0"):
        VariationalGP(12, (3,), (8,), **options)
