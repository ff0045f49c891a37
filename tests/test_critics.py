"""Critics: density ratios against exact ones, and how `fit` trains them. Seeds are fixed; without, each would fail in
fewer than one run of twenty."""

import copy
import itertools
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import LADDER
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import nn

from pyro_lvae import (
    ADGM,
    GECO,
    IWAE,
    RWS,
    VAE,
    BayesianWeights,
    BetaTCELBO,
    Dataset,
    DenoisingVAE,
    DReG,
    FactorVAE,
    FlowVAE,
    FusedAdam,
    ImplicitPosteriorVAE,
    OptimalPriorVAE,
    SampledELBO,
    SemiSupervisedVAE,
    VampPrior,
    ais_log_likelihood,
    anneal,
    check,
    compare,
    elbo,
    fit,
    log_likelihood,
)
from pyro_lvae.alternation import CriticSteps
from pyro_lvae.critics import Critic, critic_loss, critics_learning
from pyro_lvae.objectives import backward, check_supported
from pyro_lvae.objectives.decomposed import aggregated
from pyro_lvae.traces import generate, ledger

SMALL = partial(VAE, z_dim=2, hidden_dim=16, batch_norm=False)
CRITIC = dict(critic_hidden_dim=32, critic_num_hidden=2)


def _learn(structure, x, steps, lr=3e-3):
    critics = CriticSteps(structure, partial(FusedAdam, lr=lr), 1)
    for _ in range(steps):
        critics((x,))
    return structure


def test_a_critic_finds_the_log_ratio_of_two_gaussians():
    """T* = log N(u; 1, 1) - log N(u; 0, 1) = u - 1/2."""
    critic = Critic(1, 32, 2).double()
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    for _ in range(600):
        a, b = (torch.randn(512, 1, dtype=torch.double) + shift for shift in (1, 0))
        with critics_learning(critic):
            optimizer.zero_grad()
            critic.loss((a,), (b,)).backward()
        optimizer.step()
    u = torch.linspace(-1, 2, 13, dtype=torch.double)
    assert (critic(u[:, None]) - (u - 0.5)).abs().max() < 0.25


class LinearGuide(nn.Module):
    """q(z|x) = N(A x, s^2): for x ~ N(0, I), q(z) is N(0, A A' + s^2 I), whose total correlation is known."""

    def __init__(self, x_dim, identity=False, s=0.3):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(2) if identity else torch.tensor([[1.0, 0.0], [1.5, 0.8]]))
        self.s = s

    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z1", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z1", dist.Normal(x @ self.weight.T, self.s).to_event(1))

    def covariance(self):
        return self.weight @ self.weight.T + self.s**2 * torch.eye(2)


def test_factor_vae_estimates_the_total_correlation():
    structure = FactorVAE(2, LinearGuide, gamma=2.0, **CRITIC)
    data = torch.randn(4000, 2)
    critics = CriticSteps(structure, partial(FusedAdam, lr=2e-3), 1)
    for i in range(800):
        critics((data[torch.arange(500) + 500 * (i % 8)],))
    with torch.no_grad():
        sites = ledger(structure.model, structure.guide, data)
    covariance = structure.base.covariance()
    exact = 0.5 * (covariance.diagonal().log().sum() - covariance.logdet()).item()
    assert exact > 0.5
    estimate = -sites["total_correlation"].log_p.mean().item() / structure.gamma
    assert estimate == pytest.approx(exact, abs=0.12)


def test_the_penalty_is_there_in_training_alone_and_reaches_the_guide_alone(x):
    structure = FactorVAE(12, SMALL, gamma=3.0, **CRITIC)
    plain = ledger(structure.base.model, structure.base.guide, x)
    assert set(ledger(structure.model, structure.guide, x)) == {*plain, "total_correlation"}
    assert torch.equal(*_same_noise(lambda: elbo(structure, x, 3), lambda: elbo(structure.base, x, 3)))
    sites = ledger(structure.model, structure.guide, x, num_particles=4)
    expected = -3.0 * structure.critic(sites["z1"].value)
    assert torch.equal(sites["total_correlation"].log_p, expected)
    expected.sum().backward()
    moved = {n.partition(".")[0] for n, p in structure.base.named_parameters() if p.grad is not None}
    assert moved == {"bottom_up"}


def test_the_optimal_prior_finds_the_aggregated_posterior():
    """Against log 1/N sum_n q(z|x_n) - log p(z) by hand, and against the VampPrior at the data themselves."""
    x = torch.tensor([[1.2, 0.8], [-1.2, 0.8], [1.2, -0.8], [-1.2, -0.8], [0.0, 1.5], [0.3, -1.4]])
    structure = OptimalPriorVAE(2, partial(LinearGuide, identity=True, s=0.4), **CRITIC)
    _learn(structure, x.repeat(100, 1), 700)
    structure.normalize()
    q = dist.Normal(x, 0.4).to_event(1)
    p = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    z = q.sample((300,)).reshape(-1, 2)
    exact = (q.log_prob(z[:, None]).logsumexp(1) - math.log(6) - p.log_prob(z)).detach()
    found = structure.log_ratio(z).detach()
    assert (found - exact).abs().mean() < 0.2 < 0.4 < exact.std()
    assert torch.corrcoef(torch.stack([found, exact]))[0, 1] > 0.95

    vamp = VampPrior(2, lambda _: copy.deepcopy(structure.base), 6, bounds=None)
    with torch.no_grad():
        vamp.raw.copy_(x)
    torch.testing.assert_close(vamp.prior().log_prob(z) - p.log_prob(z), exact, rtol=1e-4, atol=1e-4)
    pairs = _same_noise(lambda: log_likelihood(structure, x, 200), lambda: log_likelihood(vamp, x, 200))
    assert (pairs[0] - pairs[1]).abs().max() < 0.5

    drawn = generate(structure, x[:1].expand(4000, -1), {})["z1"][1]
    torch.testing.assert_close(drawn.mean(0), x.mean(0), rtol=0, atol=0.25)
    torch.testing.assert_close(drawn.T.cov(), z.T.cov(), rtol=0.2, atol=0.2)


def test_the_factor_of_the_optimal_prior_is_normalised_and_the_prior_stays_closed_form(x):
    structure = OptimalPriorVAE(12, SMALL, **CRITIC)
    with torch.no_grad():
        structure.critic.net[1].bias.fill_(2.0)  # exp(T) is e^2 times too large, about
    value = structure.normalize()
    z = torch.randn(100_000, 2)
    assert structure.log_ratio(z).logsumexp(0).item() == pytest.approx(math.log(len(z)), abs=0.02)
    assert value == pytest.approx(2.0, abs=1.0)
    site = ledger(structure.model, structure.guide, x)["z1"]
    plain = ledger(structure.base.model, structure.base.guide, x)["z1"]
    torch.testing.assert_close(site.kl(), plain.kl() - structure.log_ratio(site.value))
    for _ in range(300):  # the running mean gets there too
        structure._move_normalizer(structure.critic(torch.randn(500, 2)))
    assert structure.log_normalizer.item() == pytest.approx(value, abs=0.1)


def test_the_ratio_belongs_to_the_prior(x):
    """It is annealed with its layer, and is a part of that layer's KL, not of the reconstruction."""
    structure = OptimalPriorVAE(12, SMALL, **CRITIC)
    with anneal(beta=0.3):
        sites = ledger(structure.model, structure.guide, x, num_particles=4)
    assert set(sites) == {"z1", "x"}
    z, base = sites["z1"], dist.Normal(torch.zeros(2), 1.0).to_event(1)
    torch.testing.assert_close(z.log_p, base.log_prob(z.value) + structure.log_ratio(z.value))
    torch.testing.assert_close(sites.local_log_weight(), sites["x"].log_p + 0.3 * (z.log_p - z.log_q))
    torch.testing.assert_close(sites.kl_shares()["z1"], 0.3 * (z.log_q - z.log_p))
    losses = []
    for estimator in (Trace_ELBO(max_plate_nesting=1), SampledELBO()):
        torch.manual_seed(2)
        with anneal(beta=0.3):
            losses.append(estimator.loss(structure.model, structure.guide, x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_annealed_importance_sampling_and_comparison_take_it_along(x):
    structure = OptimalPriorVAE(12, SMALL, **CRITIC)
    structure.normalize()
    for start in ("prior", "guide"):
        found = ais_log_likelihood(structure, x, 32, 40, 3, start=start)
        assert (found - log_likelihood(structure, x, 4000)).abs().max() < 0.3
    few = dict(num_repeats=4, num_samples=50, reference_particles=10, num_temperatures=5, num_chains=2)
    compare(structure, x, [SampledELBO(), IWAE(3)], **few)


@pytest.mark.parametrize("make", [FactorVAE, OptimalPriorVAE])
def test_elbo_and_critic_have_parameters_of_their_own(make, x):
    structure = make(12, SMALL, **CRITIC)
    backward(SampledELBO(), structure, (x,), per=7)
    assert all(p.grad is None and not p.requires_grad for p in structure.critic.parameters())
    structure.zero_grad()
    with critics_learning(structure) as parameters:
        critic_loss(structure, x).backward()
    assert all(p.grad is not None for p in parameters)
    assert all(p.grad is None for p in structure.base.parameters())


@pytest.mark.parametrize("make", [FactorVAE, OptimalPriorVAE])
@pytest.mark.parametrize("base", [SMALL, LADDER, partial(DenoisingVAE, base=SMALL)], ids=["VAE", "ladder", "denoising"])
def test_fit_trains_both_and_resumes_bit_for_bit(make, base, tiny, tmp_path):
    def run(name, epochs, **options):
        torch.manual_seed(0)
        structure = make(12, base, **CRITIC)
        before = copy.deepcopy(structure.state_dict())
        history = fit(structure, tiny, epochs=epochs, batch_size=16, out=tmp_path / name, callbacks=(), **options)
        after = structure.state_dict()
        assert not any(torch.equal(before[k], after[k]) for k, _ in structure.named_parameters())
        return history, after

    history, whole = run("whole", 3)
    run("parts", 1)
    again, parts = run("parts", 3, resume=True)
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert [m.critic_loss for m in history] == [m.critic_loss for m in again]
    assert all(0 < m.critic_loss < 3 for m in history)


def test_compiled_and_eager_agree(tiny):
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        base = partial(SMALL, num_hidden=0)
        structure = OptimalPriorVAE(12, base, critic_hidden_dim=8, critic_num_hidden=1).double()
        data = Dataset("tiny", tiny.x_train.double(), tiny.x_test.double())
        fit(structure, data, epochs=2, batch_size=15, compile=compile, callbacks=())
        found.append(structure.state_dict())
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-9, atol=1e-9)


def test_a_posterior_over_the_weights_leaves_the_critic_alone(x):
    structure = BayesianWeights(FactorVAE(12, SMALL, **CRITIC))
    check(structure, x)
    assert not any("critic" in name for name in structure.names)
    before = [p.clone() for p in structure.parameters()]
    _learn(structure, x, 2)
    moved = {n for (n, p), b in zip(structure.named_parameters(), before, strict=True) if not torch.equal(p, b)}
    assert moved == {n for n, _ in structure.named_parameters() if "critic" in n}


def test_the_critics_steps_leave_batch_norm_as_it_was(x):
    structure = FactorVAE(12, partial(VAE, z_dim=2, hidden_dim=16), **CRITIC)
    before = {k: v.clone() for k, v in structure.named_buffers() if "running" in k}
    _learn(structure, x, 3)
    assert before
    assert all(torch.equal(before[k], v) for k, v in structure.named_buffers() if k in before)
    backward(SampledELBO(), structure, (x,), per=7)
    assert not any(torch.equal(before[k], v) for k, v in structure.named_buffers() if k in before)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FlowVAE(12, partial(OptimalPriorVAE, base=SMALL, **CRITIC), num_flows=1),
        lambda: OptimalPriorVAE(12, partial(FlowVAE, base=SMALL, num_flows=1), **CRITIC),
        lambda: OptimalPriorVAE(12, partial(ImplicitPosteriorVAE, z_dim=2, hidden_dim=8), **CRITIC),
        lambda: FactorVAE(12, partial(SemiSupervisedVAE, num_classes=3, z_dim=2, hidden_dim=8), layer="z1", **CRITIC),
    ],
)
def test_they_go_together(make, tiny, x):
    structure = make()
    history = fit(structure, tiny, epochs=2, batch_size=16, callbacks=())
    assert math.isfinite(history[-1].test_elbo)
    assert log_likelihood(structure, x, 5).isfinite().all()


def test_structures_without_critics_have_no_critic_loss(tiny):
    assert fit(SMALL(12), tiny, epochs=1, callbacks=())[0].critic_loss is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FactorVAE(12, SMALL, gamma=-1.0), "gamma is -1.0"),
        (lambda: FactorVAE(12, SMALL, layer="z9"), "layer is 'z9'"),
        (lambda: FactorVAE(12, partial(SMALL, z_dim=1)), "at least two real numbers"),
        (lambda: OptimalPriorVAE(12, partial(VampPrior, base=SMALL)), "parameters"),
        (lambda: BetaTCELBO(-1), "beta is -1"),
        (lambda: BetaTCELBO(size=0), "size is 0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------- the decomposed ELBO


def _same_noise(*runs):
    found = []
    for run in runs:
        torch.manual_seed(5)
        found.append(run())
    return found


@pytest.mark.parametrize("make", [SMALL, LADDER])
@pytest.mark.parametrize("particles", [1, 3])
def test_equal_weights_are_the_elbo(make, particles, x):
    structure = make(12).double()
    bounds = _same_noise(
        lambda: BetaTCELBO(1.0, num_particles=particles, size=70).loss(structure.model, structure.guide, x.double()),
        lambda: SampledELBO(particles).loss(structure.model, structure.guide, x.double()),
    )
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-12)


def test_the_aggregated_posterior_of_a_full_batch_is_exact(x):
    """Against loops over rows and units."""
    structure = SMALL(12).double()
    site = ledger(structure.model, structure.guide, x.double(), num_particles=3)["z1"]
    q = structure.bottom_up[0](x.double()).base_dist
    joint, units = aggregated(site)
    for k, b in itertools.product(range(3), range(7)):
        each = torch.stack([dist.Normal(q.loc[n], q.scale[n]).log_prob(site.value[k, b]) for n in range(7)])
        torch.testing.assert_close(joint[k, b], each.sum(-1).exp().mean().log())
        torch.testing.assert_close(units[k, b], each.exp().mean(0).log().sum())


def test_the_estimate_from_a_batch_is_unbiased(x):
    """The mean of q(z) over all batches of 3 of 7 rows that hold row 0 is q(z)."""
    structure = SMALL(12).double()
    site = ledger(structure.model, structure.guide, x.double())["z1"]
    exact, _ = aggregated(site)
    q, z = site.q.base_dist, site.value
    found = []
    for others in itertools.combinations(range(1, 7), 2):
        rows = [0, *others]
        part = copy.copy(site)
        object.__setattr__(part, "q", dist.Normal(q.loc[rows], q.scale[rows]).to_event(1))
        object.__setattr__(part, "value", z[rows])
        found.append(aggregated(part, 7)[0][0].exp())
    torch.testing.assert_close(torch.stack(found).mean(), exact[0].exp())


@pytest.mark.parametrize("estimator", [IWAE(3), DReG(3), RWS(3), GECO(5.0), RenyiELBO(num_particles=2)])
def test_a_penalty_is_no_weight(estimator, x):
    structure = FactorVAE(12, SMALL, **CRITIC)
    with pytest.raises(ValueError, match="penalty"):
        check_supported(estimator, ledger(structure.model, structure.guide, x))
    structure.eval()
    check_supported(estimator, ledger(structure.model, structure.guide, x))


def test_another_optimiser_is_refused_on_resuming(tiny, tmp_path):
    structure = FactorVAE(12, SMALL, **CRITIC)
    fit(structure, tiny, epochs=1, out=tmp_path, callbacks=())
    other = partial(torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="critic_optimizer was 'CriticAdam' and is 'SGD'"):
        fit(structure, tiny, epochs=2, out=tmp_path, resume=True, critic_optimizer=other, callbacks=())


def test_a_critic_without_a_loss_is_named(tiny):
    structure = SMALL(12)
    structure.critic = Critic(2, 4)
    with pytest.raises(ValueError, match="VAE holds a Critic and no critic_loss"):
        fit(structure, tiny, epochs=1, callbacks=())


def test_enumerated_sites_and_small_data_sets_are_refused(x):
    adgm, vae = ADGM(12, 3, 2, 8), SMALL(12)
    with pytest.raises(ValueError, match="enumerated"):
        BetaTCELBO().loss(adgm.model, adgm.guide, x)
    with pytest.raises(ValueError, match="the batch alone has 7 rows"):
        BetaTCELBO(size=3).loss(vae.model, vae.guide, x)


def test_layers_whose_posterior_depends_on_others_are_refused(x):
    ladder = LADDER(12)
    with pytest.raises(ValueError, match="depends on"):
        BetaTCELBO(layer="z1").loss(ladder.model, ladder.guide, x)
