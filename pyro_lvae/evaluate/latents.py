"""What the latent layers hold: KL per layer, active units, encodings."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from pyro.distributions import Categorical
from pyro.distributions.util import scale_and_mask
from torch import Tensor, nn
from torch.distributions import Independent

from ..traces import Ledger, Site, evaluating, guide_sites, known_mean
from .chunks import MEMORY, GuideAlone, check_rows, chunked_ledgers

ACTIVE = 0.01  # variance of the posterior mean above which a unit counts as active


def kl_per_layer(
    structure: nn.Module, x: Tensor, num_samples: int = 10, *, y: Tensor | None = None, memory: int = MEMORY
) -> dict[str, float]:
    r"""Each layer's share of the KL: E_q[log q(z_i|.) - log p(z_i|.)], mean over the data, nats per datum.

    The shares sum to KL(q(z|x) || p(z)). Estimated from `num_samples` draws, so it holds for every
    structure. In a bottom-up guide a single share is no KL divergence, and may be negative. Of `BayesianWeights` every
    pass draws the weights anew, here and in `posterior_activity`; `.mean()` and `.draw()` hold them.

    Returns:
        {site: nats}, the layer nearest the data first.
    """
    x, y = check_rows(structure, x, y)
    totals: dict[str, float] = {}
    for _, _, sites in chunked_ledgers(structure, x, y, num_samples, memory):
        for name, share in sites.kl_shares().items():
            totals[name] = totals.get(name, 0.0) + share.sum().item()
    return {name: totals[name] / (num_samples * len(x)) for name in sorted(totals, key=depth)}


def kl_per_unit(
    structure: nn.Module, x: Tensor, num_samples: int = 10, *, y: Tensor | None = None, memory: int = MEMORY
) -> dict[str, Tensor]:
    r"""Each unit's share of its layer's KL: E_q[log q(u|.) - log p(u|.)], mean over the data, nats per datum.

    Of the layers whose units are independent given all that the guide draws, under guide and model alike; the shares
    of a layer sum to that of `kl_per_layer`. A unit with less than 0.01 nats is commonly called inactive (Sonderby et
    al. 2016). In a layer below another that says more than the variance of its posterior mean: its prior moves too.

    Returns:
        {site: `[z_i]`}, the layer nearest the data first.
    """
    x, y = check_rows(structure, x, y)
    totals: dict[str, Tensor] = {}
    for _, _, sites in chunked_ledgers(structure, x, y, num_samples, memory):
        for name, site in _layers(sites).items():
            if (share := _shares_of_units(site, sites)) is not None:
                totals[name] = totals.get(name, 0.0) + share.double().flatten(0, -2).sum(0)
    return {name: totals[name] / (num_samples * len(x)) for name in sorted(totals, key=depth)}


def _shares_of_units(site: Site, sites: Ledger) -> Tensor | None:
    """log q(u|.) - log p(u|.), `[K, B, z_i]`; `None` where the units of p or q depend on each other."""
    if not all(isinstance(d, Independent) and not d.base_dist.event_shape for d in (site.p, site.q)):
        return None
    share = site.q.base_dist.log_prob(site.value) - site.p.base_dist.log_prob(site.value)
    if share.shape != site.value.shape and not sites.guide_enumerates:  # the model enumerates what p depends on
        return None
    mask = site.mask
    if isinstance(mask, Tensor):
        mask = mask.reshape(*mask.shape, *[1] * len(site.q.event_shape))
    share = scale_and_mask(share, 1.0, mask)
    return _over_guide(share.flatten(share.ndim - len(site.q.event_shape)), sites)


def _over_guide(of_units: Tensor, sites: Ledger) -> Tensor:
    """`[..., z_i]` in expectation over what the guide enumerates, `[K, B, z_i]`."""
    q = sites.guide_probabilities()
    return of_units if q is None else (q[..., None] * of_units).flatten(0, -4).sum(0)


@dataclass(frozen=True)
class Activity:
    """How the posterior means of one layer move with the data.

    Attributes:
        mean: posterior means E_q[z_i | x_n], `[N, z_i]`.
        variance: their variance over the data, one a unit, `[z_i]`; the Monte Carlo error that K
            draws leave in the means has been taken off, so it may fall slightly below zero.
    """

    mean: Tensor
    variance: Tensor

    @property
    def active(self) -> int:
        """Units whose variance exceeds 0.01."""
        return int((self.variance > ACTIVE).sum())


def posterior_activity(
    structure: nn.Module, x: Tensor, num_samples: int = 100, *, y: Tensor | None = None, memory: int = MEMORY
) -> dict[str, Activity]:
    r"""Posterior means of every layer and A_u = Var_x(E_q[u | x]) of its units (Burda et al. 2016, section 5).

    E_q[z_i | x] averages the conditional means of q(z_i | .) over `num_samples` draws of the other
    layers. Its Monte Carlo error would add s^2 / K to the variance over the data and make dead
    units look alive; that is subtracted.

    Returns:
        {site: Activity}, the layer nearest the data first.
    """
    x, y = check_rows(structure, x, y)
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for rows, _, sites in chunked_ledgers(GuideAlone(structure), x, y, num_samples, memory):
        for name, site in _layers(sites).items():
            means = _conditional_mean(site, sites)
            if name not in sums:
                sums[name], squares[name] = (means.new_zeros(len(x), means.shape[2], dtype=torch.double) for _ in "sq")
            sums[name][rows] += means.double().sum(0)
            squares[name][rows] += means.double().square().sum(0)
    return {name: _activity(sums[name], squares[name], num_samples) for name in sorted(sums, key=depth)}


def active_units(structure: nn.Module, x: Tensor, num_samples: int = 100, **options) -> dict[str, int]:
    """Units whose posterior mean varies over the data by more than 0.01: {site: count}."""
    activity = posterior_activity(structure, x, num_samples, **options)
    return {name: layer.active for name, layer in activity.items()}


def encode(structure: nn.Module, x: Tensor, num_samples: int = 100, **options) -> dict[str, Tensor]:
    """Posterior means E_q[z_i | x]: {site: `[N, z_i]`}."""
    activity = posterior_activity(structure, x, num_samples, **options)
    return {name: layer.mean for name, layer in activity.items()}


def posterior_samples(structure: nn.Module, x: Tensor, *, y: Tensor | None = None) -> dict[str, Tensor]:
    """One draw of every layer from q(z | x): {site: `[N, z_i]`}, the layer nearest the data first."""
    x, y = check_rows(structure, x, y)
    with evaluating(structure):
        sites = guide_sites(structure, x, y)
    return {name: sites[name][1] for name in sorted(sites, key=depth)}


def _layers(sites: Ledger) -> dict[str, Site]:
    """The local latents of the guide, but for class numbers, whose mean says nothing."""
    found = {name: site for name, site in sites.latents.items() if site.is_local and site.q is not None}
    return {n: s for n, s in found.items() if not isinstance(s.q, Categorical)}


def _conditional_mean(site: Site, sites: Ledger) -> Tensor:
    """E[z_i | the draws of the other layers], `[K, B, z_i]`; the draw itself where q has no mean."""
    known = known_mean(site.q)
    mean = site.value if known is None else known.expand(site.value.shape)
    mean = mean.reshape(*mean.shape[: mean.ndim - len(site.q.event_shape)], -1)
    return _over_guide(mean, sites)


def _activity(total: Tensor, squares: Tensor, num_samples: int) -> Activity:
    mean = total / num_samples
    variance = mean.var(0, correction=1) if len(mean) > 1 else torch.zeros_like(mean[0])
    if num_samples > 1:
        within = (squares / num_samples - mean.square()).clamp_min(0) / (num_samples - 1)
        variance = variance - within.mean(0)
    return Activity(mean.float(), variance.float())


def depth(name: str) -> tuple:
    """z1, z2 ... z10 in order of depth, the parts of a layer (z1_bu, z1_td) together, other names after them."""
    number = re.match(r"z(\d+)(_|$)", name)
    return (0, int(number[1]), name) if number else (1, 0, name)
