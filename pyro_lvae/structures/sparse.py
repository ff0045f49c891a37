"""Codes that are sparse or nearly binary, by their prior."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli
from torch.nn import functional as F

from ..conditionals import Normal, mixture
from ..nets import linear
from .hierarchy import GaussianHierarchy

EDGE = 1e-6  # draws of a Beta stay this far from 0 and 1, where its density may be infinite


class _Beta(dist.Beta):
    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008, as torch has it
        return super().rsample(sample_shape).clamp(EDGE, 1 - EDGE)


class _LogitRelaxedBernoulli(LogitRelaxedBernoulli, dist.torch_distribution.TorchDistributionMixin):
    has_rsample = True

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008, as torch has it
        """By the logits; torch goes through probabilities, which float32 cannot tell from 1 from logits of 16 on."""
        u = torch.rand(self._extended_shape(sample_shape), dtype=self.logits.dtype, device=self.logits.device)
        u = u.clamp(torch.finfo(u.dtype).tiny, 1 - torch.finfo(u.dtype).eps)
        return (self.logits + u.log() - torch.log1p(-u)) / self.temperature


class BetaCode(nn.Module):
    r"""Codes in (0, 1): p(z) = Beta(a, b), q(z|h) = Beta(alpha(h), beta(h)), all units apart.

    With a, b < 1 the prior's mass lies near 0 and 1. Gradients are implicit (Figurnov et al. 2018).

    Args:
        in_dim: size of the features `[..., in_dim]`.
        size: number of units.
        a, b: of the prior.
        floor: least alpha and beta of the posterior; lower ones put mass so near to 0 and 1 that float32 cannot tell.
    """

    def __init__(self, in_dim: int, size: int, a: float = 0.5, b: float = 0.5, *, floor: float = 0.3):
        super().__init__()
        if not (a > 0 and b > 0):
            raise ValueError(f"a is {a} and b is {b}; the parameters of a Beta must be positive")
        self.head, self.floor = linear(in_dim, 2 * size), floor
        self.register_buffer("shapes", torch.tensor([a, b]).expand(size, 2).clone())

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        alpha, beta = (F.softplus(self.head(h)) + self.floor).chunk(2, -1)
        return _Beta(alpha, beta).to_event(1)

    def prior(self) -> dist.TorchDistribution:
        return _Beta(*self.shapes.unbind(-1)).to_event(1)

    def decoded(self, z: Tensor) -> Tensor:
        return z

    def truncated(self, q: dist.TorchDistribution) -> Tensor:
        return q.mean > 0.5


class TwoGaussiansCode(nn.Module):
    r"""Codes near 0 and 1: p(z) = (1 - r) N(0, s^2) + r N(1, s^2), q(z|h) = N(mu(h), sigma^2(h)), all units apart.

    A soft form of bits, and of a spike and slab (Titsias & Lázaro-Gredilla 2011), which has a point at 0.

    Args:
        in_dim: size of the features `[..., in_dim]`.
        size: number of units.
        scale: s.
        rate: r, the prior's share of ones; a small one makes codes sparse.
    """

    def __init__(self, in_dim: int, size: int, scale: float = 0.1, rate: float = 0.5):
        super().__init__()
        if not (scale > 0 and 0 < rate < 1):
            raise ValueError(f"scale is {scale} and rate is {rate}; expected scale > 0 and 0 < rate < 1")
        self.head = Normal(in_dim, size)
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("probs", torch.tensor([1 - rate, rate]).expand(size, 2).clone())

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return self.head(h)

    def prior(self) -> dist.TorchDistribution:
        ends = torch.zeros_like(self.probs)
        ends[:, 1] = 1
        return mixture(self.probs.log(), dist.Normal(ends, self.scale)).to_event(1)

    def decoded(self, z: Tensor) -> Tensor:
        return z

    def truncated(self, q: dist.TorchDistribution) -> Tensor:
        return q.mean > 0.5


class RelaxedBernoulliCode(nn.Module):
    r"""Codes sigmoid(z), z the logit of a relaxed Bernoulli variable, all units apart (Maddison et al. 2017).

        z = (log alpha(h) + l) / lambda,  l ~ Logistic(0, 1);  the prior alike with log alpha = logit(r), lambda_p

    The site holds logits, whose density stays finite where float32 rounds the variable itself to 0 or 1 (appendix C.3
    there).

    Args:
        in_dim: size of the features `[..., in_dim]`.
        size: number of units.
        temperature: lambda.
        prior_temperature: lambda_p.
        rate: r, the prior's share of ones; a small one makes codes sparse.
    """

    def __init__(
        self,
        in_dim: int,
        size: int,
        temperature: float = 2 / 3,
        prior_temperature: float = 0.5,
        rate: float = 0.5,
    ):
        super().__init__()
        if not (temperature > 0 and prior_temperature > 0 and 0 < rate < 1):
            raise ValueError(
                f"temperature is {temperature}, prior_temperature {prior_temperature} and rate {rate}; expected "
                "temperatures above 0 and 0 < rate < 1"
            )
        self.head = linear(in_dim, size)
        self.register_buffer("temperatures", torch.tensor([temperature, prior_temperature]))
        self.register_buffer("logits", torch.tensor(float(rate)).logit().expand(size).clone())

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return _LogitRelaxedBernoulli(self.temperatures[0], logits=self.head(h)).to_event(1)

    def prior(self) -> dist.TorchDistribution:
        return _LogitRelaxedBernoulli(self.temperatures[1], logits=self.logits).to_event(1)

    def decoded(self, z: Tensor) -> Tensor:
        return z.sigmoid()

    def truncated(self, q: dist.TorchDistribution) -> Tensor:
        return q.base_dist.logits > 0


CODES = (BetaCode, TwoGaussiansCode, RelaxedBernoulliCode)


class SparseVAE(GaussianHierarchy):
    r"""One latent layer, with a prior that makes its units sparse or nearly binary.

        p(z_1), q(z_1|x) as `code` has them,  p(x|z_1) = likelihood(MLP(decoded(z_1)))

    (Maddison et al. 2017 for the relaxed Bernoulli.) `codes(x)` truncates q(z_1|x) to bits and `decode`
    turns bits into p(x|bits); `rate_distortion` measures both.

    Args:
        x_dim: size D of the data `[B, D]`.
        z_dim: number of units.
        hidden_dim: width of the MLPs.
        code: `(in_dim, z_dim) -> nn.Module` with q(z_1|h) as `forward`, `prior()`, `decoded(z)` and `truncated(q)`:
            `BetaCode`, `TwoGaussiansCode`, `RelaxedBernoulliCode`, or your own.
        **options: `likelihood`, `num_hidden`, `batch_norm`, `activation` as in `GaussianHierarchy`.

    >>> SparseVAE(9, z_dim=4, hidden_dim=8, batch_norm=False).codes(torch.zeros(2, 9)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int = 64,
        hidden_dim: int = 512,
        *,
        code: Callable[[int, int], nn.Module] = RelaxedBernoulliCode,
        **options,
    ):
        super().__init__(x_dim, (z_dim,), (hidden_dim,), **options)
        self.encoder = self._mlp(x_dim, 0)
        self.code = code(self.encoder.out_dim, z_dim)

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """p(x, z_1) for `x` of `[B, D]`; `y` is ignored."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z1", self.code.prior())
            return pyro.sample("x", self.decode(self.code.decoded(z)), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """q(z_1|x); `y` is ignored."""
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z1", self.code(self.encoder(x)))

    def codes(self, x: Tensor) -> Tensor:
        """q(z_1|x), truncated: bits `[B, z_dim]` as 0 and 1 of the dtype of `x`."""
        return self.code.truncated(self.code(self.encoder(x))).to(x)

    def decode(self, codes: Tensor) -> dist.TorchDistribution:
        """p(x|codes) for codes `[..., z_dim]` between 0 and 1."""
        return self.likelihood(self.decoder(codes))
