"""Normalizing flows on the guide's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro.nn import ConditionalAutoRegressiveNN, DenseNN
from torch import Tensor, nn

from ..conditionals import is_point
from ..nets import MLP
from .around import Around, Exchange, is_real_vector
from .denoising import DenoisingVAE
from .vae import VAE


class PlanarFlow(T.ConditionalPlanar):
    """f(z) = z + u tanh(w^T z + b) with u, w, b from the context (Rezende & Mohamed 2015, eq. 10)."""

    def __init__(self, z_dim: int, context_dim: int, index: int = 0):
        super().__init__(DenseNN(context_dim, [context_dim], param_dims=[1, z_dim, z_dim]))


class IAF(T.ConditionalAffineAutoregressive):
    """f(z)_i = s_i z_i + (1 - s_i) m_i, both of the entries before i and the context; odd flows in reverse order.

    The inverse autoregressive flow of Kingma et al. 2016 (eqs. 10-14).
    """

    def __init__(self, z_dim: int, context_dim: int, index: int = 0):
        super().__init__(_masked(z_dim, context_dim, index, [1, 1]), stable=True)


class SplineFlow(T.ConditionalSplineAutoregressive):
    """Linear rational splines of 8 bins on [-5, 5] (Dolatabadi et al. 2020), autoregressive; odd flows in reverse."""

    def __init__(self, z_dim: int, context_dim: int, index: int = 0):
        net = _masked(z_dim, context_dim, index, [8, 8, 7, 8])
        super().__init__(z_dim, net, count_bins=8, bound=5.0, order="linear")


FLOWS = (PlanarFlow, IAF, SplineFlow)


def _masked(z_dim: int, context_dim: int, index: int, param_dims: list[int]) -> nn.Module:
    order = torch.arange(z_dim) if index % 2 == 0 else torch.arange(z_dim).flip(0)
    hidden = [max(2 * z_dim, 32)] * 2
    return ConditionalAutoRegressiveNN(
        z_dim, context_dim, hidden, param_dims=param_dims, permutation=order, nonlinearity=nn.ELU()
    )


class FlowVAE(Around):
    r"""Any structure, with normalizing flows after the distributions of its guide (Rezende & Mohamed 2015).

        z_0 ~ q_0(z_i|.) the base's own,  z_i = f_K(... f_1(z_0; h(x)); h(x))
        log q(z_i|.) = log q_0(z_0) - sum_k log |det df_k/dz_k-1|

    (Eqs. 6-7 there.) The flows' parameters depend on x through a network of their own, so any structure will do. In a
    ladder a layer's flow comes after the precision merge.

    Args:
        x_dim: size D of the data `[B, D]`.
        base: makes the structure from `x_dim`.
        flow: `(z_dim, context_dim, index) -> ConditionalTransformModule` of Pyro: `PlanarFlow`, `IAF`, `SplineFlow`;
            made for every one of the flows of every layer.
        num_flows: K.
        layers: `"all"` layers, the `"top"` one (the first of the model), or their names; the first two pass over what
            is no vector of real numbers, such as a class.
        context_dim: size of h(x), an MLP of two layers.

    Draws of `PlanarFlow` have no inverse in closed form, and those of all are scored with what was kept of the noise
    behind them: estimators that need log q at a given draw (`STL`, `DReG`, `RWS`, `TVO`) are refused.

    Raises:
        ValueError: a layer is named that the guide does not have or that is no vector of real numbers, or the base
            keeps the data from its guide.

    >>> list(FlowVAE(9, num_flows=2).flows)
    ['z1']
    """

    def __init__(
        self,
        x_dim: int,
        base: Callable[[int], nn.Module] = VAE,
        flow: Callable[[int, int, int], nn.Module] = IAF,
        num_flows: int = 4,
        *,
        layers: str | Sequence[str] = "all",
        context_dim: int = 32,
    ):
        super().__init__(x_dim, base)
        if num_flows < 1:
            raise ValueError(f"num_flows is {num_flows}; at least 1 is needed")
        if any(isinstance(module, DenoisingVAE) for module in self.base.modules()):
            raise ValueError(
                "the flows would see the data that DenoisingVAE keeps from the guide; put it around them: "
                "DenoisingVAE(x_dim, partial(FlowVAE, ...))"
            )
        self._refuse_own_guide()
        sizes = self._sizes(layers)
        self.context = MLP(x_dim, context_dim, 2, batch_norm=False)
        self.flows = nn.ModuleDict(
            {name: nn.ModuleList(flow(size, context_dim, i) for i in range(num_flows)) for name, size in sizes.items()}
        )

    def guide(self, x: Tensor, y: Tensor | None = None):
        """The base's q(z|x), its layers sent through the flows."""
        h = self.context(x)
        with Exchange({name: self._flown(flows, h) for name, flows in self.flows.items()}):
            return self.base.guide(x, y)

    def _sizes(self, layers: str | Sequence[str]) -> dict[str, int]:
        """{name: size} of the layers asked for."""
        in_guide = self._in_guide()
        of_model = [name for name in self._in_model(in_guide) if name in in_guide]
        flown = [name for name, (q, _) in in_guide.items() if not is_point(q) and is_real_vector(q)]
        groups = {"all": flown or list(in_guide), "top": [n for n in of_model if n in flown][:1] or of_model[:1]}
        names = groups.get(layers) if isinstance(layers, str) else list(layers)
        if not names or not set(names) <= set(in_guide):
            raise ValueError(f"layers is {layers!r}; expected 'all', 'top' or some of {list(in_guide)}")
        for name in names:
            q, _ = in_guide[name]
            if is_point(q) or not is_real_vector(q):
                raise ValueError(
                    f"site {name!r} is {type(q).__name__} {tuple(q.event_shape)} in the guide; flows transform "
                    "densities over vectors of real numbers without bounds"
                )
        return {name: in_guide[name][0].event_shape[0] for name in names}

    def _flown(self, flows: nn.ModuleList, h: Tensor) -> Callable[[dist.TorchDistribution], dist.TorchDistribution]:
        h = h.to(torch.promote_types(h.dtype, torch.float32))  # a flow may ask its network outside of autocast
        return lambda q: dist.TransformedDistribution(q, [flow.condition(h) for flow in flows])
