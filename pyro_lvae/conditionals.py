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
from .words import WordCounts


class Bernoulli(nn.Module):
    """Binary data: h -> B(x | sigmoid(W h + b)), by logits, which cannot saturate.

    Args:
        in_dim: size of the features `[..., in_dim]`.
        out_dim: number of binary variables D; log-densities are nats per datum, summed over D.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.logits = linear(in_dim, out_dim)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=self.logits(h)).to_event(1)


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


class BagOfWords(nn.Module):
    r"""Word counts of documents: h -> p(x | h), a word i having the energy E(i; h) = -h^T R_i - b_i.

        log p(x|h) = sum_i x_i log softmax(R^T h + b)_i

    (Miao et al. 2016, section 3.) The probability of the words one after the other: there is no multinomial coefficient
    in it, see `WordCounts`. Documents of a batch may have any lengths.

    Args:
        in_dim: size K of the features `[..., K]`.
        out_dim: size V of the vocabulary; log-densities are nats per document.
        total_count: words in a document that is drawn; with 1 the mean of x is the words' probabilities.
    """

    def __init__(self, in_dim: int, out_dim: int, *, total_count: int = 1):
        super().__init__()
        self.words = linear(in_dim, out_dim)
        self.total_count = total_count

    @property
    def R(self) -> Tensor:
        """The words' embeddings, `[K, V]`, a column a word."""
        return self.words.weight.T

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return WordCounts(self.words(h), self.total_count)


class ProductOfExperts(nn.Module):
    r"""Word counts of documents, topics mixed in the logits: h -> p(x | theta), theta = softmax(h).

        log p(x|h) = sum_i x_i log softmax(BN(dropout(theta)^T R))_i

    (Srivastava & Sutton 2017, section 4: ProdLDA. A product of the topics' distributions, each to the power of its
    proportion, where LDA has their sum.) The batch norm has a bias and no gain, and dropout acts on the proportions, as
    in the authors' published code. There is no multinomial coefficient, see `WordCounts`.

    Args:
        in_dim: number K of topics; features are `[..., K]`.
        out_dim: size V of the vocabulary; log-densities are nats per document.
        dropout: share of the proportions set to 0 while training.
        total_count: words in a document that is drawn; with 1 the mean of x is the words' probabilities.
    """

    def __init__(self, in_dim: int, out_dim: int, *, dropout: float = 0.6, total_count: int = 1):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.words = linear(in_dim, out_dim, bias=False)
        self.norm = BatchNorm(out_dim, gain=False)
        self.total_count = total_count

    @property
    def R(self) -> Tensor:
        """The topics' unnormalised log-weights of the words, `[K, V]` (beta in the paper)."""
        return self.words.weight.T

    @property
    def experts(self) -> Tensor:
        """R as it acts after batch norm, `[K, V]`: its distance from the average document's, in standard deviations."""
        return (self.R - self.norm.running_mean) * torch.rsqrt(self.norm.running_var + self.norm.eps)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return WordCounts(self.norm(self.words(self.dropout(h.softmax(-1)))), self.total_count)


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
