"""The ELBO of the beta-TCVAE: a weight of its own for each of the three parts of a layer's KL."""

from __future__ import annotations

import math
from numbers import Real

import pyro.distributions as dist
from torch import Tensor

from ..traces import Ledger, Site
from .base import LedgerELBO


class BetaTCELBO(LedgerELBO):
    r"""The objective of the beta-TCVAE (Chen et al. 2018, eqs. 2 and 4).

        L = E[log p(x|z)] - alpha I(x; z) - beta TC(q(z)) - gamma sum_j KL(q(z_j) || p(z_j)),

    the three being, at a draw, log q(z|x) - log q(z), log q(z) - sum_j log q(z_j) and sum_j log q(z_j) - log p(z).
    q(z) = 1/N sum_n q(z|x_n) is estimated from the batch, the datum itself with weight 1/N and the B - 1 others with
    (N-1)/(N(B-1)) each: unbiased, and exact where the batch is the data set. (Deviation: the paper's stratified
    estimate, appendix C.2, gives one of the others another weight, at random.)

    Args:
        beta: weight of the total correlation.
        alpha: weight of the mutual information.
        gamma: weight of the KLs of single units.
        size: N, rows of the data set; the batch's if left out, which makes log q(z) too large by up to log N/B.
        layer: the site that is decomposed; the guide's first if left out. Its distribution may depend on x alone.
        num_particles: K.
    """

    needs_particle_dim = False

    def __init__(
        self,
        beta: float = 6.0,
        *,
        alpha: float = 1.0,
        gamma: float = 1.0,
        size: int | None = None,
        layer: str | None = None,
        num_particles: int = 1,
    ):
        super().__init__(num_particles=num_particles)
        weights = dict(beta=beta, alpha=alpha, gamma=gamma)
        if size is not None and size < 1:
            raise ValueError(f"size is {size}; give the number of rows of the data set")
        for name, value in weights.items():
            if not (isinstance(value, Real) and value >= 0):
                raise ValueError(f"{name} is {value!r}; a weight must be a number, 0 or more")
        self.beta, self.alpha, self.gamma, self.size, self.layer = beta, alpha, gamma, size, layer

    def bound(self, sites: Ledger) -> Tensor:
        site = sites[self._layer(sites)]
        log_q, log_q_units = aggregated(site, self.size)
        parts = self.alpha * (site.log_q - log_q) + self.beta * (log_q - log_q_units)
        parts = parts + self.gamma * (log_q_units - site.log_p)
        return sites.total(sites.averaged(sites.local_log_weight() - site.log_ratio - site.beta * parts))

    def check(self, sites: Ledger) -> None:
        super().check(sites)
        name = self._layer(sites)
        if any(s.is_enumerated for s in sites.values()):
            raise ValueError(
                f"{type(self).__name__} compares densities at draws, and there are enumerated sites, which are not "
                "drawn; use pyro_lvae.BetaELBO"
            )
        if self.size is not None and sites.batch_rows > self.size:
            raise ValueError(
                f"size is {self.size}, and the batch alone has {sites.batch_rows} rows; size is the number of rows of "
                "the data set"
            )
        if name not in sites.latents:
            raise ValueError(f"layer is {name!r}; the latent sites are {list(sites.latents)}")
        q = sites[name].q
        if not (isinstance(q, dist.Independent) and len(q.event_shape) == 1):
            raise ValueError(
                f"{type(self).__name__} needs q(z|x) of site {name!r} with independent units, and it is "
                f"{type(q).__name__}; name another layer, or use pyro_lvae.BetaELBO"
            )
        if name != self._first(sites):
            raise ValueError(
                f"{type(self).__name__} compares q(z|x) of all rows at one z, and site {name!r} depends on "
                f"{self._first(sites)!r} too; decompose that one"
            )

    def _layer(self, sites: Ledger) -> str:
        return self._first(sites) if self.layer is None else self.layer

    def _first(self, sites: Ledger) -> str:
        return next(n for n in sites.guide_order if sites[n].is_local)


def aggregated(site: Site, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Estimates of log q(z) and sum_j log q(z_j) at the draws of a site, nats: each `[K, B]` or `[B]`.

    Args:
        site: with independent units, its q depending on x alone.
        size: N; the rows of the batch if `None`.
    """
    batch = site.value.shape[-2]
    size = batch if size is None else size
    each = site.value.movedim(-2, 0).unsqueeze(-2)  # [B, (K), 1, z], against q of [(K), B, z]
    log_q = site.q.base_dist.log_prob(each)  # [B, (K), B, z]
    weights = log_q.new_full((batch, batch), math.log(max(size - 1, 1) / (size * max(batch - 1, 1))))
    weights.fill_diagonal_(-math.log(size))
    weights = weights if log_q.ndim == 3 else weights.unsqueeze(1)
    joint = (log_q.sum(-1) + weights).logsumexp(-1)
    units = (log_q + weights.unsqueeze(-1)).logsumexp(-2).sum(-1)
    return joint.movedim(0, -1), units.movedim(0, -1)
