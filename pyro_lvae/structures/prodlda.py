"""ProdLDA: topics as experts, with a Gaussian in place of the Dirichlet prior."""

from __future__ import annotations

from functools import partial

import pyro
import torch
from torch import Tensor, nn

from ..conditionals import normal
from ..nets import MLP, BatchNorm, linear
from ..words import ProductOfExperts
from .hierarchy import GaussianHierarchy


class ProdLDA(GaussianHierarchy):
    r"""A topic model whose topics are multiplied (Srivastava & Sutton 2017).

        p(h)   = N(mu_1, Sigma_1), the Laplace approximation of theta = softmax(h) ~ Dirichlet(alpha)
        p(x|h) = prod_i softmax(BN(theta^T R))_(x_i)
        q(h|x) = N(mu(x), sigma^2(x)),  mu = BN(linear(MLP(x))),  log sigma^2 = BN(linear(MLP(x)))

    h is the site `"z1"`; x are the counts `[B, V]`, which the encoder gets as they are. Dropout acts on the encoder's
    features and on theta, as in the authors' published code. Batch norm has a bias and no gain there, and here: so
    the encoder cannot give up a topic by sending every document to the same h. That costs K/2 nats of KL a document at
    least, at alpha = 1 and in training mode, and short documents cannot pay it: their perplexity is high.

    Args:
        x_dim: size V of the vocabulary.
        z_dim: number K of topics.
        hidden_dim: width of the encoder's layers.
        num_hidden: how many they are.
        alpha: parameter of the symmetric Dirichlet.
        dropout: share of features, and of proportions, set to 0 while training.

    >>> ProdLDA(x_dim=1995, z_dim=50).R.shape
    torch.Size([50, 1995])
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int = 50,
        hidden_dim: int = 100,
        *,
        num_hidden: int = 2,
        alpha: float = 1.0,
        dropout: float = 0.6,
    ):
        if z_dim < 2 or not alpha > 0:
            raise ValueError(f"z_dim is {z_dim} and alpha {alpha}; a Dirichlet needs at least 2 topics and alpha > 0")
        likelihood = partial(ProductOfExperts, dropout=dropout)
        super().__init__(x_dim, (z_dim,), (hidden_dim,), likelihood=likelihood, num_hidden=0)
        mlp = MLP(x_dim, hidden_dim, num_hidden, batch_norm=False, activation=nn.Softplus)
        self.encoder = nn.Sequential(mlp, nn.Dropout(dropout), _NormalisedGaussian(mlp.out_dim, z_dim))
        mu, variance = laplace_of_dirichlet(torch.full((z_dim,), float(alpha)))
        self.register_buffer("prior_mu", mu)
        self.register_buffer("prior_variance", variance)

    @property
    def R(self) -> Tensor:
        """The topics' unnormalised log-weights of the words, `[K, V]` (beta in the paper)."""
        return self.likelihood.R

    @property
    def experts(self) -> Tensor:
        """R as it acts after batch norm, `[K, V]`: what tells a topic's words from those of the average document."""
        return self.likelihood.experts

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """q(h|x) for counts `x` of `[B, V]`; `y` is ignored."""
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z1", self.encoder(x))

    def _prior(self, x: Tensor):
        return normal(self.prior_mu, self.prior_variance)


class _NormalisedGaussian(nn.Module):
    """h -> N(mu, sigma^2) with mu and log sigma^2 by batch norm without gain."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.heads = nn.Sequential(linear(in_dim, 2 * out_dim, bias=False), BatchNorm(2 * out_dim, gain=False))

    def forward(self, h: Tensor):
        mu, log_variance = self.heads(h).chunk(2, dim=-1)
        return normal(mu, log_variance.exp())


def laplace_of_dirichlet(alpha: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and diagonal covariance of h for softmax(h) ~ Dirichlet(alpha), by Laplace in the softmax basis.

        mu_k    = log alpha_k - 1/K sum_i log alpha_i
        Sigma_kk = 1/alpha_k (1 - 2/K) + 1/K^2 sum_i 1/alpha_i

    (MacKay 1998; Srivastava & Sutton 2017, section 3.2.)

    Args:
        alpha: parameters of the Dirichlet, `[K]`.

    Returns:
        mu and the diagonal of Sigma, each `[K]`.
    """
    size = len(alpha)
    mu = alpha.log() - alpha.log().mean()
    return mu, (1 - 2 / size) / alpha + alpha.reciprocal().sum() / size**2
