"""Clusters that a mixture prior finds, and how well they match classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyro.distributions import Categorical, MixtureSameFamily
from torch import Tensor, nn

from ..traces import Ledger
from .chunks import MEMORY, GuideAlone, check_rows, chunked
from .likelihood import refuse_global_sites


def cluster_probabilities(
    structure: nn.Module, x: Tensor, num_samples: int = 10, *, y: Tensor | None = None, memory: int = MEMORY
) -> Tensor:
    r"""q(c|x) of a structure whose prior is a mixture over components c (Jiang et al. 2017, eq. 16):

        q(c|x) = E_q(z|x)[p(c|z)],  p(c|z) = pi_c p(z|c) / sum_c' pi_c' p(z|c')

    Args:
        x: data `[N, D]`.
        num_samples: draws of z for each row.
        y: labels `[N, ...]`, where the structure takes them.

    Returns:
        `[N, C]`, rows sum to 1.

    Raises:
        ValueError: no layer's prior is a mixture.
    """
    return _mean_over_draws(structure, x, y, num_samples, _probabilities, memory)


def _mean_over_draws(
    structure: nn.Module, x: Tensor, y: Tensor | None, num_samples: int, read: Callable[[Ledger], Tensor], memory: int
) -> Tensor:
    """The mean of what `read` adds up over the draws of a chunk, `[N, C]`."""
    x, y = check_rows(structure, x, y)
    out = None
    for rows, _, total in chunked(structure, x, y, num_samples, read, memory=memory):
        out = total.new_zeros(len(x), total.shape[-1]) if out is None else out
        out[rows] += total / num_samples
    return out


def _probabilities(sites: Ledger) -> Tensor:
    refuse_global_sites(sites)
    for site in sites.latents.values():
        if isinstance(site.p, MixtureSameFamily):
            given_c = site.p.component_distribution.log_prob(site.value.unsqueeze(-2))
            return (site.p.mixture_distribution.logits + given_c).softmax(-1).sum(0)
    raise ValueError(
        f"no prior of {', '.join(map(repr, sites.latents))} is a mixture; use VaDE, MixturePrior or VampPrior, or "
        "fit a mixture to `encode`"
    )


def clustering_accuracy(clusters: Tensor, labels: Tensor) -> float:
    """The share of data in the right class, clusters and classes matched one to one as well as can be.

    (Yang et al. 2010; Jiang et al. 2017, eq. 18.) The matching is the Hungarian method's.

    Args:
        clusters: numbers of the clusters, `[N]`.
        labels: numbers of the classes, `[N]`.

    >>> clustering_accuracy(torch.tensor([0, 0, 1, 1]), torch.tensor([5, 5, 2, 5]))
    0.75
    """
    from scipy.optimize import linear_sum_assignment

    if clusters.ndim != 1 or clusters.shape != labels.shape or len(labels) == 0:
        raise ValueError(
            f"clusters {tuple(clusters.shape)} and labels {tuple(labels.shape)}; expected two vectors [N] of one length"
        )
    (_, c), (_, y) = (v.cpu().unique(return_inverse=True) for v in (clusters, labels))
    counts = torch.zeros(int(c.max()) + 1, int(y.max()) + 1, dtype=torch.long)
    counts.index_put_((c, y), torch.ones_like(c), accumulate=True)
    matched = linear_sum_assignment(counts.numpy(), maximize=True)
    return counts[matched].sum().item() / len(labels)


def label_probabilities(
    structure: nn.Module, x: Tensor, num_samples: int = 10, *, y: Tensor | None = None, memory: int = MEMORY
) -> Tensor:
    r"""q(y|x) of a structure whose guide has a discrete latent "y", as `SemiSupervisedVAE`: `[N, C]`.

        q(y|x) = E_q(a|x)[q(y|a, x)],  a what the guide draws before y

    Args:
        x: data `[N, D]`.
        num_samples: draws for each row.

    Raises:
        ValueError: there is no such site.
    """
    return _mean_over_draws(GuideAlone(structure), x, y, num_samples, _labels, memory)


def _labels(sites: Ledger) -> Tensor:
    refuse_global_sites(sites)
    q = sites["y"].q if "y" in sites else None
    if not isinstance(q, Categorical):
        raise ValueError(f"the latents are {', '.join(map(repr, sites.latents))}: no Categorical 'y' is in the guide")
    return q.probs.expand(*sites.local_log_weight().shape, -1).sum(0)
