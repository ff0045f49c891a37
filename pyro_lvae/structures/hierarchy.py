"""A hierarchy of Gaussian latent layers with a bottom-up guide; and its generative half alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from ..conditionals import Bernoulli, Normal
from ..nets import MLP, Concat, concatenated


class GaussianHierarchy(nn.Module):
    r"""The generative model that hierarchical and ladder VAEs have in common.

        p(z_L)       = N(0, I)
        p(z_i|z_i+1) = N(mu_p,i(z_i+1), sigma^2_p,i(z_i+1)),  i = L-1 ... 1
        p(x|z_1)     = likelihood(MLP(z_1))

    (Sonderby et al. 2016, eqs. 1-4.) With `skip` every layer sees all that are above it, p(z_i|z_i+1 ... z_L) and
    p(x|z_1 ... z_L). Sites are `"z1"` ... `"zL"` and `"x"`.

    Args:
        x_dim: size D of the data `[B, D]`.
        z_dims: sizes of z_1 ... z_L, nearest the data first.
        hidden_dims: MLP widths, one a layer: `hidden_dims[i]` belongs to the networks between
            layer i and the one below it, in both directions.
        likelihood: `(in_dim, x_dim) -> nn.Module` that maps features to a distribution over x.
        skip: connect each layer to all below it, not to the next one alone (as in BIVA's model: Maaloe et al. 2019).
        num_hidden: hidden layers in every MLP; 0 makes every conditional linear.
        batch_norm: batch norm on the hidden layers.
        head_batch_norm: batch norm on the Gaussian heads too; `None` follows `batch_norm`.
        activation: makes the nonlinearity.
        min_variance: floor of the latent variances.
        decoder_num_hidden: hidden layers of the MLP below z_1; `None` follows `num_hidden`.
        decoder_activation: its nonlinearity; `None` follows `activation`.
    """

    def __init__(
        self,
        x_dim: int,
        z_dims: Sequence[int] = (64, 32, 16, 8, 4),
        hidden_dims: Sequence[int] = (512, 256, 128, 64, 32),
        *,
        likelihood: Callable[[int, int], nn.Module] = Bernoulli,
        skip: bool = False,
        num_hidden: int = 2,
        batch_norm: bool = True,
        head_batch_norm: bool | None = None,
        activation: Callable[[], nn.Module] = nn.LeakyReLU,
        min_variance: float = 1e-5,
        decoder_num_hidden: int | None = None,
        decoder_activation: Callable[[], nn.Module] | None = None,
    ):
        super().__init__()
        _check_sizes(x_dim, z_dims, hidden_dims)
        self.z_dims, self.hidden_dims = tuple(z_dims), tuple(hidden_dims)
        self._mlp_options = dict(num_layers=num_hidden, batch_norm=batch_norm, activation=activation)
        self._head_options = dict(
            batch_norm=batch_norm if head_batch_norm is None else head_batch_norm, min_variance=min_variance
        )
        self.skip = skip
        self.top_down = self._top_down()
        of_decoder = dict(num_layers=decoder_num_hidden, activation=decoder_activation)
        self.decoder = self._mlp(self._dim_from(0), 0, **{k: v for k, v in of_decoder.items() if v is not None})
        self.likelihood = likelihood(self.decoder.out_dim, x_dim)

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """p(x, z_1 ... z_L) for `x` of `[B, D]`; `y` is ignored."""
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("x", self._given(self._latents(x)), obs=x)

    def _latents(self, x: Tensor) -> list[Tensor]:
        """Samples z_L ... z_1, inside the plate."""
        z = [pyro.sample(f"z{self.num_layers}", self._prior(x))]
        for i in reversed(range(self.num_layers - 1)):
            z.append(pyro.sample(f"z{i + 1}", self.top_down[i](*self._seen(z))))
        return z

    def _given(self, z: list[Tensor]) -> dist.TorchDistribution:
        """p(x|z_L ... z_1), or without `skip` p(x|z_1)."""
        return self.likelihood(self.decoder(concatenated(z) if self.skip else z[-1]))

    def _seen(self, z: list[Tensor]) -> list[Tensor]:
        """Of z_L ... z_i+1 those that layer i sees."""
        return z if self.skip else z[-1:]

    def _dim_from(self, i: int) -> int:
        """Size of what is seen of the layers from `z_dims[i]` upwards."""
        return sum(self.z_dims[i:]) if self.skip else self.z_dims[i]

    @property
    def num_layers(self) -> int:
        """L, the number of stochastic layers."""
        return len(self.z_dims)

    def _prior(self, x: Tensor) -> dist.TorchDistribution:
        size = self.z_dims[-1]
        return dist.Normal(x.new_zeros(size), x.new_ones(size)).to_event(1)

    def _top_down(self) -> nn.ModuleList:
        """Networks of z_i+1, or with `skip` of z_L ... z_i+1, to N(mu_i, sigma^2_i), for i = 1 ... L-1."""
        return nn.ModuleList(
            self._gaussian(self._dim_from(i + 1), i + 1, self.z_dims[i], Concat if self.skip else nn.Sequential)
            for i in range(self.num_layers - 1)
        )

    def _mlp(self, in_dim: int, layer: int, **other) -> MLP:
        return MLP(in_dim, self.hidden_dims[layer], **self._mlp_options | other)

    def _head(self, in_dim: int, out_dim: int) -> Normal:
        return Normal(in_dim, out_dim, **self._head_options)

    def _gaussian(
        self, in_dim: int, layer: int, out_dim: int, chain: type[nn.Sequential] = nn.Sequential
    ) -> nn.Sequential:
        mlp = self._mlp(in_dim, layer)
        return chain(mlp, self._head(mlp.out_dim, out_dim))


class HierarchicalVAE(GaussianHierarchy):
    r"""L latent layers and a bottom-up guide.

        q(z_1|x)     = N(mu_q,1(x), sigma^2_q,1(x))
        q(z_i|z_i-1) = N(mu_q,i(z_i-1), sigma^2_q,i(z_i-1)),  i = 2 ... L

    (Rezende et al. 2014; Sonderby et al. 2016, eqs. 8-10.) `skip` is the model's; the guide stays this chain. It
    samples z_1 first and the model z_L first: `TraceMeanField_ELBO` is no bound here and is refused.

    >>> HierarchicalVAE(x_dim=9, z_dims=(3, 2), hidden_dims=(8, 4)).num_layers
    2
    """

    def __init__(
        self,
        x_dim: int,
        z_dims: Sequence[int] = (64, 32, 16, 8, 4),
        hidden_dims: Sequence[int] = (512, 256, 128, 64, 32),
        **options,
    ):
        super().__init__(x_dim, z_dims, hidden_dims, **options)
        below = (x_dim, *self.z_dims[:-1])
        self.bottom_up = nn.ModuleList(self._gaussian(below[i], i, z) for i, z in enumerate(self.z_dims))

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """q(z_1|x) q(z_2|z_1) ... q(z_L|z_L-1) for `x` of `[B, D]`; `y` is ignored."""
        with pyro.plate("data", len(x), dim=-1):
            z = x
            for i, q in enumerate(self.bottom_up):
                z = pyro.sample(f"z{i + 1}", q(z))


def _check_sizes(x_dim: int, z_dims: Sequence[int], hidden_dims: Sequence[int]) -> None:
    for name, given in (("z_dims", z_dims), ("hidden_dims", hidden_dims)):
        if not hasattr(given, "__len__"):
            raise TypeError(f"{name} is {given!r}; expected the sizes of the layers one after another, as in (64, 32)")
    if len(z_dims) < 1 or len(z_dims) != len(hidden_dims):
        raise ValueError(
            f"z_dims has {len(z_dims)} layers {tuple(z_dims)} and hidden_dims {len(hidden_dims)} "
            f"{tuple(hidden_dims)}; give one hidden size for each latent layer, and at least one layer"
        )
    for name, sizes in (("x_dim", (x_dim,)), ("z_dims", z_dims), ("hidden_dims", hidden_dims)):
        if not all(isinstance(size, Integral) and size >= 1 for size in sizes):
            raise ValueError(f"{name} is {sizes if name != 'x_dim' else x_dim}; sizes are whole numbers of at least 1")
