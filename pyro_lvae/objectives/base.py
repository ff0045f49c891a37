"""What estimators have in common, and how any `pyro.infer.ELBO` is run, checked and differentiated."""

from __future__ import annotations

from abc import abstractmethod

import pyro
import torch
from pyro.infer import ELBO, RenyiELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.enum import get_importance_trace
from torch import Tensor, nn

from ..traces import Ledger, ledger


class LedgerELBO(ELBO):
    """An estimator that is a function of the ledger; a subclass writes `bound` alone.

    Works as `Estimator()(model, guide)`, in Pyro's `SVI` and in `fit`. Nothing in
    `differentiable_loss` waits for the device.

    Args:
        num_particles: K, the draws of each local site per datum, drawn together along dim -2.
    """

    def __init__(self, num_particles: int = 1):
        if num_particles < 1:
            raise ValueError(f"num_particles is {num_particles}; at least 1 is needed")
        super().__init__(num_particles=num_particles, max_plate_nesting=2)

    @abstractmethod
    def bound(self, sites: Ledger) -> Tensor:
        """The estimate for the data set that the batch stands for: a scalar in nats."""

    def differentiable_loss(self, model, guide, *args, **kwargs) -> Tensor:
        """-bound, differentiable, a scalar in nats."""
        return -self.bound(ledger(model, guide, *args, num_particles=self.num_particles, **kwargs))

    @torch.no_grad()
    def loss(self, model, guide, *args, **kwargs) -> float:
        """-bound, a float in nats."""
        return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model, guide, *args, **kwargs) -> float:
        """-bound, a float in nats; gradients are added to the parameters' `.grad`."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.item()

    def _get_trace(self, model, guide, args, kwargs):
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)


def check_supported(estimator: ELBO, sites: Ledger) -> None:
    """Raise `ValueError` where `estimator` would be silently wrong on a structure with these sites."""
    name = type(estimator).__name__
    enumerated = [n for n, s in sites.items() if s.is_enumerated]
    if enumerated and not isinstance(estimator, TraceEnum_ELBO | LedgerELBO):
        raise ValueError(
            f"the model enumerates {_names(enumerated)} and {name} would draw from the prior in its place; use "
            "pyro.infer.TraceEnum_ELBO(max_plate_nesting=1), or pyro_lvae.IWAE"
        )
    if sites.global_sites and isinstance(estimator, RenyiELBO):
        raise ValueError(
            f"RenyiELBO weighs whole batches, not data, once there is a site outside the data plate, and there "
            f"{_names(sites.global_sites)} lies; use pyro_lvae.IWAE"
        )
    if isinstance(estimator, TraceMeanField_ELBO):
        _check_mean_field(sites)
    if isinstance(estimator, LedgerELBO):
        check_reparameterised(name, sites)


def check_reparameterised(name: str, sites: Ledger) -> None:
    """Raise `ValueError` unless every site of the guide has an `rsample`."""
    stuck = [n for n, s in sites.latents.items() if s.q is not None and not s.q.has_rsample]
    if stuck:
        raise ValueError(
            f"{name} differentiates through the guide's draws, and {_names(stuck)} cannot be "
            "reparameterised; use pyro.infer.Trace_ELBO or TraceGraph_ELBO (score function), or "
            'enumerate with pyro.infer.TraceEnum_ELBO and infer={"enumerate": "parallel"}'
        )


def backward(estimator: ELBO, structure: nn.Module, args: tuple, per: float) -> Tensor:
    """Add the gradient of loss/`per` to the parameters; return that loss, nats, detached.

    Pyro's RenyiELBO and TraceGraph_ELBO have no `differentiable_loss`, and their `loss_and_grads`
    skips the gradient unless it sees a `pyro.param`: they are shown one, in a store of its own.
    """
    if hasattr(estimator, "differentiable_loss"):
        loss = estimator.differentiable_loss(structure.model, structure.guide, *args) / per
        loss.backward()
        return loss.detach()

    def guide(*args):
        pyro.param("pyro_lvae_sees_gradients", lambda: torch.zeros(()))
        return structure.guide(*args)

    held = [(p, p.grad) for p in structure.parameters()]
    structure.zero_grad(set_to_none=True)
    with pyro.get_param_store().scope():
        loss = estimator.loss_and_grads(structure.model, guide, *args) / per
    for p, before in held:
        p.grad = _sum(before, None if p.grad is None else p.grad / per)
    return torch.as_tensor(loss)


def _check_mean_field(sites: Ledger) -> None:
    if any(s.p is None for s in sites.latents.values()):
        raise ValueError(
            "TraceMeanField_ELBO with sites that only the guide has is not a bound: Pyro drops the Delta's "
            "log-density; use Trace_ELBO"
        )
    model_order, guide_order = tuple(sites.latents), sites.guide_order
    if model_order != guide_order:
        raise ValueError(
            f"TraceMeanField_ELBO takes each layer's KL in closed form given the layers before it, so guide "
            f"and model must sample in the same order; the guide samples {_names(guide_order)} and the model "
            f"{_names(model_order)}, and the result would not be a bound. Use Trace_ELBO, or a top-down guide"
        )
    deltas = [n for n, s in sites.latents.items() if "Delta" in _class_names(s.q)]
    if deltas:
        raise ValueError(
            f"TraceMeanField_ELBO drops the log-density of a Delta, and {_names(deltas)} has one in the guide; "
            "use Trace_ELBO"
        )


def _class_names(fn) -> set[str]:
    names = set()
    while fn is not None:
        names.add(type(fn).__name__)
        fn = getattr(fn, "base_dist", None)
    return names


def _names(names) -> str:
    return ", ".join(repr(n) for n in names)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
