"""What is measured while a structure trains, and where a loss that is not finite comes from."""

from __future__ import annotations

import pyro
import torch
from torch import Tensor, nn

from .data import Dataset
from .traces import Ledger, evaluating, fixed_noise, ledger


def monitored(structure: nn.Module, data: Dataset, size: int, beta: dict[str, float], supervised: bool) -> dict:
    """The ELBOs and KLs of `EpochMetrics`, on `size` rows of either set, with the same noise at each call."""
    train, test = (
        _measured(structure, _args(rows, supervised)) for rows in (data.train_rows(size), data.test_rows(size))
    )
    with torch.no_grad():  # closed forms are computed only now
        global_kl = 0.0 - float(test.global_log_weight()) / len(data.x_train)  # without global sites 0, not -0
    return {
        "train_elbo": _mean(train.local_log_weight()) - global_kl,
        "test_elbo": _mean(test.local_log_weight()) - global_kl,
        "kl": {name: _mean(share) for name, share in test.kl_shares().items()},
        "beta": _in_short(beta, test),
        "global_kl": global_kl,
    }


def not_finite(structure: nn.Module, args: tuple) -> str:
    """Which densities are not finite on a new draw, in words."""
    with torch.no_grad(), pyro.validation_enabled(False):
        sites = ledger(structure.model, structure.guide, *args)
    densities = {(name, kind): getattr(s, kind) for name, s in sites.items() for kind in ("log_p", "log_q")}
    bad = [f"{kind} of {name!r}" for (name, kind), value in densities.items() if not torch.isfinite(value).all()]
    return f"not finite: {', '.join(bad)}" if bad else "every site is finite on a new draw, so it was a rare one"


def _args(rows: tuple[Tensor, Tensor | None], supervised: bool) -> tuple:
    return rows if supervised else rows[:1]


def _measured(structure: nn.Module, args: tuple) -> Ledger:
    with evaluating(structure), fixed_noise(args[0].device), pyro.validation_enabled(False):
        return ledger(structure.model, structure.guide, *args)


def _in_short(beta: dict[str, float], sites: Ledger) -> dict[str, float]:
    """The weights by site; those of many global sites that are all alike as one, "global"."""
    outside = {name: value for name, value in beta.items() if name in sites.global_sites}
    if len(outside) < 2 or len(set(outside.values())) > 1:
        return beta
    return {n: v for n, v in beta.items() if n not in outside} | {"global": next(iter(outside.values()))}


def _mean(x: Tensor) -> float:
    return x.mean().item()
