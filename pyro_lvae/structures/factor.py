"""FactorVAE: the total correlation of a layer is penalised, as a critic sees it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..critics import Critic
from .around import Around, Beside, drawn, is_real_vector
from .beta import BetaVAE


class FactorVAE(Around):
    r"""Any structure whose training makes the units of one layer independent over the data (Kim & Mnih 2018).

        L = E_q[log p(x|z)] - KL(q(z|x) || p(z)) - gamma TC(q(z)),  TC(q(z)) = KL(q(z) || prod_j q(z_j))
        TC ~ E_q(z)[T(z)],  T* = log q(z) - log prod_j q(z_j)

    (Eq. 2 there.) q(z) is the mean of q(z|x) over the data. The critic T tells draws of q(z) from draws whose units
    were permuted, each on its own, over the batch, which are draws of prod_j q(z_j); `fit` trains it in turn. The
    penalty is a factor "total_correlation" of the model while training; in evaluation mode the pair is that of `base`,
    so that bounds and likelihoods are its own. Deviation: what is permuted is a second draw for the same batch, where
    the paper takes a second batch.

    Args:
        x_dim: size D of the data `[B, D]`.
        base: makes the structure from `x_dim`.
        gamma: weight of the total correlation, 0 or more.
        layer: the site; the top one if left out.
        critic_hidden_dim, critic_num_hidden: width and number of the critic's layers.

    Raises:
        ValueError: `gamma` is negative, or the layer is no vector of two real numbers or more.

    >>> FactorVAE(9, critic_hidden_dim=8).layer
    'z1'
    """

    def __init__(
        self,
        x_dim: int,
        base: Callable[[int], nn.Module] = BetaVAE,
        gamma: float = 35.0,
        *,
        layer: str | None = None,
        critic_hidden_dim: int = 1000,
        critic_num_hidden: int = 5,
    ):
        super().__init__(x_dim, base)
        if not gamma >= 0:
            raise ValueError(f"gamma is {gamma}; the weight of the total correlation must be 0 or more")
        in_guide = self._in_guide()
        self.layer = next(n for n in self._in_model(in_guide) if n in in_guide) if layer is None else layer
        if self.layer not in in_guide:
            raise ValueError(f"layer is {layer!r}; the latents of {type(self.base).__name__} are {list(in_guide)}")
        q, _ = in_guide[self.layer]
        if not is_real_vector(q) or q.event_shape[0] < 2:
            raise ValueError(
                f"site {self.layer!r} is {type(q).__name__} {tuple(q.event_shape)} in the guide; a total correlation "
                "needs a vector of at least two real numbers"
            )
        self.gamma = gamma
        self.critic = Critic(q.event_shape[0], critic_hidden_dim, critic_num_hidden)

    def model(self, x: Tensor, y: Tensor | None = None):
        """The base's p(x, z); while training with the factor exp(-gamma T(z))."""
        if not self.training:
            return self.base.model(x, y)
        with Beside(self.layer, "total_correlation", lambda z: -self.gamma * self.critic(z)):
            return self.base.model(x, y)

    def critic_loss(self, pair: nn.Module, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The critic's loss on a batch `[B, D]`, a scalar in nats."""
        z, other = (drawn(pair, x, y)[self.layer][1] for _ in range(2))
        return self.critic.loss((z,), (permuted(other),))


def permuted(z: Tensor) -> Tensor:
    """`[B, z]` with every column in a random order of its own."""
    return z.gather(0, torch.rand_like(z).argsort(0))
