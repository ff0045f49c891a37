"""Which estimators are compared on a structure."""

from __future__ import annotations

from collections.abc import Sequence

from pyro.infer import ELBO
from torch import nn

from ..contract import check
from ..objectives import check_supported, label, parse, with_nesting
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
    check(structure, *args)
    with evaluating(structure), fixed_noise(args[0].device):
        return ledger(structure.model, structure.guide, *args)


def chosen_estimators(estimators: str | Sequence[ELBO], sites: Ledger) -> tuple[list[ELBO], dict[str, str]]:
    """The estimators to compare; those of the default list that do not suit the structure are skipped."""
    chosen, skipped = [], {}
    estimators = [estimators] if isinstance(estimators, ELBO) else estimators
    for estimator in parse(estimators) if isinstance(estimators, str) else estimators:
        if not isinstance(estimator, ELBO):
            raise ValueError(f"{estimator!r} is no estimator; give instances of a pyro.infer.ELBO, such as IWAE(50)")
        try:
            check_supported(estimator, sites)
        except ValueError as error:
            if estimators != ESTIMATORS:
                raise
            skipped[label(estimator)] = str(error)
        else:
            chosen.append(with_nesting(estimator))
    if not chosen:
        raise ValueError(f"no estimator is left to compare; {skipped or 'name one, such as IWAE(50)'}")
    names = [label(e) for e in chosen]
    if twice := {n for n in names if names.count(n) > 1}:
        raise ValueError(f"{', '.join(sorted(twice))} stands twice among the estimators")
    return chosen, skipped
