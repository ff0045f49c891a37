"""Variational deep embedding: clustering by a mixture of Gaussians over the latent layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro
import torch
from torch import Tensor, nn

from ..conditionals import Bernoulli, GaussianMixture, Normal
from ..nets import MLP


class VaDE(nn.Module):
    r"""One latent layer whose prior is a mixture, one component a cluster (Jiang et al. 2017).

        p(c) = pi_c,  p(z_1|c) = N(mu_c, diag(sigma^2_c)),  p(x|z_1) = likelihood(MLP(z_1))
        q(z_1|x) = N(mu(x), sigma^2(x)),  q(c|x) = E_q(z_1|x)[p(c|z_1)]

    (Eqs. 1-6 and 16 there.) With q(c|z_1) = p(c|z_1), which is the best one, c sums out of the bound:

        E_q[log p(x|z_1) + log sum_c pi_c p(z_1|c) - log q(z_1|x)]

    That form is the one here: it has less noise, and every estimator trains it. `cluster_probabilities` gives q(c|x).
    Training from a random mixture ends in bad clusters: train with `beta=0` first, then set the mixture by
    `put_clusters` to one fitted to the codes, then go on (section 3.3 there; `examples/clustering.py`). Where another
    method has found clusters, their numbers as labels (`fit(..., supervised=True)`) make c observed, which arranges the
    codes by them, and evaluations are of p(x, c): E_q[log p(x|z_1) + log pi_c p(z_1|c) - log q(z_1|x)].

    Args:
        x_dim: size D of the data `[B, D]`.
        num_clusters: components of the mixture.
        z_dim: size of z_1.
        hidden_dims: widths of the encoder's layers; the decoder has them in reverse.
        likelihood: `(in_dim, x_dim) -> nn.Module` that maps features to a distribution over x.
        batch_norm: batch norm on the hidden layers (not in the paper).
        activation: makes the nonlinearity.

    Attributes:
        prior: the mixture; `prior()` is p(z_1).

    >>> VaDE(9, num_clusters=4, z_dim=2, hidden_dims=(8,)).prior().component_distribution.mean.shape
    torch.Size([4, 2])
    """

    def __init__(
        self,
        x_dim: int,
        num_clusters: int = 10,
        z_dim: int = 10,
        hidden_dims: Sequence[int] = (500, 500, 2000),
        *,
        likelihood: Callable[[int, int], nn.Module] = Bernoulli,
        batch_norm: bool = False,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ):
        super().__init__()
        if min(z_dim, *hidden_dims, z_dim) < 1:
            raise ValueError(f"z_dim is {z_dim} and hidden_dims {tuple(hidden_dims)}; sizes must be at least 1")
        options = dict(batch_norm=batch_norm, activation=activation)
        self.encoder = MLP(x_dim, tuple(hidden_dims), **options)
        self.posterior = Normal(self.encoder.out_dim, z_dim)
        self.prior = GaussianMixture(z_dim, num_clusters)
        self.decoder = MLP(z_dim, tuple(hidden_dims)[::-1], **options)
        self.likelihood = likelihood(self.decoder.out_dim, x_dim)

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """p(x, z_1) for `x` of `[B, D]`, c summed out; with numbers of clusters `y` `[B]`, p(x, z_1, c = y)."""
        with pyro.plate("data", len(x), dim=-1):
            prior = self.prior()
            if y is not None:
                pyro.sample("y", prior.mixture_distribution, obs=y)
                prior = self.prior.component(y)
            z = pyro.sample("z1", prior)
            return pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """q(z_1|x); `y` is ignored."""
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z1", self.posterior(self.encoder(x)))

    @torch.no_grad()
    def put_clusters(self, probabilities: Tensor, means: Tensor, variances: Tensor) -> None:
        """Set the mixture: pi `[C]`, mu `[C, z]` and sigma^2 `[C, z]`, as scikit-learn's GaussianMixture has them.

        Raises:
            ValueError: the shapes are others, or a probability or variance is not positive.
        """
        given = {"probabilities": probabilities, "means": means, "variances": variances}
        own = (self.prior.logits, self.prior.loc, self.prior.log_variance)
        values = [torch.as_tensor(value) for value in given.values()]
        for name, value, parameter in zip(given, values, own, strict=True):
            if value.shape != parameter.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {tuple(parameter.shape)}")
            if name != "means" and not (value > 0).all():
                raise ValueError(f"{name} go down to {value.min():g}; they must be positive")
        for name, value, parameter in zip(given, values, own, strict=True):
            parameter.copy_(value if name == "means" else value.log())
