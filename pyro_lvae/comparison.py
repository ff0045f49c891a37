"""Estimators side by side: what each is worth on one batch, and in the same training time."""

from __future__ import annotations

import copy
import math
import statistics
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .checkpoint import rng_state, set_rng_state
from .data import Dataset
from .evaluate import (
    ais_log_likelihood,
    bidirectional_monte_carlo,
    check_annealable,
    log_likelihood,
    refuse_global_sites,
)
from .evaluate.chunks import args_of, check_rows, cost_of
from .loop import NonFiniteLoss
from .objectives import IWAE, RWS, LedgerELBO, backward, check_supported, label, parse
from .results import Comparison, EstimatorQuality, GradientQuality, TrainingComparison
from .traces import Ledger, evaluating, fixed_noise, ledger, log_densities
from .train import fit

# What is compared unless the caller says otherwise; those that do not suit the structure are left out.
ESTIMATORS = (
    "SampledELBO(1), SampledELBO(5), SampledELBO(50), AnalyticELBO(1), STL(1), IWAE(5), IWAE(50), DReG(5), DReG(50), "
    "PIWAE(5, 10), TVO(50), RWS(50)"
)
GROUPS = ("model", "guide", "shared")
MEMORY = 2**30  # bytes, about, of a chunk of the reference gradient


def compare(
    structure: nn.Module,
    x: Tensor,
    estimators: str | Sequence[ELBO] = ESTIMATORS,
    *,
    num_repeats: int = 100,
    num_samples: int = 5000,
    reference_particles: int = 1000,
    reference_repeats: int = 4,
    num_temperatures: int = 100,
    num_chains: int = 16,
    y: Tensor | None = None,
    seed: int = 0,
) -> Comparison:
    """Measure estimators on one structure, trained or not, and one batch.

    Everything runs in evaluation mode, so that batch norm is a fixed function and all figures are
    of the same model. The structure's weights, modes and gradients stay as they are. Parameters fall into those
    that log p alone reads ("model"), those that log q alone reads ("guide"), and "shared" ones.

    Args:
        x: the batch `[B, D]`, binary where the likelihood asks for it.
        estimators: objects, or a list in words such as `"IWAE(50), DReG(50)"`.
        num_repeats: draws of each value and gradient; they are taken in turn, so that their times compare.
        num_samples: importance samples a row of the log p(x) that gaps are measured from.
        reference_particles, reference_repeats: the gradient of log p(x) is that of IWAE with so many
            particles (of `RWS`, where a site cannot be reparameterised), averaged over so many draws.
        num_temperatures, num_chains: of annealed importance sampling, and of bidirectional Monte
            Carlo on data drawn from the model; 0 temperatures leave both out.
        y: labels `[B, ...]`, where the structure takes them.
        seed: of all noise; the caller's random state stays as it is.

    Raises:
        ValueError: an estimator that was named does not suit the structure; an argument is out of range.
    """
    repeats = dict(
        num_repeats=num_repeats, reference_repeats=reference_repeats, reference_particles=reference_particles
    )
    _check_counts(2, **repeats)
    _check_counts(1, num_samples=num_samples, num_chains=num_chains)
    _check_counts(0, num_temperatures=num_temperatures)
    x, y = check_rows(structure, x, y)
    args = args_of(x, y, slice(None))
    with fixed_noise(x.device, seed), pyro.validation_enabled(False), _own_gradients(structure):
        sites = _sites(structure, args)
        refuse_global_sites(sites)
        chosen, skipped = _chosen(estimators, sites)
        if num_temperatures:
            try:
                check_annealable(structure, x, y)
            except ValueError as error:
                skipped["annealed importance sampling"], num_temperatures = str(error), 0
        groups = parameter_groups(structure, *args)
        many = _many_particles(reference_particles, sites)
        reference = _reference(many, structure, args, groups, reference_repeats)
        measured = {label(e): _Measured(e, structure, args, groups, sites) for e in chosen}
        for _ in range(num_repeats):
            for each in measured.values():
                each.draw()
        gap = None
        if num_temperatures:
            options = dict(num_chains=num_chains, num_temperatures=num_temperatures, y=y)
            gap = bidirectional_monte_carlo(structure, x, **options).gap.mean().item()
        return Comparison(
            structure=type(structure).__name__,
            num_rows=len(x),
            num_parameters={g: sum(p.numel() for p in members) for g, members in groups.items()},
            log_p=log_likelihood(structure, x, num_samples, y=y).mean().item(),
            num_samples=num_samples,
            log_p_annealed=ais_log_likelihood(structure, x, **options).mean().item() if num_temperatures else None,
            annealed_gap=gap,
            reference_particles=reference_particles,
            reference_norm={group: moments.norm() for group, moments in reference.items()},
            rows=[each.quality(reference) for each in measured.values()],
            skipped=skipped,
        )


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
        **options: of `fit`, such as `batch_size` and `beta`.
    """
    options = {"callbacks": (), "epochs": 10**9, **options}
    _check_counts(1, num_samples=num_samples, num_images=num_images)
    x, y = data.train_rows(2)
    supervised = options.get("supervised", False)
    chosen, skipped = _chosen(estimators, _sites(structure, (x, y) if supervised else (x,)))
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


class _Moments:
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

    def distance(self, other: _Moments) -> tuple[float, float]:
        """Between the means, the noise of both subtracted; and that noise."""
        noise = self.noise + other.noise
        return math.sqrt(max(0.0, (self.mean - other.mean).square().sum().item() - noise)), math.sqrt(noise)


@dataclass
class _Draw:
    value: float
    gradients: dict[str, Tensor]


class _Measured:
    """One estimator, drawn from again and again."""

    def __init__(self, estimator: ELBO, structure: nn.Module, args: tuple, groups: dict, sites: Ledger):
        self.estimator, self.structure, self.args, self.groups = estimator, structure, args, groups
        self.plain = _plain(estimator, sites)
        self.moments = {group: _Moments() for group in groups}
        self.difference = {group: _Moments() for group in groups}
        self.seconds: list[float] = []
        self.values: list[float] = []
        self.norms: dict[str, list[float]] = {group: [] for group in groups}
        structure.zero_grad(set_to_none=True)
        with _PeakBytes(args[0].device) as memory:  # warms up, too
            self._gradient(estimator)
        self.peak_bytes = memory.peak

    def draw(self) -> None:
        """One more value and gradient."""
        noise, device = rng_state(self.args[0].device), self.args[0].device
        started = time.perf_counter()
        drawn = self._gradient(self.estimator)
        self.seconds.append(time.perf_counter() - started)
        if not math.isfinite(drawn.value):
            raise ValueError(f"{label(self.estimator)} gives {drawn.value} on this batch; leave it out")
        self.values.append(drawn.value)
        for group, gradient in drawn.gradients.items():
            self.moments[group].add(gradient)
            self.norms[group].append(gradient.norm().item())
        if self.plain is not None:
            after = rng_state(device)
            set_rng_state(noise, device)
            for group, gradient in self._gradient(self.plain).gradients.items():
                self.difference[group].add(drawn.gradients[group] - gradient)
            set_rng_state(after, device)

    def quality(self, reference: dict[str, _Moments]) -> EstimatorQuality:
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

    def _gradient_quality(self, group: str, reference: _Moments) -> GradientQuality:
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

    def _gradient(self, estimator: ELBO) -> _Draw:
        """Of the objective, per datum. A copy, so that no multiplier moves."""
        return _gradient(copy.copy(estimator), self.structure, self.args, self.groups)


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


def _gradient(estimator: ELBO, structure: nn.Module, args: tuple, groups: dict) -> _Draw:
    structure.zero_grad(set_to_none=True)
    with evaluating(structure), torch.enable_grad():
        loss = backward(estimator, structure, args, per=len(args[0]))
    return _Draw(-loss.item(), {g: torch.cat([_flat(p) for p in members]) for g, members in groups.items()})


def _flat(parameter: nn.Parameter) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else -parameter.grad
    return gradient.flatten().double()


def _many_particles(num_particles: int, sites: Ledger) -> LedgerELBO:
    """The estimator of the gradient of log p(x)."""
    estimator = IWAE(num_particles)
    try:
        estimator.check(sites)
    except ValueError:
        return RWS(num_particles)
    return estimator


def _reference(
    estimator: LedgerELBO, structure: nn.Module, args: tuple, groups: dict, num_repeats: int
) -> dict[str, _Moments]:
    """The gradient of log p(x), per datum, by many particles, a few rows at a time."""
    num_particles = estimator.num_particles
    moments = {group: _Moments() for group in groups}
    with evaluating(structure):
        at_once = cost_of(structure, args[0], args[1] if len(args) > 1 else None).chunk(num_particles, MEMORY // 3)[0]
    total = len(args[0])
    for _ in range(num_repeats):
        parts: dict[str, Tensor] = {}
        for start in range(0, total, at_once):
            chunk = tuple(a[start : start + at_once] for a in args)
            drawn = _gradient(estimator, structure, chunk, groups).gradients
            share = len(chunk[0]) / total
            parts = {g: parts.get(g, 0.0) + share * gradient for g, gradient in drawn.items()}
        for group, gradient in parts.items():
            moments[group].add(gradient)
    return moments


def _check_counts(least: int, **counts: int) -> None:
    for name, count in counts.items():
        if count < least:
            raise ValueError(f"{name} is {count}; at least {least} needed")


def _sites(structure: nn.Module, args: tuple) -> Ledger:
    with evaluating(structure), fixed_noise(args[0].device):
        return ledger(structure.model, structure.guide, *args)


def _chosen(estimators: str | Sequence[ELBO], sites: Ledger) -> tuple[list[ELBO], dict[str, str]]:
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


@contextmanager
def _own_gradients(structure: nn.Module) -> Iterator[None]:
    """The parameters' gradients, as they were before."""
    held = [(p, p.grad) for p in structure.parameters()]
    try:
        yield
    finally:
        for p, gradient in held:
            p.grad = gradient


class _PeakBytes(TorchDispatchMode):
    """The largest memory alive at one moment inside, beyond what was alive before."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.peak, self._live = device, 0, 0
        self._refs: dict[int, weakref.ref] = {}

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._live = torch.cuda.memory_allocated(self.device)
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - self._live
        self._refs.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.device.type != "cuda":
            given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for t in tree_leaves(out):
                if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given | self._refs.keys():
                    self._hold(t.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def free(_):
            if self._refs.pop(key, None) is not None:
                self._live -= size

        self._refs[key] = weakref.ref(storage, free)
        self._live += size
        self.peak = max(self.peak, self._live)
