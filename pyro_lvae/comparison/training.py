"""Estimators side by side in the same training time."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

from pyro.infer import ELBO
from torch import nn

from ..contract import takes_labels
from ..data import Dataset
from ..evaluate import log_likelihood
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
        num_samples, num_images: of the test log p(x) in the end.
        **options: of `fit`, such as `batch_size` and `beta`; eager unless `compile=True`, for time is compared.
    """
    if own := {"out", "resume", "overwrite"} & set(options):
        raise ValueError(f"{', '.join(sorted(own))}: one folder cannot hold several runs; leave it out")
    options = {"callbacks": (), "epochs": 10**9, "compile": False, **options}
    check_counts(1, num_samples=num_samples, num_images=num_images)
    x, y = data.train_rows(2)
    supervised = options.setdefault("supervised", takes_labels(structure))
    chosen, skipped = chosen_estimators(estimators, first_sites(structure, (x, y) if supervised else (x,)))
    histories, log_p = {}, {}
    for estimator in chosen:
        trained, name = copy.deepcopy(structure), label(estimator)
        with fixed_noise(data.x_train.device, seed):
            try:
                histories[name] = fit(trained, data, estimator, max_seconds=max_seconds, **options)
            except NonFiniteLoss as error:
                skipped[name] = str(error)
                continue
            x, y = data.test_rows(num_images)
            log_p[name] = log_likelihood(trained, x, num_samples, y=y if supervised else None)
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
