"""Normalizing flows on the guide's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro.nn import ConditionalAutoRegressiveNN, DenseNN
from torch import Tensor, nn

from ..nets import MLP
from .around import Around, Exchange
from .vae import VAE

Flow = Callable[[int, int, int], nn.Module]


def planar(z_dim: int, context_dim: int, index: int = 0) -> T.ConditionalTransformModule:
    """f(z) = z + u tanh(w^T z + b) with u, w, b from the context (Rezende & Mohamed 2015, eq. 10)."""
    return T.ConditionalPlanar(DenseNN(context_dim, [context_dim], param_dims=[1, z_dim, z_dim]))


def iaf(z_dim: int, context_dim: int, index: int = 0) -> T.ConditionalTransformModule:
    """Inverse autoregressive flow, s_i z_i + (1 - s_i) m_i (Kingma et al. 2016, eqs. 10-14); odd ones in reverse."""
    order = torch.arange(z_dim) if index % 2 == 0 else torch.arange(z_dim).flip(0)
    hidden = [max(2 * z_dim, 32)] * 2
    net = ConditionalAutoRegressiveNN(z_dim, context_dim, hidden, permutation=order, nonlinearity=nn.ELU())
    return T.ConditionalAffineAutoregressive(net, stable=True)


def spline(z_dim: int, context_dim: int, index: int = 0) -> T.ConditionalTransformModule:
    """Autoregressive linear rational splines of 8 bins on [-5, 5] (Dolatabadi et al. 2020), odd ones in reverse."""
    order = torch.arange(z_dim) if index % 2 == 0 else torch.arange(z_dim).flip(0)
    bins, hidden = 8, [max(2 * z_dim, 32)] * 2
    net = ConditionalAutoRegressiveNN(
        z_dim, context_dim, hidden, param_dims=[bins, bins, bins - 1, bins], permutation=order, nonlinearity=nn.ELU()
    )
    return T.ConditionalSplineAutoregressive(z_dim, net, count_bins=bins, bound=5.0, order="linear")


class FlowVAE(Around):
    r"""Any structure, with normalizing flows after the distributions of its guide (Rezende & Mohamed 2015).

        z_0 ~ q_0(z_i|.) the base's own,  z_i = f_K(... f_1(z_0; h(x)); h(x))
        log q(z_i|.) = log q_0(z_0) - sum_k log |det df_k/dz_k-1|

    (Eqs. 6-7 there.) The flows' parameters depend on x through a network of their own, so any structure will do. In a
    ladder a layer's flow comes after the precision merge.

    Args:
        x_dim: size D of the data `[B, D]`.
        base: makes the structure from `x_dim`.
        flow: `(z_dim, context_dim, index) -> ConditionalTransformModule`: `planar`, `iaf` or `spline` of this file, or
            your own; made once for each of the flows of each layer.
        num_flows: K.
        layers: `"all"` layers, the `"top"` one, or their names.
        context_dim: size of h(x), an MLP of two layers.

    Draws of `planar` have no inverse in closed form, and those of all are scored with what was kept of the noise
    behind them: estimators that need log q at a given draw (`STL`, `DReG`, `RWS`, `TVO`) are refused.

    Raises:
        ValueError: a layer is named that the guide does not have, or is none of real vectors.

    >>> list(FlowVAE(9, num_flows=2).flows)
    ['z1']
    """

    def __init__(
        self,
        x_dim: int,
        base: Callable[[int], nn.Module] = VAE,
        flow: Flow = iaf,
        num_flows: int = 4,
        *,
        layers: str | Sequence[str] = "all",
        context_dim: int = 32,
    ):
        super().__init__(x_dim, base)
        latents = self._latents()
        names = {"all": list(latents), "top": [self._top()]}.get(layers) if isinstance(layers, str) else list(layers)
        if names is None or not set(names) <= set(latents) or not names:
            raise ValueError(f"layers is {layers!r}; expected 'all', 'top' or some of {list(latents)}")
        for name in names:
            if latents[name].support.event_dim != 1 or len(latents[name].event_shape) != 1:
                raise ValueError(f"site {name!r} has event shape {tuple(latents[name].event_shape)}; flows need [z]")
        self.context = MLP(x_dim, context_dim, 2, batch_norm=False)
        self.flows = nn.ModuleDict(
            {
                name: nn.ModuleList(flow(latents[name].event_shape[0], context_dim, i) for i in range(num_flows))
                for name in names
            }
        )

    def guide(self, x: Tensor, y: Tensor | None = None):
        """The base's q(z|x), its layers sent through the flows."""
        h = self.context(x)
        with Exchange({name: self._flown(flows, h) for name, flows in self.flows.items()}):
            return self.base.guide(x, y)

    def _flown(self, flows: nn.ModuleList, h: Tensor) -> Callable[[dist.TorchDistribution], dist.TorchDistribution]:
        return lambda q: dist.TransformedDistribution(q, [flow.condition(h) for flow in flows])
