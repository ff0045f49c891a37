"""Labels that are sometimes seen: Pyro's enumeration and quadrature as oracles, in float64."""

import copy
import math
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO

from pyro_lvae import (
    ADGM,
    IWAE,
    SDGM,
    STL,
    VAE,
    AnalyticELBO,
    DataError,
    Dataset,
    FlowVAE,
    SampledELBO,
    SemiSupervisedVAE,
    check,
    elbo,
    few_labels,
    fit,
    kl_per_layer,
    label_probabilities,
    ledger,
    log_likelihood,
    sample_prior,
)
from pyro_lvae.structures.flows import PlanarFlow

MAKERS = [SemiSupervisedVAE, ADGM, SDGM]
SIZES = dict(num_classes=3, z_dim=1, hidden_dim=8, batch_norm=False, alpha=2.0)


def _make(cls, **options):
    return cls(12, **SIZES | options).double()


@pytest.fixture
def x64(x):
    return x.double()


def _seeded(run):
    torch.manual_seed(1)
    return run()


@pytest.mark.parametrize("cls", MAKERS)
@pytest.mark.parametrize("labelled", [False, True])
def test_the_bound_and_its_gradient_are_those_of_pyros_enumeration(cls, labelled, x64):
    y = torch.tensor([0, 2, -1, 1, -1, 0, -1]) if labelled else None
    found = []
    for estimator in (TraceEnum_ELBO(max_plate_nesting=1), SampledELBO()):
        torch.manual_seed(0)
        structure = _make(cls)
        loss = _seeded(lambda e=estimator, s=structure: e.differentiable_loss(s.model, s.guide, x64, y))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in structure.parameters())])
    for pyros, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, pyros, rtol=1e-9, atol=1e-9)


def test_rows_with_and_without_a_label_by_hand(x64):
    """Kingma et al. 2014, eqs. 6-9, with KLs in closed form and one draw of z_1 for every class."""
    structure, y = _make(SemiSupervisedVAE), torch.tensor([0, 2, -1, 1, -1, 0, -1])
    loss = _seeded(lambda: AnalyticELBO().loss(structure.model, structure.guide, x64, y))
    classes = torch.eye(3, dtype=torch.double)[:, None]
    q = structure.encoder(x64, classes)
    z = _seeded(lambda: structure.encoder(x64, classes).rsample((1,))[0])
    log_p_x = structure.likelihood(structure.decoder(classes, z)).log_prob(x64)
    kl = dist.kl.kl_divergence(q, dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
    each = log_p_x - kl - math.log(3)  # [C, B]
    probs = structure.classifier(x64).softmax(-1)
    expected = 0.0
    for b, label in enumerate(y.tolist()):
        if label >= 0:
            expected += each[label, b] + 2.0 * probs[b, label].log()
        else:
            expected += (probs[b] * (each[:, b] - probs[b].log())).sum()
    assert -loss == pytest.approx(expected.item(), rel=1e-9)


@torch.no_grad()
def _log_p(structure, x):
    """log p(x), summed over classes and by the trapezoidal rule over z_1 (and a)."""
    grid = torch.linspace(-7, 7, 281, dtype=torch.double)
    log_step = math.log(grid[1] - grid[0])
    total = []
    for c in range(3):
        one_hot = torch.eye(3, dtype=torch.double)[c]
        z = grid[:, None]
        weight = dist.Normal(0.0, 1.0).log_prob(grid) + log_step
        if isinstance(structure, SDGM):
            p_a = structure.generative_auxiliary(one_hot, z)
            # the grid of a follows p(a|y, z), in standard deviations
            a = p_a.mean + p_a.variance.sqrt() * grid  # [Z, A]
            weight = weight[:, None] + weight
            features = structure.decoder(a[..., None], one_hot, z[:, None])
        else:
            features = structure.decoder(one_hot, z)
        log_p_x = structure.likelihood(features[..., None, :]).log_prob(x)
        total.append((weight[..., None] + log_p_x).flatten(0, -2).logsumexp(0) - math.log(3))
    return torch.stack(total).logsumexp(0)


@torch.no_grad()
def _widen(structure):
    for gaussian in (structure.encoder, getattr(structure, "auxiliary", None)):
        for p in () if gaussian is None else gaussian.parameters():
            p.mul_(0.3)  # near N(0, softplus(2)), which is wider than the posterior
        if gaussian is not None:
            gaussian[1].head[0].bias[1] += 2.0


@pytest.mark.parametrize("layers", ["all", "top"])
def test_flows_transform_latents_and_pass_over_classes(layers, x64):
    structure = FlowVAE(12, partial(SemiSupervisedVAE, **SIZES), PlanarFlow, 2, layers=layers).double()
    assert list(structure.flows) == ["z1"]
    check(structure, x64)
    _widen(structure.base)
    exact = _log_p(structure.base, x64)
    torch.testing.assert_close(log_likelihood(structure, x64, 20_000), exact, rtol=0, atol=0.03)


@pytest.mark.parametrize("cls", MAKERS)
def test_importance_sampling_finds_the_likelihood_that_quadrature_finds(cls, x64):
    structure = _make(cls)
    _widen(structure)
    exact = _log_p(structure, x64)
    found = log_likelihood(structure, x64, 20_000)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.03)
    bounds = [elbo(structure, x64, 2000), _iwae(structure, x64), exact]
    assert bounds[0].mean() < bounds[1].mean() < bounds[2].mean()


@torch.no_grad()
def _iwae(structure, x):
    structure.eval()
    return torch.stack([-torch.tensor(IWAE(5).loss(structure.model, structure.guide, x)) for _ in range(300)]) / len(x)


@pytest.mark.parametrize("cls", MAKERS)
def test_shares_add_up_and_labels_count_in_training_alone(cls, x64):
    structure, y = _make(cls), torch.tensor([0, 1, 2, 0, 1, 2, -1])
    assert torch.equal(*(_seeded(lambda y=y: elbo(structure, x64, 5, y=y)) for y in (None, y)))
    sites = _seeded(lambda: ledger(structure.model, structure.guide, x64, num_particles=4))
    assert sites.local_log_weight().shape == (4, 7)
    reconstruction = sites.expected(sites["x"].log_p)
    torch.testing.assert_close(reconstruction - sum(sites.kl_shares().values()), sites.local_log_weight())
    assert set(kl_per_layer(structure, x64, 2)) == set(sites.latents)
    unknown = torch.full((7,), -1)
    both = [_seeded(lambda y=y: SampledELBO().loss(structure.model, structure.guide, x64, y)) for y in (None, unknown)]
    assert both[0] == pytest.approx(both[1], rel=1e-12)


@pytest.mark.parametrize("cls", MAKERS)
def test_classifies_and_generates(cls, x64):
    structure = _make(cls)
    probs = label_probabilities(structure, x64, 3)
    guide_alone = copy.deepcopy(structure)
    guide_alone.model = None  # q(y|x) does not ask the model
    assert label_probabilities(guide_alone, x64, 3).shape == probs.shape
    torch.testing.assert_close(probs.sum(-1), torch.ones(7).double())
    if cls is SemiSupervisedVAE:
        torch.testing.assert_close(probs, structure.classifier(x64).softmax(-1))
    assert sample_prior(structure, 3, x64, y=torch.tensor([0, 1, 2])).shape == (3, 12)
    check(structure, x64, torch.tensor([0, 1, 2, -1, 0, 0, 0]))


@pytest.mark.parametrize("cls", MAKERS)
def test_a_few_labels_train_the_classifier(cls):
    """Three classes that differ in four pixels each; of 240 rows 6 have labels. Chance is 1/3."""
    y = torch.arange(240) % 3
    means = torch.eye(3).repeat_interleave(4, 1) * 0.8 + 0.1
    x = (torch.rand(240, 12) < means[y]).float()
    data = few_labels(Dataset("blocks", x, x[:60], y, y[:60]), 6, share=0.2)
    structure = cls(12, 3, 2, 16, alpha=5.0)
    fit(structure, data, epochs=30, batch_size=32, callbacks=())
    assert (label_probabilities(structure, x).argmax(-1) == y).float().mean() > 0.85


def test_labels_are_hidden_evenly_and_repeated(tiny):
    data = few_labels(tiny, 6, seed=3, share=0.5)
    known = data.y_train >= 0
    assert data.y_train[:45][known[:45]].bincount().tolist() == [2, 2, 2]
    assert known.float().mean() >= 0.5
    assert len(few_labels(tiny, 6).y_train) == 45
    original = {tuple(row.tolist()) for row in tiny.x_train}
    assert {tuple(row.tolist()) for row in data.x_train} == original
    for options, message in [
        (dict(count=7), "multiple"),
        (dict(count=60), "fewer than 20"),
        (dict(count=6, share=1.0), "share"),
    ]:
        with pytest.raises(DataError, match=message):
            few_labels(tiny, **options)
    with pytest.raises(DataError, match="no integer labels"):
        few_labels(Dataset("plain", tiny.x_train, tiny.x_test), 6)


def test_refusals(x64, tiny):
    structure = _make(SemiSupervisedVAE)
    with pytest.raises(ValueError, match="the guide enumerates 'y'"):
        STL().loss(structure.model, structure.guide, x64)
    with pytest.raises(ValueError, match="no Categorical 'y'"):
        label_probabilities(VAE(12, 2, 4), x64)
    with pytest.raises(ValueError, match="alpha=-1"):
        SemiSupervisedVAE(12, alpha=-1)
    with pytest.raises(ValueError, match="num_classes=2 takes 0 to 1"):
        fit(SemiSupervisedVAE(12, 2, 2, 4), tiny, epochs=1, callbacks=())
