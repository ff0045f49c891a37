"""A mixture of Gaussians as the prior of the top layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..conditionals import GaussianMixture
from .around import Around, Exchange
from .vae import VAE


class MixturePrior(Around):
    r"""Any structure, with a learned mixture as the prior of its top layer (as in Jiang et al. 2017, eqs. 1-2).

        p(z_L) = sum_c pi_c N(z_L | mu_c, diag(sigma^2_c))

    The component c is summed out, so that every estimator works.

    Args:
        x_dim: size D of the data `[B, D]`.
        base: makes the structure from `x_dim`.
        num_components: C.
        spread: standard deviation of the means mu_c at first.

    Raises:
        ValueError: the top layer is no vector of real numbers, or has a learned prior already.

    Attributes:
        prior: the mixture; `prior()` is p(z_L).
        top: the name of the layer that has it, the first that the model samples.

    >>> MixturePrior(9, num_components=4).prior().event_shape
    torch.Size([64])
    """

    def __init__(
        self, x_dim: int, base: Callable[[int], nn.Module] = VAE, num_components: int = 10, *, spread: float = 1.0
    ):
        super().__init__(x_dim, base)
        self.top, replaced = self._top(self._in_guide())
        self.prior = GaussianMixture(replaced.event_shape[0], num_components, spread=spread)

    def model(self, x: Tensor, y: Tensor | None = None):
        """p(x, z) with the mixture in place of the base's p(z_L)."""
        with Exchange({self.top: lambda _: self.prior()}):
            return self.base.model(x, y)
