"""Gradients of estimators, drawn again and again: mean, noise, and distance from what they should be."""

from __future__ import annotations

import copy
import math
import statistics
import time

import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from ..checkpoint import rng_state, set_rng_state
from ..evaluate.chunks import cost_of
from ..objectives import IWAE, RWS, LedgerELBO, backward, label
from ..objectives.gradients import replace_at_draws
from ..results import EstimatorQuality, GradientQuality
from ..traces import Ledger, evaluating, ledger, log_densities
from .memory import PeakBytes

GROUPS = ("model", "guide", "shared")
MEMORY = 2**30  # bytes, about, of a chunk of the reference gradient


def parameter_groups(structure: nn.Module, *args) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters that log p alone reads, those that log q alone reads, and shared ones.

    Returns:
        {"model" | "guide" | "shared": parameters}, without empty groups.
    """
    parameters = [p for p in structure.parameters() if p.requires_grad]
    with evaluating(structure):
        sites = ledger(structure.model, structure.guide, *args, num_particles=1)
    latents = {name: site.value for name, site in sites.latents.items() if site.q is not None}
    reads = []
    for fn in (structure.model, structure.guide):
        values = {name: z.clone() for name, z in latents.items()}  # nothing computed for the one serves the other
        with evaluating(structure), torch.enable_grad():
            total = sum(v.sum() for v in log_densities(fn, values, *args, num_particles=1).values())
        if isinstance(total, Tensor) and total.requires_grad:
            found = torch.autograd.grad(total, parameters, allow_unused=True)
        else:
            found = [None] * len(parameters)
        reads.append([g is not None for g in found])
    names = {(True, False): "model", (False, True): "guide", (True, True): "shared"}
    groups: dict[str, list[nn.Parameter]] = {group: [] for group in GROUPS}
    for parameter, *by in zip(parameters, *reads, strict=True):
        if any(by):
            groups[names[tuple(by)]].append(parameter)
    return {group: members for group, members in groups.items() if members}


class Moments:
    """Running mean and summed variance of vectors."""

    def __init__(self):
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, vector: Tensor) -> None:
        self.count += 1
        before = vector - self.mean
        self.mean = self.mean + before / self.count
        self.squares += (before * (vector - self.mean)).sum().item()

    @property
    def variance(self) -> float:
        """Summed over the entries."""
        return self.squares / (self.count - 1)

    @property
    def noise(self) -> float:
        """Squared standard error of the mean, summed over the entries."""
        return self.variance / self.count

    def norm(self) -> float:
        """Of the mean, the noise subtracted."""
        return math.sqrt(max(0.0, self.mean.square().sum().item() - self.noise))

    def distance(self, other: Moments) -> tuple[float, float]:
        """Between the means, the noise of both subtracted; and that noise."""
        noise = self.noise + other.noise
        return math.sqrt(max(0.0, (self.mean - other.mean).square().sum().item() - noise)), math.sqrt(noise)


class Measured:
    """One estimator, drawn from again and again."""

    def __init__(self, estimator: ELBO, structure: nn.Module, args: tuple, groups: dict, sites: Ledger):
        self.estimator, self.structure, self.args, self.groups = estimator, structure, args, groups
        self.plain = _plain(estimator, sites)
        self.moments = {group: Moments() for group in groups}
        self.difference = {group: Moments() for group in groups}
        self.seconds: list[float] = []
        self.values: list[float] = []
        self.norms: dict[str, list[float]] = {group: [] for group in groups}
        structure.zero_grad(set_to_none=True)
        with PeakBytes(args[0].device) as memory:  # warms up, too
            self._backward(estimator)
        self.peak_bytes = memory.peak

    def draw(self) -> None:
        """One more value and gradient."""
        noise, device = rng_state(self.args[0].device), self.args[0].device
        self.structure.zero_grad(set_to_none=True)
        started = time.perf_counter()
        value = self._backward(self.estimator)
        self.seconds.append(time.perf_counter() - started)
        if not math.isfinite(value):
            raise ValueError(f"{label(self.estimator)} gives {value} on this batch; leave it out")
        self.values.append(value)
        drawn = _gradients(self.groups)
        for group, gradient in drawn.items():
            self.moments[group].add(gradient)
            self.norms[group].append(gradient.norm().item())
        if self.plain is not None:
            after = rng_state(device)
            set_rng_state(noise, device)
            for group, gradient in _gradient(self.plain, self.structure, self.args, self.groups).items():
                self.difference[group].add(drawn[group] - gradient)
            set_rng_state(after, device)

    def quality(self, reference: dict[str, Moments]) -> EstimatorQuality:
        return EstimatorQuality(
            estimator=label(self.estimator),
            num_particles=self.estimator.num_particles,
            value=statistics.fmean(self.values),
            stderr=statistics.stdev(self.values) / math.sqrt(len(self.values)),
            gradients={group: self._gradient_quality(group, reference[group]) for group in self.groups},
            seconds=statistics.median(self.seconds),
            peak_bytes=self.peak_bytes,
            values=self.values,
            gradient_norms=self.norms,
        )

    def _gradient_quality(self, group: str, reference: Moments) -> GradientQuality:
        moments, difference = self.moments[group], self.difference[group]
        std, (bias, noise) = math.sqrt(moments.variance), moments.distance(reference)
        own = own_noise = None
        if isinstance(self.estimator, LedgerELBO) and self.estimator.needs_rsample:
            own = difference.norm() if difference.count else 0.0
            own_noise = math.sqrt(difference.noise) if difference.count else 0.0
        return GradientQuality(
            norm=moments.norm(),
            std=std,
            snr=moments.norm() / std if std > 0 else None,
            snr_floor=1 / math.sqrt(moments.count),
            bias=bias,
            bias_noise=noise,
            own_bias=own,
            own_bias_noise=own_noise,
        )

    def _backward(self, estimator: ELBO) -> float:
        """A copy, so that no multiplier moves."""
        return _backward(copy.copy(estimator), self.structure, self.args)


class _Plain(LedgerELBO):
    """The bound of another estimator, differentiated plainly."""

    def __init__(self, of: LedgerELBO):
        super().__init__(of.num_particles)
        self.of = of

    def bound(self, sites: Ledger) -> Tensor:
        return self.of.bound(sites)


def _plain(estimator: ELBO, sites: Ledger) -> ELBO | None:
    """Its bound, differentiated plainly, where its gradient is another and the sites allow it."""
    has_own = isinstance(estimator, LedgerELBO) and type(estimator).objective is not LedgerELBO.objective
    return _Plain(estimator) if has_own and estimator.needs_rsample and not estimator.state_dict() else None


def _gradient(estimator: ELBO, structure: nn.Module, args: tuple, groups: dict) -> dict[str, Tensor]:
    structure.zero_grad(set_to_none=True)
    _backward(estimator, structure, args)
    return _gradients(groups)


def _backward(estimator: ELBO, structure: nn.Module, args: tuple) -> float:
    """The objective per datum; its gradient is added to the parameters'."""
    with evaluating(structure), torch.enable_grad():
        return -backward(estimator, structure, args, per=len(args[0])).item()


def _gradients(groups: dict) -> dict[str, Tensor]:
    return {group: torch.cat([_flat(p) for p in members]) for group, members in groups.items()}


def _flat(parameter: nn.Parameter) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else -parameter.grad
    return gradient.flatten().double()


class _ModelAlone(RWS):
    """The model's half of `RWS`: sum_k v_k d log p(x, z_k), which is d log p(x); the guide gets nothing."""

    def objective(self, sites: Ledger) -> Tensor:
        return replace_at_draws(self.bound(sites.without_scores()), sites.draws, {})


def many_particles(num_particles: int, sites: Ledger) -> LedgerELBO:
    """The estimator of the gradient of log p(x)."""
    estimator = IWAE(num_particles)
    try:
        estimator.check(sites)
    except ValueError:
        return _ModelAlone(num_particles)
    return estimator


def reference_gradient(
    estimator: LedgerELBO, structure: nn.Module, args: tuple, groups: dict, num_repeats: int
) -> dict[str, Moments]:
    """The gradient of log p(x), per datum, by many particles, a few rows at a time."""
    num_particles = estimator.num_particles
    moments = {group: Moments() for group in groups}
    with evaluating(structure):
        at_once = cost_of(structure, args[0], args[1] if len(args) > 1 else None).chunk(num_particles, MEMORY // 3)[0]
    total = len(args[0])
    for _ in range(num_repeats):
        parts: dict[str, Tensor] = {}
        for start in range(0, total, at_once):
            chunk = tuple(a[start : start + at_once] for a in args)
            drawn = _gradient(estimator, structure, chunk, groups)
            share = len(chunk[0]) / total
            parts = {g: parts.get(g, 0.0) + share * gradient for g, gradient in drawn.items()}
        for group, gradient in parts.items():
            moments[group].add(gradient)
    return moments
