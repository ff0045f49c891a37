import math
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import STRUCTURES
from pyro import poutine
from torch import nn

from pyro_lvae import (
    VAE,
    BayesianWeights,
    HierarchicalVAE,
    LadderVAE,
    active_units,
    elbo,
    encode,
    interpolate,
    kl_per_layer,
    kl_per_unit,
    log_likelihood,
    manifold,
    posterior_activity,
    reconstruct,
    sample_prior,
    summarize,
    traverse,
)
from pyro_lvae.conditionals import Normal
from pyro_lvae.evaluate import can_generate, has_likelihood
from pyro_lvae.evaluate.chunks import _MadeBytes, chunked_ledgers, cost_of
from pyro_lvae.evaluate.samples import expected
from pyro_lvae.evaluate.watched import watched
from pyro_lvae.traces import evaluating, fixed_noise, ledger


def test_every_evaluation_works_on_every_structure(structure, x):
    structure = structure.draw() if isinstance(structure, BayesianWeights) else structure
    latents = ledger(structure.model, structure.guide, x).latents
    assert elbo(structure, x, 3).shape == (7,)
    if has_likelihood(structure, x):
        assert log_likelihood(structure, x, 10).shape == (7,)
    else:
        with pytest.raises(ValueError, match="the guide of 'z1' is a point mass"):
            log_likelihood(structure, x, 10)
    parts = [f"z{i + 1}{part}" for i in range(len(latents)) for part in ("", "_bu", "_td")]
    layers = [name for name in parts if name in latents]
    names = list(kl_per_layer(structure, x))
    assert names[: len(layers)] == layers
    assert sorted(names) == sorted(latents)  # auxiliary variables after the layers
    units = active_units(structure, x, 10)
    codes = encode(structure, x, 10)
    assert [codes[n].shape for n in units] == [(7, latents[n].q.event_shape.numel()) for n in units]
    assert reconstruct(structure, x).shape == (7, 12)
    assert interpolate(structure, x[:2], x[2:4], 5).shape == (2, 5, 12)
    assert not can_generate(structure, x) or sample_prior(structure, 4, x).shape == (4, 12)
    assert traverse(structure, x[:2], names[0], units=[1], steps=4).shape == (2, 1, 4, 12)
    assert structure.training, "evaluation restores the mode"
    assert all(p.grad is None for p in structure.parameters())


def test_more_samples_tighten_the_bound(x):
    structure = STRUCTURES["LadderVAE"]()
    coarse, fine = (log_likelihood(structure, x, k).mean() for k in (1, 2000))
    assert coarse < fine


def test_long_evaluations_show_a_bar_on_a_terminal(monkeypatch, capsys):
    def seen(**environment) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert [(i, j) for i in watched([1, 2], "outer") for j in watched([1, 2], "inner")] == [
            *product([1, 2], [1, 2])
        ]
        return capsys.readouterr().err

    assert seen(TERM="xterm", FORCE_COLOR="1") == ""  # quick ones show nothing
    monkeypatch.setattr("pyro_lvae.evaluate.watched.PATIENCE", 0.0)
    shown = seen()
    assert "outer" in shown or "inner" in shown  # whichever was first; never both at once
    monkeypatch.delenv("FORCE_COLOR")
    assert seen() == ""  # standard error is a file here


@pytest.mark.parametrize("name", ["VAE-normal", "HierarchicalVAE", "LadderVAE"])
@pytest.mark.parametrize("num_samples", [1, 40])
def test_chunks_stay_under_the_memory_bound(name, num_samples, x):
    """Counted around every pass itself, from its start to the chunk it yields."""
    structure = STRUCTURES[name]()
    least = cost_of(structure.eval(), x, None)(1, 1)
    for memory in (3 * least, 40 * least, 10**9):
        counts, chunks = torch.zeros(7), chunked_ledgers(structure, x, None, num_samples, memory)
        counter = _MadeBytes()
        next_chunk = next(chunks)  # the first includes measuring the cost
        while next_chunk is not None:
            rows, draws, sites = next_chunk
            assert sites.local_log_weight().shape == (draws, rows.stop - rows.start)
            counts[rows] += draws
            counter.bytes = 0
            with counter:
                next_chunk = next(chunks, None)
            assert counter.bytes <= 1.1 * max(memory, least)
        assert counts.tolist() == [num_samples] * 7


def test_the_cost_of_a_pass_is_linear_in_rows_and_draws():
    structure, x = LadderVAE(784).eval(), torch.ones(8, 784)
    cost = cost_of(structure, x, None)
    with _MadeBytes() as made, evaluating(structure):
        ledger(structure.model, structure.guide, x, num_particles=50)
    assert cost(8, 50) == pytest.approx(made.bytes, rel=0.05)


class Half(nn.Module):
    """q(z1|x) = N((x_1, 0), I) and z2 ~ N(z1_2, 1): units with a known posterior mean."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def _sites(self, x):
        import pyro
        import pyro.distributions as dist

        loc = torch.stack([x[:, 0], torch.zeros(len(x))], -1)
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("z2", dist.Normal(z1[..., 1:], 1.0).to_event(1))

    guide = lambda self, x, y=None: self._sites(x)  # noqa: E731

    def model(self, x, y=None):
        import pyro
        import pyro.distributions as dist

        self._sites(torch.zeros_like(x))
        with pyro.plate("likelihood", len(x), dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1), obs=x)


def test_active_units_are_those_whose_posterior_mean_moves():
    """Dead units whose conditional mean is random must not look alive, however few the draws.

    z2's mean is z1_2 ~ N(0, 1): the plain variance of K=20 averages is 0.05, above the threshold of
    0.01. The debiased one has mean 0 and, over 2,000 rows, standard error below 0.002.
    """
    x = torch.randn(2000, 3)
    activity = posterior_activity(Half(), x, num_samples=20)
    torch.testing.assert_close(activity["z1"].mean[:, 0], x[:, 0])
    assert activity["z1"].variance[0].item() == pytest.approx(x[:, 0].var().item(), rel=1e-4)
    assert activity["z2"].mean.var() > 0.03
    assert abs(activity["z2"].variance[0]) < 0.01
    assert active_units(Half(), x, 20) == {"z1": 1, "z2": 0}


def test_kl_of_a_vae_is_the_analytic_one(x):
    from torch.distributions import Normal as N
    from torch.distributions import kl_divergence

    vae = VAE(12, 3, 16).double().eval()
    mu, var = vae.bottom_up[0][1].moments(vae.bottom_up[0][0](x.double()))
    exact = kl_divergence(N(mu, var.sqrt()), N(0.0, 1.0)).sum(-1).mean().item()
    estimate = kl_per_layer(vae, x.double(), num_samples=20_000)["z1"]
    assert estimate == pytest.approx(exact, abs=0.03)  # 7 x 20,000 draws of a ratio of spread < 2: 5 sigma


def test_kl_of_units_is_the_analytic_one_and_adds_up_to_the_layers(x):
    """5 standard errors of 7 x 20,000 ratios; a dead unit costs nothing at all."""
    from torch.distributions import Normal as N
    from torch.distributions import kl_divergence

    vae = VAE(12, 3, 16, batch_norm=False).double()
    with torch.no_grad():
        last = vae.bottom_up[0][1].head[0]
        last.weight[[0, 3]], last.bias[[0, 3]] = 0.0, torch.tensor([0.0, math.log(math.e - 1)]).double()
    mu, var = vae.bottom_up[0][1].moments(vae.bottom_up[0][0](x.double()))
    exact = kl_divergence(N(mu, var.sqrt()), N(0.0, 1.0)).mean(0)
    found = kl_per_unit(vae, x.double(), num_samples=20_000)["z1"]
    torch.testing.assert_close(found, exact, atol=0.02, rtol=0)
    assert abs(found[0]) < 1e-4  # but for the floor of variances


@pytest.mark.parametrize("name", ["LadderVAE", "HierarchicalVAE", "ConvLadderVAE", "SDGM", "VaDE"])
def test_kl_of_units_adds_up_to_the_layers(name, x):
    structure = STRUCTURES[name]().double()
    layers, units = ((torch.manual_seed(0), of(structure, x.double(), 3))[1] for of in (kl_per_layer, kl_per_unit))
    assert {n: u.sum().item() for n, u in units.items()} == pytest.approx({n: layers[n] for n in units})
    assert set(layers) - set(units) == {"SDGM": {"y"}, "VaDE": {"z1"}}.get(name, set())


def test_interpolation_ends_at_reconstructions_of_its_ends(x):
    """With a guide of almost no spread, the ends are the reconstructions."""
    vae = VAE(12, 3, 16, batch_norm=False)
    with torch.no_grad():
        vae.bottom_up[0][1].head[0].bias[3:] = -100
    path = interpolate(vae, x[:3], x[3:6], 4)
    torch.testing.assert_close(path[:, 0], reconstruct(vae, x[:3]), atol=0.02, rtol=0)
    torch.testing.assert_close(path[:, -1], reconstruct(vae, x[3:6]), atol=0.02, rtol=0)


def test_manifold_runs_through_the_inverse_normal_cdf(x):
    vae = VAE(12, 2, 16, likelihood=Normal).eval()
    grid = manifold(vae, x, size=3)
    q = torch.distributions.Normal(0, 1).icdf(torch.tensor([1 / 6, 1 / 2, 5 / 6]))
    corners = {(0, 0): (q[0], q[2]), (0, 2): (q[2], q[2]), (2, 0): (q[0], q[0]), (1, 1): (q[1], q[1])}
    for (row, column), z in corners.items():  # the first latent runs to the right, the second upwards
        z = torch.stack(z)[None]
        torch.testing.assert_close(grid[row, column], vae.likelihood(vae.decoder(z)).mean[0])
    deep = HierarchicalVAE(12, (3, 2), (8, 8)).eval()
    centre = deep.likelihood(deep.decoder(deep.top_down[0](torch.zeros(1, 2)).mean)).mean[0]
    torch.testing.assert_close(manifold(deep, x, size=1)[0, 0], centre)  # the layer below takes its mean
    assert manifold(deep, x, size=4).shape == (4, 4, 12)
    with pytest.raises(ValueError, match=r"a manifold needs a top layer N\(0, I\) of two dimensions"):
        manifold(VAE(12, 3, 16), x)


def test_a_traversal_moves_one_unit_and_holds_the_rest(x):
    """Against the bare networks: all other units at the posterior mean."""
    vae = VAE(12, 3, 16, likelihood=Normal).eval()
    mu, _ = vae.bottom_up[0][1].moments(vae.bottom_up[0][0](x))
    path = traverse(vae, x, units=[2, 0], low=-1, high=2, steps=4)
    assert path.shape == (7, 2, 4, 12)
    for row, (at, unit), (step, value) in [(0, (0, 2), (0, -1.0)), (6, (1, 0), (2, 1.0)), (3, (0, 2), (3, 2.0))]:
        z = mu[row].clone()
        z[unit] = value
        torch.testing.assert_close(path[row, at, step], vae.likelihood(vae.decoder(z)).mean)
    torch.testing.assert_close(traverse(vae, x, "z1", low=-1, high=2, steps=4)[:, [2, 0]], path)


@pytest.mark.parametrize("make", [HierarchicalVAE, LadderVAE])
def test_a_traversal_of_a_middle_layer(make, x):
    """z3 stays where the guide has it, which x does not see; z1 follows z2 by its conditional mean."""
    structure = make(12, (5, 3, 2), (16, 8, 8), likelihood=Normal).eval()
    path = traverse(structure, x, "z2", units=[1], low=0.5, high=0.5, steps=1)[:, 0, 0]
    if make is HierarchicalVAE:  # its means, from the data upwards
        z2 = structure.bottom_up[1](structure.bottom_up[0](x).mean).mean.clone()
    else:
        *evidence, top = structure._upwards(x)
        p = structure.top_down[1](top[0])
        (m, v), (mu, var) = evidence[1], (p.mean, p.variance)
        z2 = (m / v + mu / var) / (1 / v + 1 / var)
    z2[:, 1] = 0.5
    torch.testing.assert_close(path, structure.likelihood(structure.decoder(structure.top_down[0](z2).mean)).mean)
    default = traverse(structure, x, steps=2)
    assert default.shape == (7, 2, 2, 12), "the top layer"
    assert not torch.allclose(default[:, :, 0], default[:, :, 1]), "what is moved above is not hidden by z1"


class WithoutMeans(nn.Module):
    """A Cauchy latent under both, and x_d of {0, 1, 2}."""

    def __init__(self):
        super().__init__()
        self.enc, self.dec = nn.Linear(12, 2), nn.Linear(2, 36)

    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z1", dist.StudentT(1.0, x.new_zeros(2), 1.0).to_event(1))
            logits = self.dec(z.clamp(-5, 5)).unflatten(-1, (12, 3))
            pyro.sample("x", dist.Categorical(logits=logits).to_event(1), obs=x)

    def guide(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z1", dist.StudentT(1.0, 3 * self.enc(x), 0.01).to_event(1))


def test_what_has_no_mean_is_drawn_and_class_numbers_are_averaged(x):
    structure = WithoutMeans()
    activity = posterior_activity(structure, x, 50)["z1"]
    assert activity.mean.isfinite().all()
    assert activity.active == 2
    assert traverse(structure, x[:2], "z1", units=[1], steps=4).isfinite().all()
    with torch.no_grad():
        structure.dec.weight.zero_()
        structure.dec.bias.copy_(torch.tensor([0.5, 0.2, 0.3]).log().repeat(12))
    for found in (sample_prior(structure, 4, x), reconstruct(structure, x)):
        torch.testing.assert_close(found, torch.full_like(found, 0.2 + 2 * 0.3))


def test_the_mean_of_x_where_it_is_hidden_or_unknown():
    numbers = dist.Categorical(torch.tensor([0.5, 0.2, 0.3]))
    for p in (numbers.expand([3, 4]).to_event(1).mask(True), numbers.mask(True).expand([3, 4]).to_event(1)):
        torch.testing.assert_close(expected(p), torch.full((3, 4), 0.8))
    assert torch.equal(expected(dist.StudentT(1.0, torch.ones(3, 4), 2.0).to_event(1)), torch.ones(3, 4))
    squashed = dist.Normal(torch.zeros(3, 4), 1.0).to_event(1)
    squashed = dist.TransformedDistribution(squashed, [dist.transforms.SigmoidTransform()])
    assert expected(squashed).shape == (3, 4)
    assert ((expected(squashed) > 0) & (expected(squashed) < 1)).all()


def test_a_traversal_from_draws(x):
    vae = VAE(12, 3, 16, likelihood=Normal)
    means = [traverse(vae, x, steps=2) for _ in range(2)]
    assert torch.equal(*means), "without draws nothing is random"
    draws = [traverse(vae, x, steps=2, draw=True) for _ in range(2)]
    assert not torch.allclose(*draws)


def test_a_traversal_of_a_structure_with_global_sites(x):
    """The weights are held at their means, which is the structure with these weights put in."""
    bayesian = BayesianWeights(VAE(12, 3, 16))
    path = traverse(bayesian, x[:2], "z1", units=[0, 2])
    torch.testing.assert_close(path, traverse(bayesian.mean(), x[:2], "z1", units=[0, 2]))
    with pytest.raises(ValueError, match="the continuous layers are 'z1'"):
        traverse(bayesian, x, bayesian.names[0])


class Layered(nn.Module):
    """A scalar s ~ N(0, 1), a switch c, z1 ~ N(s + c, 1) and x ~ N((z1, s, c), 1); q(z1) is a flow without a mean."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            s = pyro.sample("s", dist.Normal(x.new_zeros(()), 1.0))
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)))
            z = pyro.sample("z1", dist.Normal((s + c)[..., None], 1.0).to_event(1))
            mu = torch.cat([z, s[..., None], c[..., None]], -1)
            pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)

    def guide(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("s", dist.Normal(x[:, 1], 1.0))
            pyro.sample("c", dist.Bernoulli(x[:, 2]))
            flow = dist.transforms.AffineTransform(3 * x[:, :1], 0.5, event_dim=1)
            pyro.sample("z1", dist.TransformedDistribution(dist.Normal(0 * x[:, :1], 1.0).to_event(1), flow))


def test_a_traversal_of_a_scalar_a_switch_and_a_flow():
    x = torch.tensor([[0.5, 2.0, 1.0], [0.1, -1.0, 0.0]])
    path = traverse(Layered(), x, "s", low=0, high=4, steps=3)[:, 0]
    assert path[..., 1].tolist() == [[0, 2, 4], [0, 2, 4]], "what is moved"
    torch.testing.assert_close(path[..., 0], path[..., 1] + path[..., 2])  # z1 at its conditional mean
    below = traverse(Layered(), x, "z1", low=-1, high=1, steps=2)[:, 0]
    assert below[..., 0].tolist() == [[-1, 1], [-1, 1]]
    assert below[..., 1].tolist() == [[2, 2], [-1, -1]], "above it, posterior means"
    assert below[..., 2].tolist() == [[1, 1], [0, 0]], "a switch is held at a draw of the guide"
    with pytest.raises(ValueError, match="layer is 'c'; the continuous layers are 's', 'z1'"):
        traverse(Layered(), x, "c")


def test_layers_below_a_manifold_take_their_means(x):
    structure = HierarchicalVAE(12, (3, 2), (8, 8), likelihood=Normal).eval()
    grid = manifold(structure, x, size=3)
    z1 = structure.top_down[0](torch.zeros(1, 2)).mean  # the middle of the square
    torch.testing.assert_close(grid[1, 1], structure.likelihood(structure.decoder(z1)).mean[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, x: traverse(s, x, "z4"), "layer is 'z4'; the continuous layers are 'z1'"),
        (lambda s, x: traverse(s, x, units=[3]), r"units \[3\] at 7 steps; 'z1' has units 0 to 2"),
        (lambda s, x: traverse(s, x, units=[]), "name some"),
        (lambda s, x: log_likelihood(s, x[0]), r"x is of shape \(12,\); expected a tensor \[N, D\]"),
        (lambda s, x: log_likelihood(s, x, 0), "num_samples is 0"),
        (lambda s, x: elbo(s, x.tolist()), "x is a list"),
        (lambda s, x: interpolate(s, x[:2], x[:3]), "same shape"),
        (lambda s, x: log_likelihood(s, x / 0), "x holds NaN or infinite values"),
        (
            lambda s, x: log_likelihood(s, 2 * x - 0.5, 3),
            "'x': its distribution does not admit values from -0.5",
        ),
    ],
)
def test_bad_input_is_refused(call, message, x):
    with pytest.raises(ValueError, match=message):
        call(STRUCTURES["VAE"](), x)


def test_rows_of_another_size_are_refused_without_the_shapes_of_all_sites(x):
    with pytest.raises(ValueError, match="VAE cannot take rows of 10: was it made for another size") as caught:
        log_likelihood(STRUCTURES["VAE"](), x[:, :10], 3)
    assert "Trace Shapes" not in str(caught.value)


class Masked(VAE):
    """Every other row counts."""

    def model(self, x, y=None):
        with poutine.mask(mask=torch.arange(len(x)) % 2 == 0):
            return super().model(x)

    def guide(self, x, y=None):
        with poutine.mask(mask=torch.arange(len(x)) % 2 == 0):
            return super().guide(x)


def test_units_of_masked_sites_sum_to_the_kl_of_their_layer(x):
    masked = Masked(12, 3, 8)
    with fixed_noise(x.device):
        whole = kl_per_layer(masked, x, num_samples=3)["z1"]
    with fixed_noise(x.device):
        units = kl_per_unit(masked, x, num_samples=3)["z1"]
    assert units.sum().item() == pytest.approx(whole, rel=1e-5)


def test_global_sites_are_refused_by_name(x):
    from test_traces import GlobalWeight

    with pytest.raises(ValueError, match="'w' lie outside the data plate"):
        log_likelihood(GlobalWeight(), x[:, :2].double(), 5)


def test_summary_holds_the_parts(tiny):
    structure = LadderVAE(12, (5, 3), (16, 8))
    summary = summarize(structure, tiny, [], num_samples=7, num_images=4)
    assert (summary.num_samples, summary.num_images, summary.epochs) == (7, 4, 0)
    assert (summary.structure, summary.data, summary.units) == ("LadderVAE", "tiny", {"z1": 5, "z2": 3})
    assert summary.num_parameters == sum(p.numel() for p in structure.parameters())
    assert summary.test_log_likelihood_stderr > 0
