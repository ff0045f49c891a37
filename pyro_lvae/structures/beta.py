"""The structure of the beta-VAE; its KL weight comes from outside."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .hierarchy import HierarchicalVAE


class BetaVAE(HierarchicalVAE):
    r"""One latent layer with the networks of the beta-VAE for dSprites (Higgins et al. 2017, appendix A.1).

        p(z_1) = N(0, I),  p(x|z_1) = B(x | MLP(z_1)),  q(z_1|x) = N(mu(x), sigma^2(x))

    The encoder has two layers of ReLU, the decoder three of tanh. What makes it a beta-VAE is the objective (eq. 4
    there), and no structure holds a KL weight: `fit(beta=4)`, or the estimator `BetaELBO(4)`, maximises

        L = E_q[log p(x|z)] - beta KL(q(z|x) || p(z))

    This is, but for the constant beta epsilon, the Lagrangian (eq. 3) with a KKT multiplier beta held fixed, of (eq. 2)

        max E_q[log p(x|z)]  subject to  KL(q(z|x) || p(z)) < epsilon

    `ConstrainedELBO(epsilon)` is given epsilon instead and learns beta; `GECO(distortion)` bounds -log p(x|z) and
    makes the KL small. beta = 1 is the VAE.

    Args:
        x_dim: size D of the data `[B, D]`.
        z_dim: size of z_1.
        hidden_dim: width of the MLPs of encoder and decoder.
        num_hidden: hidden layers of the encoder.
        decoder_num_hidden: hidden layers of the decoder.
        activation: makes the nonlinearity of the encoder.
        decoder_activation: makes the nonlinearity of the decoder.
        batch_norm: batch norm on the hidden layers; the paper has none.
        **options: `likelihood`, `head_batch_norm`, `min_variance` as in `GaussianHierarchy`.

    >>> BetaVAE(x_dim=9, z_dim=2, hidden_dim=8).decoder[1]
    Tanh()
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int = 10,
        hidden_dim: int = 1200,
        *,
        num_hidden: int = 2,
        decoder_num_hidden: int = 3,
        activation: Callable[[], nn.Module] = nn.ReLU,
        decoder_activation: Callable[[], nn.Module] = nn.Tanh,
        batch_norm: bool = False,
        **options,
    ):
        super().__init__(
            x_dim,
            (z_dim,),
            (hidden_dim,),
            num_hidden=num_hidden,
            decoder_num_hidden=decoder_num_hidden,
            activation=activation,
            decoder_activation=decoder_activation,
            batch_norm=batch_norm,
            **options,
        )
