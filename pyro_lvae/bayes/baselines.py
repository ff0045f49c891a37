"""What a variational posterior over weights is held against: the Laplace approximation, SWAG, and ensembles.

A deep ensemble (Lakshminarayanan et al. 2017) needs no code: it is the list of structures trained from several seeds.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from ..callbacks import Callback
from ..results import EpochMetrics
from ..traces import evaluating, generate, guide_sites
from .posteriors import MeanField
from .priors import Normal
from .weights import BayesianWeights


def laplace(
    bayesian: BayesianWeights, x: Tensor, y: Tensor | None = None, *, size: int | None = None
) -> BayesianWeights:
    r"""A diagonal Laplace approximation around the posterior means (MacKay 1992; Daxberger et al. 2021).

        q(w_i) = N(w_i^MAP, 1 / (N F_i + 1/s_i^2)),  F_i = 1/B sum_b (d/dw_i sum_s log p(s~_b | parents, w))^2

    over the sites s of the model, x and latents: their parents are the guide's draws, and s~ is drawn from the model
    anew, which makes F the Fisher information of the model's conditionals, the diagonal of the Gauss-Newton
    matrix. Weights of the guide alone have F = 0 and keep the prior's width: leave them points
    (`where=generative(structure, x)`).

    Args:
        bayesian: trained, usually with `posterior=Delta`; priors must be `Normal`. Not changed.
        x: rows that F is the mean over, `[B, D]`, one gradient each.
        y: labels `[B, ...]`, where the structure takes them.
        size: N, the rows that it was trained on; `len(x)` if left out.

    Returns:
        A copy whose posteriors are `MeanField`.

    Raises:
        ValueError: a prior has another curvature than that of a Normal.
    """
    if odd := [n for n in bayesian.names if not isinstance(bayesian.prior(n), Normal)]:
        raise ValueError(
            f"the prior of {odd[0]!r} is {type(bayesian.prior(odd[0])).__name__}; the Laplace approximation here adds "
            "the curvature of Normal priors: train with prior=priors.Normal"
        )
    size = len(x) if size is None else size
    fisher = _fisher(bayesian.mean(), bayesian.names, x, y)
    found = copy.deepcopy(bayesian)
    for name in bayesian.names:
        mean = bayesian.posterior(name).mean.detach()
        sigma = (size * fisher[name] + bayesian.prior(name).scale.detach() ** -2).rsqrt()
        q = MeanField(mean, 1)
        q.rho = nn.Parameter(sigma + torch.log(-torch.expm1(-sigma)))  # softplus(rho) = sigma
        found.put_posterior(name, q)
    return found


def _fisher(structure: nn.Module, names: list[str], x: Tensor, y: Tensor | None) -> dict[str, Tensor]:
    """Mean over rows of the squared gradient of the model's log-density at its own draws, by parameter."""
    parameters = {n: p for n, p in structure.named_parameters() if n in names}
    squares = {n: torch.zeros_like(p) for n, p in parameters.items()}
    with evaluating(structure):
        for i in range(len(x)):
            args = (x[i : i + 1],) if y is None else (x[i : i + 1], y[i : i + 1])
            z = {name: value for name, (_, value) in guide_sites(structure, *args).items()}
            with torch.enable_grad():
                found = generate(structure, args[0], z, *args[1:], draw_labels=True)
                log_p = sum(fn.log_prob(fn.sample()).sum() for fn, _ in found.values())
                gradients = torch.autograd.grad(log_p, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    squares[name] += gradient.square() / len(x)
    return squares


class SWAG(Callback):
    r"""Stochastic weight averaging, Gaussian: moments of the weights along training (Maddox et al. 2019, eq. 1).

        q(w) = N(mean, 1/2 diag(second moment - mean^2) + 1/2 D D^T / (K - 1))

    with the last K deviations from the running mean as the columns of D. Pass it to
    `fit(..., callbacks=[swag])`, with a learning rate that keeps the weights moving. The statistics of batch norm
    are those of the end of training. What was collected is in no checkpoint: a resumed run starts it anew.

    Args:
        structure: the one that is trained.
        start: epochs after which weights are collected.
        rank: K, at most.
    """

    def __init__(self, structure: nn.Module, start: int, rank: int = 20):
        if start < 0 or rank < 2:
            raise ValueError(f"start={start}, rank={rank}; start from epoch 0 or later, with a rank of at least 2")
        self.structure, self.start_epoch, self.rank = structure, start, rank
        self.count, self.first, self.squares = 0, None, None
        self.deviations: list[Tensor] = []

    def on_epoch(self, metrics: EpochMetrics) -> None:
        if metrics.epoch > self.start_epoch:
            self.collect()

    @torch.no_grad()
    def collect(self) -> None:
        """Take in the weights as they stand."""
        w = torch.cat([p.flatten() for p in self._parameters(self.structure)])
        self.count += 1
        if self.count == 1:
            self.first, self.squares = w.clone(), torch.zeros_like(w)
        before = w - self.first
        self.first = self.first + before / self.count
        self.squares = self.squares + before * (w - self.first)  # Welford's sum, which does not cancel
        self.deviations = [*self.deviations, w - self.first][-self.rank :]

    @torch.no_grad()
    def draw(self) -> nn.Module:
        """A copy of the structure with a draw of its weights."""
        if self.count < 2:
            raise ValueError(f"SWAG has seen {self.count} set(s) of weights; train for more epochs after `start`")
        spread = (self.squares / self.count).sqrt()
        d = torch.stack(self.deviations, 1)
        low_rank = d @ torch.randn(d.shape[1], dtype=d.dtype, device=d.device) / math.sqrt(max(1, d.shape[1] - 1))
        w = self.first + (spread * torch.randn_like(spread) + low_rank) / math.sqrt(2)
        structure = copy.deepcopy(self.structure)
        parameters = self._parameters(structure)
        for p, part in zip(parameters, w.split([p.numel() for p in parameters]), strict=True):
            p.copy_(part.view_as(p))
        return structure

    @staticmethod
    def _parameters(structure: nn.Module) -> list[nn.Parameter]:
        return [p for p in structure.parameters() if p.requires_grad]
