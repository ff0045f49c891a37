"""The figures that end a run."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..bayes import BayesianWeights
from ..contract import takes_labels
from ..data import Dataset
from ..distributed import Processes
from ..results import EpochMetrics, Summary, trained_by
from .latents import kl_per_layer, posterior_activity
from .likelihood import elbo, has_likelihood, log_likelihood
from .weights import predictive_log_likelihood, weight_kl


def summarize(
    structure: nn.Module,
    data: Dataset,
    history: list[EpochMetrics],
    *,
    num_samples: int = 5000,
    num_images: int | None = None,
    supervised: bool | None = None,
    num_draws: int = 10,
    processes: Processes = Processes(),  # noqa: B008, frozen
) -> Summary:
    """Evaluate a trained structure on the test set; random numbers come from torch's default generator.

    ELBOs and KL per layer are by ten draws. Of `BayesianWeights`, the log-likelihood is averaged over draws of the
    weights, the ELBOs are means over them, and KL per layer and active units are those at the posterior mean.

    Args:
        history: what `fit` returned.
        num_samples: importance samples of each log-likelihood.
        num_images: test rows that the log-likelihood takes, spread evenly; all if `None`. KL, active
            units and ELBOs take them all (the train ELBO as many training rows).
        supervised: pass labels; left out, where the structure says that it takes them.
        num_draws: draws of the weights, where they have a posterior.
        processes: that share the rows of the bounds and log-likelihoods; all must call this alike.
    """
    supervised = takes_labels(structure, supervised)
    x, y = data.test_rows(len(data.x_test))
    x_train, y_train = data.train_rows(len(x))
    scored, y_scored = data.test_rows(len(x) if num_images is None else num_images)
    y, y_train, y_scored = (y, y_train, y_scored) if supervised else (None, None, None)
    is_bayesian = isinstance(structure, BayesianWeights)
    draws = [structure.draw() for _ in range(num_draws)] if is_bayesian else [structure]
    point = structure.mean() if is_bayesian else structure

    def log_p_of(x: Tensor, y: Tensor | None) -> Tensor:
        if is_bayesian:
            return predictive_log_likelihood(draws, x, num_samples, y=y).averaged
        return log_likelihood(structure, x, num_samples, y=y)

    def elbo_of(x: Tensor, y: Tensor | None) -> Tensor:
        return torch.stack([elbo(given, x, 1 if is_bayesian else 10, y=y) for given in draws]).mean(0)

    log_p = None
    if has_likelihood(point, x[:1], None if y is None else y[:1]):
        log_p = processes.by_share(log_p_of, scored, y_scored)
    activity = posterior_activity(point, x, y=y)
    seconds = history[-1].seconds if history else 0.0
    return Summary(
        data=data.name,
        structure=_name(structure),
        estimator=trained_by(history),
        epochs=history[-1].epoch if history else 0,
        seconds=seconds,
        images_per_second=len(data.x_train) * len(history) / seconds if seconds else 0.0,
        num_parameters=sum(p.numel() for p in structure.parameters() if p.requires_grad),
        train_elbo=processes.by_share(elbo_of, x_train, y_train).mean().item(),
        test_elbo=processes.by_share(elbo_of, x, y).mean().item(),
        test_log_likelihood=None if log_p is None else log_p.mean().item(),
        test_log_likelihood_stderr=_stderr(log_p),
        num_samples=num_samples,
        num_images=len(scored),
        kl_per_layer=kl_per_layer(point, x, y=y),
        active_units={name: layer.active for name, layer in activity.items()},
        units={name: layer.variance.numel() for name, layer in activity.items()},
        num_draws=num_draws if is_bayesian else 0,
        weight_kl=weight_kl(structure) / len(data.x_train) if is_bayesian else 0.0,
        beta=_last_beta(history),
    )


def _last_beta(history: list[EpochMetrics]) -> float:
    """Of the layers' KL weights in the last epoch the one furthest from 1."""
    weights = history[-1].beta_of_layers.values() if history else []
    return max(weights, key=lambda beta: abs(beta - 1), default=1.0)


def _name(structure: nn.Module) -> str:
    if isinstance(structure, BayesianWeights):
        return f"BayesianWeights of {_name(structure.structure)}"
    return type(structure).__name__


def _stderr(values: torch.Tensor | None) -> float | None:
    return values.std().item() / math.sqrt(len(values)) if values is not None and len(values) > 1 else None
