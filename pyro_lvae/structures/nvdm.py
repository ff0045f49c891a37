"""The neural variational document model: word counts from a linear softmax decoder."""

from __future__ import annotations

from collections.abc import Callable

import pyro
from torch import Tensor, nn

from ..conditionals import Normal
from ..nets import MLP
from ..words import BagOfWords
from .hierarchy import GaussianHierarchy


class NVDM(GaussianHierarchy):
    r"""Bags of words with one latent layer and no hidden layer in the decoder (Miao et al. 2016, section 3).

        p(h) = N(0, I),  p(X|h) = prod_i softmax(R^T h + b)_(x_i),  q(h|X) = N(mu(X), sigma^2(X))

    h is the site `"z1"`; x are the counts `[B, V]`. The encoder gets them as they are, as in the paper, or through
    `transform`. Deviation: sigma^2 is softplus(linear) as in every structure here, where the paper has log sigma =
    linear.

    Args:
        x_dim: size V of the vocabulary.
        z_dim: size K of h; 50 and 200 in the paper.
        hidden_dim: width of the encoder's layers.
        num_hidden: how many they are.
        batch_norm: batch norm on them, which the paper has not.
        dropout: share of their features set to 0 while training; 0 in the paper.
        activation: makes their nonlinearity.
        transform: `[B, V]` -> `[B, V]`, what the encoder gets of the counts. With `torch.log1p` it learns faster and
            generalises better: a word's hundredth occurrence says less than its first.
        min_variance: floor of sigma^2.

    >>> NVDM(x_dim=2000, z_dim=50).R.shape
    torch.Size([50, 2000])
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int = 50,
        hidden_dim: int = 500,
        *,
        num_hidden: int = 2,
        batch_norm: bool = False,
        dropout: float = 0.0,
        activation: Callable[[], nn.Module] = nn.ReLU,
        transform: Callable | None = None,
        min_variance: float = 1e-5,
    ):
        super().__init__(x_dim, (z_dim,), (hidden_dim,), likelihood=BagOfWords, num_hidden=0)
        mlp = MLP(x_dim, hidden_dim, num_hidden, batch_norm=batch_norm, activation=activation)
        self.transform = transform
        head = Normal(mlp.out_dim, z_dim, min_variance=min_variance)
        self.encoder = nn.Sequential(mlp, nn.Dropout(dropout), head)

    @property
    def R(self) -> Tensor:
        """The words' embeddings, `[K, V]`, a column a word."""
        return self.likelihood.R

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """q(h|X) for counts `x` of `[B, V]`; `y` is ignored."""
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z1", self.encoder(x if self.transform is None else self.transform(x)))
