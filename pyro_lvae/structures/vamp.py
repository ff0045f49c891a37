"""The VampPrior: a mixture of the guide's own posteriors at learned pseudo-inputs, as the prior of the top layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyro.distributions import TorchDistribution, TransformedDistribution
from torch import Tensor, nn

from ..conditionals import is_point, mixture
from ..nets import evaluation_mode
from .around import Around, Exchange, distribution_at
from .vae import VAE


class VampPrior(Around):
    r"""Any structure, with a prior of its top layer made of its guide (Tomczak & Welling 2018).

        p(z_L) = 1/C sum_c q(z_L|u_c)

    (Eq. 9 there.) The pseudo-inputs u_c are learned. They pass the guide in evaluation mode, so that batch norm treats
    them as it will after training. Deviations: where the guide samples other layers before the top one, as a bottom-up
    guide of several layers does, q(z_L|u_c) is no density that could be written down, and q(z_L|z_1, ..., u_c) with
    those layers at their means stands in its place; within bounds u = low + (high - low) sigmoid(v), where the paper
    clamps u, and its gradient is lost at the bounds. With flows around (`FlowVAE(x_dim, partial(VampPrior, ...))`) the
    mixture is of the distributions before the flows.

    Args:
        x_dim: size D of the data `[B, D]`.
        base: makes the structure from `x_dim`; ladders of several layers are made by `partial(LadderVAE, z_dims=...)`.
        num_pseudo_inputs: C.
        mean, std: of the normal noise that pseudo-inputs start from; `start_from(x)` starts them from data.
        bounds: least and largest value of a pseudo-input's entries; `None` for data without bounds.

    Raises:
        ValueError: the guide has flows or points at the top layer or before it, or the structure takes labels.

    >>> VampPrior(9, num_pseudo_inputs=5).pseudo_inputs.shape
    torch.Size([5, 9])
    """

    def __init__(
        self,
        x_dim: int,
        base: Callable[[int], nn.Module] = VAE,
        num_pseudo_inputs: int = 500,
        *,
        mean: float = 0.05,
        std: float = 0.01,
        bounds: tuple[float, float] | None = (0.0, 1.0),
    ):
        super().__init__(x_dim, base)
        if num_pseudo_inputs < 1:
            raise ValueError(f"num_pseudo_inputs is {num_pseudo_inputs}; the mixture has at least 1 component")
        if self.takes_labels:
            raise ValueError(f"{type(self.base).__name__} is conditional on labels, and pseudo-inputs have none")
        self._refuse_own_guide()
        in_guide = self._in_guide()
        top, whose = next(iter(self._in_model(in_guide))), f"the guide of {type(self.base).__name__}"
        for site, (q, _) in in_guide.items():
            if isinstance(q, TransformedDistribution):
                raise ValueError(
                    f"{whose} has flows at {site!r}, whose density is known at their own draws alone; put the flows "
                    "around: FlowVAE(x_dim, partial(VampPrior, base=...))"
                )
            if is_point(q):
                raise ValueError(f"{whose} is a point mass at {site!r}, and a mixture of them has no density")
            if site == top:
                break
        self.top, _ = self._top(in_guide)
        self.bounds = bounds
        self.raw = nn.Parameter(torch.empty(num_pseudo_inputs, x_dim))
        self._put(mean + std * torch.randn(num_pseudo_inputs, x_dim))

    @property
    def pseudo_inputs(self) -> Tensor:
        """u_c, `[C, D]`."""
        if self.bounds is None:
            return self.raw
        low, high = self.bounds
        return low + (high - low) * self.raw.sigmoid()

    def model(self, x: Tensor, y: Tensor | None = None):
        """p(x, z) with the mixture in place of the base's p(z_L)."""
        prior = self.prior()
        with Exchange({self.top: lambda _: prior}):
            return self.base.model(x, y)

    def prior(self) -> TorchDistribution:
        """p(z_L), of batch shape `[]`."""
        u = self.pseudo_inputs
        with evaluation_mode(self.base):
            q = distribution_at(self.top, self.base.guide, u, at_means=True)
        return mixture(u.new_zeros(len(u)), q)

    @torch.no_grad()
    def start_from(self, x: Tensor) -> None:
        """Set the pseudo-inputs to rows of `x` `[N, D]`, at random; to repeated rows where N < C.

        With bounds, entries stay a hundredth of the range away from them, where the sigmoid still has a slope.

        Raises:
            ValueError: `x` has another width, or values outside the bounds.
        """
        if x.ndim != 2 or x.shape[1] != self.x_dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected rows [N, {self.x_dim}]")
        if self.bounds is not None and not self.bounds[0] <= x.min() <= x.max() <= self.bounds[1]:
            raise ValueError(
                f"x runs from {x.min():g} to {x.max():g}, beyond bounds={self.bounds}; give others, or None"
            )
        count = len(self.raw)
        self._put(x[torch.randperm(max(len(x), count), device=x.device)[:count] % len(x)])

    @torch.no_grad()
    def _put(self, u: Tensor) -> None:
        if self.bounds is not None:
            low, high = self.bounds
            u = ((u - low) / (high - low)).clamp(0.01, 0.99).logit()
        self.raw.copy_(u)
