"""Priors p(w) of a weight tensor: `(value, fan_in) -> nn.Module`, whose forward gives the distribution.

`value` is the tensor as it stands (a prior reads its shape), `fan_in` the number of inputs of a unit of its layer.
`functools.partial(Normal, scale=0.1)` is such a maker. A prior with latent scales of its own samples them in
`forward`, and their posterior in `guide`.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..traces import CLOSED_FORM
from .distributions import ScaleMixtureNormal


class Prior(nn.Module):
    """Base: `forward(site)` is p(w), drawing what it depends on; `guide(site)` draws that from its posterior.

    Args:
        value: `[...]`, of the weight's shape.
        fan_in: inputs of a unit of the layer.
    """

    def __init__(self, value: Tensor, fan_in: int):
        super().__init__()
        self.event_dim = value.ndim
        self.register_buffer("zeros", torch.zeros_like(value, requires_grad=False), persistent=False)

    def forward(self, site: str) -> dist.TorchDistribution:
        raise NotImplementedError

    def guide(self, site: str) -> None:
        """Nothing: most priors have no latent scale."""


class _Scaled(Prior):
    """Of one scale for the whole tensor."""

    def __init__(
        self, value: Tensor, fan_in: int, scale: float = 1.0, over_fan_in: bool = False, learned: bool = False
    ):
        super().__init__(value, fan_in)
        if not 0 < scale < math.inf:
            raise ValueError(f"scale is {scale}; a prior needs a positive one")
        start = value.new_tensor(math.log(scale / math.sqrt(fan_in) if over_fan_in else scale))
        if learned:
            self.log_scale = nn.Parameter(start)
        else:
            self.register_buffer("log_scale", start, persistent=False)

    @property
    def scale(self) -> Tensor:
        """A scalar, or what broadcasts to the weight's shape."""
        return self.log_scale.exp()


class Normal(_Scaled):
    r"""p(w) = N(0, s^2), independently (Kingma & Welling 2014, appendix F, with s = 1).

    Args:
        scale: s.
        over_fan_in: s / sqrt(fan_in) instead: the activations then have a scale that does not grow with the width.
        learned: maximise the bound over s too, one for each tensor (empirical Bayes).
    """

    def forward(self, site: str) -> dist.TorchDistribution:
        return dist.Normal(self.zeros, self.scale.expand_as(self.zeros)).to_event(self.event_dim)


class Laplace(_Scaled):
    """p(w) = exp(-|w| / b) / 2b, independently; arguments as of `Normal`, with b for s."""

    def forward(self, site: str) -> dist.TorchDistribution:
        return dist.Laplace(self.zeros, self.scale.expand_as(self.zeros)).to_event(self.event_dim)


class ScaleMixture(Prior):
    r"""p(w) = pi N(0, s_1^2) + (1 - pi) N(0, s_2^2), independently (Blundell et al. 2015, eq. 7).

    Args:
        pi: weight of the wide part.
        scale_1: its standard deviation.
        scale_2: that of the narrow one.
    """

    def __init__(
        self, value: Tensor, fan_in: int, pi: float = 0.5, scale_1: float = 1.0, scale_2: float = math.exp(-6)
    ):
        super().__init__(value, fan_in)
        if not (0 < pi < 1 and scale_1 > 0 and scale_2 > 0):
            raise ValueError(
                f"pi={pi}, scale_1={scale_1}, scale_2={scale_2}; pi must lie between 0 and 1, and the scales above 0"
            )
        self.register_buffer("pi", value.new_tensor(pi), persistent=False)
        self.register_buffer("scales", value.new_tensor([scale_1, scale_2]), persistent=False)

    def forward(self, site: str) -> dist.TorchDistribution:
        return ScaleMixtureNormal(self.pi, self.scales, self.zeros.shape)


class HierarchicalPrecision(Prior):
    r"""p(w) = N(0, 1 / alpha), alpha ~ Gamma(a, b) for each tensor; q(alpha) is log-normal.

    (MacKay 1992; Hinton & van Camp 1993.) Marginally, w is Student-t. The KL of alpha is taken in closed form.

    Args:
        a: shape.
        b: rate.
    """

    def __init__(self, value: Tensor, fan_in: int, a: float = 1.0, b: float = 0.01):
        super().__init__(value, fan_in)
        if not (a > 0 and b > 0):
            raise ValueError(f"a={a}, b={b}; a Gamma distribution needs both above 0")
        self.register_buffer("a", value.new_tensor(a), persistent=False)
        self.register_buffer("b", value.new_tensor(b), persistent=False)
        self.precision = _LogNormal(value.new_tensor(math.log(fan_in)))

    def forward(self, site: str) -> dist.TorchDistribution:
        alpha = pyro.sample(f"{site}.precision", dist.Gamma(self.a, self.b))
        return dist.Normal(self.zeros, alpha.rsqrt().expand_as(self.zeros)).to_event(self.event_dim)

    def guide(self, site: str) -> None:
        pyro.sample(f"{site}.precision", self.precision(), infer={CLOSED_FORM: True})


class Horseshoe(Prior):
    r"""p(w_ij) = N(0, (tau lambda_j)^2), tau ~ C+(0, s), lambda_j ~ C+(0, 1): whole inputs j are switched off.

    (Carvalho et al. 2010; by groups of weights: Louizos et al. 2017, Ghosh et al. 2019.) Of a weight, dim 1 are the
    inputs (of a transposed convolution the outputs); a bias has a lambda for each entry. q(tau) and q(lambda) are
    log-normal.

    Args:
        scale: s; small for few inputs that count.
    """

    def __init__(self, value: Tensor, fan_in: int, scale: float = 1.0):
        super().__init__(value, fan_in)
        if not scale > 0:
            raise ValueError(f"scale is {scale}; a half-Cauchy needs a positive one")
        self.register_buffer("global_scale", value.new_tensor(scale), persistent=False)
        shape = (1, value.shape[1], *[1] * (value.ndim - 2)) if value.ndim > 1 else value.shape
        self.register_buffer("local_scale", value.new_ones(shape), persistent=False)
        self.tau = _LogNormal(value.new_tensor(-0.5 * math.log(fan_in)))
        self.lambda_ = _LogNormal(value.new_zeros(shape))

    def forward(self, site: str) -> dist.TorchDistribution:
        tau = pyro.sample(f"{site}.tau", dist.HalfCauchy(self.global_scale))
        local = pyro.sample(f"{site}.lambda", dist.HalfCauchy(self.local_scale).to_event(self.local_scale.ndim))
        return dist.Normal(self.zeros, (tau * local).expand_as(self.zeros)).to_event(self.event_dim)

    def guide(self, site: str) -> None:
        pyro.sample(f"{site}.tau", self.tau())
        pyro.sample(f"{site}.lambda", self.lambda_())


class _LogNormal(nn.Module):
    """q(s) = LogNormal(mu, softplus(rho)^2) of a positive scale."""

    def __init__(self, mu: Tensor, sigma: float = 0.1):
        super().__init__()
        self.mu = nn.Parameter(mu.clone())
        self.rho = nn.Parameter(torch.full_like(mu, math.log(math.expm1(sigma))))

    def forward(self) -> dist.TorchDistribution:
        return dist.LogNormal(self.mu, F.softplus(self.rho)).to_event(self.mu.ndim)


PRIORS = (Normal, Laplace, ScaleMixture, HierarchicalPrecision, Horseshoe)
