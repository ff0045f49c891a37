"""Adversarial variational Bayes: a posterior that can be drawn from, but has no density of its own."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from ..critics import PairCritic
from ..nets import MLP, JointMLP, linear
from .around import drawn
from .hierarchy import GaussianHierarchy

FLOOR = 1e-3  # of the contrast's standard deviations


class ImplicitPosteriorVAE(GaussianHierarchy):
    r"""One latent layer whose posterior is the law of a network of x and noise (Mescheder et al. 2017).

        q(z_1|x):  z_1 = g(x, eps) = eps_1 + net(x, eps),  eps = (eps_1, eps_2) ~ N(0, I)
        log q(z_1|x) ~ T(x, z~) + log r(z_1|x),  T* = log q(z_1|x) - log r(z_1|x)
        r(z_1|x) = N(m(x), s^2(x)),  z~ = (z_1 - m(x)) / s(x)

    (Sections 3 and 4 there.) The critic T tells draws of q from draws of the contrast r, given x; `fit` trains
    it in turn. The bound is E_q[log p(x|z_1) + log p(z_1) - log r(z_1|x) - T]. T enters as a density of the guide,
    since no model may look at x, so that estimators and evaluation stay as they are. With `adaptive_contrast`, m and
    s are the moments of q(z_1|x), from draws, without gradient; without it r is N(0, I), the prior, and the ratio that
    T has to find is large. eps_1 of the size of z_1 is added (not in the paper), so that q starts near the prior, which
    covers all modes. Modes that lie far apart are lost all the same, as by any q that goes down KL(q || p).

    The bound and an importance-sampled log p(x) are as right as T; `ais_log_likelihood` takes no density of the guide.
    A critic that is behind makes the bound too large: take several of its steps (`critic_steps` of `fit`).

    Args:
        x_dim: size D of the data `[B, D]`.
        z_dim: size of z_1.
        hidden_dim: width of the networks.
        noise_dim: size of eps, at least that of z_1; four times that of z_1 if left out.
        adaptive_contrast: as above.
        num_contrast: draws for the moments of each q(z_1|x).
        **options: `likelihood`, `num_hidden`, `batch_norm`, `activation`, `decoder_num_hidden`,
            `decoder_activation` as in `GaussianHierarchy`; the decoder alone has batch norm.

    >>> ImplicitPosteriorVAE(x_dim=9, z_dim=2, hidden_dim=8).noise_dim
    8
    """

    has_own_guide = True

    def __init__(
        self,
        x_dim: int,
        z_dim: int = 64,
        hidden_dim: int = 512,
        *,
        noise_dim: int | None = None,
        adaptive_contrast: bool = True,
        num_contrast: int = 64,
        num_hidden: int = 2,
        batch_norm: bool = False,
        activation: Callable[[], nn.Module] = nn.LeakyReLU,
        **options,
    ):
        super().__init__(
            x_dim,
            (z_dim,),
            (hidden_dim,),
            num_hidden=num_hidden,
            batch_norm=batch_norm,
            activation=activation,
            **options,
        )
        if num_contrast < 2 or (noise_dim is not None and noise_dim < z_dim):
            raise ValueError(
                f"noise_dim={noise_dim} and num_contrast={num_contrast}; expected at least z_dim={z_dim} and 2"
            )
        self.noise_dim = 4 * z_dim if noise_dim is None else noise_dim
        self.adaptive_contrast, self.num_contrast = adaptive_contrast, num_contrast
        plain = dict(batch_norm=False, activation=activation)
        self.encoder = MLP(x_dim, hidden_dim, num_hidden, **plain)
        self.push = JointMLP((self.encoder.out_dim, self.noise_dim), hidden_dim, max(1, num_hidden), **plain)
        self.out = linear(hidden_dim, z_dim)
        nn.init.normal_(self.out.weight, std=0.1 / hidden_dim**0.5)
        self.critic = PairCritic(x_dim, z_dim, hidden_dim, max(1, num_hidden), activation=activation)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """q(z_1|x) for `x` of `[B, D]`; `y` is ignored."""
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z1", self._posterior(x))

    def critic_loss(self, pair: nn.Module, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The critic's loss on a batch `[B, D]`, a scalar in nats."""
        q, z = drawn(pair, x, y)["z1"]
        loc, scale = q.contrast
        return self.critic.loss((x, (z - loc) / scale), (x, torch.randn_like(z)))

    def _posterior(self, x: Tensor) -> Implicit:
        h = self.encoder(x)

        def push(eps: Tensor) -> Tensor:
            return eps[..., : self.z_dims[0]] + self.out(self.push(h, eps))

        loc, scale = self._contrast(push, x)

        def log_density(z: Tensor) -> Tensor:
            return self.critic(x, (z - loc) / scale) + Normal(loc, scale).log_prob(z).sum(-1)

        return Implicit(push, log_density, (loc, scale), self.noise_dim)

    @torch.no_grad()
    def _contrast(self, push: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.adaptive_contrast:
            zero = x.new_zeros(len(x), self.z_dims[0])
            return zero, torch.ones_like(zero)
        z = push(torch.randn(self.num_contrast, len(x), self.noise_dim, dtype=x.dtype, device=x.device))
        return z.mean(0), z.std(0).clamp_min(FLOOR)


class Implicit(TorchDistribution):
    """The law of `push(eps)`, eps ~ N(0, I), with a log-density that is estimated.

    Args:
        push: noise `[..., B, noise_dim]` -> draws `[..., B, z]`.
        log_density: draws `[..., B, z]` -> nats `[..., B]`.
        contrast: loc and scale `[B, z]` of the contrast.
        noise_dim: size of eps.

    Attributes:
        mean, variance: those of the contrast, `[B, z]`: with adaptive contrast, from draws.
    """

    arg_constraints = {}  # noqa: RUF012, as torch has it
    support = constraints.real_vector
    has_rsample = True
    is_implicit = True

    def __init__(self, push, log_density, contrast: tuple[Tensor, Tensor], noise_dim: int, batch_shape=None):
        self.push, self.log_density, self.contrast, self.noise_dim = push, log_density, contrast, noise_dim
        shape = contrast[0].shape
        super().__init__(shape[:-1] if batch_shape is None else batch_shape, shape[-1:], validate_args=False)

    def expand(self, batch_shape, _instance=None) -> Implicit:
        return Implicit(self.push, self.log_density, self.contrast, self.noise_dim, torch.Size(batch_shape))

    @property
    def mean(self) -> Tensor:
        return self.contrast[0].expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        return self.contrast[1].square().expand(self.batch_shape + self.event_shape)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008, as torch has it
        loc = self.contrast[0]
        return self.push(
            torch.randn(*sample_shape, *self.batch_shape, self.noise_dim, dtype=loc.dtype, device=loc.device)
        )

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_density(value)
