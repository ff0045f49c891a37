"""Run folders: what is in one, making one without overwriting anything, opening one again."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import plots
from .checkpoint import load_weights
from .data import Dataset
from .evaluate import summarize
from .loop import CHECKPOINT, METRICS
from .report import write_report
from .results import EpochMetrics, Summary, read_metrics, read_summary, write_json

CONFIG, SUMMARY, FIGURES, REPORT, BOARD = "config.yaml", "summary.json", "figures", "report.html", "tensorboard"


@dataclass(frozen=True)
class Run:
    """A trained structure with its data and its folder.

    Attributes:
        folder: holds `config.yaml`, `metrics.jsonl`, `checkpoint.pt`, `summary.json`, `figures/`, `report.html`.
        estimator: name of what it was trained by.
        history: metrics of its epochs.
        supervised: whether it takes labels.
    """

    folder: Path
    structure: nn.Module
    data: Dataset
    estimator: str
    history: list[EpochMetrics]
    supervised: bool = False

    def evaluate(self, num_samples: int, num_images: int | None) -> Summary:
        """Write `summary.json`."""
        summary = summarize(
            self.structure,
            self.data,
            self.history,
            estimator=self.estimator,
            num_samples=num_samples,
            num_images=num_images,
            supervised=self.supervised,
        )
        write_json(self.folder / SUMMARY, summary)
        return summary

    def report(self) -> Path:
        """Draw `figures/` and write `report.html`; its path."""
        figures = plots.draw(self.structure, self.data, self.history, supervised=self.supervised)
        plots.save(figures, self.folder / FIGURES)
        return write_report(self.folder)

    def load(self) -> Run:
        """The same run, with the weights of its checkpoint and the metrics of its file."""
        load_weights(self.structure, self.folder / CHECKPOINT)
        self.history[:] = read_metrics(self.folder / METRICS)
        return self

    @property
    def summary(self) -> Summary | None:
        """The results, if it has been evaluated."""
        path = self.folder / SUMMARY
        return read_summary(path) if path.exists() else None


def claim_folder(out: str | Path | None, stem: str, *, resume: bool = False, overwrite: bool = False) -> Path:
    """The folder of a new run, or of the one to go on with; an existing one is overwritten only when asked.

    Args:
        out: the folder; `None` takes the first free one of runs/STEM-1, runs/STEM-2 ...

    Raises:
        FileExistsError: it holds a run already, and neither `resume` nor `overwrite` was asked for.
        ValueError: both were, or there is nothing to resume.
    """
    if resume and (overwrite or out is None):
        raise ValueError("resume goes on with the run in a folder that is named: give out, and not overwrite")
    if out is None:
        numbers = (Path("runs", f"{stem}-{i}") for i in range(1, 10**6))
        return next(folder for folder in numbers if not folder.exists())
    folder = Path(out)
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; name a folder for the run")
    if overwrite:
        _remove_run(folder)
    elif not resume and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty; name another folder, or ask to go on with the run in it (--resume) or to "
            "replace it (--overwrite)"
        )
    return folder


def _remove_run(folder: Path) -> None:
    """Remove what a run writes, and nothing else that may lie in the folder."""
    for name in (CONFIG, SUMMARY, REPORT, CHECKPOINT, METRICS):
        (folder / name).unlink(missing_ok=True)
    for name in (FIGURES, BOARD):
        shutil.rmtree(folder / name, ignore_errors=True)


def auto_device(device: str | None) -> torch.device:
    """The device that was asked for, or CUDA where there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
