"""fit(): train any structure by any estimator."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Integral, Real
from pathlib import Path
from typing import Literal

import torch
from pyro.distributions import TorchDistribution
from pyro.infer import ELBO, TraceEnum_ELBO
from torch import nn
from torch.distributions import Independent
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .annealing import as_schedule
from .callbacks import Callback, JSONLines, ProgressBar
from .contract import check, is_set_up, takes_labels
from .data import DataError, Dataset, check_labels
from .distributed import processes
from .loop import CHECKPOINT, METRICS, Loop
from .objectives import KLBalanced, check_supported, default_estimator
from .optim import CriticAdam, FusedAdam
from .results import EpochMetrics
from .schedules import Schedule
from .traces import Ledger, evaluating, fixed_noise, ledger

Beta = float | Schedule | Mapping[str, float | Schedule]


def fit(
    structure: nn.Module,
    data: Dataset,
    estimator: ELBO | None = None,
    *,
    epochs: int = 100,
    max_seconds: float | None = None,
    batch_size: int = 128,
    beta: Beta = 1.0,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = FusedAdam,
    lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    critic_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = CriticAdam,
    critic_steps: int = 1,
    average: float | None = None,
    supervised: bool | None = None,
    monitor_size: int = 1000,
    device: str | torch.device | None = None,
    compile: bool | Literal["auto"] = "auto",
    precision: Literal["float32", "tf32", "bfloat16"] = "float32",
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_every: int = 1,
    callbacks: Sequence[Callback] | None = None,
) -> list[EpochMetrics]:
    """Train a structure by maximising an ELBO per datum; the loss is -bound / N, in nats.

    Random numbers come from torch's default generators: seed them (`torch.manual_seed`) before
    building the structure. With `out`, a run may be stopped at any point (by Ctrl-C too) and
    resumed: weights, optimiser, schedules, data order and noise go on bit for bit.

    Under `torchrun` every process calls this alike, and takes its rows of each batch; `batch_size` is that of all
    together, a step that of one process, and the first process alone writes.

    Args:
        structure: any `nn.Module` that keeps the rules of `pyro_lvae.Structure`; trained in place.
        data: from `load`, or a `Dataset` of tensors.
        estimator: any `pyro.infer.ELBO`; if left out, `SampledELBO()`, or `Trace_ELBO()` where a site has no
            `rsample`. It is copied, never changed; what a copy learns (a multiplier) stands in the metrics, and
            in the checkpoint.
        epochs: passes over the training data, all in all; a resumed run does the rest of them.
        max_seconds: stop once the training time, all in all, reaches this; the last epoch is then a part
            of one, and counts as one.
        batch_size: rows a step.
        beta: KL weight: a number, a schedule (`linear(0, 1, epochs=200)`), or either by site name or pattern
            (`{"z*": 1.0, "weights.*": linear(0, 1, epochs=20)}`), 1 for sites that none fits.
        optimizer: makes the optimiser from the parameters.
        lr_scheduler: makes a `torch.optim` scheduler from the optimiser; stepped once an epoch.
        clip_norm: largest global norm of the gradient of the loss.
        clip_value: largest absolute entry of the gradient, applied after `clip_norm`.
        critic_optimizer: makes the optimiser of the critics, where the structure has some, from their parameters.
        critic_steps: their steps before each step of the ELBO, on its batch.
        average: decay, such as 0.999, of an exponential moving average of the weights (`optim.WeightAverage`). It is
            what the metrics are of, what the checkpoint holds for evaluation, and what the structure has once all
            epochs are done; until then (in callbacks, after an error or Ctrl-C) it has what is being trained.
        supervised: pass the labels to `model` and `guide` as y; left out, where the structure says that it takes them.
        monitor_size: rows of train and test data whose ELBO and KL are written down each epoch.
        device: where to train; the structure's own device if left out.
        compile: trace the step through Pyro once and run it as one compiled graph; "auto" does so where
            the run is long enough to pay for it. The progress bar says what was decided, and why.
        precision: of matrix products while training; weights, log-densities and evaluation stay float32. "tf32" acts
            on CUDA alone; "bfloat16" is autocast.
        out: run folder for `checkpoint.pt` and `metrics.jsonl`; without it nothing is written.
        resume: go on from the checkpoint in `out`, with the same data, optimiser and `average`; `epochs`, `beta`,
            `estimator`, `lr_scheduler`, clipping and (between epochs) `batch_size` may be new.
        overwrite: replace the checkpoint and metrics in `out`, once every input has been checked.
        checkpoint_every: epochs between checkpoints.
        callbacks: watchers; a progress bar if left out, none with `()`.

    Returns:
        The metrics of every epoch, those before a resume included.

    Raises:
        ContractError: the structure breaks a rule.
        ValueError: the estimator would be wrong on it, or an argument is out of range.
        FileExistsError: `out` holds a run, and neither `resume` nor `overwrite` was asked for.
        CheckpointError: there is nothing to resume, or it does not fit.
        NonFiniteLoss: the loss became NaN or infinite; names site, step and last good checkpoint.
    """
    out, together = None if out is None else Path(out), processes(_device(structure, device))
    supervised = takes_labels(structure, supervised)
    counts = dict(
        epochs=epochs,
        batch_size=batch_size,
        monitor_size=monitor_size,
        checkpoint_every=checkpoint_every,
        critic_steps=critic_steps,
    )
    makers = dict(optimizer=optimizer, critic_optimizer=critic_optimizer, lr_scheduler=lr_scheduler)
    _check_arguments(counts, dict(max_seconds=max_seconds, clip_norm=clip_norm, clip_value=clip_value), makers)
    _check_data(data, supervised)
    if together.is_first:
        _check_folder(out, resume, overwrite)
    _check_batches(structure, data, batch_size)
    structure, data = _on_one_device(structure, data, device)
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile is {compile!r}; expected True, False or 'auto'")
    if precision not in ("float32", "tf32", "bfloat16"):
        raise ValueError(f"precision is {precision!r}; expected 'float32', 'tf32' or 'bfloat16'")
    sites = _first_sites(structure, data, supervised)
    estimator = default_estimator(sites) if estimator is None else estimator
    if not isinstance(estimator, ELBO):
        raise ValueError(f"estimator is {estimator!r}; expected an instance of a pyro.infer.ELBO, such as IWAE()")
    check_supported(estimator, sites)
    together.check(structure, estimator, len(data.x_train), batch_size)
    schedules = _schedules(beta, sites)
    _check_annealing(estimator, schedules, sites)
    _warn_if_unfinished(schedules, epochs, epochs * data.num_batches(batch_size))
    together.begin(structure)
    loop = Loop(
        structure,
        data,
        estimator,
        _made(optimizer, structure),
        lr_scheduler,
        schedules,
        batch_size=batch_size,
        clip_norm=clip_norm,
        clip_value=clip_value,
        supervised=supervised,
        monitor_size=monitor_size,
        has_global_sites=bool(sites.global_sites),
        compile=compile,
        precision=precision,
        out=out,
        critic_optimizer=critic_optimizer,
        critic_steps=critic_steps,
        average=average,
        identity=None if out is None else _identity(structure, data, sites),
        processes=together,
    )
    if resume:
        loop.restore()
    callbacks = [ProgressBar()] if callbacks is None else list(callbacks)
    return loop.train(
        epochs,
        math.inf if max_seconds is None else max_seconds,
        checkpoint_every,
        callbacks + ([JSONLines(out / METRICS)] if out else []),
    )


def _check_arguments(counts: dict[str, int], limits: dict[str, float | None], makers: dict) -> None:
    for name, value in counts.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number, at least 1")
    for name, value in limits.items():
        if value is not None and not (isinstance(value, Real) and value > 0):
            raise ValueError(f"{name} is {value!r}; give a number above 0, or leave it out")
    for name, value in makers.items():
        if not (callable(value) or (name == "lr_scheduler" and value is None)):
            came = repr(value) if isinstance(value, str) else f"a {type(value).__name__}"
            example = "ExponentialLR, gamma=0.99" if name == "lr_scheduler" else "torch.optim.Adam, lr=1e-3"
            raise ValueError(f"{name} is {came}; expected what makes one, the class itself or partial({example})")


def _made(optimizer: Callable, structure: nn.Module) -> torch.optim.Optimizer:
    made = optimizer([p for p in structure.parameters() if p.requires_grad])
    if not isinstance(made, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__} that makes a {type(made).__name__}; expected what makes a "
            "torch.optim.Optimizer of parameters, such as partial(torch.optim.Adam, lr=1e-3) (of Pyro's, that of torch)"
        )
    return made


def _check_data(data, supervised: bool) -> None:
    if not isinstance(data, Dataset):
        raise DataError(f"data is a {type(data).__name__}; expected a Dataset, from load(...) or Dataset(name, x, x)")
    if supervised:
        check_labels(data)


def _check_batches(structure: nn.Module, data: Dataset, batch_size: int) -> None:
    if min(batch_size, len(data.x_train)) > 1 or not is_set_up(structure):
        return
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in structure.modules()):
        raise ValueError(
            f"batches of one row (batch_size={batch_size}, {len(data.x_train)} rows) leave batch norm without a "
            "variance; use larger batches or batch_norm=False"
        )


def _device(structure: nn.Module, device: str | torch.device | None) -> torch.device | None:
    """The device asked for, or that of the structure, if it has one."""
    if device is not None:
        return as_device(device)
    return next((p.device for p in structure.parameters()), None) if is_set_up(structure) else None


def _on_one_device(structure: nn.Module, data: Dataset, device: str | torch.device | None):
    """Both on one device; what is no module is left for `check` to refuse."""
    if not is_set_up(structure):
        return structure, data
    device = _device(structure, device) or data.x_train.device
    return structure.to(device), data.to(device)


def as_device(device: str | torch.device) -> torch.device:
    """`device`, or a `ValueError` where there is none such."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"device is {str(device)!r} and cannot be used: {why}; give 'cpu', or leave it out") from None
    return found


def _identity(structure: nn.Module, data: Dataset, sites: Ledger) -> dict[str, str]:
    """What must be the same in a resumed run, though weights of another would fit."""
    modules = {f"module {name}" if name else "structure": _module(m) for name, m in structure.named_modules()}
    densities = {f"{kind}({name})": _kind(getattr(site, kind)) for name, site in sites.items() for kind in ("p", "q")}
    return {"checksum of the training data": data.checksum()} | modules | densities


def _module(module: nn.Module) -> str:
    """Its class; batch norm of every kind is one, for with more processes it is another."""
    return "BatchNorm" if isinstance(module, nn.modules.batchnorm._BatchNorm) else type(module).__name__


def _kind(fn: TorchDistribution | None) -> str:
    return "" if fn is None else _kind(fn.base_dist) if isinstance(fn, Independent) else type(fn).__name__


def _check_folder(out: Path | None, resume: bool, overwrite: bool) -> None:
    if resume and (out is None or overwrite):
        raise ValueError("resume=True goes on with the run in a folder: give out=, and not overwrite")
    if out is None or resume or overwrite:
        return
    if (out / CHECKPOINT).exists() or (out / METRICS).exists():
        raise FileExistsError(f"{out} already holds a run; give another folder, resume=True or overwrite=True")


def _first_sites(structure: nn.Module, data: Dataset, supervised: bool) -> Ledger:
    """The sites of a structure that keeps the rules."""
    x, y = data.train_rows(4)
    args = (x, y) if supervised else (x,)
    check(structure, *args)
    if supervised and y.ndim == 1:  # the least and the largest label, wherever they are
        labels = torch.cat([data.y_train, data.y_test])
        check(structure, x[:1].expand(2, -1), torch.stack([labels.min(), labels.max()]))
    with evaluating(structure), fixed_noise(x.device):
        sites = ledger(structure.model, structure.guide, *args)
    if "x" in sites and sites["x"].p is not None:
        _check_support(sites["x"].p, data)
    return sites


def _check_support(likelihood: TorchDistribution, data: Dataset) -> None:
    """Refuse a row, wherever it is, that the likelihood does not admit."""
    first = data.x_train[:1]
    try:
        likelihood.support.check(first.expand(likelihood.batch_shape.numel() + 1, -1))
    except (RuntimeError, NotImplementedError):  # the support of a row is its own: only those that were run are known
        return
    for name, x in (("x_train", data.x_train), ("x_test", data.x_test)):
        if name == "x_train" and data.binarize:
            continue
        for start in range(0, len(x), 4096):
            rows = x[start : start + 4096]
            is_admitted = likelihood.support.check(rows).reshape(len(rows), -1).all(-1)
            if not is_admitted.all():
                row = int(is_admitted.logical_not().nonzero()[0])
                raise DataError(
                    f"{data.name}: row {start + row} of {name} has values from {rows[row].min():g} to "
                    f"{rows[row].max():g}, which the likelihood does not admit; draw grey values as binary "
                    "(binarize=True), or pass another likelihood"
                )


def _schedules(beta: Beta, sites: Ledger) -> dict[str, Schedule]:
    """A schedule for each latent site."""
    if not isinstance(beta, Mapping):
        return dict.fromkeys(sites.latents, as_schedule(beta))
    if unknown := [pattern for pattern in beta if not any(fnmatchcase(name, pattern) for name in sites.latents)]:
        raise ValueError(f"beta names {unknown}; the latent sites are {list(sites.latents)}")
    deciding = {name: _first_match(beta, name) for name in sites.latents}
    if idle := [pattern for pattern in beta if pattern not in deciding.values()]:
        raise ValueError(f"beta's {idle} decide no site: others stand before them. Name the narrower pattern first")
    return {name: as_schedule(1.0 if key is None else beta[key]) for name, key in deciding.items()}


def _first_match(beta: Mapping[str, float | Schedule], name: str) -> str | None:
    """A site's own name, where it is named, or else the first pattern that fits it."""
    return name if name in beta else next((pattern for pattern in beta if fnmatchcase(name, pattern)), None)


def _check_annealing(estimator: ELBO, schedules: dict[str, Schedule], sites: Ledger) -> None:
    annealed = [name for name, schedule in schedules.items() if not schedule.start == schedule.stop == 1]
    never = all(min(schedule.start, schedule.stop) >= 1 for schedule in schedules.values())
    if isinstance(estimator, KLBalanced) and never and not estimator.always:
        warnings.warn(
            "KLBalanced moves KL weights while beta is below 1, and it never is: this trains the plain ELBO. "
            "Give a warm-up, such as beta=linear(0, 1, epochs=20), or KLBalanced(always=True)",
            stacklevel=3,
        )
    if annealed and isinstance(estimator, TraceEnum_ELBO) and any(s.is_enumerated for s in sites.values()):
        raise ValueError(
            f"TraceEnum_ELBO needs one scale on all sites that an enumerated one reaches, and beta anneals {annealed}; "
            "use beta=1 (--beta 1), or IWAE(num_particles=1)"
        )


def _warn_if_unfinished(schedules: dict[str, Schedule], epochs: int, steps: int) -> None:
    late = {s for s in schedules.values() if s.ends_after(steps, epochs)}
    if late:
        lengths = ", ".join(f"{s.length} {s.unit}" for s in late)
        warnings.warn(
            f"beta is at the end of its schedule only after {lengths}, and training ends after {epochs} epochs "
            f"({steps} steps): the objective never becomes the ELBO. Train longer, or shorten the schedule",
            stacklevel=3,
        )
