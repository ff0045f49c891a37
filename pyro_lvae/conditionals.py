"""Tensor -> Distribution: modules whose forward returns a Pyro distribution with event dims declared.

A *likelihood* is any callable `(in_dim, x_dim) -> nn.Module` whose result maps features
`[..., in_dim]` to a distribution over `x` with `batch_shape` `[...]` and `event_shape` `[x_dim]`.
The classes here are such callables, `functools.partial(Normal, scale=0.1)` is one, and so is any
class of your own.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .nets import BatchNorm, linear


class Bernoulli(nn.Module):
    """Binary data: h -> B(x | sigmoid(W h + b)), by logits, which cannot saturate.

    Args:
        in_dim: size of the features `[..., in_dim]`.
        out_dim: number of binary variables D; log-densities are nats per datum, summed over D.
        grey: admit values between 0 and 1, scored by the cross-entropy x log p + (1 - x) log(1 - p), as many
            papers do: the mean log-probability of binary images drawn from x, and no density of grey values.
    """

    def __init__(self, in_dim: int, out_dim: int, *, grey: bool = False):
        super().__init__()
        self.logits = linear(in_dim, out_dim)
        self.grey = grey

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return (_Grey if self.grey else dist.Bernoulli)(logits=self.logits(h)).to_event(1)


class _Grey(dist.Bernoulli):
    support = dist.constraints.unit_interval


class Normal(nn.Module):
    r"""Real data: h -> N(mu(h), sigma^2(h)), or with a fixed scale.

        mu = linear(h),  sigma^2 = softplus(linear(h)) + min_variance

    The heads of Sonderby et al. 2016 (eqs. 5-7). Their floor of 1e-5 entered the log-densities
    only; here it is part of the variance, in the precision merge too.

    Args:
        in_dim: size of the features `[..., in_dim]`.
        out_dim: size of the variable; log-densities are nats per datum, summed over it.
        scale: a fixed standard deviation, in the units of the variable; `None` learns sigma^2(h).
        batch_norm: normalise both heads before the softplus, as the ladder paper's recipe does.
        min_variance: floor of the learned variance. As a likelihood of data on a grid (grey
            values), give the grid's spacing squared or more: a density has no upper bound.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        scale: float | None = None,
        batch_norm: bool = False,
        min_variance: float = 1e-5,
    ):
        super().__init__()
        if scale is not None and not scale > 0:
            raise ValueError(f"scale is {scale}; a fixed standard deviation must be positive")
        heads = 1 if scale is not None else 2
        self.head = nn.Sequential(linear(in_dim, heads * out_dim, bias=not batch_norm))
        if batch_norm:
            self.head.append(BatchNorm(heads * out_dim))
        elif scale is None:
            nn.init.ones_(self.head[0].bias[out_dim:])
        self.min_variance = min_variance
        self.register_buffer("scale", None if scale is None else torch.tensor(float(scale)))

    def moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, each `[..., out_dim]`."""
        if self.scale is not None:
            mu = self.head(h)
            return mu, (self.scale**2).expand_as(mu)
        mu, raw = self.head(h).chunk(2, dim=-1)
        return mu, F.softplus(raw) + self.min_variance

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return normal(*self.moments(h))


class Point(nn.Module):
    """A point mass: h -> delta(W h + b), the code of an autoencoder; its log-density counts as 0.

    Args:
        in_dim: size of the features `[..., in_dim]`.
        out_dim: size of the variable.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.point = linear(in_dim, out_dim)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return dist.Delta(self.point(h)).to_event(1)


class GaussianMixture(nn.Module):
    r"""A mixture without inputs, the prior of a latent layer: () -> sum_c pi_c N(mu_c, diag(sigma^2_c)).

        pi = softmax(w),  sigma^2_c = exp(s_c) + min_variance

    Args:
        size: size of the variable.
        num_components: C.
        spread: standard deviation of the means at first.
        min_variance: floor of the variances.

    Attributes:
        logits: w, `[C]`; `loc`: mu, `[C, size]`; `log_variance`: s, `[C, size]`.
    """

    def __init__(self, size: int, num_components: int = 10, *, spread: float = 1.0, min_variance: float = 1e-5):
        super().__init__()
        if num_components < 1:
            raise ValueError(f"num_components is {num_components}; a mixture has at least 1")
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(spread * torch.randn(num_components, size))
        self.log_variance = nn.Parameter(torch.zeros(num_components, size))
        self.min_variance = min_variance

    def forward(self) -> dist.TorchDistribution:
        return mixture(self.logits, normal(self.loc, self.log_variance.exp() + self.min_variance))


def mixture(logits: Tensor, components: dist.TorchDistribution) -> dist.TorchDistribution:
    """sum_c softmax(logits)_c components_c, for components of batch shape `[C]`."""
    return dist.MixtureSameFamily(dist.Categorical(logits=logits), components)


def normal(mu: Tensor, variance: Tensor) -> dist.TorchDistribution:
    """N(mu, variance), independent over the last dim, which is the event dim."""
    return dist.Normal(mu, variance.sqrt()).to_event(1)


def precision_merge(mu_1: Tensor, var_1: Tensor, mu_2: Tensor, var_2: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and variance of the normalised product of two Gaussian densities.

        sigma^2 = 1 / (sigma_1^-2 + sigma_2^-2)
        mu      = (mu_1 sigma_1^-2 + mu_2 sigma_2^-2) / (sigma_1^-2 + sigma_2^-2)

    Sonderby et al. 2016, eqs. 17-18. The first is printed there as an equation for sigma; it is
    the variance sigma^2, as the product of two Gaussians shows. The form used here divides once
    and never by a small variance alone.

    >>> precision_merge(*(torch.tensor(v) for v in (0.0, 1.0, 3.0, 0.5)))
    (tensor(2.), tensor(0.3333))
    """
    total = var_1 + var_2
    return (mu_1 * var_2 + mu_2 * var_1) / total, var_1 * var_2 / total
