"""Posteriors q(w) of a weight tensor: `(value, fan_in) -> nn.Module`, whose forward gives the distribution.

Each begins at `value`, the weight as it stands: a trained structure is its own starting point.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .distributions import DiagonalNormal, LowRankNormal
from .distributions import MatrixNormal as _MatrixNormal


class Posterior(nn.Module):
    """Base: `forward()` is q(w), and `mean` its mean.

    Args:
        value: where it begins, `[...]`, of the weight's shape.
        fan_in: inputs of a unit of the layer.
    """

    def __init__(self, value: Tensor, fan_in: int):
        super().__init__()
        self.mu = nn.Parameter(value.detach().clone())

    @property
    def mean(self) -> Tensor:
        """Of the weight's shape."""
        return self.mu

    def forward(self) -> dist.TorchDistribution:
        raise NotImplementedError


class MeanField(Posterior):
    r"""q(w) = N(mu, sigma^2) with sigma = softplus(rho), independently (Blundell et al. 2015, section 3.2).

    Args:
        value: where mu begins.
        fan_in: inputs of a unit of the layer.
        sigma: where sigma begins; left out, 0.1 / sqrt(fan_in), a tenth of the scale of initial weights.
    """

    def __init__(self, value: Tensor, fan_in: int, sigma: float | None = None):
        super().__init__(value, fan_in)
        self.rho = nn.Parameter(torch.full_like(value, _rho(sigma, fan_in), requires_grad=False))

    @property
    def sigma(self) -> Tensor:
        """The standard deviations, of the weight's shape."""
        return F.softplus(self.rho)

    def forward(self) -> dist.TorchDistribution:
        return DiagonalNormal(self.mu, self.sigma)


class Delta(Posterior):
    """q(w) = a point: training finds the maximum of the posterior density (MAP), with a bound for z as before."""

    def forward(self) -> dist.TorchDistribution:
        return dist.Delta(self.mu, event_dim=self.mu.ndim)


class LowRank(MeanField):
    r"""q(w) = N(mu, diag(sigma^2) + F F^T): correlations within a tensor (Ong et al. 2018).

    Args:
        value, fan_in, sigma: as of `MeanField`.
        rank: columns of F, at most; they begin at a tenth of sigma.
    """

    def __init__(self, value: Tensor, fan_in: int, rank: int = 4, sigma: float | None = None):
        super().__init__(value, fan_in, sigma)
        if rank < 1:
            raise ValueError(f"rank is {rank}; at least 1 is needed (MeanField is rank 0)")
        rank = min(rank, value.numel())
        start = 0.1 * self.sigma.detach().mean() / math.sqrt(rank)
        self.factor = nn.Parameter(start * torch.randn(value.numel(), rank, dtype=value.dtype, device=value.device))

    def forward(self) -> dist.TorchDistribution:
        return LowRankNormal(self.mu, self.sigma, self.factor)


class MatrixNormal(Posterior):
    r"""q(W) = MN(M, A A^T, B B^T): covariance A A^T of the outputs times B B^T of the inputs (Louizos & Welling 2016).

    A and B are lower triangular with positive diagonals. For a bias, a column: N(M, A A^T).

    Args:
        value, fan_in, sigma: as of `MeanField`.
    """

    def __init__(self, value: Tensor, fan_in: int, sigma: float | None = None):
        super().__init__(value, fan_in)
        rows, columns = value.shape[0], value[0].numel()
        self.rows, self.columns = _Triangular(rows, value, 1.0), _Triangular(columns, value, _sigma(sigma, fan_in))

    def forward(self) -> dist.TorchDistribution:
        return _MatrixNormal(self.mu, self.rows(), self.columns())


class _Triangular(nn.Module):
    """A lower triangular matrix with a positive diagonal, which begins as `scale` times the identity."""

    def __init__(self, size: int, like: Tensor, scale: float):
        super().__init__()
        self.below = nn.Parameter(like.new_zeros(size, size))
        self.rho = nn.Parameter(like.new_full((size,), math.log(math.expm1(scale))))

    def forward(self) -> Tensor:
        return self.below.tril(-1) + F.softplus(self.rho).diag()


def _sigma(sigma: float | None, fan_in: int) -> float:
    sigma = 0.1 / math.sqrt(fan_in) if sigma is None else sigma
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma is {sigma}; a posterior begins with a positive standard deviation (Delta has none)")
    return sigma


def _rho(sigma: float | None, fan_in: int) -> float:
    return math.log(math.expm1(_sigma(sigma, fan_in)))


POSTERIORS = (MeanField, Delta, LowRank, MatrixNormal)
