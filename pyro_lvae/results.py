"""What a run found: frozen dataclasses, JSON and tables."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path


@dataclass(frozen=True)
class EpochMetrics:
    """One line of `metrics.jsonl`; all in nats per datum.

    Attributes:
        epoch: epochs completed.
        step: optimiser steps completed.
        seconds: training time so far, over all resumed parts.
        objective: mean training objective of the epoch (annealed by beta, in training mode).
        train_elbo, test_elbo: ELBO at beta = 1, one sample, in evaluation mode, on rows spread
            over either set (`monitor_size` of `fit`), with the same noise every epoch.
        kl: {site: KL contribution E_q[log q - log p]} on the same test rows.
        beta: {site: KL weight at the end of the epoch}; "global" stands for many global sites of one weight.
        lr: learning rate of the epoch.
        images_per_second: training rows per second of the epoch.
        learned: what the estimator itself has learned, such as {"multiplier": 0.7}.
        global_kl: KL of sites outside the data plate (weights) for each training datum; both ELBOs include it.
        critic_loss: mean loss of the critics over the epoch, nats, where there are some; 2 log 2 = 1.39 if they see
            no difference.
        estimator: name of what trained it.
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
    global_kl: float = 0.0
    critic_loss: float | None = None
    estimator: str = ""

    @property
    def beta_of_layers(self) -> dict[str, float]:
        """`beta` without the sites of weights."""
        return {name: beta for name, beta in self.beta.items() if name in self.kl}


def trained_by(history: list[EpochMetrics]) -> str:
    """The estimators of a run by name, in the order of its epochs: "SampledELBO, then IWAE"."""
    return ", then ".join(name for name, _ in groupby(m.estimator for m in history))


@dataclass(frozen=True)
class Summary:
    """The results of a run; log-likelihoods and KLs in nats per datum.

    Attributes:
        data, structure, estimator: what was trained on what, by what.
        epochs, seconds, images_per_second: of training.
        num_parameters: trainable scalars.
        train_elbo, test_elbo: ELBO at beta = 1, in evaluation mode, by ten draws.
        test_log_likelihood: importance-sampled log p(x), mean over `num_images` test rows; `None` for an autoencoder.
        test_log_likelihood_stderr: standard error of that mean over the rows; `None` for a single one.
        num_samples: importance samples a row.
        num_images: how many test rows the log-likelihood used.
        kl_per_layer: {site: KL contribution} on the test rows; they sum to the whole KL.
        active_units: {site: units whose posterior mean varies over the data by more than 0.01}.
        units: {site: size of the layer}.
        num_draws: draws of the weights, where they have a posterior, else 0. The log-likelihood is then averaged over
            them within the logarithm; the ELBOs are means of those conditional on each; KL per layer and active units
            are conditional on the posterior mean.
        weight_kl: KL of the weights, nats for each training datum.
        beta: the KL weight of a layer at the end of training that is furthest from 1; the figures here are at 1.
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
    test_log_likelihood: float | None
    test_log_likelihood_stderr: float | None
    num_samples: int
    num_images: int
    kl_per_layer: dict[str, float]
    active_units: dict[str, int]
    units: dict[str, int]
    num_draws: int = 0
    weight_kl: float = 0.0
    beta: float = 1.0

    def rows(self) -> list[tuple[str, str]]:
        """The table of results, as (label, value)."""
        given = f" (mean of {self.num_draws}, given the weights, whose KL is not taken off)" if self.num_draws else ""
        kl_of_weights = [("KL of the weights", f"{self.weight_kl:.2f} nats a training datum")] if self.num_draws else []
        beta = [] if self.beta == 1 else [("beta", f"{self.beta:.4g} at the end of training; figures below are at 1")]
        return [
            ("structure", f"{self.structure} ({self.num_parameters:,} parameters)"),
            ("data", self.data),
            ("training", f"{_several(self.epochs, 'epoch')} by {self.estimator} in {self.seconds:.0f} s"),
            *beta,
            ("speed", f"{self.images_per_second:,.0f} images/s"),
            ("train ELBO", f"{self.train_elbo:.2f} nats{given}"),
            ("test ELBO", f"{self.test_elbo:.2f} nats{given}"),
            ("test log p(x)", self._log_p()),
            *kl_of_weights,
            ("KL per layer", "  ".join(f"{k} {v:.2f}" for k, v in self.kl_per_layer.items())),
            ("active units", "  ".join(f"{k} {v}/{self.units[k]}" for k, v in self.active_units.items())),
        ]

    def _log_p(self) -> str:
        if self.test_log_likelihood is None:
            return "none: codes are points"
        error = "" if self.test_log_likelihood_stderr is None else f" ± {self.test_log_likelihood_stderr:.2f}"
        over = f", averaged over {self.num_draws} draws of the weights" if self.num_draws else ""
        what = "standard error; " if error else ""
        samples = f"({what}{_several(self.num_samples, 'sample')}, {_several(self.num_images, 'image')}{over})"
        return f"{self.test_log_likelihood:.2f}{error} nats {samples}"


@dataclass(frozen=True)
class GradientQuality:
    """How an estimator's gradient of the bound behaves, for one group of parameters; per datum of the batch.

    Norms are Euclidean, over all parameters of the group; squared norms have the share of the
    Monte Carlo noise subtracted.

    Attributes:
        norm: of the mean gradient.
        std: root of the summed variances of its entries, from draw to draw.
        snr: norm / std, the signal-to-noise ratio (of one draw of all K particles); `None` without noise.
        snr_floor: below this, the number of draws does not tell the ratio from 0.
        bias: distance of the mean from the gradient of log p(x), estimated with many particles.
        bias_noise: root of the noise that was subtracted from its square; the tables print a bias where it is larger.
        own_bias: distance of the mean from the gradient of the estimator's own bound, differentiated
            plainly with the same noise; 0 by construction for most, `None` where sites cannot be
            reparameterised, or the estimator has no such bound.
        own_bias_noise: root of the noise that was subtracted from its square.
    """

    norm: float
    std: float
    snr: float | None
    snr_floor: float
    bias: float
    bias_noise: float
    own_bias: float | None
    own_bias_noise: float | None


@dataclass(frozen=True)
class EstimatorQuality:
    """What one estimator does on a structure and a batch.

    Attributes:
        estimator: its name and arguments.
        num_particles: K.
        value: mean of the objective over draws, nats per datum; for most a bound of log p(x).
        stderr: its Monte Carlo standard error.
        gradients: {"model" | "guide" | "shared": quality}.
        seconds: median time of a value and gradient.
        peak_bytes: largest memory that lives at one moment of it, beyond the weights.
        values: the objective of each draw, nats per datum.
        gradient_norms: {group: norm of the gradient of each draw}.
    """

    estimator: str
    num_particles: int
    value: float
    stderr: float
    gradients: dict[str, GradientQuality]
    seconds: float
    peak_bytes: int
    values: list[float]
    gradient_norms: dict[str, list[float]]


@dataclass(frozen=True)
class Comparison:
    """Estimators side by side on one structure and one batch; nats per datum.

    Attributes:
        structure: its class.
        num_rows: rows of the batch.
        num_parameters: {group: number of parameters}: the model's own, the guide's own, and shared.
        log_p: log p(x) by importance sampling, mean over the batch.
        num_samples: importance samples a row.
        log_p_annealed: log p(x) by annealed importance sampling; `None` where it was not asked for.
        annealed_gap: mean gap of bidirectional Monte Carlo on as many rows drawn from the model.
        reference_particles: of the gradient of log p(x).
        reference_norm: {group: norm of that gradient}.
        rows: one estimator each.
        skipped: {estimator: why it cannot be used here}.
    """

    structure: str
    num_rows: int
    num_parameters: dict[str, int]
    log_p: float
    num_samples: int
    log_p_annealed: float | None
    annealed_gap: float | None
    reference_particles: int
    reference_norm: dict[str, float]
    rows: list[EstimatorQuality]
    skipped: dict[str, str]

    def tables(self) -> dict[str, tuple[list[str], list[list[str]]]]:
        """{title: heads and rows}, in words; a gradient's bias is printed where it stands out of its noise."""
        truth = [f"log p(x) {self.log_p:.2f} by {self.num_samples:,} importance samples"]
        if self.log_p_annealed is not None:
            truth += [f"{self.log_p_annealed:.2f} by annealing (gap {self.annealed_gap:.2f} on simulated data)"]
        title = f"{self.structure}, {self.num_rows} rows; {', '.join(truth)}; nats per datum"
        heads = ["estimator", "value", "below IS", "below AIS", "ms", "MiB"]
        tables = {title: (heads, [self._value(row) for row in self.rows])}
        for group, size in self.num_parameters.items():
            heads = ["estimator", "|E g|", "sd(g)", "SNR", "bias to d log p", "bias to own bound"]
            rows = [[r.estimator, *self._gradient(r.gradients[group])] for r in self.rows]
            tables[f"gradient of {size:,} {group} parameters"] = heads, rows
        return tables

    def _value(self, row: EstimatorQuality) -> list[str]:
        annealed = "" if self.log_p_annealed is None else f"{self.log_p_annealed - row.value:.2f}"
        cells = [row.estimator, f"{row.value:.2f} ± {row.stderr:.2f}", f"{self.log_p - row.value:.2f}", annealed]
        return [*cells, f"{1e3 * row.seconds:.1f}", f"{row.peak_bytes / 2**20:.1f}"]

    def _gradient(self, g: GradientQuality) -> list[str]:
        own = "" if g.own_bias is None else _beyond_noise(g.own_bias, g.own_bias_noise)
        is_lost = g.snr is not None and g.snr <= g.snr_floor
        snr = "" if g.snr is None else _below(g.snr_floor) if is_lost else f"{g.snr:.2g}"
        norm = _below(g.snr_floor * g.std) if is_lost else f"{g.norm:.3g}"
        return [norm, f"{g.std:.3g}", snr, _beyond_noise(g.bias, g.bias_noise), own]


@dataclass(frozen=True)
class TrainingComparison:
    """One structure trained by each estimator from the same start for the same time.

    Attributes:
        structure, data: what was trained on what.
        max_seconds: training time of each.
        histories: {estimator: the metrics of its epochs}.
        log_p: {estimator: test log p(x) by importance sampling, nats per datum}.
        log_p_stderr: {estimator: standard error of that over the rows; `None` for a single one}.
        num_samples: importance samples a row.
        skipped: {estimator: why it could not be used, or where it failed}.
    """

    structure: str
    data: str
    max_seconds: float
    histories: dict[str, list[EpochMetrics]]
    log_p: dict[str, float]
    log_p_stderr: dict[str, float | None]
    num_samples: int
    skipped: dict[str, str]

    def tables(self) -> dict[str, tuple[list[str], list[list[str]]]]:
        """{title: heads and rows}, in words."""
        rows = []
        for name, history in self.histories.items():
            last = history[-1]
            error = "" if self.log_p_stderr[name] is None else f" ± {self.log_p_stderr[name]:.2f}"
            log_p = f"{self.log_p[name]:.2f}{error}"
            rows.append([name, f"{last.test_elbo:.2f}", log_p, str(last.epoch), str(last.step), f"{last.seconds:.0f}"])
        heads = ["estimator", "test ELBO", "test log p(x)", "epochs", "steps", "seconds"]
        title = f"{self.structure} on {self.data}, {self.max_seconds:g} s of training each; nats per datum"
        return {title: (heads, rows)}


def _beyond_noise(bias: float, noise: float) -> str:
    return f"{bias:.2g}" if bias > noise else _below(noise) if noise > 0 else "0"


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _below(bound: float) -> str:
    """A bound in two digits, rounded up."""
    step = 10.0 ** (math.floor(math.log10(bound)) - 1)
    return f"< {float(f'{math.ceil(bound / step - 1e-9) * step:.2g}'):g}"


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
