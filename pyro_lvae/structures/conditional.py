"""The conditional VAE: labels go into guide, prior and likelihood."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..conditionals import Bernoulli, Normal, one_hot
from ..nets import MLP


class ConditionalVAE(nn.Module):
    r"""One latent layer, everything given a label or condition y (Sohn et al. 2015).

        p(z_1|y)   = N(0, I), or learned: N(mu_p(y), sigma^2_p(y))
        p(x|z_1,y) = likelihood(MLP([z_1, y]))
        q(z_1|x,y) = N(mu_q([x, y]), sigma^2_q([x, y]))

        log p(x|y) >= E_q[log p(x|z_1, y)] - KL(q(z_1|x, y) || p(z_1|y))

    (Eq. 4 there.) y is an input and no site: bounds and likelihoods are of p(x|y). `fit` and the command line pass
    the labels of the data of themselves, since `takes_labels` is set.

    Args:
        x_dim: size D of the data `[B, D]`.
        num_classes: labels are integers `[B]` from 0 to `num_classes - 1`; or y is a real condition `[B, num_classes]`.
        z_dim: size of z_1.
        hidden_dim: width of the MLPs.
        learn_prior: learn p(z_1|y), in place of N(0, I) for every y, which makes z_1 what does not depend on y.
        likelihood: `(in_dim, x_dim) -> nn.Module` that maps features to a distribution over x.
        num_hidden: hidden layers in every MLP.
        batch_norm: batch norm on the hidden layers and the Gaussian heads.
        activation: makes the nonlinearity.

    >>> ConditionalVAE(9, num_classes=3, z_dim=2, hidden_dim=8).takes_labels
    True
    """

    takes_labels = True

    def __init__(
        self,
        x_dim: int,
        num_classes: int = 10,
        z_dim: int = 64,
        hidden_dim: int = 512,
        *,
        learn_prior: bool = False,
        likelihood: Callable[[int, int], nn.Module] = Bernoulli,
        num_hidden: int = 2,
        batch_norm: bool = True,
        activation: Callable[[], nn.Module] = nn.LeakyReLU,
    ):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 1")
        self.num_classes, self.z_dim = num_classes, z_dim

        def gaussian(in_dim: int) -> nn.Module:
            mlp = MLP(in_dim, hidden_dim, num_hidden, batch_norm=batch_norm, activation=activation)
            return nn.Sequential(mlp, Normal(mlp.out_dim, z_dim, batch_norm=batch_norm))

        self.encoder = gaussian(x_dim + num_classes)
        self.prior = gaussian(num_classes) if learn_prior else None
        self.decoder = MLP(z_dim + num_classes, hidden_dim, num_hidden, batch_norm=batch_norm, activation=activation)
        self.likelihood = likelihood(self.decoder.out_dim, x_dim)

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """p(x, z_1 | y) for `x` of `[B, D]` and `y` of `[B]` or `[B, num_classes]`."""
        y = self._condition(x, y)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z1", self._prior_given(y))
            h = torch.cat([z, y.expand(*z.shape[:-1], -1)], -1)
            return pyro.sample("x", self.likelihood(self.decoder(h)), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """q(z_1 | x, y)."""
        y = self._condition(x, y)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z1", self.encoder(torch.cat([x, y], -1)))

    def _prior_given(self, y: Tensor) -> dist.TorchDistribution:
        if self.prior is not None:
            return self.prior(y)
        return dist.Normal(y.new_zeros(self.z_dim), y.new_ones(self.z_dim)).to_event(1)

    def _condition(self, x: Tensor, y: Tensor | None) -> Tensor:
        """y as `[B, num_classes]` in the dtype of x: one-hot where it is labels."""
        if y is None:
            raise ValueError(f"{type(self).__name__} is conditional on labels y, and none were given; pass y=")
        if y.ndim == 1 and not y.is_floating_point():
            return one_hot(y, self.num_classes, x, " (with hidden ones, -1, use SemiSupervisedVAE, ADGM or SDGM)")
        if not y.is_floating_point() or y.shape[1:] != (self.num_classes,):
            raise ValueError(
                f"y is {y.dtype} of shape {tuple(y.shape)}; expected integer labels [B] or floating-point "
                f"conditions [B, {self.num_classes}]; num_classes says how wide"
            )
        return y.to(x)
