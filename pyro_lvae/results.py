"""What a run found: frozen dataclasses, JSON and tables."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class EpochMetrics:
    """One line of `metrics.jsonl`; all in nats per datum.

    Attributes:
        epoch: epochs completed.
        step: optimiser steps completed.
        seconds: training time so far, over all resumed parts.
        objective: mean training objective of the epoch (annealed by beta, in training mode).
        train_elbo, test_elbo: ELBO at beta = 1, one sample, in evaluation mode, on the first
            rows of either set (`monitor_size` of `fit`), with the same noise every epoch.
        kl: {site: KL contribution E_q[log q - log p]} on the same test rows.
        beta: {site: KL weight at the end of the epoch}.
        lr: learning rate of the epoch.
        images_per_second: training rows per second of the epoch.
        learned: what the estimator itself has learned, such as {"multiplier": 0.7}.
    """

    epoch: int
    step: int
    seconds: float
    objective: float
    train_elbo: float
    test_elbo: float
    kl: dict[str, float]
    beta: dict[str, float]
    lr: float
    images_per_second: float
    learned: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """The results of a run; log-likelihoods and KLs in nats per datum.

    Attributes:
        data, structure, estimator: what was trained on what, by what.
        epochs, seconds, images_per_second: of training.
        num_parameters: trainable scalars.
        train_elbo, test_elbo: ELBO at beta = 1, in evaluation mode.
        test_log_likelihood: importance-sampled log p(x), mean over `num_images` test rows.
        test_log_likelihood_stderr: standard error of that mean over the rows; `None` for a single one.
        num_samples: importance samples a row.
        num_images: how many test rows the log-likelihood used.
        kl_per_layer: {site: KL contribution} on the test rows; they sum to the whole KL.
        active_units: {site: units whose posterior mean varies over the data by more than 0.01}.
        units: {site: size of the layer}.
    """

    data: str
    structure: str
    estimator: str
    epochs: int
    seconds: float
    images_per_second: float
    num_parameters: int
    train_elbo: float
    test_elbo: float
    test_log_likelihood: float
    test_log_likelihood_stderr: float | None
    num_samples: int
    num_images: int
    kl_per_layer: dict[str, float]
    active_units: dict[str, int]
    units: dict[str, int]

    def rows(self) -> list[tuple[str, str]]:
        """The table of results, as (label, value)."""
        error = "" if self.test_log_likelihood_stderr is None else f" ± {self.test_log_likelihood_stderr:.2f}"
        log_p = f"{self.test_log_likelihood:.2f}{error} nats"
        return [
            ("structure", f"{self.structure} ({self.num_parameters:,} parameters)"),
            ("data", self.data),
            ("training", f"{self.epochs} epochs by {self.estimator} in {self.seconds:.0f} s"),
            ("speed", f"{self.images_per_second:,.0f} images/s"),
            ("train ELBO", f"{self.train_elbo:.2f} nats"),
            ("test ELBO", f"{self.test_elbo:.2f} nats"),
            ("test log p(x)", f"{log_p} ({self.num_samples:,} samples, {self.num_images:,} images)"),
            ("KL per layer", "  ".join(f"{k} {v:.2f}" for k, v in self.kl_per_layer.items())),
            ("active units", "  ".join(f"{k} {v}/{self.units[k]}" for k, v in self.active_units.items())),
        ]


def write_json(path: Path, value) -> None:
    """Write a dataclass or dict as JSON, atomically."""
    value = value if isinstance(value, dict) else asdict(value)
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_summary(path: Path) -> Summary:
    """The `summary.json` of a run."""
    return Summary(**json.loads(path.read_text(encoding="utf-8")))


def write_metrics(path: Path, epochs: Iterable[EpochMetrics]) -> None:
    """Write `metrics.jsonl`: one JSON object a line, one line an epoch."""
    write_text(path, "".join(json.dumps(asdict(e)) + "\n" for e in epochs))


def read_metrics(path: Path) -> list[EpochMetrics]:
    """The epochs of a `metrics.jsonl`; a last line that a crash cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    epochs = []
    for line in lines:
        try:
            epochs.append(EpochMetrics(**json.loads(line)))
        except json.JSONDecodeError:
            break
    return epochs
