"""Structures around another structure: what they change, they change by handlers at its sample sites."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from ..nets import evaluation_mode


class Around(nn.Module):
    """Any structure `base`, with distributions at some of its sites exchanged.

    Args:
        x_dim: size D of the data `[B, D]`.
        base: makes the structure from `x_dim`: a class, or `functools.partial` of one.
    """

    def __init__(self, x_dim: int, base: Callable[[int], nn.Module]):
        super().__init__()
        self.base = base(x_dim)
        self.x_dim = x_dim

    @property
    def takes_labels(self) -> bool:
        """Whether the structure within is conditional on labels."""
        return bool(getattr(self.base, "takes_labels", False))

    def model(self, x: Tensor, y: Tensor | None = None):
        return self.base.model(x, y)

    def guide(self, x: Tensor, y: Tensor | None = None):
        return self.base.guide(x, y)

    def _latents(self) -> dict[str, TorchDistribution]:
        """{latent: its distribution for two rows of zeros} of the base's guide, in the guide's order."""
        return self._seen(self.base.guide)

    def _top(self) -> str:
        """The first latent that the base's model samples."""
        return next(iter(self._seen(self.base.model)))

    def _seen(self, run: Callable) -> dict[str, TorchDistribution]:
        x, y = torch.zeros(2, self.x_dim), torch.zeros(2, dtype=torch.long) if self.takes_labels else None
        with (
            evaluation_mode(self.base),
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            poutine.block(),
            Seen() as seen,
        ):
            run(x, y)
        return seen.sites


class Exchange(Messenger):
    """At the sites named, the distribution that is made from the one that stands there."""

    def __init__(self, makers: dict[str, Callable[[TorchDistribution], TorchDistribution]]):
        super().__init__()
        self.makers = makers

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.makers:
            shape = msg["fn"].batch_shape
            made = self.makers[msg["name"]](msg["fn"])
            msg["fn"] = made if made.batch_shape == shape else made.expand(shape)


class Seen(Messenger):
    """Remembers the distributions of latent sites, by name and in order.

    Attributes:
        sites: {name: distribution}.
    """

    def __init__(self):
        super().__init__()
        self.sites: dict[str, TorchDistribution] = {}

    def _pyro_post_sample(self, msg: dict) -> None:
        if not msg["is_observed"] and isinstance(msg["fn"], TorchDistributionMixin):  # the plate's own is none
            self.sites[msg["name"]] = msg["fn"]
