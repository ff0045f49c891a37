"""The training loop: the state of one run, and the steps that move it."""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .alternation import CriticSteps
from .auto import AutoStep
from .callbacks import Callback
from .checkpoint import CheckpointError, load_checkpoint, put_weights, rng_state, save_checkpoint, set_rng_state
from .data import Dataset
from .distributed import Processes
from .malloc import kept_memory
from .monitor import monitored, not_finite
from .objectives import learned, with_nesting
from .optim import FusedAdam, WeightAverage, settings_of
from .results import EpochMetrics, read_metrics
from .schedules import Schedule
from .step import Step, matmul_precision

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
PATIENCE = 100  # steps after which a loss that was not waited for is looked at
_COUNTERS = ("epoch", "batch", "step", "seconds", "epoch_seconds", "total", "rows", "order")


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite; says where, and which checkpoint is good."""


class Loop:
    """One run of `fit`, whose arguments have been checked there.

    Attributes:
        epoch, step: epochs and optimiser steps completed.
        batch: batches completed of the epoch in progress; `order` is that epoch's order of rows.
        seconds: training time of the completed epochs, `epoch_seconds` of the one in progress.
        total, rows: sum of the loss over the epoch's rows so far, and their number.
        history: the metrics of the completed epochs.
    """

    def __init__(
        self,
        structure: nn.Module,
        data: Dataset,
        estimator: ELBO,
        optimizer: Optimizer,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None,
        schedules: dict[str, Schedule],
        *,
        batch_size: int,
        clip_norm: float | None,
        clip_value: float | None,
        supervised: bool,
        monitor_size: int,
        has_global_sites: bool,
        compile: bool | str,
        precision: str,
        out: Path | None,
        critic_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        critic_steps: int,
        average: float | None = None,
        identity: dict[str, str] | None = None,
        processes: Processes = Processes(),  # noqa: B008, frozen
    ):
        self.structure, self.data = structure, data
        self.estimator = with_nesting(estimator)
        self.optimizer = optimizer
        rows = {"rows": len(data.x_train), "x_dim": data.x_dim, "batch_size": batch_size}
        self.settings = rows | settings_of(optimizer) | {"average": average}
        self.identity = identity or {}
        self.lr_scheduler = None if lr_scheduler is None else lr_scheduler(optimizer)
        self.schedules = schedules
        self.batch_size, self.supervised, self.monitor_size = batch_size, supervised, monitor_size
        size, clip = len(data.x_train) if has_global_sites else None, dict(clip_norm=clip_norm, clip_value=clip_value)
        self.processes, self.clip = processes, Step(structure, self.estimator, **clip).clip
        options = dict(size=size, precision=precision, **(clip if processes.size == 1 else {}))
        self.eager = Step(structure, self.estimator, **options)
        # `Processes.begin` has told the modules of several processes by now
        is_parted = processes.size > 1 and any(getattr(m, "synchronised", False) for m in structure.modules())
        hindrance = "batch norm over several processes cannot be compiled" if is_parted else None
        self.gradient = AutoStep(self.eager, compile, hindrance, self._say)
        self.average = None if average is None else WeightAverage(structure, average)
        self.critics = CriticSteps(structure, critic_optimizer, critic_steps, processes)
        self.settings |= self.critics.settings()
        self.planned, self.callbacks = (0, math.inf), []
        self.out = out
        self.told = [m for m in structure.modules() if callable(getattr(m, "advance", None))]
        self.device = data.x_train.device
        self.epoch, self.batch, self.step, self.order = 0, 0, 0, None
        self.seconds, self.epoch_seconds = 0.0, 0.0
        self.total, self.rows = torch.zeros((), device=self.device), 0
        self.history: list[EpochMetrics] = []
        self.saved_step: int | None = None
        self.waits = self.device.type != "cuda" or not isinstance(optimizer, FusedAdam)
        self.bad: Tensor | None = None

    def train(
        self, epochs: int, max_seconds: float, checkpoint_every: int, callbacks: list[Callback]
    ) -> list[EpochMetrics]:
        """Train until `epochs` epochs are completed, or for `max_seconds`; the last epoch may then be a part of one."""
        if self.out is not None and self.saved_step is None:
            self.save()
        callbacks = callbacks if self.processes.is_first else []
        self.planned, self.callbacks = (epochs * self.data.num_batches(self.batch_size), max_seconds), callbacks
        with ExitStack() as stack:
            stack.enter_context(matmul_precision(self.eager.precision))
            stack.enter_context(kept_memory())
            for callback in callbacks:
                callback.on_start(self.epoch, epochs, self.data.num_batches(self.batch_size))
                stack.callback(callback.on_end)
            stop = stack.enter_context(_interrupt_at_step_end(self.out is not None))
            self.structure.train()
            is_done = self.epoch >= epochs or self.seconds >= max_seconds
            while not is_done:
                self._epoch(callbacks, stop, max_seconds)
                is_done = self.epoch >= epochs or self.seconds >= max_seconds
                if self.out is not None and (self.epoch % checkpoint_every == 0 or is_done):
                    self.save()
        if self.average is not None:
            self.average.put()
        return self.history

    def save(self) -> None:
        """Write the checkpoint."""
        self._look()
        state = {name: getattr(self, name) for name in _COUNTERS}
        state |= {
            "structure": self.structure.state_dict() if self.average is None else self.average.state_dict(),
            "estimator": learned(self.estimator),
            "optimizer": self.optimizer.state_dict(),
            "critics": self.critics.state_dict(),
            "lr_scheduler": None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
            "rng": rng_state(self.device),
            "settings": self.settings,
            "identity": self.identity,
        }
        if self.average is not None:  # evaluations take the average, a resumed run goes on from what was trained
            state["trained"] = self.structure.state_dict()
        if self.processes.is_first:
            save_checkpoint(self.out / CHECKPOINT, state)
        self.processes.wait()
        self.saved_step = self.step

    def restore(self) -> None:
        """Go back to the checkpoint in `out`."""
        path = self.out / CHECKPOINT
        state = load_checkpoint(path, self.device)
        self._check_unchanged(state, path)
        put_weights(self.structure, state, path)
        if self.average is not None:
            self.average = WeightAverage(self.structure, self.average.decay)
            put_weights(self.structure, {"structure": state["trained"]}, path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.critics.load_state_dict(state.get("critics"))
        if self.lr_scheduler is not None and state["lr_scheduler"] is not None:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        kept = state.get("estimator", {})
        if kept and learned(self.estimator).keys() == kept.keys():  # else the estimator is new, and begins anew
            self.estimator.load_state_dict(kept)
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self.history = [m for m in read_metrics(self.out / METRICS) if m.epoch <= self.epoch]
        self.saved_step = self.step
        set_rng_state(state["rng"], self.device)
        self.processes.part_noise(self.step)

    def _check_unchanged(self, state: dict, path: Path) -> None:
        """Refuse to go on with another structure, other data or another optimiser; within an epoch, other batches."""
        names = [n for n in self.settings if state["batch"] > 0 or n != "batch_size"]
        if changed := _changed(state["settings"], self.settings, names):
            raise ValueError(
                f"{path} cannot be resumed with other settings: {changed}. Give the former ones, or start a new run "
                "from its weights (load_weights)"
            )
        before = state.get("identity", self.identity)
        if changed := _changed(before, self.identity, [*self.identity, *(n for n in before if n not in self.identity)]):
            raise CheckpointError(
                f"{path} is of another structure or other data: {changed}. Make them as for that run, or begin a new "
                "one"
            )

    # ------------------------------------------------------------------ one epoch, one step

    def _epoch(self, callbacks: list[Callback], stop: threading.Event, max_seconds: float) -> None:
        """One epoch, or what a resumed run has left of it, or what the time suffices for."""
        started = time.perf_counter() - self.epoch_seconds
        self.order = self.processes.agree(self.data.order()) if self.order is None else self.order
        for x, y in self.data.batches(self.batch_size, self.order, skip=self.batch):
            self.optimise(self._args(x, y))
            self.batch, self.step, self.rows = self.batch + 1, self.step + 1, self.rows + len(x)
            self.epoch_seconds = time.perf_counter() - started
            for callback in callbacks:
                callback.on_batch(self.epoch, self.batch - 1)
            stopped, is_late = self._agreed(stop.is_set(), self.seconds + self.epoch_seconds >= max_seconds)
            if stopped:
                self.save()
                raise KeyboardInterrupt(f"stopped after step {self.step}; resume from {self.out}")
            if is_late:
                break
        self._look()  # waits for the device
        self.epoch_seconds = self.processes.agree(time.perf_counter() - started)
        metrics = self._end_epoch()
        for callback in callbacks:
            callback.on_epoch(metrics)

    def optimise(self, args: tuple) -> None:
        """One step on a batch; raises `NonFiniteLoss` before it would do harm."""
        for module in self.told:
            module.advance(self.step, self.epoch)
        self.critics(args if self.processes.size == 1 else tuple(self.processes.share(a) for a in args))
        loss, norm = self._gradient(args) if self.processes.size == 1 else self._added_up(args)
        if self.waits:
            self._refuse(args, loss, norm)
        else:  # Adam leaves everything as it was where the flag is set, so that the host may look later
            bad = ~(loss.isfinite() & norm.isfinite())
            self.optimizer.found_inf = bad.float()
            self.bad = bad if self.bad is None else self.bad | bad
            if self.step % PATIENCE == 0:
                self._look()
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.step + 1)
        self.total += loss * len(args[0])

    def _added_up(self, args: tuple) -> tuple[Tensor, Tensor]:
        """Loss and gradient of the batch, of which every process takes a share."""
        shares = tuple(self.processes.share(a) for a in args)
        self.eager.share = len(shares[0]) / len(args[0])
        loss, _ = self._gradient(shares)
        with_gradient = [p for p in self.eager.parameters if p.grad is not None]
        loss, *gradients = self.processes.add_up([loss, *(p.grad for p in with_gradient)])
        for p, gradient in zip(with_gradient, gradients, strict=True):
            p.grad = gradient
        return loss, self.clip()

    def _agreed(self, *flags: bool) -> list[bool]:
        """Whether any process has the flag set."""
        if self.processes.size == 1:
            return list(flags)
        found = self.processes.add_up([torch.tensor([float(f) for f in flags], device=self.device)])[0]
        return [f > 0 for f in found.tolist()]

    def _gradient(self, args: tuple) -> tuple[Tensor, Tensor]:
        """Loss and gradient of what this process has of a batch."""
        count = self.data.num_batches(self.batch_size)
        is_regular = self.batch < count - 1 or count == 1  # of the size that most are
        return self.gradient(args, self._beta(), num_left=self._num_left if is_regular else None)

    def _num_left(self, seconds: float) -> int:
        """Steps to come, at so many seconds each."""
        steps, until = self.planned
        return int(min(steps - self.step, math.inf if until == math.inf else (until - self.seconds) / seconds))

    def _say(self, message: str, *, unasked: bool = False) -> None:
        if unasked and not self.callbacks and self.processes.is_first:  # nobody else would tell
            warnings.warn(message, stacklevel=2)
        for callback in self.callbacks:
            callback.on_message(message)

    def _refuse(self, args: tuple, loss: Tensor, norm: Tensor) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteLoss(self._diagnosis(args, float(loss), float(norm)))

    def _look(self) -> None:
        """Raise for a loss that was not finite in one of the steps since the last look."""
        if self.bad is not None and self.bad.item():
            args = self._args(*self.data.train_rows(self.batch_size))  # the batch itself is gone
            raise NonFiniteLoss(self._diagnosis(args, math.nan, math.nan))
        self.bad = None

    def _beta(self) -> dict[str, float]:
        return {name: schedule(self.step, self.epoch) for name, schedule in self.schedules.items()}

    def _args(self, x: Tensor, y: Tensor | None) -> tuple:
        return (x, y) if self.supervised else (x,)

    # ------------------------------------------------------------------ what is written down

    def _end_epoch(self) -> EpochMetrics:
        lr = float(self.optimizer.param_groups[0]["lr"])
        with nullcontext() if self.average is None else self.average.in_place():
            found = monitored(self.structure, self.data, self.monitor_size, self._beta(), self.supervised)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.epoch, self.batch, self.order = self.epoch + 1, 0, None
        self.seconds += self.epoch_seconds
        metrics = EpochMetrics(
            epoch=self.epoch,
            step=self.step,
            seconds=self.seconds,
            objective=-self.total.item() / self.rows,
            lr=lr,
            images_per_second=self.rows / self.epoch_seconds,
            learned={name: value.item() for name, value in learned(self.estimator).items()},
            critic_loss=self.critics.mean_loss(),
            estimator=type(self.estimator).__name__,
            **found,
        )
        self.total, self.rows, self.epoch_seconds = torch.zeros_like(self.total), 0, 0.0
        self.history.append(metrics)
        return metrics

    def _diagnosis(self, args: tuple, loss: float, norm: float) -> str:
        good = "none, for fit was called without out"
        if self.saved_step is not None:
            good = f"{self.out / CHECKPOINT}, of step {self.saved_step}"
        return (
            f"the loss is {loss} and the gradient's norm {norm:g} in step {self.step + 1} (epoch {self.epoch + 1}); "
            f"{not_finite(self.structure, args)}. Last good checkpoint: {good}. Lower the learning rate, set "
            "clip_norm, or raise min_variance"
        )


def _changed(before: dict, now: dict, names: list[str]) -> str:
    """The first few of what differs, in words."""
    found = [f"{n} was {before.get(n)!r} and is {now.get(n)!r}" for n in names if before.get(n) != now.get(n)]
    return "; ".join(found[:4]) + " ..." * (len(found) > 4)


@contextmanager
def _interrupt_at_step_end(enabled: bool) -> Iterator[threading.Event]:
    """Ctrl-C lets the step in progress finish and sets the event; a second Ctrl-C stops at once."""
    asked = threading.Event()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handler(signum, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
