"""Lower-variance gradients for the guide: through its draws alone, its scores left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from numbers import Real

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from ..traces import Ledger, Site, normal_of, redraw
from .base import LedgerELBO
from .gradients import gradients_at_draws, replace_at_draws, with_value
from .resampling import WeighedELBO
from .support import check_same_order, names


class STL(LedgerELBO):
    r"""The ELBO with the gradient that sticks the landing (Roeder et al. 2017).

        grad_phi = sum_i dL/dz_i dz_i/dphi,   the score d log q(z_i|.)/dphi at fixed z left out

    The score has mean zero, so nothing is lost but its variance: where q is the exact posterior, the guide's
    gradient is exactly 0 in every sample. In a hierarchy q(z_j|z_i) depends on z_i too, and that
    way through log q stays; taking all of log q's parameters as constants, as is often done,
    would be unbiased but noisy at the optimum. (So does the way through global draws, such as weights of the guide.)

    Args:
        num_particles: K draws, averaged.
    """

    splits_densities = at_fixed_draws = True

    def bound(self, sites: Ledger) -> Tensor:
        return sites.total(sites.local_log_weight().mean(0))

    def objective(self, sites: Ledger) -> Tensor:
        bound = self.bound(sites)
        gradients = gradients_at_draws(bound, sites.draws)
        return replace_at_draws(with_value(self.bound(sites.without_scores()), bound), sites.draws, gradients)


class DReG(WeighedELBO):
    r"""The importance-weighted bound with doubly reparameterised gradients (Tucker et al. 2019; Bauer & Mnih 2021).

        L = 1/(1-alpha) log 1/K sum_k w_k^(1-alpha),   v_k = w_k^(1-alpha) / sum_j w_j^(1-alpha)
        grad_phi = sum_k sum_i v_k [1 - beta_i (1-alpha) (1 - v_k)] d log w_k/dz_ik dz_ik/dm_i dm_i/dphi

    where m_i are the parameters of q(z_i|.), given the draws before z_i, and d/dz_i the total
    derivative: through the likelihood, the prior, and the densities and draws of the layers after z_i.
    At alpha = 0 and beta = 1 the bracket is v_k, and this is Tucker et al.'s v_k^2; beta_i is the
    KL weight of layer i (tempered weights), which enters the score that is reparameterised away.

    On hierarchies it is unbiased because that derivative keeps the scores of later layers, d log q(z_j|z_i)/dz_i
    through m_j (the further terms that Bauer & Mnih find); with the parameters of every q held
    constant, as a single layer allows, they would be missing.

    With `prior`, the scores of p(z_i|.) are reparameterised away as well (Bauer & Mnih's second part):

        grad_theta = sum_k sum_i beta_i [v_k r_ik + (1-alpha) v_k (1-v_k) d log w_k/dz_ik] dT_i/dtheta,
        r_i = d/dz (log q(z|.) - log p(z|.)) at z_i,   T_i = mu_p,i + sigma_p,i eps at the eps that gives z_i

    Where model and guide share networks, as in a ladder, the scores of p and q nearly cancel in the
    plain gradient; without `prior` one of the two is left alone, and the shared networks' gradient is
    noisier than that of IWAE.

    Batch norm in training mode makes the particles of a batch see each other; the identities then
    hold up to that.

    Args:
        num_particles: K.
        alpha: order of the Renyi bound; 0 is IWAE's, 1 the ELBO's (and this is `STL`).
        prior: for the model's latent layers too; they must be Normal, and sampled in the same order
            by guide and model.
        resampled: M particles that stand for K in the gradient, as of `IWAE`.
    """

    splits_densities = at_fixed_draws = True

    def __init__(self, num_particles: int = 5, alpha: float = 0.0, prior: bool = False, resampled: int | None = None):
        if not (isinstance(alpha, Real) and math.isfinite(alpha)):
            raise ValueError(f"alpha is {alpha!r}; doubly reparameterised gradients need a finite order")
        super().__init__(num_particles, alpha, resampled)
        self.prior = prior

    def objective(self, sites: Ledger) -> Tensor:
        v = self.weights(sites)
        return self.weighed(sites, self.bound, v, v)

    def weighed(self, sites: Ledger, bound: Callable[[Ledger], Tensor], shares: Tensor, v: Tensor) -> Tensor:
        value = bound(sites)
        totals = gradients_at_draws(value, sites.draws)
        scored = {n: self._scored(sites[n], v) for n in totals if sites[n].is_local}
        at_draws = {n: g * (1 - _like(scored[n], g)) if n in scored else g for n, g in totals.items()}
        gradient_of = bound(self._for_model(sites, scored))
        if self.prior:
            at_prior = {n: self._at_prior(sites, n, shares) + _like(scored[n], totals[n]) * totals[n] for n in scored}
            gradient_of = gradient_of + sum((g * redraw(sites[n].p, sites[n].value)).sum() for n, g in at_prior.items())
        return replace_at_draws(with_value(gradient_of, value), sites.draws, at_draws)

    def check(self, sites: Ledger) -> None:
        super().check(sites)
        if not self.prior:
            return
        check_same_order("DReG(prior=True)", sites, "would be biased", instead="DReG")
        local = {n: s for n, s in sites.latents.items() if s.is_local}
        if odd := [n for n, s in local.items() if s.p is None or normal_of(s.p) is None]:
            raise ValueError(f"DReG(prior=True) shifts and scales Normal priors, and {names(odd)} has none; use DReG")

    def _scored(self, site: Site, v: Tensor) -> Tensor:
        """How much of a draw's gradient the score takes along when it is reparameterised; a masked one has none."""
        return scale_and_mask(site.beta * (1 - self.alpha) * (1 - v), 1.0, site.mask)

    def _for_model(self, sites: Ledger, scored: dict[str, Tensor]) -> Ledger:
        """What the densities alone hand on: log p to the model, but for the layers treated otherwise."""
        plain = sites.without_scores()
        if self.prior:
            for name in scored:
                plain[name] = replace(plain[name], log_p=plain[name].log_p.detach())
        return plain

    def _at_prior(self, sites: Ledger, name: str, shares: Tensor) -> Tensor:
        """N/B beta_i v_k d/dz (log q(z_i|.) - log p(z_i|.)), at given parameters of both."""
        site, z = sites[name], sites[name].value.detach().requires_grad_()
        with torch.enable_grad():
            ratio = scale_and_mask(site.q.log_prob(z) - site.p.log_prob(z), 1.0, site.mask)
            slope = torch.autograd.grad(ratio.sum(), z)[0]
        return sites.plate_scale() * _like(site.beta * shares, slope) * slope


def _like(weights: Tensor, value: Tensor) -> Tensor:
    """`[K, B]` weights, to be multiplied with `[K, B, ...]`."""
    return weights.reshape(*weights.shape, *[1] * (value.ndim - weights.ndim))
