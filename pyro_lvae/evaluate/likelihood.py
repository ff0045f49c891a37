"""Estimates of log p(x) and of its lower bound, one number a datum."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..conditionals import is_point
from ..objectives.support import names
from ..traces import Ledger, evaluating, forked_noise, ledger
from .chunks import MEMORY, check_rows, chunked


def log_likelihood(
    structure: nn.Module,
    x: Tensor,
    num_samples: int = 5000,
    *,
    y: Tensor | None = None,
    memory: int = MEMORY,
    compile: bool | Literal["auto"] = "auto",
) -> Tensor:
    r"""log p(x) by importance sampling with the guide as proposal:

        log p(x_n) ~ log 1/K sum_k p(x_n, z_nk) / q(z_nk | x_n),  z_nk ~ q(z | x_n)

    (Rezende et al. 2014, appendix E; Burda et al. 2016.) A lower bound in expectation, tight as K
    grows. Random numbers come from torch's default generator.

    Args:
        x: data `[N, D]`.
        num_samples: K.
        y: labels `[N, ...]`, where the structure takes them; the result is then log p(x | y) or
            log p(x, y), as the model has it. (Those of `SemiSupervisedVAE`, `ADGM` and `SDGM` count in training alone:
            here y is summed out, and the result is log p(x).)
        memory: bytes that a chunk of draws may take, counted as if nothing in it were freed.
        compile: run the chunks as one compiled graph; "auto" does so where it pays.

    Returns:
        Nats, `[N]`.
    """
    x, y = check_rows(structure, x, y)
    out = torch.full((len(x),), -math.inf, dtype=x.dtype, device=x.device)
    for rows, _, total in chunked(structure, x, y, num_samples, _log_total, memory=memory, compile=compile):
        out[rows] = torch.logaddexp(out[rows], total)
    return out - math.log(num_samples)


def elbo(
    structure: nn.Module, x: Tensor, num_samples: int = 1, *, y: Tensor | None = None, memory: int = MEMORY
) -> Tensor:
    """The evidence lower bound of each datum at beta = 1, by `num_samples` draws: nats, `[N]`."""
    x, y = check_rows(structure, x, y)
    out = x.new_zeros(len(x))
    for rows, _, total in chunked(structure, x, y, num_samples, _total, memory=memory):
        out[rows] += total / num_samples
    return out


def _log_total(sites: Ledger) -> Tensor:
    refuse_global_sites(sites)
    refuse_points(sites)
    return sites.local_log_evidence().logsumexp(0)


def _total(sites: Ledger) -> Tensor:
    refuse_global_sites(sites)
    return sites.local_log_weight().sum(0)


def has_likelihood(structure: nn.Module, x: Tensor, y: Tensor | None = None) -> bool:
    """Whether the guide has densities to weigh its draws by: that of an autoencoder has points."""
    with evaluating(structure), forked_noise(x.device):
        return not _points(ledger(structure.model, structure.guide, *((x,) if y is None else (x, y))))


def refuse_points(sites: Ledger) -> None:
    """Raise `ValueError` where the guide has no densities to weigh its draws by."""
    if points := _points(sites):
        raise ValueError(
            f"the guide of {', '.join(map(repr, points))} is a point mass, as that of an autoencoder: there is no "
            "estimate of p(x) from it; `elbo` gives its objective"
        )


def _points(sites: Ledger) -> list[str]:
    return [n for n, s in sites.latents.items() if s.is_local and s.q is not None and is_point(s.q)]


def refuse_global_sites(sites: Ledger) -> None:
    """Raise `ValueError` where log p(x) of one datum is no number of its own."""
    if sites.global_sites:
        raise ValueError(
            f"site(s) {names(sites.global_sites)} lie outside the data plate: p(x) of one datum then "
            "depends on a draw that all data share. Condition them first (poutine.condition); of BayesianWeights, give "
            "bayesian.draw() or bayesian.mean(), or take predictive_log_likelihood"
        )
