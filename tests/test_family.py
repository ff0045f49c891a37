"""Each member of the family against an exact answer or an independent computation, in float64.

Statistical tests draw from a fixed seed; with a fresh one each would fail less than once in 1,000 runs (bounds are at
least 3.3 standard errors wide).
"""

import itertools
import math
from dataclasses import replace
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from torch import nn
from torch.distributions import MultivariateNormal

from pyro_lvae import (
    AE,
    IWAE,
    VAE,
    BidirectionalLadderVAE,
    ConditionalVAE,
    Dataset,
    DenoisingVAE,
    FlowVAE,
    HierarchicalVAE,
    LadderVAE,
    MixturePrior,
    OptimalPriorVAE,
    SampledELBO,
    SparseVAE,
    VaDE,
    VampPrior,
    ais_log_likelihood,
    cluster_probabilities,
    clustering_accuracy,
    elbo,
    fit,
    linear,
    log_likelihood,
    rate_distortion,
)
from pyro_lvae.conditionals import Bernoulli, Normal
from pyro_lvae.contract import ContractError, check
from pyro_lvae.objectives import backward
from pyro_lvae.structures.denoising import gaussian, masking, salt_and_pepper
from pyro_lvae.structures.flows import IAF, PlanarFlow, SplineFlow
from pyro_lvae.structures.sparse import BetaCode, RelaxedBernoulliCode, TwoGaussiansCode
from pyro_lvae.traces import evaluating, ledger

FIXED = dict(num_hidden=0, batch_norm=False, likelihood=partial(Normal, scale=0.7))


def within(estimate, truth, log_w, standard_errors=4.0):
    """Whether an importance-sampled log p is as near as the spread of its weights `[K, N]` says."""
    w = log_w.softmax(0)
    stderr = (w.square().sum(0) - 1 / len(w)).clamp_min(0).sqrt()
    return ((estimate - truth).abs() < standard_errors * stderr + 1e-9).all()


def log_weights(structure, x, num_samples, *y):
    with evaluating(structure):
        return ledger(structure.model, structure.guide, x, *y, num_particles=num_samples).local_log_weight()


# ------------------------------------------------------------------ autoencoder


def test_an_autoencoder_minimises_the_cross_entropy(x):
    ae, x = AE(12, 2, 5, batch_norm=False).double(), x.double()
    loss = backward(SampledELBO(), ae, (x,), per=7)
    mlp, head = ae.bottom_up[0]
    logits = ae.likelihood(ae.decoder(head.point(mlp(x)))).base_dist.logits
    by_hand = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1).mean()
    torch.testing.assert_close(loss, by_hand.detach())


def test_an_autoencoder_minimises_the_squared_error():
    ae, x = AE(6, 2, 5, batch_norm=False, likelihood=partial(Normal, scale=1.0)).double(), torch.randn(8, 6).double()
    loss = backward(SampledELBO(), ae, (x,), per=8)
    gradients = [p.grad.clone() for p in ae.parameters()]
    ae.zero_grad()
    mlp, head = ae.bottom_up[0]
    by_hand = 0.5 * (ae.likelihood.head(ae.decoder(head.point(mlp(x)))) - x).square().sum(-1).mean()
    by_hand.backward()
    torch.testing.assert_close(loss, by_hand.detach() + 3 * math.log(2 * math.pi))
    for p, g in zip(ae.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, g)


# ------------------------------------------------------------------ labels


@pytest.mark.parametrize("learn_prior", [False, True])
def test_a_linear_conditional_vae_has_a_known_likelihood(learn_prior):
    cvae = ConditionalVAE(4, 3, 2, 8, learn_prior=learn_prior, **FIXED).double().eval()
    head = cvae.encoder[1].head[0]  # a wide guide, whatever x is
    head.weight.data[:2] *= 0.3
    head.weight.data[2:], head.bias.data[2:] = 0, 1.5
    x, y = torch.randn(12, 4).double(), torch.arange(12) % 3
    one_hot = nn.functional.one_hot(y, 3).double()
    mean, var = (one_hot.new_zeros(12, 2), one_hot.new_ones(12, 2))
    if learn_prior:
        p = cvae.prior(one_hot)
        mean, var = p.mean.detach(), p.variance.detach()
    w, b = cvae.likelihood.head[0].weight.detach(), cvae.likelihood.head[0].bias.detach()
    cov = w[:, :2] @ torch.diag_embed(var) @ w[:, :2].T + 0.49 * torch.eye(4).double()
    truth = MultivariateNormal(mean @ w[:, :2].T + one_hot @ w[:, 2:].T + b, cov).log_prob(x)
    log_w = log_weights(cvae, x, 20_000, y)
    assert within(log_w.logsumexp(0) - math.log(20_000), truth, log_w)
    torch.testing.assert_close(log_likelihood(cvae, x, 20_000, y=y), truth, atol=0.2, rtol=0)
    torch.testing.assert_close(elbo(cvae, x, 4000, y=one_hot).mean(), elbo(cvae, x, 4000, y=y).mean(), atol=0.1, rtol=0)


def test_labels_reach_a_conditional_structure_by_themselves(tiny):
    cvae = ConditionalVAE(12, 3, 2, 16)
    history = fit(cvae, tiny, epochs=2, batch_size=15, callbacks=())
    assert len(history) == 2
    with pytest.raises(ContractError, match="ConditionalVAE is conditional on labels y, and none were given; pass y="):
        check(cvae, tiny.x_test)
    with pytest.raises(ContractError, match=r"expected integer labels \[B\] or floating-point conditions \[B, 3\]"):
        check(cvae, tiny.x_test, torch.randn(15, 2))
    with pytest.raises(ContractError, match="a label is 7; num_classes=3 takes 0 to 2"):
        check(cvae, tiny.x_test, torch.tensor([0, 7, 1, 2]).repeat(4)[:15])
    late = replace(tiny, y_test=torch.full((15,), 3))
    with pytest.raises(ContractError, match="a label is 3; num_classes=3 takes 0 to 2"):
        fit(cvae, late, epochs=1, callbacks=())
    assert FlowVAE(12, partial(ConditionalVAE, num_classes=3)).takes_labels
    with pytest.raises(ValueError, match="ConditionalVAE is conditional on labels, and pseudo-inputs have none"):
        VampPrior(12, ConditionalVAE)


# ------------------------------------------------------------------ mixtures


def _joint(prior, likelihood, x):
    """log p(x, c) of a mixture prior under x = W z + b + N(0, 0.49), `[B, C]`."""
    w, b = likelihood.head[0].weight.detach(), likelihood.head[0].bias.detach()
    components = prior.component_distribution
    mean, var = components.mean.detach(), components.variance.detach()
    cov = w @ torch.diag_embed(var) @ w.T + 0.49 * torch.eye(len(w)).double()
    given_c = MultivariateNormal(mean @ w.T + b, cov).log_prob(x.unsqueeze(-2))
    return prior.mixture_distribution.logits.detach() + given_c


def _marginal(prior, likelihood, x):
    return _joint(prior, likelihood, x).logsumexp(-1)


def _wide(head):
    head.weight.data[:2] *= 0.3
    head.weight.data[2:], head.bias.data[2:] = 0, 2.0


MIXTURES = {
    "VaDE": lambda: VaDE(4, 3, 2, (), likelihood=partial(Normal, scale=0.7)),
    "MixturePrior": lambda: MixturePrior(4, partial(VAE, z_dim=2, hidden_dim=8, **FIXED), 3),
    "VampPrior": lambda: VampPrior(4, partial(VAE, z_dim=2, hidden_dim=8, **FIXED), 3, std=1.0, bounds=None),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_linear_structures_with_mixture_priors_have_a_known_likelihood(name):
    structure = MIXTURES[name]().double().eval()
    encoder = structure.posterior if name == "VaDE" else structure.base.bottom_up[0][1]
    _wide(encoder.head[0])
    likelihood = structure.likelihood if name == "VaDE" else structure.base.likelihood
    if name != "VampPrior":
        structure.prior.log_variance.data.normal_(-1, 0.3)
    x = torch.randn(12, 4).double()
    log_w = log_weights(structure, x, 40_000)
    assert within(log_w.logsumexp(0) - math.log(40_000), _marginal(structure.prior(), likelihood, x), log_w)


@pytest.mark.parametrize("name", ["VaDE", *(pytest.param(n, marks=pytest.mark.slow) for n in MIXTURES if n != "VaDE")])
def test_annealing_takes_mixture_priors(name):
    """AIS with 60 temperatures and 32 chains, whose error here is far below 0.3 nats a datum."""
    structure = MIXTURES[name]().double().eval()
    likelihood = structure.likelihood if name == "VaDE" else structure.base.likelihood
    x = torch.randn(4, 4).double()
    found = ais_log_likelihood(structure, x, num_chains=32, num_temperatures=60)
    torch.testing.assert_close(found, _marginal(structure.prior(), likelihood, x), atol=0.3, rtol=0)


def test_vade_scores_and_learns_given_clusters():
    vade = MIXTURES["VaDE"]().double().eval()
    _wide(vade.posterior.head[0])
    vade.prior.logits.data.normal_()
    x, c = torch.randn(12, 4).double(), torch.arange(12) % 3
    log_w = log_weights(vade, x, 40_000, c)
    exact = _joint(vade.prior(), vade.likelihood, x)[range(12), c]
    assert within(log_w.logsumexp(0) - math.log(40_000), exact, log_w)
    torch.manual_seed(0)
    found = log_likelihood(vade, x, 100, y=c.to(torch.uint8))  # numbers of bytes would be taken for a mask
    torch.manual_seed(0)
    torch.testing.assert_close(found, log_likelihood(vade, x, 100, y=c))


def test_vade_arranges_its_codes_by_given_clusters():
    """One of twelve fair coins, which no method would find, is what q(c|x) tells after training with it."""
    x = torch.randint(0, 2, (512, 12)).float()
    coins = Dataset("coins", x[:400], x[400:], x[:400, 0].long(), x[400:, 0].long())
    vade = VaDE(12, 2, 3, (64,))
    fit(vade, coins, epochs=40, batch_size=50, optimizer=partial(torch.optim.Adam, lr=5e-3), supervised=True)
    for part, c in ((coins.x_train, coins.y_train), (coins.x_test, coins.y_test)):
        assert clustering_accuracy(cluster_probabilities(vade, part).argmax(-1), c) > 0.95
    with pytest.raises(ContractError, match="a label is 2; num_clusters=2 takes 0 to 1; count clusters from 0"):
        fit(vade, replace(coins, y_train=coins.y_train + 1), epochs=1, supervised=True)
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="a label is -1; num_clusters=2 takes 0 to 1"):
        elbo(vade, coins.x_test[:2], y=torch.tensor([0, -1]))


class Enumerated(nn.Module):
    """VaDE's pair with its c as a site, for Pyro to sum out."""

    def __init__(self, vade):
        super().__init__()
        self.vade, self.guide = vade, vade.guide

    def model(self, x, y=None):
        prior, components = self.vade.prior(), self.vade.prior().component_distribution.base_dist
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.Categorical(prior.mixture_distribution.probs), infer={"enumerate": "parallel"})
            z = pyro.sample("z1", dist.Normal(components.loc[c], components.scale[c]).to_event(1))
            pyro.sample("x", self.vade.likelihood(self.vade.decoder(z)), obs=x)


def test_vade_is_its_enumerated_form_summed_out(x):
    vade, x = VaDE(12, 4, 3, (16, 8)).double(), x.double()
    for p in vade.prior.parameters():
        p.data.add_(torch.randn_like(p))
    losses, gradients = [], []
    for structure, estimator in ((vade, SampledELBO()), (Enumerated(vade), TraceEnum_ELBO(max_plate_nesting=1))):
        torch.manual_seed(3)
        vade.zero_grad()
        losses.append(backward(estimator, structure, (x,), per=7))
        gradients.append([p.grad.clone() for p in vade.parameters()])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def test_cluster_probabilities_follow_bayes_rule(x):
    vade, x = VaDE(12, 4, 3, (16, 8)).double().eval(), x.double()
    vade.posterior.head[0].bias.data[3:] = -30  # nearly points
    pi = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    vade.prior.logits.data = pi.log()
    with torch.no_grad():
        z = vade.posterior(vade.encoder(x)).mean
        prior = vade.prior()
        components = prior.component_distribution.base_dist
        joint = dist.Normal(components.loc, components.scale).log_prob(z.unsqueeze(-2)).sum(-1)
    expected = pi * joint.exp() / (pi * joint.exp()).sum(-1, keepdim=True)
    torch.testing.assert_close(cluster_probabilities(vade, x, 20), expected, atol=0.02, rtol=0)
    torch.testing.assert_close(cluster_probabilities(vade, x, 20, memory=1).sum(-1), torch.ones(7).double())


def test_cluster_probabilities_average_over_the_posterior(x):
    """Of a wide posterior over one unit, E_q(z|x)[p(c|z)] by quadrature."""
    vade, x = VaDE(12, 4, 1, (16, 8)).double().eval(), x.double()
    vade.prior.loc.data = torch.tensor([[-2.0], [0.0], [1.0], [3.0]]).double()
    grid = torch.linspace(-12, 12, 4801).double()
    with torch.no_grad():
        q, prior = vade.posterior(vade.encoder(x)), vade.prior()
        of = prior.component_distribution.log_prob(grid[:, None, None]) + prior.mixture_distribution.logits
        density = q.log_prob(grid[:, None, None]).exp()  # [grid, B]
        expected = torch.trapezoid(density[..., None] * of.softmax(-1)[:, None], grid, dim=0)
    torch.testing.assert_close(cluster_probabilities(vade, x, 20_000), expected.squeeze(), atol=0.02, rtol=0)


def test_put_clusters_sets_the_mixture():
    vade = VaDE(12, 4, 3, (16, 8))
    pi, mu, var = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.randn(4, 3), torch.rand(4, 3) + 0.1
    vade.put_clusters(pi.numpy(), mu.numpy(), var.numpy())
    prior = vade.prior()
    torch.testing.assert_close(prior.mixture_distribution.probs, pi)
    torch.testing.assert_close(prior.component_distribution.mean, mu)
    torch.testing.assert_close(prior.component_distribution.variance, var + 1e-5)
    with pytest.raises(ValueError, match=r"means has shape \(3, 4\); expected \(4, 3\)"):
        vade.put_clusters(pi, mu.T, var)
    with pytest.raises(ValueError, match="variances go down to -.* they must be positive"):
        vade.put_clusters(pi.flip(0), mu + 1, -var)
    torch.testing.assert_close(vade.prior().mixture_distribution.probs, pi)  # nothing was changed


def test_clustering_accuracy_is_the_best_of_all_matchings():
    from itertools import permutations

    clusters, labels = torch.randint(0, 5, (200,)), torch.randint(0, 5, (200,))
    best = max((torch.tensor(order)[clusters] == labels).float().mean().item() for order in permutations(range(5)))
    assert clustering_accuracy(clusters, labels) == pytest.approx(best)
    assert clustering_accuracy(labels * 7 + 3, labels) == 1
    assert clustering_accuracy(torch.arange(4), torch.zeros(4)) == 0.25  # one cluster a class, no more
    with pytest.raises(ValueError, match=r"expected two vectors \[N\] of one length"):
        clustering_accuracy(clusters[:3], labels)


def test_cluster_probabilities_need_a_mixture(x):
    with pytest.raises(ValueError, match="no prior of 'z1' is a mixture"):
        cluster_probabilities(VAE(12, 3, 16), x)


@pytest.mark.parametrize(
    "base", [partial(VAE, z_dim=3, hidden_dim=16), partial(LadderVAE, z_dims=(5, 3), hidden_dims=(16, 8))]
)
def test_the_vampprior_at_the_data_is_the_aggregated_posterior(base, x):
    vamp = VampPrior(12, base, 7, bounds=None).double()
    with torch.no_grad():
        vamp.raw.copy_(x)
    vamp.base.train()
    backward(SampledELBO(), vamp, (x.double(),), per=7)  # moves batch-norm statistics
    moved = {n: b.clone() for n, b in vamp.named_buffers()}
    prior = vamp.prior()
    for name, buffer in vamp.named_buffers():
        assert torch.equal(buffer, moved[name]), "pseudo-inputs leave batch-norm statistics alone"
    assert vamp.base.training
    vamp.eval()
    torch.manual_seed(0)
    q = ledger(vamp.model, vamp.guide, x.double())[vamp.top].q
    z = torch.randn(6, 3).double()
    by_hand = torch.stack([q.log_prob(one.expand(7, 3)).logsumexp(0) - math.log(7) for one in z])
    torch.testing.assert_close(prior.log_prob(z), by_hand)


def test_the_vampprior_of_a_bottom_up_hierarchy_has_the_lower_layers_at_their_means():
    vamp = VampPrior(12, partial(HierarchicalVAE, z_dims=(5, 4, 3), hidden_dims=(16, 8, 6)), 7).double().eval()
    u = vamp.pseudo_inputs
    for mlp, head in vamp.base.bottom_up:
        q = head(mlp(u))
        u = q.mean
    z = torch.randn(6, 3).double()
    by_hand = torch.stack([q.log_prob(one.expand(7, 3)).logsumexp(0) - math.log(7) for one in z])
    torch.testing.assert_close(vamp.prior().log_prob(z), by_hand)


def test_a_vampprior_refuses_flows_and_starts_from_data(x):
    with pytest.raises(ValueError, match="the guide of FlowVAE has flows at 'z1'"):
        VampPrior(12, FlowVAE)
    ladder = partial(LadderVAE, z_dims=(5, 3), hidden_dims=(16, 8))
    check(VampPrior(12, partial(BidirectionalLadderVAE, z_dims=(5, 4, 3), hidden_dim=8)), x)
    check(VampPrior(12, partial(FlowVAE, base=ladder, layers=["z1"])), x)  # below the top, they are in nobody's way
    vamp = VampPrior(12, partial(VAE, z_dim=2, hidden_dim=8), 5)
    vamp.start_from(x)
    with pytest.raises(ValueError, match=r"x runs from 0 to 2, beyond bounds=\(0.0, 1.0\)"):
        vamp.start_from(2 * x)
    rows = {tuple(r) for r in x.tolist()}
    assert all(tuple(u) in rows for u in vamp.pseudo_inputs.round().tolist())
    backward(SampledELBO(), vamp, (x,), per=7)
    assert (vamp.raw.grad != 0).float().mean() > 0.5, "binary pseudo-inputs are learned too"


# ------------------------------------------------------------------ flows


@pytest.mark.parametrize("flow", [PlanarFlow, IAF, SplineFlow], ids=lambda f: f.__name__)
def test_flows_change_the_density_by_their_jacobian(flow, x):
    x = x.double()
    structure = FlowVAE(12, partial(VAE, z_dim=3, hidden_dim=16), flow, 2).double().eval()
    for p in structure.flows.parameters():  # away from the identity
        p.data.add_(0.3 * torch.randn_like(p))
    context = structure.context(x)
    transforms = [f.condition(context) for f in structure.flows["z1"]]
    base = structure.base.bottom_up[0](x)
    z = base.rsample()

    def run(z):
        for transform in transforms:
            z = transform(z)
        return z

    jacobian = torch.autograd.functional.jacobian(lambda z: run(z).sum(0), z).permute(1, 0, 2)  # [7, 3, 3]
    expected = base.log_prob(z) - torch.linalg.slogdet(jacobian).logabsdet
    q = dist.TransformedDistribution(base, [f.condition(context) for f in structure.flows["z1"]])
    value = z
    for transform in q.transforms:
        value = transform(value)  # fills the caches that log_prob reads
    torch.testing.assert_close(q.log_prob(value), expected)
    assert (jacobian - torch.diag_embed(jacobian.diagonal(dim1=1, dim2=2))).abs().max() > 1e-3, "units interact"


def test_flows_reach_a_correlated_posterior():
    """x ~ N(z_1 + z_2, 0.1): the posterior's correlation is -0.91, which no product of Normals has."""

    def vae(x_dim):
        made = VAE(x_dim, 2, 8, num_hidden=0, batch_norm=False, likelihood=partial(Normal, scale=0.1**0.5))
        head = made.likelihood.head[0]
        head.weight.data.fill_(1.0)
        for p in made.likelihood.parameters():
            p.requires_grad_(False)
        return made

    x = math.sqrt(2.1) * torch.randn(100, 1)
    truth = dist.Normal(0.0, math.sqrt(2.1)).log_prob(x).mean().item()
    gaps = {}
    for name, structure in (("plain", vae(1)), ("flows", FlowVAE(1, vae, IAF, 2))):
        optimizer = torch.optim.Adam([p for p in structure.parameters() if p.requires_grad], lr=0.02)
        for _ in range(400):
            optimizer.zero_grad()
            backward(SampledELBO(), structure, (x,), per=100)
            optimizer.step()
        gaps[name] = truth - elbo(structure, x, 200).mean().item()
    assert 0.82 < gaps["plain"] < 1  # 1/2 log(1 / (1 - (1/1.1)^2)) = 0.876 at best
    assert -0.03 < gaps["flows"] < 0.2


def test_flows_are_where_they_are_asked_for(x):
    base = partial(LadderVAE, z_dims=(5, 3), hidden_dims=(16, 8))
    assert list(FlowVAE(12, base).flows) == ["z2", "z1"]
    assert list(FlowVAE(12, base, layers="top").flows) == ["z2"]
    assert list(FlowVAE(12, base, layers=["z1"]).flows) == ["z1"]
    with pytest.raises(ValueError, match=r"layers is \['z7'\]; expected 'all', 'top' or some of \['z2', 'z1'\]"):
        FlowVAE(12, base, layers=["z7"])


class Own(nn.Module):
    """A base of someone's own: a global site, and a latent h with another name, drawn after a discrete one."""

    def __init__(self, x_dim, discrete=False):
        super().__init__()
        self.encoder, self.decoder, self.discrete = nn.Linear(x_dim, 2), nn.Linear(2, x_dim), discrete

    def model(self, x, y=None):
        if not self.discrete:
            pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            if self.discrete:
                pyro.sample("c", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            h = pyro.sample("h", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(h)).to_event(1), obs=x)

    def guide(self, x, y=None):
        if not self.discrete:
            pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("h", dist.Normal(self.encoder(x), 1.0).to_event(1))


def test_what_goes_around_a_base_looks_at_its_local_layers():
    assert MixturePrior(12, Own, 3).top == VampPrior(12, Own, 3).top == "h"
    assert list(FlowVAE(12, Own).flows) == ["h"]
    assert next(MixturePrior(12, lambda d: VAE(d, 2, 8).double()).parameters()).dtype == torch.double


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixturePrior(12, partial(SparseVAE, code=BetaCode)), "'z1', which is no vector of real numbers"),
        (
            lambda: MixturePrior(12, partial(ConditionalVAE, learn_prior=True)),
            "which has parameters that would have no use then",
        ),
        (lambda: MixturePrior(12, VaDE), "which has parameters that would have no use then"),
        (lambda: MixturePrior(12, OptimalPriorVAE), "a factor beside it, learned for that very prior, would stay"),
        (lambda: VampPrior(12, OptimalPriorVAE), "a factor beside it, learned for that very prior, would stay"),
        (lambda: OptimalPriorVAE(12, OptimalPriorVAE), "a factor beside it, learned for that very prior, would stay"),
        (lambda: MixturePrior(12, partial(Own, discrete=True)), "'c', and the guide does not sample it"),
        (lambda: VampPrior(12, AE), "the guide of AE is a point mass at 'z1'"),
        (lambda: FlowVAE(12, AE), "site 'z1' is .* in the guide; flows transform densities over vectors"),
        (lambda: FlowVAE(12, partial(SparseVAE, code=BetaCode)), "flows transform densities over vectors of real"),
        (lambda: FlowVAE(12, DenoisingVAE), "the flows would see the data that DenoisingVAE keeps from the guide"),
        (lambda: FlowVAE(12, num_flows=0), "num_flows is 0; at least 1 is needed"),
        (
            lambda: MixturePrior(12, lambda d: VAE(d + 1)),
            "MixturePrior looks at the layers of VAE on two",
        ),
        (lambda: VaDE(12, z_dim=0), "sizes must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: FlowVAE(12, partial(VampPrior, base=partial(LadderVAE, z_dims=(5, 3), hidden_dims=(16, 8)))),
        lambda: DenoisingVAE(12, partial(FlowVAE, base=partial(MixturePrior, base=partial(VAE, z_dim=3)))),
        lambda: MixturePrior(12, AE),
    ],
)
def test_they_combine(make, x):
    structure = make()
    check(structure, x)
    for estimator in (SampledELBO(), IWAE(3)):
        structure.zero_grad()
        assert torch.isfinite(backward(estimator, structure, (x,), per=7))
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in structure.parameters())


def test_annealing_refuses_points_and_flows_without_an_inverse(x):
    with pytest.raises(ValueError, match="the guide of 'z1' is a point mass"):
        ais_log_likelihood(AE(12, 3, 16), x)
    with pytest.raises(ValueError, match="the flows of its guide have no inverse"):
        ais_log_likelihood(FlowVAE(12, partial(VAE, z_dim=3), PlanarFlow), x, start="guide")


# ------------------------------------------------------------------ denoising


def test_corruptions_are_as_strong_as_they_say():
    x, level = (torch.rand(400, 500) < 0.3).double(), torch.tensor(0.2)
    flipped = salt_and_pepper(x, level)
    assert ((flipped != x).double().mean() - 0.1).abs() < 0.004  # half of those drawn anew stay as they were
    assert (masking(x, level).mean() - 0.8 * 0.3).abs() < 0.005
    assert ((gaussian(x, level) - x).std() - 0.2).abs() < 0.002
    for corruption in (salt_and_pepper, masking, gaussian):
        torch.testing.assert_close(corruption(x, torch.tensor(0.0)), x)


def test_the_guide_alone_sees_corrupted_data_and_in_training_alone(x):
    structure = DenoisingVAE(12, partial(VAE, z_dim=3, hidden_dim=16, batch_norm=False), masking, 1.0)
    sites = ledger(structure.model, structure.guide, x)
    torch.testing.assert_close(sites["z1"].q.mean[0], sites["z1"].q.mean[1])  # all x~ are zero
    plain = structure.base.bottom_up[0](x)
    torch.testing.assert_close(ledger(structure.eval().model, structure.guide, x)["z1"].q.mean, plain.mean)
    assert torch.equal(sites["x"].value, x)


def test_the_denoising_bound_is_a_bound_by_enumeration(x):
    """L = E_p(x~|x) E_q(z|x~)[log p(x, z) - log q(z|x~)] (Im et al. 2017, eq. 7) over every mask of three pixels.

    The average of single draws is that within 5 standard errors, and no more than log p(x).
    """
    x = x[:4, :3].double()
    base = partial(VAE, z_dim=1, hidden_dim=6, batch_norm=False, likelihood=Bernoulli)
    structure = DenoisingVAE(3, base, masking, 0.3).double().train()
    grid, exact = torch.linspace(-10, 10, 2001).double(), 0.0
    with torch.no_grad():
        prior = dist.Normal(0.0, 1.0).log_prob(grid)
        log_p = structure.base.likelihood(structure.base.decoder(grid[:, None, None])).log_prob(x)  # [grid, B]
        for mask in itertools.product([0.0, 1.0], repeat=3):
            kept = torch.tensor(mask).double()
            chance = 0.7 ** kept.sum() * 0.3 ** (3 - kept.sum())
            q = structure.base.bottom_up[0](x * kept).log_prob(grid[:, None, None])
            exact = exact + chance * torch.trapezoid(q.exp() * (log_p + prior[:, None] - q), grid, dim=0)
        evidence = torch.trapezoid((log_p + prior[:, None]).exp(), grid, dim=0).log()
        drawn = torch.stack([ledger(structure.model, structure.guide, x).local_log_weight() for _ in range(3000)])
    assert ((drawn.mean(0) - exact).abs() < 5 * drawn.std(0) / math.sqrt(3000)).all()
    assert (exact < evidence).all()


def test_training_follows_the_schedule_of_the_noise(tiny, tmp_path):
    def make():
        torch.manual_seed(1)
        return DenoisingVAE(12, partial(VAE, z_dim=3, hidden_dim=16), level=linear(0.5, 0.1, epochs=4))

    levels, options = [], dict(batch_size=15, callbacks=())
    structure = make()
    guide = structure.guide
    structure.guide = lambda x, y=None: (
        structure.training and levels.append(round(structure.level.item(), 3)),
        guide(x, y),
    )[1]
    fit(structure, tiny, epochs=5, **options)
    assert levels == [v for v in (0.5, 0.4, 0.3, 0.2, 0.1) for _ in range(3)]
    whole, parts = make(), make()
    torch.manual_seed(2)
    fit(whole, tiny, epochs=4, **options)
    torch.manual_seed(2)
    fit(parts, tiny, epochs=2, out=tmp_path, **options)
    parts = make()
    fit(parts, tiny, epochs=4, out=tmp_path, resume=True, **options)
    assert parts.level.item() == pytest.approx(0.2)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ValueError, match="both must be 0 or more"):
        DenoisingVAE(12, level=-1.0)


# ------------------------------------------------------------------ sparse and binary codes


@pytest.mark.parametrize("code", [BetaCode, TwoGaussiansCode, RelaxedBernoulliCode])
def test_codes_of_one_unit_have_a_likelihood_by_quadrature(code):
    structure = SparseVAE(3, 1, 8, code=code, num_hidden=1, batch_norm=False).double().eval()
    x = (torch.rand(9, 3) > 0.5).double()
    if code is BetaCode:  # z = sin^2(t) takes the poles of Beta(1/2, 1/2) away: p(z) dz = 2/pi dt
        t = (torch.arange(4000).double() + 0.5) / 4000 * math.pi / 2
        z, log_measure = t.sin().square(), torch.full((4000,), -math.log(4000)).double()
    else:
        z = torch.linspace(-40, 40, 400_001, dtype=torch.double)
        log_measure = structure.code.prior().log_prob(z.unsqueeze(-1)) + math.log((z[1] - z[0]).item())
    torch.testing.assert_close(log_measure.logsumexp(0), torch.tensor(0.0).double(), atol=1e-6, rtol=0)
    with torch.no_grad():
        p = structure.decode(structure.code.decoded(z.unsqueeze(-1)))
        truth = torch.stack([(p.log_prob(row) + log_measure).logsumexp(0) for row in x])
        log_w = log_weights(structure, x, 100_000)
    assert within(log_w.logsumexp(0) - math.log(100_000), truth, log_w, standard_errors=5)


def test_the_relaxed_bernoulli_is_that_of_maddison():
    code = RelaxedBernoulliCode(4, 2, temperature=0.6).double()
    h, z = torch.randn(5, 4).double(), torch.randn(5, 2).double()
    x, alpha, t = z.sigmoid(), code.head(h).exp(), 0.6
    density = t * alpha * x ** (-t - 1) * (1 - x) ** (-t - 1) / (alpha * x**-t + (1 - x) ** -t) ** 2  # eq. 9 there
    jacobian = x * (1 - x)  # from x to its logit
    torch.testing.assert_close(code(h).log_prob(z), (density * jacobian).log().sum(-1), atol=1e-6, rtol=1e-6)


def test_the_relaxed_bernoulli_draws_from_what_it_scores():
    """Far out too: the mean of z is logits / temperature, its standard error pi / sqrt(3 N) / temperature."""
    code = RelaxedBernoulliCode(1, 1, temperature=0.5)
    code.head.weight.data.zero_()
    code.head.bias.data.fill_(20.0)
    z = code(torch.zeros(20_000, 1)).rsample()
    assert z.mean().item() == pytest.approx(40, abs=0.12)


def test_implicit_gradients_of_the_beta_code():
    """d E[z] / d alpha of Beta(alpha, beta) is beta / (alpha + beta)^2."""
    code = BetaCode(1, 1).double()
    h = torch.zeros(200_000, 1).double()
    code.head.bias.data = torch.tensor([0.4, -0.3]).double()
    z = code(h).rsample()
    (gradient,) = torch.autograd.grad(z.mean(), code.head.bias)
    a, b = (nn.functional.softplus(code.head.bias) + 0.3).detach()
    slope = torch.sigmoid(code.head.bias.detach())
    expected = torch.stack([b, -a]) / (a + b) ** 2 * slope
    torch.testing.assert_close(gradient, expected, atol=0.004, rtol=0)


@pytest.mark.parametrize("code", [BetaCode, TwoGaussiansCode, RelaxedBernoulliCode])
def test_rate_and_distortion_are_what_counting_gives(code, x):
    structure = SparseVAE(12, 4, 16, code=code, batch_norm=False)
    found = rate_distortion(structure, x, batch_size=3)
    with torch.no_grad():
        h = structure.encoder(x)
        codes = {
            BetaCode: lambda: structure.code(h).mean > 0.5,
            TwoGaussiansCode: lambda: structure.code.head.moments(h)[0] > 0.5,
            RelaxedBernoulliCode: lambda: structure.code.head(h) > 0,
        }[code]().float()
        p = structure.decode(codes)
    share = codes.mean(0)
    bits = sum(-s * math.log2(s) - (1 - s) * math.log2(1 - s) for s in share.tolist() if 0 < s < 1)
    assert found.size == 4
    assert found.rate == pytest.approx(bits, abs=1e-5)
    assert found.distortion == pytest.approx(-p.log_prob(x).mean().item(), rel=1e-5)
    assert found.mse == pytest.approx((p.mean - x).square().mean().item(), rel=1e-5)
    assert found.ones == pytest.approx(codes.mean().item())
    with pytest.raises(ValueError, match="VAE has no methods codes and decode, as SparseVAE has them"):
        rate_distortion(VAE(12, 3, 16), x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BetaCode(4, 2, a=0.0), "the parameters of a Beta must be positive"),
        (lambda: TwoGaussiansCode(4, 2, rate=1.0), "expected scale > 0 and 0 < rate < 1"),
        (lambda: RelaxedBernoulliCode(4, 2, temperature=0.0), "expected temperatures above 0"),
        (lambda: ConditionalVAE(4, 0), "num_classes is 0; it must be at least 1"),
        (lambda: VampPrior(4, num_pseudo_inputs=0), "the mixture has at least 1 component"),
        (lambda: MixturePrior(4, num_components=0), "a mixture has at least 1"),
    ],
)
def test_sizes_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
