"""Semi-supervised VAEs with an auxiliary variable."""

from __future__ import annotations

from collections.abc import Callable

import pyro
from torch import Tensor, nn

from ..nets import JointMLP
from .semi_supervised import SemiSupervisedVAE


class ADGM(SemiSupervisedVAE):
    r"""`SemiSupervisedVAE` with an auxiliary variable a (Maaloe et al. 2016, the auxiliary deep generative model).

        p(y) p(z_1) p(x|y, z_1) p(a|x, y, z_1)
        q(a|x) q(y|a, x) q(z_1|a, x, y)

    (Section 2 there.) a makes q(y, z_1|x) richer; in the model it comes after x, which leaves p(x) as it was.

    Args:
        a_dim: size of a; that of z_1 if left out.
        **options: as of `SemiSupervisedVAE`.

    >>> ADGM(9, num_classes=3, z_dim=2, hidden_dim=8).a_dim
    2
    """

    def __init__(
        self,
        x_dim: int,
        num_classes: int = 10,
        z_dim: int = 100,
        hidden_dim: int = 500,
        *,
        a_dim: int | None = None,
        num_hidden: int = 2,
        batch_norm: bool = True,
        activation: Callable[[], nn.Module] = nn.ReLU,
        **options,
    ):
        super().__init__(
            x_dim,
            num_classes,
            z_dim,
            hidden_dim,
            num_hidden=num_hidden,
            batch_norm=batch_norm,
            activation=activation,
            **options,
        )
        self.a_dim = z_dim if a_dim is None else a_dim
        self.auxiliary = self._gaussian(self.a_dim, x_dim)
        self.classifier = self._classifier(self.a_dim, x_dim)
        self.encoder = self._gaussian(z_dim, self.a_dim, x_dim, num_classes)
        self.generative_auxiliary = self._gaussian(self.a_dim, x_dim, num_classes, z_dim)

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """p(x, y, z_1) p(a|x, y, z_1)."""
        labels = self._labels(x, y)
        with pyro.plate("data", len(x), dim=-1):
            c = self._one_hot(pyro.sample("y", self._prior_of_y(x)), x)
            z = pyro.sample("z1", self._prior(x))
            x = pyro.sample("x", self.likelihood(self.decoder(c, z)), obs=x)
            a = pyro.sample("a", self.generative_auxiliary(x, c, z))
            self._classify(labels, a, x)
            return x

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """q(a|x) q(y|a, x) q(z_1|a, x, y)."""
        labels = self._labels(x, y)
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", self.auxiliary(x))
            c = self._sample_y(self.classifier(a, x), labels, x)
            pyro.sample("z1", self.encoder(a, x, c))


class SDGM(ADGM):
    r"""The skip deep generative model, where a is a layer of the model (Maaloe et al. 2016).

        p(y) p(z_1) p(a|y, z_1) p(x|a, y, z_1),  guide as of `ADGM`

    >>> SDGM(9, num_classes=3, z_dim=2, hidden_dim=8).z_dim
    2
    """

    def __init__(self, x_dim: int, num_classes: int = 10, z_dim: int = 100, hidden_dim: int = 500, **options):
        super().__init__(x_dim, num_classes, z_dim, hidden_dim, **options)
        self.decoder = JointMLP((self.a_dim, num_classes, z_dim), **self._options)
        self.generative_auxiliary = self._gaussian(self.a_dim, num_classes, z_dim)

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """p(x, a, y, z_1)."""
        labels = self._labels(x, y)
        with pyro.plate("data", len(x), dim=-1):
            c = self._one_hot(pyro.sample("y", self._prior_of_y(x)), x)
            z = pyro.sample("z1", self._prior(x))
            a = pyro.sample("a", self.generative_auxiliary(c, z))
            x = pyro.sample("x", self.likelihood(self.decoder(a, c, z)), obs=x)
            self._classify(labels, a, x)
            return x
