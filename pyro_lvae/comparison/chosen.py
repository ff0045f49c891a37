"""Which estimators are compared on a structure."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

from pyro.infer import ELBO
from torch import nn

from ..objectives import check_supported, label, parse
from ..traces import Ledger, evaluating, fixed_noise, ledger

# What is compared unless the caller says otherwise; those that do not suit the structure are left out.
ESTIMATORS = (
    "SampledELBO(1), SampledELBO(5), SampledELBO(50), AnalyticELBO(1), STL(1), IWAE(5), IWAE(50), DReG(5), DReG(50), "
    "PIWAE(5, 10), TVO(50), RWS(50)"
)


def check_counts(least: int, **counts: int) -> None:
    for name, count in counts.items():
        if count < least:
            raise ValueError(f"{name} is {count}; at least {least} needed")


def first_sites(structure: nn.Module, args: tuple) -> Ledger:
    with evaluating(structure), fixed_noise(args[0].device):
        return ledger(structure.model, structure.guide, *args)


def chosen_estimators(estimators: str | Sequence[ELBO], sites: Ledger) -> tuple[list[ELBO], dict[str, str]]:
    """The estimators to compare; those of the default list that do not suit the structure are skipped."""
    chosen, skipped = [], {}
    for estimator in parse(estimators) if isinstance(estimators, str) else estimators:
        if not isinstance(estimator, ELBO):
            raise ValueError(f"{estimator!r} is no estimator; give instances of a pyro.infer.ELBO, such as IWAE(50)")
        try:
            check_supported(estimator, sites)
        except ValueError as error:
            if estimators is not ESTIMATORS:
                raise
            skipped[label(estimator)] = str(error)
        else:
            chosen.append(_with_nesting(estimator))
    if not chosen:
        raise ValueError(f"no estimator is left to compare; {skipped or 'name one, such as IWAE(50)'}")
    names = [label(e) for e in chosen]
    if twice := {n for n in names if names.count(n) > 1}:
        raise ValueError(f"{', '.join(sorted(twice))} stands twice among the estimators")
    return chosen, skipped


def _with_nesting(estimator: ELBO) -> ELBO:
    """A copy that knows its plates: Pyro's guess, and keep what they guessed."""
    estimator = copy.copy(estimator)
    if estimator.max_plate_nesting == math.inf:
        estimator.max_plate_nesting = 2 if estimator.vectorize_particles and estimator.num_particles > 1 else 1
    return estimator
