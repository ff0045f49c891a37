"""The optimal prior, q(z) over the data, as the prior of any structure times a ratio that a critic learns."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..critics import Critic, logistic_loss
from .around import Around, Beside, Exchange, distribution_at, drawn
from .vae import VAE

CANDIDATES = 256  # draws of p(z), of which one is taken in proportion to exp(T)
RATE = 0.01  # of the running mean of exp(T)


class OptimalPriorVAE(Around):
    r"""Any structure with the aggregated posterior as the prior of its top layer (Takahashi et al. 2019).

        p*(z) = q(z) = E_data[q(z|x)],  log p*(z) = log p(z) + T*(z),  T* = log q(z) - log p(z)
        L = E_q[log p(x|z) + T(z)] - KL(q(z|x) || p(z))

    (Section 3 there; the ELBO is largest for this prior, Hoffman & Johnson 2016.) p(z) is the base's own prior. The
    critic T tells draws of q(z) from draws of p(z); `fit` trains it in turn. T enters the model as a factor "ratio" of
    the prior: it is annealed with the layer, whose KL is that with p*; the KL with p(z) in it keeps its closed form.
    p(z) exp(T(z)) is a density only as far as T is right: the factor is exp(T)/Z, where log Z = log E_p[exp(T)],
    `log_normalizer`, is a running mean over the critic's steps; `normalize` computes it anew. Draws of the model are
    resampled, from 256 draws of p(z) for each, in proportion to exp(T).

    Args:
        x_dim: size D of the data `[B, D]`.
        base: makes the structure from `x_dim`.
        critic_hidden_dim, critic_num_hidden: width and number of the critic's layers.

    Attributes:
        top: the name of the layer, the first that the model samples.
        log_normalizer: log Z, nats, a scalar.

    Raises:
        ValueError: the top layer is no vector of real numbers with independent entries, or its prior has parameters.

    >>> OptimalPriorVAE(9).top
    'z1'
    """

    def __init__(
        self,
        x_dim: int,
        base: Callable[[int], nn.Module] = VAE,
        *,
        critic_hidden_dim: int = 256,
        critic_num_hidden: int = 3,
    ):
        super().__init__(x_dim, base)
        self.top, prior = self._top(self._in_guide())
        if not isinstance(prior, dist.Independent):
            raise ValueError(f"the prior of {self.top!r} is a {type(prior).__name__}; expected independent entries")
        self.critic = Critic(prior.event_shape[0], critic_hidden_dim, critic_num_hidden)
        self.register_buffer("log_normalizer", torch.zeros(()))

    def model(self, x: Tensor, y: Tensor | None = None):
        """p(x, z) exp(T(z_L)) / Z."""
        ratio = Beside(self.top, "ratio", self.log_ratio, prior_of=self.top)
        with ratio, Exchange({self.top: lambda p: _Tilted(p, self.critic)}):
            return self.base.model(x, y)

    def log_ratio(self, z: Tensor) -> Tensor:
        """T(z) - log Z, which estimates log q(z) - log p(z): nats, `[...]` for z `[..., z_L]`."""
        return self.critic(z) - self.log_normalizer

    def critic_loss(self, pair: nn.Module, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The critic's loss on a batch `[B, D]`, a scalar in nats."""
        z = drawn(pair, x, y)[self.top][1]
        at_prior = self.critic(self._prior(x, y).base_sample())
        self._move_normalizer(at_prior)
        return logistic_loss(self.critic(z), at_prior)

    @torch.no_grad()
    def normalize(self, num_samples: int = 100_000) -> float:
        """Set log Z to log of the mean of exp(T) over draws of p(z), nats; return it."""
        x = self.log_normalizer.new_zeros(num_samples, self.x_dim)
        y = torch.zeros(num_samples, dtype=torch.long, device=x.device) if self.takes_labels else None
        self.log_normalizer.copy_(_log_mean_exp(self.critic(self._prior(x, y).base_sample())))
        return self.log_normalizer.item()

    def _prior(self, x: Tensor, y: Tensor | None) -> _Tilted:
        return _Tilted(distribution_at(self.top, self.base.model, x, y), self.critic)

    @torch.no_grad()
    def _move_normalizer(self, t: Tensor) -> None:
        now = _log_mean_exp(t)
        self.log_normalizer.copy_(torch.logaddexp(self.log_normalizer + math.log(1 - RATE), now + math.log(RATE)))


class _Tilted(dist.Independent):
    """p(z), but draws are of p(z) exp(T(z)): what a factor beside it makes of the densities."""

    has_rsample = False
    has_factor = True  # beside the site

    def __init__(self, p: dist.Independent, critic: nn.Module):
        super().__init__(p.base_dist, p.reinterpreted_batch_ndims)
        self.critic = critic

    def expand(self, batch_shape, _instance=None):
        plain = dist.Independent(self.base_dist, self.reinterpreted_batch_ndims)
        return _Tilted(plain.expand(batch_shape), self.critic)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008, as torch has it
        z = self.base_sample((CANDIDATES, *sample_shape))
        chosen = dist.Categorical(logits=self.critic(z).movedim(0, -1)).sample()
        return z.gather(0, chosen[None, ..., None].expand(1, *z.shape[1:])).squeeze(0)

    def base_sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """Draws of p(z)."""
        return self.base_dist.sample(sample_shape)


def _log_mean_exp(t: Tensor) -> Tensor:
    return t.logsumexp(0) - math.log(len(t))
