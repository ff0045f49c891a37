"""Estimators side by side in the same training time."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

from pyro.infer import ELBO
from torch import Tensor, nn

from ..bayes import BayesianWeights
from ..contract import takes_labels
from ..data import Dataset
from ..evaluate import predictive_log_likelihood
from ..loop import NonFiniteLoss
from ..objectives import label
from ..results import TrainingComparison
from ..traces import fixed_noise
from ..train import fit
from .chosen import ESTIMATORS, check_counts, chosen_estimators, first_sites


def compare_training(
    structure: nn.Module,
    data: Dataset,
    estimators: str | Sequence[ELBO] = ESTIMATORS,
    *,
    max_seconds: float = 60.0,
    num_samples: int = 1000,
    num_images: int = 200,
    seed: int = 0,
    **options,
) -> TrainingComparison:
    """Train copies of a structure, one by each estimator, from the same weights and seed for the same time.

    Args:
        structure: stays as it is.
        estimators: as for `compare`.
        max_seconds: training time of each; evaluation between epochs does not count.
        num_samples, num_images: of the test log p(x) in the end; of `BayesianWeights` it is averaged over ten draws of
            the weights.
        **options: of `fit`, such as `batch_size` and `beta`; eager unless `compile=True`, for time is compared.

    Raises:
        ValueError: before anything is trained: the structure has no log p(x), or an argument does not suit it.
    """
    if own := {"out", "resume", "overwrite"} & set(options):
        raise ValueError(f"{', '.join(sorted(own))}: one folder cannot hold several runs; leave it out")
    options = {"callbacks": (), "epochs": 10**9, "compile": False, **options}
    check_counts(1, num_samples=num_samples, num_images=num_images)
    x, y = data.train_rows(2)
    supervised = options.setdefault("supervised", takes_labels(structure))
    chosen, skipped = chosen_estimators(estimators, first_sites(structure, (x, y) if supervised else (x,)))
    x, y = data.test_rows(num_images)
    y = y if supervised else None
    with fixed_noise(data.x_train.device, seed):
        _log_p(structure, x[:1], None if y is None else y[:1], 1)  # refuses what has none
    histories, log_p = {}, {}
    for estimator in chosen:
        trained, name = copy.deepcopy(structure), label(estimator)
        with fixed_noise(data.x_train.device, seed):
            try:
                histories[name] = fit(trained, data, estimator, max_seconds=max_seconds, **options)
            except NonFiniteLoss as error:
                skipped[name] = str(error)
                continue
            log_p[name] = _log_p(trained, x, y, num_samples)
    if not histories:
        raise NonFiniteLoss(f"no estimator trained: {skipped}")
    return TrainingComparison(
        structure=type(structure).__name__,
        data=data.name,
        max_seconds=max_seconds,
        histories=histories,
        log_p={name: v.mean().item() for name, v in log_p.items()},
        log_p_stderr={n: v.std().item() / math.sqrt(len(v)) if len(v) > 1 else None for n, v in log_p.items()},
        num_samples=num_samples,
        skipped=skipped,
    )


def _log_p(structure: nn.Module, x: Tensor, y: Tensor | None, num_samples: int) -> Tensor:
    """log p(x), averaged over draws of the weights where they have a posterior."""
    draws = [structure.draw() for _ in range(10)] if isinstance(structure, BayesianWeights) else [structure]
    return predictive_log_likelihood(draws, x, num_samples, y=y).averaged
