"""Evaluation over several draws of the weights: what a posterior over them, an ensemble or SWAG predicts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..bayes import PREFIX, BayesianWeights
from ..traces import ledger
from .chunks import MEMORY
from .likelihood import log_likelihood


@dataclass(frozen=True)
class Predictive:
    """log p(x_n | w_s) of S draws of the weights, nats, `[S, N]`, and what follows from it, `[N]` each."""

    log_likelihoods: Tensor

    def __repr__(self) -> str:
        draws, rows = self.log_likelihoods.shape
        return f"Predictive({draws} draws of the weights, {rows} data: mean {self.averaged.mean():.2f} nats)"

    @property
    def averaged(self) -> Tensor:
        """log 1/S sum_s p(x | w_s): the predictive log-likelihood, which averages over the weights."""
        return self.log_likelihoods.logsumexp(0) - math.log(len(self.log_likelihoods))

    @property
    def conditional(self) -> Tensor:
        """1/S sum_s log p(x | w_s): the mean of the numbers conditional on the weights; at most `averaged`."""
        return self.log_likelihoods.mean(0)

    @property
    def waic(self) -> Tensor:
        """E[log p(x|w)] - Var[log p(x|w)], of two draws or more: low where x is unlikely or the draws differ.

        (Choi et al. 2018.)
        """
        return self.conditional - self.log_likelihoods.var(0)

    @property
    def effective_draws(self) -> Tensor:
        """1 / sum_s r_s^2, r_s = p(x|w_s) / sum_t p(x|w_t): from 1, where the draws disagree about x, to S, where they
        agree (Daxberger & Hernandez-Lobato 2019, eq. 5). Low for data unlike the training data.
        """
        return 1 / self.log_likelihoods.softmax(0).square().sum(0)


def predictive_log_likelihood(
    draws: Iterable[nn.Module],
    x: Tensor,
    num_samples: int = 1000,
    *,
    y: Tensor | None = None,
    memory: int = MEMORY,
    compile: bool | Literal["auto"] = "auto",
) -> Predictive:
    """log p(x | w_s) by importance sampling, for several draws of the weights.

    Args:
        draws: structures with their weights put in: `(bayesian.draw() for _ in range(20))`, the members of an
            ensemble, or `swag.draw()` several times.
        x: data `[N, D]`.
        num_samples: K, importance samples of z for each datum and draw.
        y, memory, compile: as for `log_likelihood`.

    Raises:
        ValueError: there is no draw; or a draw has global sites itself (pass `bayesian.draw()`, not `bayesian`).
    """
    if isinstance(draws, nn.Module):
        raise ValueError("draws is one module; give an iterable of structures: [bayesian.draw() for _ in range(10)]")
    found = [log_likelihood(structure, x, num_samples, y=y, memory=memory, compile=compile) for structure in draws]
    if not found:
        raise ValueError("there are no draws; give at least one structure with its weights")
    return Predictive(torch.stack(found))


@torch.no_grad()
def weight_kl(bayesian: BayesianWeights, num_samples: int = 10) -> float:
    """KL(q(w) || p(w)), nats, in closed form where there is one; the rest is the mean of `num_samples` draws.

    (Of `Delta`, which has no KL, -log p(w) at the point.)
    """
    _check_has_posterior(bayesian)
    total = 0.0
    for _ in range(num_samples):
        sites = ledger(bayesian.weights_of_model, bayesian.weights_of_guide)
        total -= float(sites.global_log_weight()) / num_samples
    return total


def signal_to_noise(bayesian: BayesianWeights) -> dict[str, Tensor]:
    """|mu| / sigma of every weight, by parameter, in its shape (Blundell et al. 2015, section 5.4).

    Raises:
        ValueError: a posterior has no width (`Delta`), or there is none.
    """
    _check_has_posterior(bayesian)
    found = {}
    with torch.no_grad():
        for name in bayesian.names:
            q = bayesian.posterior(name)()
            if not q.variance.gt(0).all():
                raise ValueError(f"the posterior of {name!r} is a point; signal to noise needs one with a width")
            found[name] = q.mean.abs() / q.variance.sqrt()
    return found


@dataclass(frozen=True)
class LayerSummary:
    """The posterior of one parameter.

    Attributes:
        entries: how many weights.
        snr: median over them of |mu| / sigma.
        uncertain: part of them with |mu| < sigma.
        kl: KL(q || p), nats, in closed form or by one draw.
    """

    entries: int
    snr: float
    uncertain: float
    kl: float

    def __repr__(self) -> str:
        return (
            f"{self.entries} weights: |mu|/sigma {self.snr:.3g}, {self.uncertain:.0%} uncertain, KL {self.kl:.4g} nats"
        )


def weight_summary(bayesian: BayesianWeights) -> dict[str, LayerSummary]:
    """{parameter: its posterior in four numbers}. Raises `ValueError` as `signal_to_noise`."""
    _check_has_posterior(bayesian)
    with torch.no_grad():
        sites = ledger(bayesian.weights_of_model, bayesian.weights_of_guide)
        kl = {n: (site.beta * site.kl()).item() for n in bayesian.names for site in [sites[PREFIX + n]]}
    return {
        n: LayerSummary(r.numel(), r.median().item(), (r < 1).float().mean().item(), kl[n])
        for n, r in signal_to_noise(bayesian).items()
    }


def prune(bayesian: BayesianWeights, fraction: float) -> nn.Module:
    """The structure at the posterior means, with the weights of lowest signal to noise set to 0.

    Args:
        fraction: of the weights that have a posterior, how many to remove, from 0 to 1.

    Returns:
        A plain structure, for `elbo` or `log_likelihood`, which are then conditional on its weights.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must lie between 0 and 1")
    ratios = signal_to_noise(bayesian)
    if parts := [name for name in ratios if ".parametrizations." in f".{name}"]:
        raise ValueError(
            f"{parts[0]!r} is a part that a weight is computed from, and the weight is not 0 where the part is; take "
            "the parametrization away (torch.nn.utils.parametrize.remove_parametrizations), or leave it out of where"
        )
    every = torch.cat([r.flatten() for r in ratios.values()])
    count = round(fraction * len(every))
    removed = torch.zeros_like(every, dtype=torch.bool)
    removed[every.argsort()[:count]] = True
    structure = bayesian.mean()
    parameters = dict(structure.named_parameters())
    with torch.no_grad():
        for (name, r), part in zip(ratios.items(), removed.split([r.numel() for r in ratios.values()]), strict=True):
            parameters[name][part.view_as(r)] = 0
    return structure


def _check_has_posterior(bayesian) -> None:
    if not isinstance(bayesian, BayesianWeights):
        name = type(bayesian).__name__
        raise ValueError(f"a {name} has no posterior over its weights; give a BayesianWeights({name}(...)), trained")
