"""The bidirectional ladder: a deep hierarchy whose guide samples half of every layer upwards and half downwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from ..conditionals import Bernoulli, Normal, normal, precision_merge
from ..nets import SMALL, Onwards, Residual, Shared, linear

Moments = tuple[Tensor, Tensor]


class BidirectionalLadderVAE(nn.Module):
    r"""L latent layers, z_i = (z_i^BU, z_i^TD) below the top, in skip-connected paths (BIVA; Maaloe et al. 2019).

    The model is one stochastic pass downwards along a deterministic path d, which remembers all that is above:

        z_L ~ N(0, I)
        d_i          = f_i(d_i+1 + W_i z_i+1),  i = L-1 ... 0  (without d_i+1 at the top)
        p(z_i|z_>i)  = p(z_i^BU|d_i) p(z_i^TD|d_i),  each N(mu_p(d_i), sigma^2_p(d_i)),  i = L-1 ... 1
        p(x|z)       = likelihood(d_0)

    The guide is a stochastic pass upwards along a path d~ of its own, and then one downwards along the model's d:

        d~_i         = f~_i(d~_i-1 + V_i z_i-1^BU),  i = 1 ... L  (d~_1 = f~_1(V_1 x))
        q(z_i^BU|x, z_<i^BU)        = N(mu_q(d~_i), sigma^2_q(d~_i)),  i = 1 ... L-1
        q(z_L|x, z_<L^BU)           = N(mu_q(d~_L), sigma^2_q(d~_L))
        q(z_i^TD|x, z_<i^BU, z_>i)  = the precision merge of N(mu^(d~_i), sigma^2^(d~_i)) and p(z_i^TD|d_i)

    (Section 3 there; f and f~ are residual blocks.) Sites are `"zL"`, `"z1_bu"`, `"z1_td"` ... Since the guide samples
    the BU half of the hierarchy before its top, estimators with closed-form KLs refuse it, as bottom-up guides.

    Deviations from the paper: its q(z_i^TD|.) is a network of d~_i and d_i together, and the ladder's merge here
    (Sonderby et al. 2016, eqs. 17-18); d_i+1 and z_i+1 are added up where it concatenates them; its networks are
    convolutional with weight normalisation, these are dense, and what blocks and z add to d starts scaled by depth
    instead (Child 2021).

    Args:
        x_dim: size D of the data `[B, D]`.
        z_dims: sizes of z_1 ... z_L, nearest the data first; below the top, of either half.
        hidden_dim: width of both paths.
        likelihood: `(in_dim, x_dim) -> nn.Module` that maps features to a distribution over x.
        num_blocks: residual blocks of two hidden layers in each step of a path; 0 makes every conditional linear.
        activation: makes the nonlinearity, which keeps the width.
        min_variance: floor of the latent variances. A layer without use shrinks in p and q together, at no cost, and
            the noise of gradients grows with its precision.

    Raises:
        ValueError: there is no layer, or a size is not positive.

    >>> structure = BidirectionalLadderVAE(9, z_dims=(3, 2), hidden_dim=8)
    >>> [structure.num_layers, len(structure.prior)]
    [2, 1]
    """

    def __init__(
        self,
        x_dim: int,
        z_dims: Sequence[int] = (40, 36, 32, 28, 24, 20, 16, 12, 8, 4),
        hidden_dim: int = 256,
        *,
        likelihood: Callable[[int, int], nn.Module] = Bernoulli,
        num_blocks: int = 1,
        activation: Callable[[], nn.Module] = nn.LeakyReLU,
        min_variance: float = 1e-2,
    ):
        super().__init__()
        if min((x_dim, *z_dims, hidden_dim)) < 1 or not len(z_dims) or num_blocks < 0:
            raise ValueError(
                f"x_dim is {x_dim}, z_dims {tuple(z_dims)}, hidden_dim {hidden_dim}, num_blocks {num_blocks}; give at "
                "least one layer, sizes of at least 1 and num_blocks of at least 0"
            )
        self.z_dims, self.hidden_dim = tuple(z_dims), hidden_dim
        gain = (max(num_blocks, 1) * len(z_dims)) ** -0.5

        def step(in_dim: int, gain_of_inlet: float = gain) -> Onwards:
            blocks = (Residual(linear, hidden_dim, gain=gain, activation=activation) for _ in range(num_blocks))
            return Onwards(linear(in_dim, hidden_dim, gain=gain_of_inlet), nn.Sequential(*blocks))

        def gaussian(size: int) -> Normal:
            return Normal(hidden_dim, size, gain=SMALL, min_variance=min_variance)

        sizes = [*(2 * size for size in self.z_dims[:-1]), self.z_dims[-1]]  # BU and TD together
        self.bottom_up = nn.ModuleList([step(x_dim, 1.0), *map(step, self.z_dims[:-1])])
        self.evidence = nn.ModuleList(map(gaussian, sizes))
        self.top_down = nn.ModuleList(Shared(step(size)) for size in sizes[1:])
        self.prior = nn.ModuleList(Shared(gaussian(size)) for size in sizes[:-1])
        self.decoder = step(sizes[0])
        self.likelihood = likelihood(hidden_dim, x_dim)

    @property
    def num_layers(self) -> int:
        """L, the number of stochastic layers."""
        return len(self.z_dims)

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """p(x, z_1 ... z_L) for `x` of `[B, D]`; `y` is ignored."""
        size = self.z_dims[-1]
        top = dist.Normal(x.new_zeros(size), x.new_ones(size)).to_event(1)
        with pyro.plate("data", len(x), dim=-1):
            d, z = None, [pyro.sample(f"z{self.num_layers}", top)]
            for i in reversed(range(self.num_layers - 1)):
                d = self.top_down[i](d, *z)
                p = self.prior[i](d)
                bu, td = _halves(p.mean, p.variance)
                z = [pyro.sample(f"z{i + 1}_bu", normal(*bu)), pyro.sample(f"z{i + 1}_td", normal(*td))]
            return pyro.sample("x", self.likelihood(self.decoder(d, *z)), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """q(z_1^BU|x) ... q(z_L|x, z_<L^BU) ... q(z_1^TD|x, z_>1) for `x` of `[B, D]`; `y` is ignored."""
        with pyro.plate("data", len(x), dim=-1):
            d_up, bu, evidence = self._upwards(x)
            d, z = None, [pyro.sample(f"z{self.num_layers}", self.evidence[-1](d_up))]
            for i in reversed(range(self.num_layers - 1)):
                d = self.top_down[i](d, *z)
                p = self.prior[i](d)
                _, prior = _halves(p.mean, p.variance)
                z = [bu[i], pyro.sample(f"z{i + 1}_td", normal(*precision_merge(*evidence[i], *prior)))]

    def _upwards(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Moments]]:
        """d~_L, the draws z_i^BU, and the evidence for z_i^TD, i = 1 ... L-1."""
        d, z, draws, evidence = None, x, [], []
        for i in range(self.num_layers - 1):
            d = self.bottom_up[i](d, z)
            bu, td = _halves(*self.evidence[i].moments(d))
            z = pyro.sample(f"z{i + 1}_bu", normal(*bu))
            draws.append(z)
            evidence.append(td)
        return self.bottom_up[-1](d, z), draws, evidence


def _halves(mu: Tensor, variance: Tensor) -> tuple[Moments, Moments]:
    """The moments of z_i^BU and z_i^TD, from those of both together."""
    return tuple(zip(mu.chunk(2, -1), variance.chunk(2, -1), strict=True))
