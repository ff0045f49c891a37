"""What the package's estimators have in common, and how any `pyro.infer.ELBO` is differentiated."""

from __future__ import annotations

import copy
from abc import abstractmethod

import pyro
import torch
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from torch import Tensor, nn

from ..traces import Ledger, ledger
from .support import check_densities, check_reparameterised, check_scores, check_weights


class LedgerELBO(ELBO):
    """An estimator that is a function of the ledger; a subclass writes `bound`, and `objective` if need be.

    Works as `Estimator()(model, guide)`, in Pyro's `SVI` and in `fit`. Nothing in
    `differentiable_loss` waits for the device.

    Args:
        num_particles: K, the draws of each local site per datum, drawn together along dim -2.

    Attributes:
        needs_particle_dim: whether `bound` wants the densities of a single draw as `[1, B]`; with `False` they are
            `[B]`, which is faster, and `Ledger.averaged` takes the mean over particles where there are some.
        needs_rsample: whether local sites must be reparameterised; global ones always must.
        splits_densities: whether `objective` gives log p and log q gradients of their own.
        at_fixed_draws: whether it needs log q as a function of the draw.
        weighs_draws: whether the particles of a datum are weighed, so that a penalty would choose among them.
        needs_scores: whether the guide's gradient has d log q(z|x) at fixed z in it, with a mean that is not 0.
    """

    needs_particle_dim = True
    needs_rsample = True
    splits_densities = False
    at_fixed_draws = False
    weighs_draws = False
    needs_scores = False

    def __init__(self, num_particles: int = 1):
        if not isinstance(num_particles, int) or num_particles < 1:
            raise ValueError(f"num_particles is {num_particles}; a whole number of at least 1 is needed")
        super().__init__(num_particles=num_particles, max_plate_nesting=2)

    @abstractmethod
    def bound(self, sites: Ledger) -> Tensor:
        """The estimate for the data set that the batch stands for: a scalar in nats."""

    def objective(self, sites: Ledger) -> Tensor:
        """A scalar of the value of `bound`; its gradient is the estimator's, which may be another than `bound`'s."""
        return self.bound(sites)

    def check(self, sites: Ledger) -> None:
        """Raise `ValueError` where the estimator would be wrong on a structure with these sites."""
        check_reparameterised(type(self).__name__, sites, local=self.needs_rsample)
        if self.num_particles > 1:
            check_weights(type(self).__name__, sites, weighs=self.weighs_draws, needs_scores=self.needs_scores)
        if self.splits_densities:
            check_densities(type(self).__name__, sites, at_fixed_draws=self.at_fixed_draws)
        if not self.needs_rsample:
            check_scores(type(self).__name__, sites)

    def state_dict(self) -> dict[str, Tensor]:
        """What the estimator has learned, such as a multiplier; empty for most."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` returned."""

    def differentiable_loss(self, model, guide, *args, **kwargs) -> Tensor:
        """-bound with the estimator's gradient, a scalar in nats."""
        objective = self.objective(self._sites(model, guide, args, kwargs))
        if objective.ndim:
            raise ValueError(
                f"the bound of {type(self).__name__} has shape {tuple(objective.shape)}; expected a scalar: sum it "
                "over the data"
            )
        return -objective

    @torch.no_grad()
    def loss(self, model, guide, *args, **kwargs) -> float:
        """-bound, a float in nats."""
        return -self.bound(self._sites(model, guide, args, kwargs)).item()

    def loss_and_grads(self, model, guide, *args, **kwargs) -> float:
        """-bound, a float in nats; gradients are added to the parameters' `.grad`."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.item()

    def _sites(self, model, guide, args: tuple, kwargs: dict) -> Ledger:
        particles = self.num_particles if self.num_particles > 1 or self.needs_particle_dim else None
        sites = ledger(model, guide, *args, num_particles=particles, **kwargs)
        self.check(sites)
        return sites

    def _get_trace(self, model, guide, args, kwargs):
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)


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


def learned(estimator: ELBO) -> dict[str, Tensor]:
    """What an estimator has learned, such as a multiplier; Pyro's own learn nothing."""
    return estimator.state_dict() if hasattr(estimator, "state_dict") else {}


def with_nesting(estimator: ELBO) -> ELBO:
    """A copy, for Pyro's estimators keep the plate nesting that they guess from the first model they see."""
    estimator = copy.copy(estimator)
    if estimator.max_plate_nesting == float("inf"):
        estimator.max_plate_nesting = 1 + (estimator.vectorize_particles and estimator.num_particles > 1)
    estimator.max_plate_nesting = int(estimator.max_plate_nesting)  # a command line gives 1.0
    return estimator


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
