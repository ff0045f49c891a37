"""The denoising VAE: the guide sees corrupted data, the model is asked for the clean."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..schedules import Schedule, constant
from .around import Around
from .vae import VAE

Corruption = Callable[[Tensor, Tensor], Tensor]


def salt_and_pepper(x: Tensor, level: Tensor) -> Tensor:
    """Each entry becomes 0 or 1, evenly, with probability `level` (Im et al. 2017, for binary images)."""
    noise = torch.rand_like(x)
    return torch.where(noise < level, (noise < level / 2).to(x), x)


def masking(x: Tensor, level: Tensor) -> Tensor:
    """Each entry becomes 0 with probability `level` (Vincent et al. 2008)."""
    return torch.where(torch.rand_like(x) < level, torch.zeros_like(x), x)


def gaussian(x: Tensor, level: Tensor) -> Tensor:
    """x + level eps, eps ~ N(0, 1)."""
    return x + level * torch.randn_like(x)


CORRUPTIONS = (salt_and_pepper, masking, gaussian)


class DenoisingVAE(Around):
    r"""Any structure whose guide sees x~ ~ p(x~|x) in place of x while training (Im et al. 2017).

        q~(z|x) = int q(z|x~) p(x~|x) dx~
        L^C = E_p(x~|x) E_q(z|x~) [log p(x, z) - log q(z|x~)] <= log p(x)

    (Eqs. 7-8 there.) The bound holds for every x~, and so on the mean. In evaluation mode the guide sees x itself.

    Args:
        x_dim: size D of the data `[B, D]`.
        base: makes the structure from `x_dim`.
        corruption: `(x, level) -> x~` of the same shape: `salt_and_pepper`, `masking`, `gaussian`, or your own.
        level: how strong: a number, or a schedule that training follows, such as
            `pyro_lvae.linear(0.5, 0.05, epochs=50)`, from coarse to fine (Geras & Sutton 2014).

    Attributes:
        level: the present one, a scalar tensor.

    >>> DenoisingVAE(9, level=0.25).level
    tensor(0.2500)
    """

    def __init__(
        self,
        x_dim: int,
        base: Callable[[int], nn.Module] = VAE,
        corruption: Corruption = salt_and_pepper,
        level: float | Schedule = 0.1,
    ):
        super().__init__(x_dim, base)
        self._refuse_own_guide()
        self.corruption = corruption
        self.schedule = level if callable(level) else constant(float(level))
        self.register_buffer("level", torch.tensor(0.0))
        self.advance(0, 0)

    def guide(self, x: Tensor, y: Tensor | None = None):
        """q(z|x~) while training, else q(z|x)."""
        return self.base.guide(self.corruption(x, self.level) if self.training else x, y)

    def advance(self, step: int, epoch: int) -> None:
        """Set the level to that of a step and epoch, both counted from 0; `fit` does so before each step."""
        self.level.fill_(self.schedule(step, epoch))
