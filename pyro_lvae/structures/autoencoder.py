"""The plain autoencoder: the baseline that a variational one is held against."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn

from ..conditionals import Point
from .vae import VAE


class _Flat(dist.ImproperUniform):
    def log_prob(self, value: Tensor) -> Tensor:  # Pyro's is of the default dtype, on the CPU
        return value.new_zeros(()).expand(super().log_prob(value).shape)


class AE(VAE):
    r"""An autoencoder (Hinton & Salakhutdinov 2006) with the networks of `VAE`: codes are points without a prior.

        z_1 = linear(MLP(x)),  objective = log p(x|z_1)

    With `likelihood=partial(Normal, scale=s)` the objective is -||x - mu(z_1)||^2 / 2 s^2 and a constant, with
    `Bernoulli` minus the cross-entropy. A penalty lambda ||theta||^2 on the weights is the optimiser's `weight_decay`.
    Written as a pair, the prior of z_1 is flat, with density 1 everywhere, and q(z_1|x) is a point mass: a "bound" is
    then the objective above, there is no p(x), and nothing to generate from.

    Args:
        x_dim: size D of the data `[B, D]`.
        z_dim: size of the code z_1.
        hidden_dim: width of the MLPs of encoder and decoder.
        **options: `likelihood`, `num_hidden`, `batch_norm`, `activation` as in `GaussianHierarchy`.
    """

    def _prior(self, x: Tensor) -> dist.TorchDistribution:
        return _Flat(dist.constraints.real_vector, (), (self.z_dims[-1],))

    def _head(self, in_dim: int, out_dim: int) -> nn.Module:
        return Point(in_dim, out_dim)
