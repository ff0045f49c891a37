"""The conformance suite: every structure x every estimator it supports."""

import copy
import pickle

import pyro
import pytest
import torch
from conftest import STRUCTURES, Clustered, Labelled
from pyro.distributions import Categorical
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from pyro_lvae import (
    CIWAE,
    GECO,
    IWAE,
    PIWAE,
    RWS,
    STL,
    TVO,
    AnalyticELBO,
    BayesianWeights,
    BetaELBO,
    BetaTCELBO,
    ConditionalVAE,
    ConstrainedELBO,
    DReG,
    FreeBits,
    HierarchicalVAE,
    ImplicitLikelihoodVAE,
    KLBalanced,
    LadderVAE,
    Renyi,
    SampledELBO,
    Structure,
    anneal,
    check,
    for_svi,
    reconstruct,
    sample_prior,
)
from pyro_lvae.evaluate import can_generate
from pyro_lvae.objectives import backward, check_supported
from pyro_lvae.step import Step
from pyro_lvae.structures import STRUCTURES as LISTED
from pyro_lvae.traces import ledger
from pyro_lvae.words import WordCounts

NESTED = dict(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
ESTIMATORS = {
    "Trace_ELBO": Trace_ELBO,
    "Trace_ELBO-particles": lambda: Trace_ELBO(**NESTED),
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceEnum_ELBO": lambda: TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "RenyiELBO": lambda: RenyiELBO(alpha=0, **NESTED),
    "RenyiELBO-loop": lambda: RenyiELBO(alpha=0.5, num_particles=2),
    "SampledELBO": SampledELBO,
    "AnalyticELBO": AnalyticELBO,
    "IWAE": lambda: IWAE(num_particles=3),
    "Renyi": lambda: Renyi(-0.5, 3),
    "CIWAE": lambda: CIWAE(0.5, 3),
    "PIWAE": lambda: PIWAE(2, 2),
    "STL": lambda: STL(2),
    "DReG": lambda: DReG(3),
    "DReG-prior": lambda: DReG(3, prior=True),
    "RWS": lambda: RWS(3),
    "TVO": lambda: TVO(3),
    "BetaTCELBO": lambda: BetaTCELBO(2.0, num_particles=2),
    "FreeBits": lambda: FreeBits(0.01),
    "KLBalanced": lambda: KLBalanced(always=True),
    "ConstrainedELBO": lambda: ConstrainedELBO(1.0),
    "GECO": lambda: GECO(6.0),
}


AVERAGING = [SampledELBO(), AnalyticELBO(), BetaELBO(3.0), FreeBits(0.01), KLBalanced(always=True), BetaTCELBO(2.0)]
AVERAGING += [ConstrainedELBO(1.0), GECO(6.0)]


def test_one_draw_gives_the_same_with_and_without_a_dim_of_particles(structure, x, monkeypatch):
    structure, x = structure.double().eval(), x.double()
    for estimator in AVERAGING:
        found = []
        for needs in (False, True):
            monkeypatch.setattr(estimator, "needs_particle_dim", needs)
            structure.zero_grad()
            torch.manual_seed(0)
            try:
                loss = backward(copy.deepcopy(estimator), structure, (x,), per=1)
            except ValueError:  # the estimator refuses the structure
                found.append([])
                continue
            found.append([loss, *(p.grad for p in structure.parameters() if p.grad is not None)])
        torch.testing.assert_close(*found)


@pytest.fixture(params=ESTIMATORS)
def estimator(request):
    return ESTIMATORS[request.param]()


def _supported(estimator, structure, x):
    is_bayesian = isinstance(structure, BayesianWeights)
    if is_bayesian and estimator.vectorize_particles:
        pytest.skip("particles that share their weights are the package's own")
    try:
        check_supported(estimator, ledger(structure.model, structure.guide, x))
    except ValueError as error:
        reasons = (
            "same order",
            "Normal priors",
            "remember the noise",
            "Delta",
            "point mass",
            "guide enumerates",
            "independent units",
            "is a critic's",
            "penalty",
            "enumerated sites",
        )
        assert any(r in str(error) for r in reasons) or (is_bayesian and "outside the data plate" in str(error))
        pytest.skip("bottom-up guide, global or enumerated sites, flows, points, or a prior that is not Normal")


def _trained(structure):
    """What the ELBO trains: all but the critics."""
    return {n: p for n, p in structure.named_parameters() if p.requires_grad}


def _has_words(structure, x):
    return isinstance(ledger(structure.model, structure.guide, x)["x"].p, WordCounts)


def test_every_listed_structure_is_covered():
    covered = {type(make()) for make in STRUCTURES.values()} - {Labelled, Clustered} | {ConditionalVAE}
    assert covered == {*LISTED, BayesianWeights}


def test_keeps_the_contract(structure, x):
    assert isinstance(structure, Structure)
    check(structure, x)


def test_gradients_reach_every_parameter(structure, estimator, x):
    _supported(estimator, structure, x)
    loss = backward(estimator, structure, (x,), per=len(x))
    assert torch.isfinite(loss)
    for name, parameter in _trained(structure).items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert len(pyro.get_param_store()) == 0


def test_gradients_accumulate_and_are_per_datum(structure, estimator, x):
    _supported(estimator, structure, x)
    structure.eval()
    torch.manual_seed(1)
    once = backward(copy.copy(estimator), structure, (x,), per=1.0)  # a multiplier moves in the copy
    first = [p.grad.clone() for p in _trained(structure).values()]
    torch.manual_seed(1)
    again = backward(copy.copy(estimator), structure, (x,), per=4.0)
    torch.testing.assert_close(again * 4, once)
    for p, g in zip(_trained(structure).values(), first, strict=True):
        torch.testing.assert_close(p.grad, g * 1.25, rtol=1e-4, atol=1e-4)


def test_training_lowers_the_loss(structure, estimator, x):
    _supported(estimator, structure, x)
    if isinstance(estimator, GECO) and _has_words(structure, x):
        pytest.skip("the constraint cannot be met: n words of 12 cost n log n nats at least, so the multiplier grows")
    if any(isinstance(m, ImplicitLikelihoodVAE) for m in structure.modules()):
        pytest.skip("all that the bound knows of the data comes from the critic, which does not learn here")
    optimizer = torch.optim.Adam(structure.parameters(), lr=0.02)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        losses.append(backward(estimator, structure, (x,), per=len(x)).item())
        optimizer.step()
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("estimator", [Trace_ELBO, lambda: IWAE(2), lambda: RenyiELBO(**NESTED)])
def test_pyros_own_svi_trains_two_instances(structure, estimator, x):
    _supported(estimator(), structure, x)
    for instance in (structure, pickle.loads(pickle.dumps(structure))):
        before = {k: v.clone() for k, v in _trained(instance).items()}
        svi = SVI(*for_svi(instance), pyro.optim.Adam({"lr": 0.01}), estimator())
        for _ in range(2):
            svi.step(x)
        unmoved = [k for k, v in _trained(instance).items() if torch.equal(v, before[k])]
        assert not unmoved
    pyro.clear_param_store()


def test_estimator_of_model_and_guide(structure, x):
    """Pyro's own way of calling: Estimator()(model, guide) on anything that is called."""
    _supported(IWAE(2), structure, x)
    loss = IWAE(2)(structure.model, structure.guide)(x)
    assert loss.shape == ()


def test_encoder_runs_once_however_many_particles(structure, x):
    inputs = []
    for module in structure.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            dims = 1 if isinstance(module, torch.nn.Linear) else 3
            module.register_forward_hook(
                lambda m, args, out, dims=dims: inputs.append((m, args[0].shape[:-dims], args[0].shape[-dims:].numel()))
            )
    ledger(structure.model, structure.guide, x, num_particles=4)
    from_data = [(m, rows) for m, rows, size in inputs if size in (12, 15)]  # x, or x and a label
    assert {len(rows) for _, rows in from_data} == {1}
    assert len(set(from_data)) == len(from_data)


def test_saves_and_loads(structure, x, tmp_path):
    backward(SampledELBO(), structure, (x,), per=1)  # moves batch-norm statistics
    torch.save(structure.state_dict(), tmp_path / "weights.pt")
    twin = pickle.loads(pickle.dumps(structure))
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    twin.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    losses = []
    for module in (structure.eval(), twin.eval()):
        torch.manual_seed(2)
        losses.append(SampledELBO().loss(module.model, module.guide, x))
    assert losses[0] == losses[1]


def test_generates_and_reconstructs(structure, x):
    if can_generate(structure, x):
        assert sample_prior(structure, 6, x).shape == (6, 12)
    else:
        with pytest.raises(ValueError, match="has no prior to draw from"):
            sample_prior(structure, 6, x)
    assert reconstruct(structure, x).shape == x.shape
    assert structure.training


def test_draws_and_densities_stay_float32_where_products_are_in_bfloat16(structure, x):
    pair = Step(structure, SampledELBO(), precision="bfloat16").pair
    sites = ledger(pair.model, pair.guide, x, num_particles=2)
    values = [s.value for s in sites.latents.values() if s.value.is_floating_point()]
    assert {t.dtype for s in sites.values() for t in (s.log_p, s.log_q)} == {torch.float32}
    assert all(value.dtype == torch.float32 for value in values)
    for fn in (d for s in sites.values() for d in (s.p, s.q) if isinstance(d, Categorical | WordCounts)):
        torch.testing.assert_close(fn.probs.sum(-1), torch.ones(fn.batch_shape), rtol=0, atol=1e-6)


def test_double_precision(structure, x):
    structure.double()
    sites = ledger(structure.model, structure.guide, x.double(), num_particles=2)
    assert all(s.log_p.dtype == torch.double for s in sites.values())
    assert {s.value.dtype for s in sites.values()} <= {torch.double, torch.long}


@pytest.mark.parametrize("make", [Trace_ELBO, lambda: Trace_ELBO(**NESTED), lambda: IWAE(3)])
@pytest.mark.parametrize("share", [True, False])
def test_a_ladder_computes_its_top_down_networks_once(make, share, x):
    ladder, calls = LadderVAE(12, (5, 3, 2), (16, 8, 8), share_top_down=share), []
    for net in ladder.top_down:
        getattr(net, "net", net).register_forward_hook(lambda *_: calls.append(1))
    backward(make(), ladder, (x,), per=1)
    assert len(calls) == 2
    norms = [m for m in ladder.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert {m.num_batches_tracked.item() for m in norms} == {1}


def test_sharing_changes_nothing_but_the_work(x):
    """Loss and gradient with the kept answer equal those with every call computed afresh."""
    ladder = LadderVAE(12, (5, 3, 2), (16, 8, 8), batch_norm=False).double()
    results = []
    for forget in (False, True):
        hooks = [n.register_forward_pre_hook(lambda m, _: setattr(m, "_kept", None)) for n in ladder.top_down if forget]
        ladder.zero_grad()
        torch.manual_seed(3)
        with anneal(beta=0.7):
            loss = backward(Trace_ELBO(), ladder, (x.double(),), per=1)
        results.append([loss, *(p.grad for p in ladder.parameters())])
        for hook in hooks:
            hook.remove()
    for kept, fresh in zip(*results, strict=True):
        torch.testing.assert_close(kept, fresh)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(z_dims=(3, 2), hidden_dims=(8,)), "2 layers .* hidden_dims 1"),
        (dict(z_dims=(), hidden_dims=()), "at least one layer"),
        (dict(z_dims=(3, 0), hidden_dims=(8, 8)), "z_dims is .* at least 1"),
        (dict(z_dims=(3, 2), hidden_dims=((8, 8), (4, 4))), "hidden_dims is .* whole numbers"),
    ],
)
def test_sizes_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        LadderVAE(12, **arguments)


def test_one_number_is_no_list_of_sizes():
    with pytest.raises(TypeError, match="z_dims is 3; expected the sizes of the layers one after another"):
        LadderVAE(12, 3, 8)


@pytest.mark.parametrize("structure", [HierarchicalVAE, LadderVAE])
def test_layers_with_skip_connections_broadcast(structure, x):
    """One z_3 a datum, and particles of the layers below it."""
    structure, z = structure(12, (3, 3, 2), (8, 8, 8), skip=True).eval(), torch.randn(len(x), 2)
    conditioned = pyro.poutine.condition(structure.model, {"z3": z})
    with pyro.plate("particles", 4, dim=-2):
        trace = pyro.poutine.trace(conditioned).get_trace(x)
    assert trace.nodes["z1"]["value"].shape == (4, len(x), 3)
