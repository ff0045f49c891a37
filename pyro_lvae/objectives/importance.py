"""Importance-weighted bounds: a mean of K weights for each datum."""

from __future__ import annotations

import math
from itertools import pairwise
from numbers import Real

from torch import Tensor

from ..traces import Ledger
from .base import LedgerELBO
from .gradients import gradients_at_draws, replace_at_draws, with_value
from .resampling import WeighedELBO, renyi_mean


class Renyi(WeighedELBO):
    r"""The variational Renyi bound of order alpha (Li & Turner 2016).

        L_alpha,K = N/B sum_b 1/(1-alpha) E[log 1/K sum_k w_kb^(1-alpha)] + E[log p(W) - log q(W)]
        w = p(x, z|W) / q(z|x, W)

    It falls with alpha: alpha = 1 is the ELBO, alpha = 0 the bound of `IWAE`; alpha < 0 bounds log p(x) from
    above as K grows, and below it for small K; alpha = -inf is VR-max, which follows the best particle of
    each datum.

    Each mean runs over the particles of one datum alone. A KL weight beta acts inside it, the
    subsampling scale N/B outside; global sites W (Bayesian weights) are drawn once, shared by the
    particles, and enter outside. Pyro's `RenyiELBO` is the same bound only where every site is in
    the data plate and the plate is not subsampled.

    Args:
        alpha: the order; any number, -inf and inf included (on the command line, as YAML has it, -.inf).
        num_particles: K.
        resampled: as of `IWAE`.
    """

    needs_scores = True

    def __init__(self, alpha: float = 0.5, num_particles: int = 5, resampled: int | None = None):
        if not isinstance(alpha, Real) or math.isnan(alpha):
            raise ValueError(f"alpha is {alpha!r}; give the order of the Renyi divergence, such as 0.5")
        super().__init__(num_particles, alpha, resampled)


class IWAE(WeighedELBO):
    r"""The importance-weighted bound of K particles (Burda et al. 2016, eq. 8).

        L_K = N/B sum_b E[log 1/K sum_k w_kb] + E[log p(W) - log q(W)],  w = p(x, z|W) / q(z|x, W)

    What is inside the log and what outside: see `Renyi`, whose alpha = 0 this is. Its gradient is a weighted sum,

        d L_K = sum_k v_kb d log w_kb,   v_kb = w_kb / sum_j w_jb,

    which `resampled=M` estimates by the mean of M particles drawn with probabilities v (Burda et al. 2016, section 3;
    systematic resampling for M > 1): K particles go forward without a graph, M forward and back. The bound is the same
    and the gradient unbiased and noisier, for about half of the time where K is large. Under batch norm, which
    normalises K particles in one pass and M in the other, it is unbiased only nearly.

    Args:
        num_particles: K; 1 is the ELBO.
        resampled: M, or `None` for the whole sum. The guide's sites must be Normal, and all in the data plate.

    >>> import torch
    >>> from pyro_lvae import VAE
    >>> vae, x = VAE(x_dim=4, z_dim=2, hidden_dim=8), torch.ones(3, 4)
    >>> IWAE(num_particles=5).differentiable_loss(vae.model, vae.guide, x).shape
    torch.Size([])
    """

    needs_scores = True

    def __init__(self, num_particles: int = 5, resampled: int | None = None):
        super().__init__(num_particles, 0.0, resampled)


class CIWAE(LedgerELBO):
    r"""A mixture of the ELBO and the importance-weighted bound (Rainforth et al. 2018).

        L = elbo_weight ELBO + (1 - elbo_weight) L_K,  both from the same K particles

    Args:
        elbo_weight: between 0 and 1; the paper's beta, which here is the name of the KL weight.
        num_particles: K.
    """

    weighs_draws = needs_scores = True

    def __init__(self, elbo_weight: float = 0.5, num_particles: int = 5):
        super().__init__(num_particles=num_particles)
        if not (isinstance(elbo_weight, Real) and 0 <= elbo_weight <= 1):
            raise ValueError(f"elbo_weight is {elbo_weight!r}; expected a number from 0 (IWAE) to 1 (ELBO)")
        self.elbo_weight = elbo_weight

    def bound(self, sites: Ledger) -> Tensor:
        log_w = sites.local_log_weight()
        return sites.total(self.elbo_weight * log_w.mean(0) + (1 - self.elbo_weight) * renyi_mean(log_w))


class MIWAE(LedgerELBO):
    r"""The mean of M independent importance-weighted bounds of K particles (Rainforth et al. 2018).

        L_M,K = 1/M sum_m log 1/K sum_k w_mk

    The guide's gradient keeps the signal-to-noise ratio that many particles under one logarithm
    take from it.

    Args:
        num_outer: M.
        num_inner: K.
    """

    weighs_draws = needs_scores = True

    def __init__(self, num_outer: int = 5, num_inner: int = 5):
        _check_counts(num_outer, num_inner)
        super().__init__(num_particles=num_outer * num_inner)
        self.num_outer, self.num_inner = num_outer, num_inner

    def bound(self, sites: Ledger) -> Tensor:
        return sites.total(self._outer_mean(sites))

    def _outer_mean(self, sites: Ledger) -> Tensor:
        log_w = sites.local_log_weight()
        return renyi_mean(log_w.unflatten(0, (self.num_outer, self.num_inner))).mean(0)


class PIWAE(MIWAE):
    r"""The model learns from IWAE with M K particles, the guide from MIWAE with the same (Rainforth et al. 2018).

        d/d theta log 1/(MK) sum_mk w_mk,   d/d phi 1/M sum_m log 1/K sum_k w_mk

    Its value is the tighter bound. Networks that model and guide share get either gradient for
    either use of them, and draws of global sites get the guide's.

    Args:
        num_outer: M.
        num_inner: K.
    """

    splits_densities = True

    def bound(self, sites: Ledger) -> Tensor:
        return sites.total(renyi_mean(sites.local_log_weight()))

    def objective(self, sites: Ledger) -> Tensor:
        for_guide, bound = super().bound(sites), self.bound(sites)
        gradients = gradients_at_draws(for_guide, sites.draws)
        # log p gets the gradient of `bound`, log q and the draws that of `for_guide`; global sites count once.
        log_p = renyi_mean(sites.without_scores().local_log_weight())
        log_q = self._outer_mean(sites.scores_alone())
        return replace_at_draws(with_value(sites.total(log_p + log_q), bound), sites.draws, gradients)


class RWS(LedgerELBO):
    r"""Reweighted wake-sleep, the wake-wake form (Bornschein & Bengio 2015; Le et al. 2019).

        theta: sum_k v_k d log p(x, z_k),   phi: sum_k v_k d log q(z_k|x),   v_k = w_k / sum_j w_j

    The model climbs the bound of `IWAE`; the guide goes down the inclusive KL(p(z|x) || q(z|x)), whose
    gradient needs no reparameterisation: discrete sites in the guide are welcome, and the guide
    does not get worse as K grows. Draws of global sites get the gradient of either at given local draws.

    Args:
        num_particles: K; 2 at least, for a single weight is 1 whatever it weighs.
    """

    needs_rsample = False
    splits_densities = at_fixed_draws = weighs_draws = needs_scores = True

    def __init__(self, num_particles: int = 10):
        super().__init__(num_particles=num_particles)
        if num_particles < 2:
            raise ValueError("num_particles is 1, and a single weight says nothing; give RWS 2 or more")

    def bound(self, sites: Ledger) -> Tensor:
        return sites.total(renyi_mean(sites.local_log_weight()))

    def objective(self, sites: Ledger) -> Tensor:
        bound = self.bound(sites)
        weights = sites.local_log_weight().detach().softmax(0)
        wake_phi = sites.plate_scale() * (weights * sites.local_log_q()).sum()
        wake_theta = renyi_mean(sites.without_scores().local_log_weight())
        objective = self.bound(sites.without_scores()) + wake_phi
        return _at_fixed_draws(objective, sites.total(wake_theta) + wake_phi, bound, sites)


class TVO(LedgerELBO):
    r"""The thermodynamic variational objective (Masrani et al. 2019).

        log p(x) = int_0^1 E_pi_t[log w] dt >= sum_j (t_j+1 - t_j) E_pi_tj[log w],   pi_t ~ q w^t

    A left Riemann sum over 0 = t_0 < t_1 < ... < 1. The expectations weigh S draws of q by the
    softmax of t log w. The gradient is the paper's covariance form,

        d E_pi_t[log w] = E_pi_t[d log w] + Cov_pi_t(d log(q w^t), log w),

    which needs no reparameterisation: discrete sites in the guide are welcome. The sum of a finite number of draws
    has a bias of the order of 1/S. Draws of global sites get the same gradient, at given local draws.

    Args:
        num_particles: S.
        num_partitions: the terms of the sum; 1 is the ELBO.
        log10_t1: log10 of t_1; the others follow evenly in the logarithm up to 1.
    """

    needs_rsample = False
    splits_densities = at_fixed_draws = weighs_draws = needs_scores = True

    def __init__(self, num_particles: int = 10, num_partitions: int = 5, log10_t1: float = -1.09):
        super().__init__(num_particles=num_particles)
        if num_particles < 2:
            raise ValueError("num_particles is 1, and a covariance needs two; give TVO 2 or more")
        if not isinstance(num_partitions, int) or num_partitions < 1 or not log10_t1 < 0:
            given = f"num_partitions={num_partitions}, log10_t1={log10_t1}"
            raise ValueError(f"{given}; expected a whole number of at least 1, and a number below 0")
        self.num_partitions, self.log10_t1 = num_partitions, log10_t1

    def partition(self) -> list[float]:
        """0 = t_0 < t_1 < ... < t_J = 1."""
        if self.num_partitions == 1:
            return [0.0, 1.0]
        steps = self.num_partitions - 1
        return [0.0, *(10 ** (self.log10_t1 * (1 - j / steps)) for j in range(steps)), 1.0]

    def bound(self, sites: Ledger) -> Tensor:
        log_w = sites.local_log_weight()
        terms = [(b - a) * ((a * log_w).softmax(0) * log_w).sum(0) for a, b in pairwise(self.partition())]
        return sites.total(sum(terms))

    def objective(self, sites: Ledger) -> Tensor:
        log_w, log_q = sites.local_log_weight(), sites.local_log_q()
        per_datum = 0
        for a, b in pairwise(self.partition()):
            pi = (a * log_w.detach()).softmax(0)
            centred = log_w.detach() - (pi * log_w.detach()).sum(0)
            per_datum = per_datum + (b - a) * (pi * (log_w + centred * (log_q + a * log_w))).sum(0)
        return _at_fixed_draws(sites.total(per_datum), sites.total(per_datum), self.bound(sites), sites)


def _at_fixed_draws(gradient_of: Tensor, at_shared: Tensor, bound: Tensor, sites: Ledger) -> Tensor:
    """`bound` with another gradient, which leaves local draws alone; global ones get that of `at_shared`."""
    local = {name: z for name, z in sites.draws.items() if sites[name].is_local}
    shared = {name: z for name, z in sites.draws.items() if name not in local}
    gradients = gradients_at_draws(replace_at_draws(at_shared, local, {}), shared)
    return replace_at_draws(with_value(gradient_of, bound), sites.draws, gradients)


def _check_counts(num_outer: int, num_inner: int) -> None:
    if not (isinstance(num_outer, int) and isinstance(num_inner, int) and num_outer > 0 and num_inner > 0):
        raise ValueError(f"num_outer={num_outer}, num_inner={num_inner}; whole numbers of at least 1 are needed")
