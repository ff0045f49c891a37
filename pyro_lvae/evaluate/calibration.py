"""Whether a likelihood says how sure it is: predicted probabilities against frequencies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..traces import Ledger, evaluating, ledger
from .chunks import check_rows


@dataclass(frozen=True)
class Calibration:
    """Predicted probabilities and the frequencies that were found, bin by bin, `[bins]` each; empty bins are NaN.

    Attributes:
        predicted: mean of the predictions in a bin.
        observed: how often it came true.
        count: predictions in the bin.
    """

    predicted: Tensor
    observed: Tensor
    count: Tensor

    @property
    def error(self) -> float:
        """Expected calibration error: the mean of |predicted - observed| over all predictions."""
        gaps = (self.predicted - self.observed).abs().nan_to_num()
        return (gaps * self.count / self.count.sum()).sum().item()


def reliability(probabilities: Tensor, outcomes: Tensor, num_bins: int = 15) -> Calibration:
    """Probabilities in [0, 1] of events, and whether each came true, in bins of equal width (Guo et al. 2017, eq. 3).

    For a classifier, give the largest probability of each row, and whether that class was right.
    """
    if probabilities.shape != outcomes.shape or num_bins < 1:
        raise ValueError(
            f"probabilities of shape {tuple(probabilities.shape)}, outcomes of {tuple(outcomes.shape)}, {num_bins} "
            "bins; expected one outcome each, and at least one bin"
        )
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError(
            f"probabilities lie between {probabilities.min():g} and {probabilities.max():g}; expected 0 to 1"
        )
    p, outcomes = probabilities.detach().flatten().double(), outcomes.detach().flatten().double()
    bins = (p * num_bins).long().clamp(0, num_bins - 1)
    count = torch.bincount(bins, minlength=num_bins)
    sums = [torch.bincount(bins, weights=w, minlength=num_bins) for w in (p, outcomes)]
    return Calibration(sums[0] / count, sums[1] / count, count)


def calibration(
    draws: Iterable[nn.Module], x: Tensor, num_samples: int = 10, *, y: Tensor | None = None, num_bins: int = 15
) -> Calibration:
    """How well p(x_d | z), with z from the guide, averaged over z and weights, foretells each entry of `x`.

    Of binary entries: the probability of a 1 against its frequency. Of continuous ones: the probability F(x_d) of
    falling below the value that came, whose distribution should be uniform; then `predicted` are the levels, and
    `observed` how often F lay below.

    Args:
        draws: structures with their weights put in; `[structure]` for a plain one.
        x: held-out data `[N, D]`.
        num_samples: draws of z for each datum and structure.
        num_bins: bins, or levels.
    """
    if isinstance(draws, nn.Module):
        raise ValueError(
            f"draws is a {type(draws).__name__}; give a list of structures: [structure], or with a posterior over "
            "weights [bayesian.draw() for _ in range(10)]"
        )
    parts = [_predicted(structure, x, y, num_samples) for structure in draws]
    if not parts:
        raise ValueError("there are no draws; give at least one structure with its weights")
    p, is_binary = torch.stack([part for part, _ in parts]).mean(0), parts[0][1]
    if is_binary:
        return reliability(p, x > 0.5, num_bins)
    levels = (torch.arange(num_bins, dtype=torch.double) + 1) / (num_bins + 1)
    observed = torch.stack([(p <= level).double().mean() for level in levels])
    return Calibration(levels, observed.cpu(), torch.full((num_bins,), p.numel()))


def _predicted(structure: nn.Module, x: Tensor, y: Tensor | None, num_samples: int) -> tuple[Tensor, bool]:
    """Mean over z of the probability of a 1, or of F(x): `[N, D]`; and which of the two it is."""
    x, y = check_rows(structure, x, y)
    args = (x,) if y is None else (x, y)
    total = torch.zeros_like(x)
    with evaluating(structure):
        for _ in range(num_samples):
            sites = ledger(structure.model, structure.guide, *args)
            entries = getattr(sites["x"].p, "base_dist", sites["x"].p)
            is_binary = entries.support is constraints.boolean
            total += _over_enumerated(entries.mean if is_binary else _below(entries, x), sites)
    return total / num_samples, is_binary


def _over_enumerated(of_entries: Tensor, sites: Ledger) -> Tensor:
    """`[..., N, D]` averaged over enumerated sites c, by q(c | .) of the guide or else by p(c | z): `[N, D]`."""
    if of_entries.ndim == 2:
        return of_entries
    q = sites.guide_probabilities()
    log_p = sum(site.log_p for name, site in sites.items() if site.is_local and name != "x")
    value, weights = torch.broadcast_tensors(of_entries, (log_p if q is None else q.log())[..., None])
    return (weights.flatten(0, -3).softmax(0) * value.flatten(0, -3)).sum(0)


def _below(entries, x: Tensor) -> Tensor:
    """F(x), entry by entry."""
    try:
        if not entries.support.is_discrete and entries.batch_shape[-1:] == x.shape[-1:]:
            return entries.cdf(x)
    except NotImplementedError:
        pass
    raise ValueError(
        f"the likelihood is {type(entries).__name__}; calibration reads binary entries, or independent continuous ones "
        "with a cdf"
    )
