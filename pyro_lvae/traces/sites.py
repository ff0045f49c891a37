"""The ledger: every sample site, seen from the model and from the guide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from pyro.distributions import TorchDistribution
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence


@dataclass(frozen=True)
class Site:
    """One sample site, seen from the model (p) and from the guide (q).

    `log_p` and `log_q` are nats, masks applied, scales not. With K particles they have shape
    `[K, B]`; without, `[B]`; for a global site, the site's own. `beta` is the product of the
    `poutine.scale`s on the site, `plate_scale` is N/B of a subsampled data plate. A discrete site that
    the model marks `infer={"enumerate": "parallel"}` and the guide leaves out is enumerated, as is one that the
    guide marks so: it, and the sites below it, have a further dim on the left. A global site whose guide says so
    (`infer={CLOSED_FORM: True}`) counts with its KL in closed form, which is right where p and q depend on draws
    before it alone. `log_p` includes `log_factor`, a factor of the prior (`pyro_lvae.critics.factor`); a site that is a
    factor without a prior is a penalty.
    """

    name: str
    value: Tensor
    p: TorchDistribution | None
    q: TorchDistribution | None
    log_p: Tensor
    log_q: Tensor
    beta: float | Tensor
    plate_scale: float
    is_observed: bool
    is_local: bool
    is_enumerated: bool = False
    has_closed_form: bool = False
    mask: Tensor | bool | None = None
    log_factor: float | Tensor = 0.0
    is_penalty: bool = False

    def kl(self) -> Tensor:
        """KL(q || p) in closed form, nats; log q - log p at the draw, where torch knows no formula.

        `[K, B]` or `[B]` for a local site. Both distributions are given the draws before this site:
        over their expectation it is the site's share of the KL where the guide samples in the
        model's order, and not otherwise.
        """
        if self.p is None or self.q is None:
            return self.log_q - self.log_p
        try:
            kl = kl_divergence(self.q, self.p)
        except NotImplementedError:
            return self.log_q - self.log_p
        return scale_and_mask(kl, 1.0, self.mask) - self.log_factor

    @property
    def log_ratio(self) -> Tensor:
        """beta (log p - log q)."""
        return self.beta * (self.log_p - self.log_q)


class Ledger(dict[str, Site]):
    """{site name: Site} in the model's order.

    Attributes:
        guide_order: the guide's sites in its own order.
        batch_dims: 2 with particles (`[K, B]`), 1 without (`[B]`).
    """

    guide_order: tuple[str, ...] = ()
    batch_dims: int = 1

    @property
    def latents(self) -> dict[str, Site]:
        """The sites that are not observed, in the model's order."""
        return {name: site for name, site in self.items() if not site.is_observed}

    @property
    def global_sites(self) -> dict[str, Site]:
        """The sites outside the data plate."""
        return {name: site for name, site in self.items() if not site.is_local}

    @property
    def draws(self) -> dict[str, Tensor]:
        """The guide's draws that a gradient passes through, in the model's order."""
        return {n: s.value for n, s in self.latents.items() if s.q is not None and s.value.requires_grad}

    def without_scores(self) -> Ledger:
        """The same numbers, where no gradient passes through any log q."""
        return self._map(lambda site: replace(site, log_q=site.log_q.detach()))

    def scores_alone(self) -> Ledger:
        """The same numbers, where no gradient passes through any log p."""
        return self._map(lambda site: replace(site, log_p=site.log_p.detach()))

    @property
    def penalties(self) -> list[str]:
        """The factors that are no part of a prior."""
        return [name for name, site in self.items() if site.is_penalty]

    def unannealed(self) -> Ledger:
        """The same sites at beta = 1."""
        return self._map(lambda site: replace(site, beta=1.0))

    @property
    def rows(self) -> float:
        """N, the rows that the batch stands for: B, unless the data plate is subsampled."""
        return self.plate_scale() * self.local_log_weight().shape[-1]

    @property
    def batch_rows(self) -> int:
        """B."""
        return next(s.log_p.shape[-1] for s in self.values() if s.is_local)

    def averaged(self, value: Tensor) -> Tensor:
        """The mean over particles of `[K, B]`, that is `[B]`; without particles, what came."""
        return value if self.batch_dims == 1 else value.mean(0)

    def total(self, per_datum: Tensor) -> Tensor:
        """N/B sum_b of a bound a datum `[B]`, with the global sites outside: a scalar, nats.

        Raises:
            ValueError: it is not `[B]`.
        """
        if per_datum.ndim != 1:
            raise ValueError(
                f"the bound of each datum has shape {tuple(per_datum.shape)}, expected ({self.batch_rows},); densities "
                "of a single draw may have no dim of particles: Ledger.averaged takes the mean over those there are"
            )
        return self.plate_scale() * per_datum.sum() + self.global_log_weight()

    def local_log_weight(self) -> Tensor:
        """Sum over local sites of beta (log p - log q), nats: `[K, B]` with particles, else `[B]`.

        Sites c that the model enumerates are summed out: log sum_c p(c) p(x, z | c) / q(z | x). With beta on c,
        p(c)^beta stands in that sum; the entropy of p(c | x, z) is then not annealed with it. Of sites y that the
        guide enumerates it is the expectation under q(y | .), as in the ELBO; `local_log_evidence` has their sum.
        """
        joint = self._joint()
        if self.guide_enumerates:
            return self.expected(joint)
        return self._over_enumerated(joint).logsumexp(0) if self._is_enumerated else joint

    def local_log_evidence(self) -> Tensor:
        """`local_log_weight` with sites y that the guide enumerates summed out too, nats: `[K, B]` or `[B]`.

        log sum_y p(x, y, z) / q(z | x, y),  z ~ q(z | x, y),  whose exponential has p(x) as its mean at beta = 1
        """
        if not self.guide_enumerates:
            return self.local_log_weight()
        log_q = sum(s.beta * s.log_q for s in self.values() if s.is_enumerated)
        return self._over_enumerated(self._joint() + log_q).logsumexp(0)

    def expected(self, value: Tensor) -> Tensor:
        """The expectation under q of what depends on sites that the guide enumerates: `[K, B]` or `[B]`.

        Args:
            value: `[C, K, B]` or `[C, B]`, or without the dim C; where there are no such sites, it comes back as it is.
        """
        q = self.guide_probabilities()
        return value if q is None else self._over_enumerated(q * value).sum(0)

    def guide_probabilities(self) -> Tensor | None:
        """q(y | .) of the sites that the guide enumerates, `[C, K, B]` or `[C, B]`; `None` where there are none."""
        if not self.guide_enumerates:
            return None
        return sum(s.log_q for s in self.values() if s.is_enumerated).exp()

    @property
    def guide_enumerates(self) -> bool:
        """Whether there are sites that the guide enumerates."""
        return any(site.is_enumerated and site.q is not None for site in self.values())

    def local_log_q(self) -> float | Tensor:
        """log q of the local draws, not annealed, nats: `[K, B]` with particles, else `[B]`."""
        return sum(s.log_q for s in self.latents.values() if s.is_local and s.q is not None)

    def kl_shares(self) -> dict[str, Tensor]:
        """{local latent: beta (log q - log p)}, nats, `[K, B]` or `[B]`: their sum has the KL as its mean.

        With an enumerated site c, r(c) = p(c | x, z) stands for q(c | z, x), and every share is its
        expectation under r. (With several, the entropy of r counts with the first.)
        """
        ratios = {n: -s.log_ratio for n, s in self.latents.items() if s.is_local}
        if not self._is_enumerated or self.guide_enumerates:
            return {n: self.expected(v) for n, v in ratios.items()}
        joint = self._joint()
        log_r = joint - self.local_log_weight()
        first = next(n for n, s in self.items() if s.is_enumerated)
        ratios[first] = ratios[first] + log_r
        return {n: self._over_enumerated(log_r.exp() * v).sum(0) for n, v in ratios.items()}

    def _map(self, change: Callable[[Site], Site]) -> Ledger:
        book = Ledger({name: change(site) for name, site in self.items()})
        book.guide_order, book.batch_dims = self.guide_order, self.batch_dims
        return book

    @property
    def _is_enumerated(self) -> bool:
        return any(site.is_enumerated for site in self.values())

    def _over_enumerated(self, value: Tensor) -> Tensor:
        """`[C, K, B]` or `[C, B]`, C all values of all enumerated sites."""
        return value.flatten(0, -1 - self.batch_dims)

    def _joint(self) -> Tensor:
        return sum(site.log_ratio for site in self.values() if site.is_local)

    def global_log_weight(self) -> float | Tensor:
        """Sum over global sites of beta (log p - log q), nats: a scalar; -beta KL for those that have a closed form."""
        sites = self.global_sites.values()
        return sum(-(s.beta * s.kl()).sum() if s.has_closed_form else s.log_ratio.sum() for s in sites)

    def plate_scale(self) -> float:
        """N/B of the data plate: 1 unless it is subsampled."""
        return next((site.plate_scale for site in self.values() if site.is_local), 1.0)
