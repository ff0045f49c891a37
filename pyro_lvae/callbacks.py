"""What may watch a training run: a progress bar, JSON lines, TensorBoard, or anything of one's own."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from .results import EpochMetrics, read_metrics, write_metrics


class Callback:
    """Methods called by `fit`; override what is needed."""

    def on_start(self, epoch: int, epochs: int, num_batches: int) -> None:
        """Training starts (or resumes) with `epoch` epochs completed out of `epochs`."""

    def on_message(self, message: str) -> None:
        """Something worth knowing, in a sentence: why the step was compiled, or was not."""

    def on_batch(self, epoch: int, batch: int) -> None:
        """Batch number `batch` of the epoch is done."""

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """An epoch is done, before its checkpoint is written.

        With `fit(average=...)` the metrics are of the average, while the structure has the weights in training.
        """

    def on_end(self) -> None:
        """Training is over, by its end, an interruption or an error."""


class ProgressBar(Callback):
    """A bar with the epoch, both ELBOs, the least beta of a layer and of the weights, and the time left.

    Where the output is no terminal but a file, a line now and then: a hundred and the last, and one after each
    half minute of silence.
    """

    def __init__(self):
        self._progress = None

    def on_start(self, epoch: int, epochs: int, num_batches: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console()
        self._is_live = console.is_jupyter or (console.is_interactive and console.file.isatty())
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[elbo]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            refresh_per_second=4,
            console=console,
            disable=not self._is_live,
        )
        total, done = epochs * num_batches, epoch * num_batches
        self._task = self._progress.add_task("", total=total, completed=done, epoch=epoch, epochs=epochs, elbo="")
        self._num_batches, self._epochs, self._line, self._last = num_batches, epochs, "", time.monotonic()
        self._progress.start()

    def on_message(self, message: str) -> None:
        self._progress.console.print(message, markup=False, highlight=False, soft_wrap=not self._is_live)

    def on_batch(self, epoch: int, batch: int) -> None:
        self._progress.update(self._task, completed=epoch * self._num_batches + batch + 1)

    def on_epoch(self, metrics: EpochMetrics) -> None:
        layers = metrics.beta_of_layers
        others = {name: beta for name, beta in metrics.beta.items() if name not in layers}
        note = _beta(layers) + (f"  KL(w) {metrics.global_kl:.1f}{_beta(others)}" if metrics.global_kl else "")
        elbo = f"ELBO train {metrics.train_elbo:.2f}  test {metrics.test_elbo:.2f}{note}"
        self._progress.update(self._task, epoch=metrics.epoch, elbo=elbo)
        self._line = f"epoch {metrics.epoch}/{self._epochs}  {elbo}"
        if metrics.epoch % -(-self._epochs // 100) == 0 or time.monotonic() - self._last > 30:
            self._write_line()

    def _write_line(self) -> None:
        if self._line and not self._is_live:
            self.on_message(self._line)
        self._line, self._last = "", time.monotonic()

    def on_end(self) -> None:
        self._write_line()
        self._progress.stop()


def _beta(weights: dict[str, float]) -> str:
    """The least of the KL weights, where one is not 1."""
    beta = min(weights.values(), default=1)
    return "" if beta == 1 else f"  β {beta:.2f}"


class JSONLines(Callback):
    """One JSON object a line, one line an epoch, in `path`; lines past the resumed epoch are dropped."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def on_start(self, epoch: int, epochs: int, num_batches: int) -> None:
        write_metrics(self.path, [m for m in read_metrics(self.path) if m.epoch <= epoch])

    def on_epoch(self, metrics: EpochMetrics) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(metrics)) + "\n")


class TensorBoard(Callback):
    """Scalars for TensorBoard in `folder`, nats per datum, against epochs."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def on_start(self, epoch: int, epochs: int, num_batches: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=epoch + 1)

    def on_epoch(self, metrics: EpochMetrics) -> None:
        for name, value in asdict(metrics).items():
            parts = value if isinstance(value, dict) else {} if value is None or isinstance(value, str) else {"": value}
            for part, number in parts.items():
                self._writer.add_scalar(f"{name}/{part}".rstrip("/"), number, metrics.epoch)

    def on_end(self) -> None:
        self._writer.close()
