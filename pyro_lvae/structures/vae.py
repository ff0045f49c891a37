"""The variational autoencoder: one latent layer."""

from __future__ import annotations

from .hierarchy import HierarchicalVAE


class VAE(HierarchicalVAE):
    r"""One latent layer (Kingma & Welling 2014).

        p(z_1) = N(0, I),  p(x|z_1) = likelihood(MLP(z_1)),  q(z_1|x) = N(mu(x), sigma^2(x))

    (Section 3 there.) A hierarchy of one layer; the site is `"z1"`.

    Args:
        x_dim: size D of the data `[B, D]`.
        z_dim: size of z_1.
        hidden_dim: width of the MLPs of encoder and decoder.
        **options: `likelihood`, `num_hidden`, `batch_norm`, `head_batch_norm`, `activation`,
            `min_variance` as in `GaussianHierarchy`.
    """

    def __init__(self, x_dim: int, z_dim: int = 64, hidden_dim: int = 512, **options):
        super().__init__(x_dim, (z_dim,), (hidden_dim,), **options)
