"""Lower-variance gradients for the guide: through its draws alone, its scores left out."""

from __future__ import annotations

import math

from torch import Tensor

from ..traces import Ledger
from .base import LedgerELBO
from .gradients import gradients_at_draws, replace_at_draws, with_value
from .importance import renyi_mean


class STL(LedgerELBO):
    r"""The ELBO with the gradient that sticks the landing (Roeder et al. 2017).

        grad_phi = sum_i dL/dz_i dz_i/dphi,   the score d log q(z_i|.)/dphi at fixed z left out

    The score has mean zero, so nothing is lost but its variance: where q is the exact posterior, the guide's
    gradient is exactly 0 in every sample. In a hierarchy q(z_j|z_i) depends on z_i too, and that
    way through log q stays; taking all of log q's parameters as constants, as is often done,
    would be unbiased but noisy at the optimum.

    Args:
        num_particles: K draws, averaged.
    """

    def bound(self, sites: Ledger) -> Tensor:
        return sites.total(sites.local_log_weight().mean(0))

    def objective(self, sites: Ledger) -> Tensor:
        bound = self.bound(sites)
        gradients = gradients_at_draws(bound, sites.draws)
        return replace_at_draws(with_value(self.bound(sites.without_scores()), bound), sites.draws, gradients)


class DReG(LedgerELBO):
    r"""The importance-weighted bound with doubly reparameterised gradients (Tucker et al. 2019; Bauer & Mnih 2021).

        L = 1/(1-alpha) log 1/K sum_k w_k^(1-alpha),   v_k = w_k^(1-alpha) / sum_j w_j^(1-alpha)
        grad_phi = sum_k sum_i v_k [1 - beta_i (1-alpha) (1 - v_k)] d log w_k/dz_ik dz_ik/dm_i dm_i/dphi

    where m_i are the parameters of q(z_i|.), given the draws before z_i, and d/dz_i the total
    derivative: through the likelihood, the prior, and the densities and draws of the layers after z_i.
    At alpha = 0 and beta = 1 the bracket is v_k, and this is Tucker et al.'s v_k^2; beta_i is the
    KL weight of layer i (tempered weights), which enters the score that is reparameterised away.

    On hierarchies it is unbiased because that derivative keeps the scores of later layers, d log q(z_j|z_i)/dz_i
    through m_j (the further terms that Bauer & Mnih find); with the parameters of every q held
    constant, as a single layer allows, they would be missing. The model's gradient is that of
    IWAE. (Bauer & Mnih's second part, the same for the parameters of p(z), is not built.)

    Batch norm in training mode makes the particles of a batch see each other; the identity then
    holds up to that.

    Args:
        num_particles: K.
        alpha: order of the Renyi bound; 0 is IWAE's, 1 the ELBO's (and this is `STL`).
    """

    def __init__(self, num_particles: int = 5, alpha: float = 0.0):
        super().__init__(num_particles=num_particles)
        if not math.isfinite(alpha):
            raise ValueError(f"alpha is {alpha}; doubly reparameterised gradients need a finite order")
        self.alpha = float(alpha)

    def bound(self, sites: Ledger) -> Tensor:
        return sites.total(renyi_mean(sites.local_log_weight(), self.alpha))

    def objective(self, sites: Ledger) -> Tensor:
        bound = self.bound(sites)
        v = ((1 - self.alpha) * sites.local_log_weight().detach()).softmax(0)
        gradients = gradients_at_draws(bound, sites.draws)
        for name, gradient in gradients.items():
            if sites[name].is_local:
                factor = 1 - sites[name].beta * (1 - self.alpha) * (1 - v)
                gradients[name] = gradient * factor.reshape(*v.shape, *[1] * (gradient.ndim - v.ndim))
        return replace_at_draws(with_value(self.bound(sites.without_scores()), bound), sites.draws, gradients)
