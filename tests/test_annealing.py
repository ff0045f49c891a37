import pytest
import torch
from conftest import STRUCTURES
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence

from pyro_lvae import Schedule, anneal, constant, cyclical, ledger, linear

ESTIMATORS = [
    Trace_ELBO(),
    TraceMeanField_ELBO(),
    TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    RenyiELBO(alpha=0, num_particles=1),
]


def _terms(structure, x):
    """(sum of log p(x|z), {site: sum of log p - log q}, {site: sum of KL}) of one draw."""
    sites = ledger(structure.model, structure.guide, x)
    ratios = {n: (s.log_p - s.log_q).sum() for n, s in sites.latents.items()}
    kls = {n: kl_divergence(s.q.base_dist, s.p.base_dist).sum() for n, s in sites.latents.items()}
    return sites["x"].log_p.sum(), ratios, kls


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, torch.tensor(0.3), {"z1": 0.0, "z3": 0.5}])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_beta_scales_latent_sites_alone(estimator, beta, x):
    ladder = STRUCTURES["LadderVAE"]().double().eval()
    torch.manual_seed(1)
    likelihood, ratios, kls = _terms(ladder, x.double())
    torch.manual_seed(1)
    with anneal(beta=beta):
        loss = estimator.loss(ladder.model, ladder.guide, x.double())
    terms = {n: -v for n, v in kls.items()} if isinstance(estimator, TraceMeanField_ELBO) else ratios
    weights = {n: beta.get(n, 1.0) if isinstance(beta, dict) else float(beta) for n in terms}
    expected = likelihood + sum(weights[n] * v for n, v in terms.items())
    assert -loss == pytest.approx(expected.item(), rel=1e-6)


def test_wrapping_model_and_guide_is_the_same_as_the_context(x):
    vae, estimator, losses = STRUCTURES["VAE"]().eval(), Trace_ELBO(), []
    torch.manual_seed(1)
    losses.append(estimator.loss(anneal(vae.model, beta=0.4), anneal(vae.guide, beta=0.4), x))
    torch.manual_seed(1)
    with anneal(beta=0.4):
        losses.append(estimator.loss(vae.model, vae.guide, x))
    assert losses[0] == losses[1]


def test_beta_zero_leaves_the_gradient_of_the_reconstruction(x):
    vae = STRUCTURES["VAE"]()
    with anneal(beta=0):
        Trace_ELBO().differentiable_loss(vae.model, vae.guide, x).backward()
    assert all(torch.isfinite(p.grad).all() for p in vae.parameters())


def test_schedules_by_epoch():
    assert [linear(0, 1, epochs=4)(step=99, epoch=e) for e in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert [linear(0.2, 0.6, epochs=2)(0, e) for e in (0, 1, 2)] == pytest.approx([0.2, 0.4, 0.6])
    assert constant(0.3)(0, 0) == constant(0.3)(10, 10) == 0.3
    assert [cyclical(epochs=8, cycles=2, ramp=0.5)(0, e) for e in range(9)] == [0, 0.5, 1, 1, 0, 0.5, 1, 1, 1]


def test_schedules_by_step():
    assert [linear(0, 1, steps=10)(step=s, epoch=0) for s in (0, 5, 10, 20)] == [0, 0.5, 1, 1]


def test_a_schedule_knows_whether_training_outlasts_it():
    assert linear(epochs=10).ends_after(steps=10**6, epochs=10)  # whose last epoch has 0.9
    assert not linear(epochs=10).ends_after(steps=11, epochs=11)
    assert linear(steps=10).ends_after(steps=10, epochs=100)
    assert not linear(steps=10).ends_after(steps=11, epochs=1)
    assert not cyclical(epochs=8, cycles=2, ramp=0.5).ends_after(steps=80, epochs=8)
    assert not constant().ends_after(0, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear(0, 1), "exactly one"),
        (lambda: linear(0, 1, epochs=3, steps=3), "exactly one"),
        (lambda: Schedule(unit="batches"), "expected 'epochs' or 'steps'"),
        (lambda: linear(0, 1, epochs="10"), "{'length': '10'} of a schedule; expected numbers"),
        (lambda: cyclical(epochs=3, cycles=0), "cycles >= 1"),
    ],
)
def test_bad_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
