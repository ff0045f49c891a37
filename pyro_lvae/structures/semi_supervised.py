"""The semi-supervised VAE: labels are a latent that is sometimes seen."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..conditionals import Bernoulli, Normal, one_hot
from ..critics import factor
from ..nets import JointMLP

UNKNOWN = -1  # the label of a row that has none
NEVER = -1e4  # a logit whose probability is 0 in float32, and still finite


class SemiSupervisedVAE(nn.Module):
    r"""One latent layer and a label y, known for some rows (Kingma et al. 2014, model M2).

        p(y) = 1/C,  p(z_1) = N(0, I),  p(x|y, z_1) = likelihood(MLP(y, z_1))
        q(y|x) = Cat(MLP(x)),  q(z_1|x, y) = N(mu(x, y), sigma^2(x, y))

    A row with a label contributes E_q(z_1|x,y)[log p(x, y, z_1) - log q(z_1|x, y)] + alpha log q(y|x), one without
    sum_y q(y|x) of the former plus the entropy of q(y|x) (eqs. 6-9 there): y is enumerated. Labels are given to
    `model` and `guide` as y, -1 where there is none. They count while training alone: in evaluation mode
    bounds and likelihoods are of p(x). The term with alpha is a factor "classification" of the model.

    M1+M2 of the paper is this structure on the codes of a `VAE`, with a Normal likelihood; the networks may have batch
    norm, which the paper's have not.

    Args:
        x_dim: size D of the data `[B, D]`.
        num_classes: C; labels are integers `[B]` from 0 to C - 1, or -1.
        z_dim: size of z_1.
        hidden_dim: width of the MLPs.
        alpha: weight of log q(y|x), nats, of a row with a label. The paper's alpha, 0.1 N, is spread over the labels:
            0.1 times N over the number of labels here.
        likelihood: `(in_dim, x_dim) -> nn.Module` that maps features to a distribution over x.
        num_hidden: hidden layers in every MLP.
        batch_norm: batch norm on the hidden layers.
        activation: makes the nonlinearity.

    >>> structure = SemiSupervisedVAE(9, num_classes=3, z_dim=2, hidden_dim=8)
    >>> structure.takes_labels
    True
    """

    takes_labels = True

    def __init__(
        self,
        x_dim: int,
        num_classes: int = 10,
        z_dim: int = 50,
        hidden_dim: int = 500,
        *,
        alpha: float = 50.0,
        likelihood: Callable[[int, int], nn.Module] = Bernoulli,
        num_hidden: int = 1,
        batch_norm: bool = False,
        activation: Callable[[], nn.Module] = nn.Softplus,
    ):
        super().__init__()
        if min(num_classes, z_dim, hidden_dim) < 1 or not alpha >= 0:
            raise ValueError(
                f"num_classes={num_classes}, z_dim={z_dim}, hidden_dim={hidden_dim}, alpha={alpha}; sizes must be at "
                "least 1, and alpha 0 or more"
            )
        self.num_classes, self.z_dim, self.alpha = num_classes, z_dim, alpha
        self._options = dict(hidden_dim=hidden_dim, num_layers=num_hidden, batch_norm=batch_norm, activation=activation)
        self.classifier = self._classifier(x_dim)
        self.encoder = self._gaussian(z_dim, x_dim, num_classes)
        self.decoder = JointMLP((num_classes, z_dim), **self._options)
        self.likelihood = likelihood(self.decoder.out_dim, x_dim)

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """p(x, y, z_1) for `x` of `[B, D]` and labels `[B]`, -1 where unknown."""
        labels = self._labels(x, y)
        with pyro.plate("data", len(x), dim=-1):
            c = self._one_hot(pyro.sample("y", self._prior_of_y(x)), x)
            z = pyro.sample("z1", self._prior(x))
            x = pyro.sample("x", self.likelihood(self.decoder(c, z)), obs=x)
            self._classify(labels, x)
            return x

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """q(y|x) q(z_1|x, y)."""
        labels = self._labels(x, y)
        with pyro.plate("data", len(x), dim=-1):
            c = self._sample_y(self.classifier(x), labels, x)
            pyro.sample("z1", self.encoder(x, c))

    def _classify(self, labels: Tensor | None, *inputs: Tensor) -> None:
        """The factor alpha log q(y|x) for rows with a label, which is no part of a bound on p(x)."""
        if labels is not None:
            known = labels != UNKNOWN
            log_q = self.classifier(*inputs).to(inputs[0]).log_softmax(-1)
            log_q = log_q.gather(-1, labels.clamp_min(0).expand(log_q.shape[:-1])[..., None]).squeeze(-1)
            factor("classification", self.alpha * known * log_q)

    def _sample_y(self, logits: Tensor, labels: Tensor | None, x: Tensor) -> Tensor:
        """y ~ q(y|.), enumerated, one-hot; where there is a label, that one."""
        if labels is not None:
            seen = torch.where(self._one_hot(labels.clamp_min(0), x) == 1, 0.0, NEVER)
            logits = torch.where((labels != UNKNOWN)[:, None], seen, logits)
        q = dist.Categorical(logits=logits)
        return self._one_hot(pyro.sample("y", q, infer={"enumerate": "parallel"}), x)

    def _labels(self, x: Tensor, y: Tensor | None) -> Tensor | None:
        """Labels that count: none in evaluation mode, where they are checked."""
        if y is None:
            return None
        if y.ndim != 1 or y.is_floating_point():
            raise ValueError(f"y is {y.dtype} of shape {tuple(y.shape)}; expected integer labels [B], -1 where unknown")
        if self.training:
            return y.long()
        self._one_hot(torch.where(y == UNKNOWN, 0, y), x)
        return None

    def _one_hot(self, y: Tensor, x: Tensor) -> Tensor:
        return one_hot(y, self.num_classes, x, ", and -1 where there is none")

    def _prior_of_y(self, x: Tensor) -> dist.TorchDistribution:
        return dist.Categorical(logits=x.new_zeros(self.num_classes))

    def _prior(self, x: Tensor) -> dist.TorchDistribution:
        return dist.Normal(x.new_zeros(self.z_dim), x.new_ones(self.z_dim)).to_event(1)

    def _classifier(self, *in_dims: int) -> nn.Module:
        mlp = JointMLP(in_dims, **self._options)
        return _Then(mlp, nn.Linear(mlp.out_dim, self.num_classes))

    def _gaussian(self, out_dim: int, *in_dims: int) -> nn.Module:
        mlp = JointMLP(in_dims, **self._options)
        return _Then(mlp, Normal(mlp.out_dim, out_dim))


class _Then(nn.Sequential):
    """One module after another; the first takes several inputs."""

    def forward(self, *inputs: Tensor):
        first, second = self
        return second(first(*inputs))
