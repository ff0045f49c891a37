"""Constrained optimisation: the weight between reconstruction and KL is a Lagrange multiplier, and learned."""

from __future__ import annotations

from abc import abstractmethod
from numbers import Real

import torch
from torch import Tensor

from ..traces import Ledger
from .base import LedgerELBO
from .elbo import reconstruction
from .support import names

LIMITS = 1e-4, 1e4  # of a multiplier


class Lagrangian(LedgerELBO):
    """An objective with one multiplier, which climbs while the constraint is broken and falls while it holds.

    It moves whenever `differentiable_loss` is asked for with gradients:

        log lambda += rate * clip(violation / |allowance|, -1, 1)

    so that it stays positive, and the step does not depend on the scale of the data. The multiplier
    is the weight between reconstruction and KL: annealing by beta acts on global sites alone.

    Args:
        allowance: what the constraint allows, nats a datum.
        rate: of the ascent.
        initial: lambda to begin with.
        num_particles: K.
    """

    needs_particle_dim = False

    def __init__(self, allowance: float, rate: float, initial: float, num_particles: int):
        super().__init__(num_particles=num_particles)
        if not isinstance(allowance, Real):
            raise ValueError(f"the constraint's limit is {allowance!r}; expected a number of nats a datum")
        if not (rate > 0 and initial > 0):
            raise ValueError(f"rate is {rate} and initial {initial}; each must be positive")
        self.allowance, self.rate, self.initial = allowance, rate, initial
        self._state = {"multiplier": torch.tensor(float(initial), dtype=torch.double)}

    @property
    def multiplier(self) -> Tensor:
        """lambda, a scalar."""
        return self._state["multiplier"]

    @abstractmethod
    def violation(self, sites: Ledger) -> Tensor:
        """How far the mean over batch and particles is beyond what is allowed, nats a datum; negative within it."""

    def objective(self, sites: Ledger) -> Tensor:
        if torch.is_grad_enabled():
            self._state = self._step(self.violation(sites).detach().double())
        return self.bound(sites)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._state = {name: state.get(name, value) for name, value in self._state.items()}

    def _step(self, violation: Tensor) -> dict[str, Tensor]:
        step = self.rate * (violation / (abs(self.allowance) or 1.0)).clamp(-1, 1)
        return {"multiplier": (self.multiplier.to(step.device) * step.exp()).clamp(*LIMITS)}


class ConstrainedELBO(Lagrangian):
    r"""The best reconstruction within a budget for the KL, by its Lagrangian.

        max E_q[log p(x|z)]  subject to  KL(q(z|x) || p(z)) < epsilon
        L = E_q[log p(x|z)] - lambda (KL - epsilon),   lambda > 0 learned

    (The constraint behind Higgins et al. 2017, who fix its KKT multiplier beta by hand; here the
    budget is given and the multiplier follows.) The KL is the mean over the data of the sum over layers.
    Where the budget is used up, lambda is what another nat of KL would be worth.

    Args:
        epsilon: the budget, nats a datum.
        rate: of the multiplier's ascent.
        initial: lambda to begin with.
        num_particles: K.
    """

    def __init__(self, epsilon: float, rate: float = 0.01, initial: float = 1.0, num_particles: int = 1):
        super().__init__(epsilon, rate, initial, num_particles)
        if not epsilon > 0:
            raise ValueError(f"epsilon is {epsilon}; a budget for the KL must be positive")
        self.epsilon = epsilon

    def bound(self, sites: Ledger) -> Tensor:
        violation = self.violation(sites)
        price = self.multiplier.to(violation) * violation
        return reconstruction(sites) - sites.rows * price + sites.global_log_weight()

    def violation(self, sites: Ledger) -> Tensor:
        return _kl(sites) - self.allowance


class GECO(Lagrangian):
    r"""The smallest KL at which the reconstruction is good enough (Rezende & Viola 2018).

        min KL(q(z|x) || p(z))  subject to  E_q[-log p(x|z)] < distortion
        L = -KL - lambda (E_q[-log p(x|z)] - distortion),   lambda > 0 learned

    The multiplier follows a moving average of the constraint, as in the paper's algorithm 1.

    Args:
        distortion: the allowed mean of -log p(x|z), nats a datum; of densities, as for real-valued data, it may be
            negative.
        rate: of the multiplier's ascent.
        initial: lambda to begin with.
        decay: of the moving average.
        num_particles: K.
    """

    def __init__(
        self,
        distortion: float,
        rate: float = 0.01,
        initial: float = 1.0,
        decay: float = 0.99,
        num_particles: int = 1,
    ):
        super().__init__(distortion, rate, initial, num_particles)
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; expected 0 or more and less than 1")
        self.distortion, self.decay = distortion, decay
        self._state["average"] = torch.tensor(float("nan"), dtype=torch.double)

    def bound(self, sites: Ledger) -> Tensor:
        violation = self.violation(sites)
        price = self.multiplier.to(violation) * violation
        return -sites.rows * (_kl(sites) + price) + sites.global_log_weight()

    def check(self, sites: Ledger) -> None:
        super().check(sites)
        if sites.penalties:
            raise ValueError(
                f"GECO bounds -log p(x|z), and the model has a penalty {names(sites.penalties)} besides; use "
                "pyro_lvae.SampledELBO or ConstrainedELBO"
            )

    def violation(self, sites: Ledger) -> Tensor:
        return -reconstruction(sites) / sites.rows - self.allowance

    def _step(self, violation: Tensor) -> dict[str, Tensor]:
        before = self._state["average"].to(violation.device)
        average = torch.where(before.isnan(), violation, self.decay * before + (1 - self.decay) * violation)
        return {**super()._step(average), "average": average}


def _kl(sites: Ledger) -> Tensor:
    """KL of the local sites, not annealed, mean over batch and particles: nats a datum."""
    return sum(sites.unannealed().kl_shares().values(), torch.zeros_like(sites.local_log_weight())).mean()
