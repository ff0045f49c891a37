"""The convolutional ladder: many latent layers of feature maps, several at each resolution of an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..conditionals import Bernoulli, Normal, normal, precision_merge
from ..nets import SMALL, Conv, Onwards, Residual, Shared


class ConvLadderVAE(nn.Module):
    r"""A ladder of L layers of feature maps over images, with skip connections from every layer to all below.

    A deterministic path h upwards gives each layer its evidence, a path d downwards remembers all that is above:

        h_i = f~_i(h_i-1),  i = 1 ... L,  h_0 = conv(x)
        d_i = f_i(d_i+1 + W_i z_i+1),  i = L-1 ... 0  (without d_i+1 at the top)

        p(z_L)          = N(0, I)
        p(z_i|z_>i)     = N(mu_p(d_i), sigma^2_p(d_i)),  i = L-1 ... 1
        p(x|z)          = likelihood(d_0), pixel by pixel
        q(z_L|x)        = N(mu^(h_L), sigma^2^(h_L))
        q(z_i|z_>i, x)  = the precision merge of N(mu^(h_i), sigma^2^(h_i)) and p(z_i|z_>i)

    f and f~ are residual blocks of 3x3 convolutions; where the resolution changes between two layers, a convolution
    of stride 2 halves it in f~_i, and repeated pixels and a convolution double it in f_i. A pass upwards and a
    stochastic one downwards along a residual path that model and guide share are those of the ResNet VAE (Kingma et al.
    2016), of NVAE (Vahdat & Kautz 2020) and of the very deep VAE (Child 2021); the merge is the ladder's (Sonderby et
    al. 2016, eqs. 17-18).

    Deviations from the first three: q sees d_i through the merge alone, where theirs is a network of h_i and d_i; a
    block is two plain convolutions; the posteriors have no flows. As with Child, nothing is normalised and a block
    starts scaled by depth: the bound of a datum then depends on neither the rest of the batch nor the particles.

    Latents are rows like the data: site `"z1"` is `[B, z_channels * H_1 * W_1]`, map by map.

    Args:
        x_dim: size D of the data `[B, D]`, images as rows, channel by channel.
        shape: (C, H, W) or (H, W) of the images; left out, one channel and a square.
        layers: number of latent layers at each resolution, the full one first; each further one has half the height
            and width, rounded up. Their sum is L. Go on until the top layer is small: one that holds all that is to be
            known of x takes it, and the layers below stay unused (`KLBalanced` wakes them).
        channels: feature maps of both paths at each resolution.
        z_channels: maps of a latent layer.
        likelihood: `(in_dim, x_dim) -> nn.Module` that maps features to a distribution over x by linear layers; they
            become 1x1 convolutions of feature maps, as `over_pixels` has it.
        activation: makes the nonlinearity, which keeps the width.
        min_variance: floor of the latent variances. A layer without use shrinks in p and q together, at no cost, and
            the noise of gradients grows with its precision.

    Raises:
        ValueError: the shape does not hold D pixels; or there is no shape, and D is no square; or `layers` and
            `channels` do not fit each other.

    >>> ladder = ConvLadderVAE(12, shape=(3, 4), layers=(2, 1), channels=(8, 8), z_channels=2)
    >>> ladder.z_dims
    (24, 24, 8)
    """

    def __init__(
        self,
        x_dim: int,
        shape: Sequence[int] | None = None,
        layers: Sequence[int] = (0, 1, 2, 2, 1),
        channels: Sequence[int] = (16, 32, 64, 64, 64),
        z_channels: int = 4,
        *,
        likelihood: Callable[[int, int], nn.Module] = Bernoulli,
        activation: Callable[[], nn.Module] = nn.SiLU,
        min_variance: float = 1e-2,
    ):
        super().__init__()
        self.shape = image_shape(x_dim, shape)
        _check_resolutions(layers, channels, z_channels)
        self.layers, self.channels, self.z_channels = tuple(layers), tuple(channels), z_channels
        self._sides = _halved(self.shape[1:], len(self.layers))
        at = [r for r, number in enumerate(layers) for _ in range(number)]  # the resolution of each layer
        self.z_dims = tuple(z_channels * math.prod(self._sides[r]) for r in at)
        self._residual = partial(Residual, Conv, gain=len(at) ** -0.5, activation=activation)
        self._head = partial(Normal, min_variance=min_variance)
        self.stem = nn.Sequential(nn.Unflatten(-1, self.shape), Conv(self.shape[0], self.channels[0]))
        self.bottom_up = nn.ModuleList(self._upwards_step(below, r) for below, r in pairwise((0, *at)))
        self.evidence = nn.ModuleList(self._gaussian(r) for r in at)
        self.top_down = nn.ModuleList(Shared(self._downwards_step(above, r)) for r, above in pairwise(at))
        self.prior = nn.ModuleList(Shared(self._gaussian(r, gain=SMALL)) for r in at[:-1])
        self.decoder = self._downwards_step(at[0], 0)
        self.likelihood = over_pixels(likelihood, self.channels[0], self.shape)

    @property
    def num_layers(self) -> int:
        """L, the number of stochastic layers."""
        return len(self.z_dims)

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """p(x, z_1 ... z_L) for `x` of `[B, D]`; `y` is ignored."""
        size = self.z_dims[-1]
        top = dist.Normal(x.new_zeros(size), x.new_ones(size)).to_event(1)
        with pyro.plate("data", len(x), dim=-1):
            d, z = None, pyro.sample(f"z{self.num_layers}", top)
            for i in reversed(range(self.num_layers - 1)):
                d = self.top_down[i](d, z)
                z = pyro.sample(f"z{i + 1}", self.prior[i](d))
            return pyro.sample("x", self.likelihood(self.decoder(d, z)), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """q(z_L|x) q(z_L-1|z_L, x) ... q(z_1|z_>1, x) for `x` of `[B, D]`; `y` is ignored."""
        *evidence, top = self._upwards(x)
        with pyro.plate("data", len(x), dim=-1):
            d, z = None, pyro.sample(f"z{self.num_layers}", normal(*top))
            for i in reversed(range(self.num_layers - 1)):
                d = self.top_down[i](d, z)
                p = self.prior[i](d)
                z = pyro.sample(f"z{i + 1}", normal(*precision_merge(*evidence[i], p.mean, p.variance)))

    def _upwards(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The evidence (mu^, sigma^2^) of each layer, i = 1 ... L, each `[B, z_i]`."""
        h, evidence = self.stem(x), []
        for up, head in zip(self.bottom_up, self.evidence, strict=True):
            h = up(h)
            evidence.append(head.moments(h))
        return evidence

    def _upwards_step(self, below: int, r: int) -> nn.Sequential:
        """f~ from resolution `below` to r."""
        halvings = (Conv(self.channels[s], self.channels[s + 1], stride=2) for s in range(below, r))
        return nn.Sequential(*halvings, self._residual(self.channels[r]))

    def _downwards_step(self, above: int, r: int) -> Onwards:
        """W and f from resolution `above` to r."""
        inlet = Conv(self.z_channels, self.channels[above], 1)
        maps = nn.Unflatten(-1, (self.z_channels, *self._sides[above]))
        doublings = (Conv(self.channels[s], self.channels[s - 1], size=self._sides[s - 1]) for s in range(above, r, -1))
        return Onwards(nn.Sequential(maps, inlet), nn.Sequential(*doublings, self._residual(self.channels[r])))

    def _gaussian(self, r: int, **options) -> nn.Module:
        """A distribution over a latent layer at resolution r."""
        head = partial(self._head, **options)
        return over_pixels(head, self.channels[r], (self.z_channels, *self._sides[r]))


def over_pixels(conditional: Callable[[int, int], nn.Module], channels: int, shape: Sequence[int]) -> nn.Module:
    """A conditional over rows `[..., C * H * W]`, given feature maps `[..., channels, H, W]` in place of features.

    Each of its linear layers becomes a 1x1 convolution, the same map at every pixel, whose bias starts at the mean over
    the pixels; what else it has, such as a variance for each entry, stays.

    Args:
        conditional: `(in_dim, out_dim) -> nn.Module` whose linear layers map features to parameters, a number for each
            entry or several: those of `pyro_lvae.conditionals`.
        channels: feature maps.
        shape: (C, H, W) of what it is a distribution over.

    Raises:
        ValueError: it has no linear layers, or one between other sizes.
    """
    made = conditional(channels, math.prod(shape))
    names = [name for name, layer in made.named_modules() if isinstance(layer, nn.Linear)]
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(made.get_submodule(parent), attribute, _pixelwise(made.get_submodule(name), channels, shape))
    if not names:
        raise ValueError(f"{type(made).__name__} has no linear layer that could become a convolution; give it one")
    return made


def _pixelwise(layer: nn.Linear, channels: int, shape: Sequence[int]) -> nn.Sequential:
    maps, rest = divmod(layer.out_features, math.prod(shape[1:]))
    if rest or layer.in_features != channels:
        raise ValueError(
            f"a linear layer from {layer.in_features} to {layer.out_features} cannot be a convolution of {channels} "
            f"feature maps over {shape[1]} x {shape[2]} pixels; map features to the parameters by linear layers alone"
        )
    convolution = Conv(channels, maps, 1, bias=layer.bias is not None)
    with torch.no_grad():
        convolution.weight.copy_(layer.weight.unflatten(0, (maps, -1))[:, 0, :, None, None])  # as the first pixel's
        if layer.bias is not None:
            convolution.bias.copy_(layer.bias.unflatten(0, (maps, -1)).mean(1))
    return nn.Sequential(convolution, nn.Flatten(-3))


def image_shape(x_dim: int, shape: Sequence[int] | None) -> tuple[int, int, int]:
    """(C, H, W) of images that are rows of D entries; see `ConvLadderVAE`."""
    if shape is None:
        side = math.isqrt(max(x_dim, 0))
        if side < 1 or side**2 != x_dim:
            raise ValueError(f"x_dim is {x_dim}, which is no square; give shape=(C, H, W) or (H, W) of the images")
        return (1, side, side)
    full = (1,) * (3 - len(shape)) + tuple(shape)
    if len(shape) not in (2, 3) or min(full) < 1 or math.prod(full) != x_dim:
        raise ValueError(
            f"shape is {tuple(shape)} and x_dim {x_dim}; expected (C, H, W) or (H, W) with C * H * W = {x_dim}"
        )
    return full


def _halved(sides: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Height and width at each of `count` resolutions."""
    return [tuple(-(-side // 2**r) for side in sides) for r in range(count)]


def _check_resolutions(layers: Sequence[int], channels: Sequence[int], z_channels: int) -> None:
    if len(layers) != len(channels) or min(layers, default=0) < 0 or sum(layers) < 1 or min(*channels, z_channels) < 1:
        raise ValueError(
            f"layers is {tuple(layers)}, channels {tuple(channels)} and z_channels {z_channels}; give a number of "
            "latent layers and of feature maps for each resolution, at least one layer in all and one map each"
        )
