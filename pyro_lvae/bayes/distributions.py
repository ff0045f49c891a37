"""Gaussian distributions over a whole weight tensor, whose KL to independent priors is known in closed form."""

from __future__ import annotations

import math
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, kl_divergence, register_kl


class Gaussian(TorchDistribution):
    """Gaussian over a tensor of shape `event_shape`; a subclass has `mean`, `variance`, `entropy`."""

    arg_constraints: ClassVar[dict] = {}
    has_rsample = True

    def __init__(self, shape: torch.Size):
        super().__init__(event_shape=shape, validate_args=False)

    @property
    def support(self):
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape, _instance=None):
        return _not_in_plates(self, batch_shape)


class DiagonalNormal(Gaussian):
    """Independent N(loc, scale^2), entry by entry."""

    def __init__(self, loc: Tensor, scale: Tensor):
        super().__init__(loc.shape)
        self.loc, self.scale = loc, scale

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return self.scale.square()

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008, immutable
        return self.loc + self.scale * _noise(self.loc, sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        z = (value - self.loc) / self.scale
        return _sum(-0.5 * z.square() - self.scale.log() - 0.5 * math.log(2 * math.pi), self)

    def entropy(self) -> Tensor:
        return (self.scale.log() + 0.5 * math.log(2 * math.pi * math.e)).sum()


class LowRankNormal(Gaussian):
    """N(loc, diag(scale^2) + F F^T) over the flattened tensor; F is `[entries, rank]`."""

    def __init__(self, loc: Tensor, scale: Tensor, factor: Tensor):
        super().__init__(loc.shape)
        variance = scale.flatten().square()
        with torch.autocast(loc.device.type, enabled=False):  # its Cholesky factor needs all digits
            self.flat = dist.LowRankMultivariateNormal(loc.flatten(), factor, variance, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.flat.loc.reshape(self.event_shape)

    @property
    def variance(self) -> Tensor:
        return self.flat.variance.reshape(self.event_shape)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008, immutable
        with torch.autocast(self.flat.loc.device.type, enabled=False):
            return self.flat.rsample(sample_shape).reshape(*sample_shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.flat.log_prob(value.flatten(-len(self.event_shape)))

    def entropy(self) -> Tensor:
        return self.flat.entropy()


class MatrixNormal(Gaussian):
    r"""MN(loc, A A^T, B B^T): w = loc + A E B^T, E of independent N(0, 1); A and B lower triangular.

    The tensor is read as a matrix `[first dim, all others]`.
    """

    def __init__(self, loc: Tensor, rows: Tensor, columns: Tensor):
        super().__init__(loc.shape)
        self.loc, self.rows, self.columns = loc, rows, columns

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return torch.outer(self.rows.square().sum(1), self.columns.square().sum(1)).reshape(self.event_shape)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008, immutable
        noise = _noise(self.loc, sample_shape).reshape(*sample_shape, len(self.rows), len(self.columns))
        with torch.autocast(self.loc.device.type, enabled=False):
            return self.loc + (self.rows @ noise @ self.columns.T).reshape(*sample_shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        off = (value - self.loc).reshape(*value.shape[: -len(self.event_shape)], len(self.rows), len(self.columns))
        noise = torch.linalg.solve_triangular(self.rows, off, upper=False)
        noise = torch.linalg.solve_triangular(self.columns.T, noise, upper=True, left=False)
        return -0.5 * noise.square().sum((-1, -2)) - 0.5 * self.loc.numel() * math.log(2 * math.pi) - self._log_volume()

    def entropy(self) -> Tensor:
        return 0.5 * self.loc.numel() * math.log(2 * math.pi * math.e) + self._log_volume()

    def _log_volume(self) -> Tensor:
        rows, columns = self.rows.diagonal().log().sum(), self.columns.diagonal().log().sum()
        return len(self.columns) * rows + len(self.rows) * columns


class ScaleMixtureNormal(TorchDistribution):
    """pi N(0, s_1^2) + (1 - pi) N(0, s_2^2), independently, over a tensor of a given shape.

    `MixtureSameFamily` computes the same over a further dim of 2, in ten times the time.
    """

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, pi: Tensor, scales: Tensor, shape: torch.Size):
        super().__init__(event_shape=shape, validate_args=False)
        self.pi, self.scales = pi, scales

    @property
    def support(self):
        return constraints.independent(constraints.real, len(self.event_shape))

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008, immutable
        like = self.scales.new_empty(*sample_shape, *self.event_shape)
        return torch.where(torch.rand_like(like) < self.pi, *self.scales) * torch.randn_like(like)

    def log_prob(self, value: Tensor) -> Tensor:
        weights, square = torch.stack([self.pi, 1 - self.pi]), value.square()
        constants = (weights / (math.sqrt(2 * math.pi) * self.scales)).log()
        parts = [c - 0.5 * square / s.square() for c, s in zip(constants, self.scales, strict=True)]
        return _sum(torch.logaddexp(*parts), self)

    def expand(self, batch_shape, _instance=None):
        return _not_in_plates(self, batch_shape)


class Draws(TorchDistribution):
    """S independent draws of a weight tensor as one value `[S, ...]`; the log-density is their sum."""

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, base: TorchDistribution, num_draws: int):
        self.base, self.num_draws = base, num_draws
        super().__init__(event_shape=(num_draws, *base.event_shape), validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return self.base.has_rsample

    @property
    def support(self):
        return constraints.independent(constraints.real, len(self.event_shape))

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008, immutable
        return self.base.rsample((*sample_shape, self.num_draws))

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008, immutable
        return self.base.sample((*sample_shape, self.num_draws))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base.log_prob(value).sum(-1)

    def expand(self, batch_shape, _instance=None):
        return _not_in_plates(self, batch_shape)


def _not_in_plates(fn: TorchDistribution, batch_shape) -> TorchDistribution:
    if torch.Size(batch_shape) != fn.batch_shape:
        raise ValueError(
            f"weights are drawn once for all data, and a plate around the structure asks for {tuple(batch_shape)} "
            "draws. In place of vectorize_particles=True use an estimator of pyro_lvae, whose particles share the "
            "weights, and num_weights for several draws of these; leave parallel=True of Predictive out"
        )
    return fn


@register_kl(torch.distributions.LogNormal, torch.distributions.Gamma)
def _kl_log_normal_gamma(q: torch.distributions.LogNormal, p: torch.distributions.Gamma) -> Tensor:
    """-H(q) - E_q[log p], with E_q[log s] = mu and E_q[s] = exp(mu + sigma^2 / 2)."""
    a, b, mean = p.concentration, p.rate, (q.loc + 0.5 * q.scale.square()).exp()
    return a.lgamma() - a * b.log() - (a - 1) * q.loc + b * mean - q.entropy()


@register_kl(Draws, Draws)
def _kl_draws(q: Draws, p: Draws) -> Tensor:
    return q.num_draws * kl_divergence(q.base, p.base)


@register_kl(Gaussian, torch.distributions.Independent)
def _kl_gaussian(q: Gaussian, p: torch.distributions.Independent) -> Tensor:
    """-H(q) - E_q[log p], which for independent Normal or Laplace p needs the marginals of q alone."""
    prior, mean, variance = p.base_dist, q.mean, q.variance
    if isinstance(prior, torch.distributions.Normal):
        squares = (mean - prior.loc).square() + variance
        log_p = -0.5 * squares / prior.variance - prior.scale.log() - 0.5 * math.log(2 * math.pi)
    elif isinstance(prior, torch.distributions.Laplace):
        log_p = -_mean_distance(mean - prior.loc, variance) / prior.scale - (2 * prior.scale).log()
    else:
        raise NotImplementedError
    return -q.entropy() - log_p.expand(q.event_shape).sum()


def _mean_distance(mean: Tensor, variance: Tensor) -> Tensor:
    """E|w| of N(mean, variance)."""
    scale = variance.sqrt()
    density = math.sqrt(2 / math.pi) * torch.exp(-0.5 * (mean / scale).square())
    return scale * density + mean * torch.erf(mean / (scale * math.sqrt(2)))


def _noise(like: Tensor, sample_shape) -> Tensor:
    return torch.randn(*sample_shape, *like.shape, dtype=like.dtype, device=like.device)


def _sum(log_prob: Tensor, of: TorchDistribution) -> Tensor:
    return log_prob.flatten(-len(of.event_shape)).sum(-1)
