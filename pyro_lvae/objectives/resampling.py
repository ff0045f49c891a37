"""The bounds of K weighed particles, whose gradient may be taken from a few of them, drawn by weight."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ..traces import Ledger, RedrawMessenger, ledger, normal_of
from .base import LedgerELBO
from .gradients import with_value
from .support import names


def renyi_mean(log_w: Tensor, alpha: float = 0.0) -> Tensor:
    """1/(1-alpha) log 1/K sum_k w_k^(1-alpha) over dim -2: log-weights `[..., K, B]` to `[..., B]`, nats.

    The mean of log w at alpha = 1, its maximum at -inf, its minimum at +inf.
    """
    if alpha == 1:
        return log_w.mean(-2)
    if math.isinf(alpha):
        return log_w.amax(-2) if alpha < 0 else log_w.amin(-2)
    power = 1 - alpha
    return ((power * log_w).logsumexp(-2) - math.log(log_w.shape[-2])) / power


class WeighedELBO(LedgerELBO):
    r"""The Renyi bound of order alpha, whose gradient is a weighted sum over the particles of each datum:

        d L = sum_k v_kb d log w_kb,   v_kb = w_kb^(1-alpha) / sum_j w_jb^(1-alpha)

    With `resampled=M` it is estimated from M particles: see `IWAE`.

    Args:
        num_particles: K.
        alpha: the order.
        resampled: M, below K, or `None` for the whole sum. The guide's sites must be Normal, and in the data plate.
    """

    weighs_draws = True

    @abstractmethod
    def __init__(self, num_particles: int, alpha: float, resampled: int | None):
        super().__init__(num_particles=num_particles)
        if resampled is not None and not (isinstance(resampled, int) and 1 <= resampled < num_particles):
            raise ValueError(
                f"resampled={resampled} of num_particles={num_particles}; expected a whole number of at least 1 and "
                "below num_particles, or None for the whole gradient"
            )
        if resampled is not None and math.isinf(alpha):
            raise ValueError(f"alpha={alpha} has one particle in its gradient as it is; give it no resampled")
        self.alpha, self.resampled = float(alpha), resampled

    def bound(self, sites: Ledger) -> Tensor:
        return sites.total(renyi_mean(sites.local_log_weight(), self.alpha))

    def weights(self, sites: Ledger) -> Tensor:
        """v, `[K, B]`."""
        return ((1 - self.alpha) * sites.local_log_weight().detach()).softmax(0)

    def weighed(self, sites: Ledger, bound: Callable[[Ledger], Tensor], shares: Tensor, v: Tensor) -> Tensor:
        """A scalar with the value of `bound` and the estimator's gradient.

        Args:
            bound: of the value wanted; of each particle its gradient has the share `shares`, `[K, B]`, as of d log w.
            v: the particle's weight among all K.
        """
        return bound(sites)

    def differentiable_loss(self, model, guide, *args, **kwargs) -> Tensor:
        """-bound with the estimator's gradient, a scalar in nats."""
        if self.resampled is None:
            return super().differentiable_loss(model, guide, *args, **kwargs)
        with torch.no_grad():
            sites = self._sites(model, guide, args, kwargs)
            bound, v = self.bound(sites), self.weights(sites)
            chosen = systematic(v, self.resampled)
            values = {n: _take(s.value, chosen) for n, s in sites.latents.items() if s.q is not None}
            v = v.gather(0, chosen)
        again = ledger(model, RedrawMessenger(values)(guide), *args, num_particles=self.resampled, **kwargs)
        return -with_value(self.weighed(again, _mean, torch.full_like(v, 1 / self.resampled), v), bound)

    def check(self, sites: Ledger) -> None:
        super().check(sites)
        if self.resampled is None:
            return
        drawn = {n: s for n, s in sites.latents.items() if not (s.is_enumerated and s.q is None)}
        if odd := [n for n, s in drawn.items() if not (s.is_local and s.q is not None and normal_of(s.q))]:
            raise ValueError(
                f"{type(self).__name__} with resampled={self.resampled} draws again from Normal sites of the guide in "
                f"the data plate, which weights with a posterior are not, nor {names(odd)}; leave resampled out"
            )


def systematic(weights: Tensor, count: int) -> Tensor:
    """`count` particles of each datum, `[count, B]`, drawn by weights `[K, B]` with one uniform number a datum."""
    points = (torch.rand_like(weights[:1]) + torch.arange(count, device=weights.device)[:, None]) / count
    passed = weights.cumsum(0) <= points[:, None]
    return passed.sum(1).clamp_max(len(weights) - 1)


def _take(value: Tensor, chosen: Tensor) -> Tensor:
    """Particles `[M, B]` of a draw `[K, B, ...]`."""
    index = chosen.reshape(*chosen.shape, *[1] * (value.ndim - 2))
    return value.gather(0, index.expand(*chosen.shape, *value.shape[2:]))


def _mean(sites: Ledger) -> Tensor:
    return sites.total(sites.local_log_weight().mean(0))
