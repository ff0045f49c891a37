"""Another device than the CPU, without having one: torch's fake tensors know their device and refuse to mix two."""

import pyro
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_lvae import GECO, IWAE, RWS, VAE, AnalyticELBO, BayesianWeights, DReG, SampledELBO
from pyro_lvae.bayes import POSTERIORS
from pyro_lvae.step import Step
from pyro_lvae.traces import ledger

ESTIMATORS = {
    "SampledELBO": SampledELBO,
    "AnalyticELBO": AnalyticELBO,
    "IWAE": lambda: IWAE(3),
    "DReG": lambda: DReG(3),
    "RWS": lambda: RWS(3),
    "GECO": lambda: GECO(6.0),
}
NOT_FAKED = {
    "FlowVAE-spline": "Pyro's spline asks which of its inputs lie outside",
    "SparseVAE-beta": "torch draws from a Beta on real devices alone",
}


def on_cuda(module: nn.Module) -> nn.Module:
    """The module with fake parameters and buffers on CUDA; tensors that it keeps elsewhere stay behind, as by `.to`."""
    moved = {}
    for tensors in (kept for m in module.modules() for kept in (m._parameters, m._buffers)):
        for name, t in tensors.items():
            if t is not None and id(t) not in moved:
                fake = torch.empty_like(t, device="cuda")
                moved[id(t)] = t, nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake
            tensors[name] = None if t is None else moved[id(t)][1]
    return module


def shapes_alone(value, inputs, grad_outputs=None, *, is_grads_batched=False, **options):
    """In place of `torch.autograd.grad`, whose engine asks for a real device."""
    inputs = [inputs] if isinstance(inputs, torch.Tensor) else inputs
    return [i.new_zeros(*grad_outputs.shape[:1] if is_grads_batched else (), *i.shape) for i in inputs]


class NoSmallFactors(TorchDispatchMode):
    """Refuses what CUDA's linear algebra does not take, and a fake tensor does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "linalg" not in str(func) or args[0].dtype != torch.bfloat16, func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def cuda(monkeypatch):
    """Fake tensors, as if CUDA were there with bfloat16."""
    monkeypatch.setattr("torch.autograd.grad", shapes_alone)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    with pyro.validation_enabled(False):
        yield FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_stays_on_its_device_and_waits_for_no_value(structure, estimator, x, cuda, request):
    """Of all that a step computes forwards; a fake tensor has no value to be waited for."""
    if reason := NOT_FAKED.get(request.node.callspec.params["structure"]):
        pytest.skip(reason)
    estimator = ESTIMATORS[estimator]()
    try:
        estimator.check(ledger(structure.model, structure.guide, x, num_particles=3))
    except ValueError:
        pytest.skip("the estimator refuses the structure")
    with cuda:
        on_cuda(structure)
        x = torch.empty_like(x, device="cuda")
        losses = [
            estimator.differentiable_loss(pair.model, pair.guide, x)
            for pair in (Step(structure, estimator, precision=p).pair for p in ("float32", "bfloat16"))
        ]
    assert {loss.device.type for loss in losses} == {"cuda"}
    assert {loss.shape for loss in losses} == {()}


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_posteriors_over_weights_stay_on_their_device(posterior, x, cuda):
    bayesian = BayesianWeights(VAE(12, 3, 8), posterior=posterior)
    with cuda, NoSmallFactors():
        on_cuda(bayesian)
        pair = Step(bayesian, SampledELBO(), precision="bfloat16").pair
        loss = SampledELBO().differentiable_loss(pair.model, pair.guide, torch.empty_like(x, device="cuda"))
    assert loss.device.type == "cuda"
