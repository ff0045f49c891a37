"""Run folders: what is in one, making one without overwriting anything, opening one again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import plots
from .bayes import BayesianWeights
from .callbacks import Callback
from .checkpoint import load_weights
from .contract import takes_labels
from .data import Dataset
from .distributed import Processes
from .evaluate import summarize
from .loop import CHECKPOINT, METRICS
from .report import CAPTIONS, write_report
from .results import EpochMetrics, Summary, read_metrics, read_summary, write_json, write_text
from .train import as_device, fit

CONFIG, SUMMARY, FIGURES, REPORT, BOARD = "config.yaml", "summary.json", "figures", "report.html", "tensorboard"


@dataclass(frozen=True)
class Run:
    """A trained structure with its data and its folder.

    Attributes:
        folder: holds `config.yaml`, `metrics.jsonl`, `checkpoint.pt`, `summary.json`, `figures/`, `report.html`.
        history: metrics of its epochs.
        supervised: whether it takes labels.
    """

    folder: Path
    structure: nn.Module
    data: Dataset
    history: list[EpochMetrics]
    supervised: bool = False
    processes: Processes = Processes()  # noqa: RUF009, frozen

    def evaluate(self, num_samples: int, num_images: int | None) -> Summary:
        """Write `summary.json`."""
        summary = summarize(
            self.structure,
            self.data,
            self.history,
            num_samples=num_samples,
            num_images=num_images,
            supervised=self.supervised,
            processes=self.processes,
        )
        if self.processes.is_first:
            write_json(self.folder / SUMMARY, summary)
        return summary

    def report(self) -> Path:
        """Draw `figures/` and write `report.html`; its path."""
        figures = plots.draw(self.point, self.data, self.history, supervised=self.supervised)
        plots.save(figures, self.folder / FIGURES)
        return write_report(self.folder)

    @property
    def point(self) -> nn.Module:
        """The structure; at its posterior mean, where the weights have a posterior."""
        return self.structure.mean() if isinstance(self.structure, BayesianWeights) else self.structure

    def load(self) -> Run:
        """The same run, with the weights of its checkpoint and the metrics of its file."""
        epoch = load_weights(self.structure, self.folder / CHECKPOINT)["epoch"]
        self.history[:] = [m for m in read_metrics(self.folder / METRICS) if m.epoch <= epoch]
        return self

    @property
    def summary(self) -> Summary | None:
        """The results, if it has been evaluated."""
        path = self.folder / SUMMARY
        return read_summary(path) if path.exists() else None


def trained(
    structure: nn.Module, data: Dataset, folder: Path, *, num_samples: int, num_images: int | None, **options
) -> Summary:
    """Train, or go on with or just read what an earlier call left in `folder`; then evaluate and report.

    Args:
        num_samples, num_images: of the log-likelihood, as `summarize` has them.
        **options: of `fit`.
    """
    history = fit(structure, data, out=folder, resume=(folder / CHECKPOINT).exists(), **options)
    run = Run(folder, structure, data, history, takes_labels(structure, options.get("supervised")))
    summary = run.evaluate(num_samples, num_images)
    run.report()
    return summary


def claim_folder(out: str | Path | None, stem: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Make the folder of a new run, or name that of an old one, in which nothing is touched yet.

    Args:
        out: the folder; `None` takes the first free one of STEM-1, STEM-2 ...

    Raises:
        FileExistsError: it holds something already, and neither `resume` nor `overwrite` was asked for; or
            it was, and there is no run in it.
        ValueError: both were asked for, or no folder was named.
    """
    if (resume or overwrite) and (out is None or resume is overwrite):
        raise ValueError("to go on with a run, or else to replace it, name its folder: give out with one of the two")
    if out is None:
        return _first_free(stem)
    folder = Path(out)
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; name a folder for the run")
    is_used = folder.exists() and any(folder.iterdir())
    if overwrite and is_used and not any((folder / name).exists() for name in (CONFIG, CHECKPOINT)):
        raise FileExistsError(f"{folder} holds files, but no run that could be replaced; name another folder")
    if is_used and not (resume or overwrite):
        raise FileExistsError(
            f"{folder} is not empty; name another folder, or ask to go on with the run in it (--resume) or to "
            "replace it (--overwrite)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _first_free(stem: str | Path) -> Path:
    for number in range(1, 10**6):
        folder = Path(f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{stem}-1 and a million more exist; name a folder with out")


class RunFiles(Callback):
    """When training starts, all inputs checked: keeps the configuration, and removes an old run's results.

    Nothing but what a run itself writes is removed.
    """

    def __init__(self, folder: Path, config: str):
        self.folder, self.config = folder, config

    def on_start(self, epoch: int, epochs: int, num_batches: int) -> None:
        figures = [self.folder / FIGURES / f"{name}.png" for name in CAPTIONS]
        for path in (self.folder / SUMMARY, self.folder / REPORT, *figures):
            path.unlink(missing_ok=True)
        if epoch == 0:
            for path in (self.folder / BOARD).glob("events.out.tfevents.*"):
                path.unlink()
        write_text(self.folder / CONFIG, self.config)


def auto_device(device: str | None) -> torch.device:
    """The device that was asked for, or CUDA where there is one: under torchrun, each process its own."""
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "cuda"
    return as_device(device or (own if torch.cuda.is_available() else "cpu"))
