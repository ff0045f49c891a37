"""Another device than the CPU, without having one: torch's fake tensors know their device and refuse to mix two."""

from unittest.mock import patch

import pyro
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from pyro_lvae import GECO, IWAE, RWS, AnalyticELBO, DReG, SampledELBO
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


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_stays_on_its_device_and_waits_for_no_value(structure, estimator, x, request):
    """Of all that a step computes forwards; a fake tensor has no value to be waited for."""
    if reason := NOT_FAKED.get(request.node.callspec.params["structure"]):
        pytest.skip(reason)
    estimator = ESTIMATORS[estimator]()
    with pyro.validation_enabled(False):
        try:
            estimator.check(ledger(structure.model, structure.guide, x, num_particles=3))
        except ValueError:
            pytest.skip("the estimator refuses the structure")
        with FakeTensorMode(allow_non_fake_inputs=True), patch("torch.autograd.grad", shapes_alone):
            on_cuda(structure)
            x = torch.empty_like(x, device="cuda")
            loss = estimator.differentiable_loss(structure.model, structure.guide, x)
    assert loss.device.type == "cuda"
    assert loss.shape == ()
