"""The evidence lower bound, sampled or with closed-form KLs, and its reweighted forms."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real

import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from ..traces import Ledger
from .base import LedgerELBO
from .support import check_analytic, check_reparameterised, names


class SampledELBO(LedgerELBO):
    r"""L^A: the ELBO with every density at a sample (Kingma & Welling 2014, eq. 6).

        L^A = N/B sum_b 1/K sum_k [log p(x, z_k) - log q(z_k|x)]

    What `Trace_ELBO` computes for reparameterised sites, without waiting for the device, so that it
    compiles; and with discrete sites that the model marks for enumeration summed out. The default of `fit`.

    Args:
        num_particles: K.
    """

    needs_particle_dim = False

    def bound(self, sites: Ledger) -> Tensor:
        return sites.total(sites.averaged(sites.local_log_weight()))


class AnalyticELBO(LedgerELBO):
    r"""L^B: the ELBO with each KL in closed form (Kingma & Welling 2014, eq. 7).

        L^B = N/B sum_b [1/K sum_k log p(x|z_k) - sum_i KL(q(z_i|.) || p(z_i|.))]

    What `TraceMeanField_ELBO` computes, without waiting for the device; and where that one would be
    silently wrong (a guide that samples in another order than the model, a Delta, an auxiliary
    site), an error. A site whose KL has no closed form is sampled.

    Args:
        num_particles: K.
    """

    needs_particle_dim = False

    def bound(self, sites: Ledger) -> Tensor:
        return penalised(sites, closed_form(sites), {}) - _global_kl(sites) + _global_observed(sites)

    def check(self, sites: Ledger) -> None:
        super().check(sites)
        check_analytic(type(self).__name__, sites, instead="pyro_lvae.SampledELBO")


class BetaELBO(LedgerELBO):
    r"""The ELBO with a weight on each layer's KL (Higgins et al. 2017, where all are one beta).

        L = N/B sum_b E_q[log p(x|z)] - sum_i beta_i (log q(z_i|.) - log p(z_i|.))

    For a weight that changes while training, anneal instead: `fit(..., beta=linear(0, 1, epochs=20))`, or
    by layer `beta={"z1": 1.0, "z2": 0.5}`. Both multiply.

    Args:
        beta: one weight, or {site: weight}, 1 for sites not named.
        num_particles: K.
    """

    needs_particle_dim = False

    def __init__(self, beta: float | dict[str, float] = 4.0, num_particles: int = 1):
        super().__init__(num_particles=num_particles)
        weights = beta.values() if isinstance(beta, Mapping) else [beta]
        if not all(isinstance(b, Real) and b >= 0 for b in weights):
            raise ValueError(f"beta is {beta!r}; a KL weight must be a number, 0 or more")
        self.beta = beta

    def bound(self, sites: Ledger) -> Tensor:
        shares = sites.kl_shares()
        weights = self.beta if isinstance(self.beta, Mapping) else dict.fromkeys(shares, self.beta)
        return penalised(sites, shares, weights) + sites.global_log_weight()

    def check(self, sites: Ledger) -> None:
        super().check(sites)
        latents = [name for name, site in sites.latents.items() if site.is_local]
        if isinstance(self.beta, Mapping) and (unknown := set(self.beta) - set(latents)):
            raise ValueError(f"beta names {names(sorted(unknown))}; the local latent sites are {names(latents)}")


class FreeBits(LedgerELBO):
    r"""The ELBO that charges nothing for a layer's first nats (Kingma et al. 2016, section 5).

        L = N/B sum_b E_q[log p(x|z)] - N sum_i max(lambda, mean_b KL_i),  one group a layer

    A lower bound of the ELBO (but for the noise of the mean under the maximum). A layer below lambda is not pushed
    towards its prior, which keeps it from dying early. The mean is over the batch, as in the paper.

    Args:
        nats: lambda, a layer and datum.
        analytic: each KL in closed form, as in `AnalyticELBO`, where guide and model sample in the
            same order; else sampled.
        num_particles: K.
    """

    needs_particle_dim = False

    def __init__(self, nats: float = 0.5, analytic: bool = False, num_particles: int = 1):
        super().__init__(num_particles=num_particles)
        if not (isinstance(nats, Real) and nats >= 0):
            raise ValueError(f"nats is {nats!r}; the free nats of a layer must be a number, 0 or more")
        self.nats, self.analytic = nats, analytic

    def bound(self, sites: Ledger) -> Tensor:
        kl = closed_form(sites) if self.analytic else sites.kl_shares()
        means = {name: share.mean() for name, share in kl.items()}
        charged = {name: mean.clamp_min(self.nats * sites[name].beta) for name, mean in means.items()}
        return reconstruction(sites) - sites.rows * sum(charged.values()) + sites.global_log_weight()

    def check(self, sites: Ledger) -> None:
        super().check(sites)
        if self.analytic:
            check_analytic("FreeBits(analytic=True)", sites, instead="FreeBits(analytic=False)")


class KLBalanced(LedgerELBO):
    r"""The ELBO, during warm-up with the KL weight moved from small layers to large ones (Vahdat & Kautz 2020).

        L = N/B sum_b E_q[log p(x|z)] - sum_i gamma_i KL_i,   gamma_i = a_i / mean_j a_j,
        a_i = (mean_b |KL_i| + 0.01) / units of z_i,   no gradient through gamma

    A layer that says little yet is hardly pushed towards its prior. Where a site's KL weight beta
    has reached 1, its gamma is 1: the end of the warm-up is the plain ELBO, as in the authors' code.

    Args:
        always: balance at beta = 1 too.
        num_particles: K.
    """

    needs_particle_dim = False

    def __init__(self, always: bool = False, num_particles: int = 1):
        super().__init__(num_particles=num_particles)
        self.always = always

    def bound(self, sites: Ledger) -> Tensor:
        shares = sites.kl_shares()
        return penalised(sites, shares, self.weights(sites, shares)) + sites.global_log_weight()

    def weights(self, sites: Ledger, shares: dict[str, Tensor]) -> dict[str, Tensor]:
        """{site: gamma_i}, from the shares as they would be at beta = 1."""
        plain = sites.unannealed().kl_shares()
        sizes = {n: (sites[n].q or sites[n].p).event_shape.numel() for n in plain}
        a = {n: (kl.detach().abs().mean() + 0.01) / sizes[n] for n, kl in plain.items()}
        mean = sum(a.values()) / max(1, len(a))
        gamma = {n: a[n] / mean for n in a}
        return gamma if self.always else {n: _until_one(sites[n].beta, g) for n, g in gamma.items()}


def default_estimator(sites: Ledger) -> ELBO:
    """`SampledELBO`; `Trace_ELBO`, with its score function, where a site cannot be reparameterised."""
    try:
        check_reparameterised("SampledELBO", sites)
    except ValueError:
        return Trace_ELBO(max_plate_nesting=1)
    return SampledELBO()


def closed_form(sites: Ledger) -> dict[str, Tensor]:
    """{local latent: beta KL(q || p)}, nats, `[K, B]` or `[B]`."""
    return {n: sites.expected(s.beta * s.kl()) for n, s in sites.latents.items() if s.is_local}


def reconstruction(sites: Ledger) -> Tensor:
    """N/B sum_b 1/K sum_k log p(x|z): a scalar, nats; with enumerated sites, its expectation under them."""
    log_p = sum(sites.kl_shares().values(), sites.local_log_weight())
    return sites.plate_scale() * sites.averaged(log_p).sum()


def penalised(sites: Ledger, kl: dict[str, Tensor], weights: Mapping) -> Tensor:
    """The reconstruction less the weighted KLs of the local sites: a scalar, nats."""
    nothing = torch.zeros_like(sites.local_log_weight())
    charged = sum((weights.get(name, 1.0) * share for name, share in kl.items()), nothing)
    return reconstruction(sites) - sites.plate_scale() * sites.averaged(charged).sum()


def _global_kl(sites: Ledger) -> float | Tensor:
    return sum((s.beta * s.kl()).sum() for s in sites.global_sites.values() if not s.is_observed)


def _global_observed(sites: Ledger) -> float | Tensor:
    return sum(s.log_ratio.sum() for s in sites.global_sites.values() if s.is_observed)


def _until_one(beta: float | Tensor, gamma: Tensor) -> Tensor:
    if not isinstance(beta, Tensor):
        return gamma if beta < 1 else torch.ones_like(gamma)
    return torch.where(beta < 1, gamma, 1.0)
