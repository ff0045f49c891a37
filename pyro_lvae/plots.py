"""Pictures of a run; the one room that imports matplotlib. Every function returns a `Figure`."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn

from .contract import takes_labels
from .data import Dataset
from .evaluate import (
    Activity,
    can_generate,
    interpolate,
    manifold,
    planar_layer,
    posterior_activity,
    posterior_samples,
    reconstruct,
    sample_prior,
    traverse,
)
from .evaluate.latents import ACTIVE, depth
from .results import Comparison, EpochMetrics, EstimatorQuality, TrainingComparison

GAP = 1  # white pixels between images
MAX_POINTS = 2000  # test rows in the scatter plots


def lines(panels: dict[str, dict[str, tuple]], xlabel: str, ylabel: str, *, is_logarithmic: bool = False) -> Figure:
    """A panel a title, with a line a label: `{title: {label: (x, y)}}`.

    Over epochs, where y starts far below the rest, as a bound in training does, the lowest tenth is cut off.

    Args:
        panels: titles, and labels with the values of x and y.
        xlabel: of every panel; `"epoch"` for curves of training.
        ylabel: of the first.
        is_logarithmic: the x axis, with ticks at the values.
    """
    width, height = (6.0, 3.6) if len(panels) == 1 else (3.2 * len(panels), 3.2)
    figure = Figure(figsize=(width, height), layout="constrained")
    for ax, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, (x, y) in curves.items():
            ax.plot(x, y, ".-" if len(x) < 12 else "-", label=label)
        if xlabel == "epoch":
            _cut_off(ax, [float(v) for _, y in curves.values() for v in y])
        ax.set(title=title, xlabel=xlabel)
        if is_logarithmic:
            ticks = sorted({value for x, _ in curves.values() for value in x})
            ax.set_xscale("log")
            ax.set_xticks(ticks, [f"{value:g}" for value in ticks])
            ax.minorticks_off()
        else:
            ax.xaxis.get_major_locator().set_params(integer=True)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(ylabel)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, loc="outside right upper")
    return figure


def _cut_off(ax, values: list[float]) -> None:
    """Limits of y without the lowest tenth, where that is far from the rest."""
    if values and (low := _lowest_tenth(values)) - min(values) > max(values) - low:
        _show_above(ax, low, max(values))


def _lowest_tenth(values: list[float]) -> float:
    return torch.quantile(torch.tensor(values), 0.1).item()


def _show_above(ax, low: float, high: float) -> None:
    """Limits of y just beyond these."""
    ax.set_ylim(low - 0.1 * (high - low) - 0.1, high + 0.1 * (high - low) + 0.1)


def elbo_curves(history: list[EpochMetrics]) -> Figure:
    """Train and test ELBO (beta = 1) over epochs, nats per datum, with the annealed training objective."""
    figure, ax = _axes("epoch", "nats per datum", "ELBO")
    epochs = [m.epoch for m in history]
    ax.plot(epochs, [m.objective for m in history], color="0.7", label="training objective (annealed)")
    ax.plot(epochs, [m.train_elbo for m in history], label="train ELBO")
    ax.plot(epochs, [m.test_elbo for m in history], label="test ELBO")
    elbos = [v for m in history for v in (m.train_elbo, m.test_elbo)]
    low, high = _lowest_tenth(elbos), max([m.objective for m in history] + elbos)
    ax.set_ylim(low - 0.15 * (high - low) - 1, high + 0.1 * (high - low) + 1)
    ax.legend(frameon=False)
    return figure


def kl_curves(history: list[EpochMetrics]) -> Figure:
    """Each layer's share of the KL over epochs, nats per datum."""
    figure, ax = _axes("epoch", "nats per datum", "KL per layer")
    _colour_layers(ax, len(history[0].kl))
    for name in sorted(history[0].kl, key=depth):
        ax.plot([m.epoch for m in history], [m.kl[name] for m in history], label=name)
    ax.set_yscale("symlog", linthresh=0.1)
    _name_layers(ax, len(history[0].kl), ncols=2)
    return figure


def image_grid(x: Tensor, shape: tuple[int, int], columns: int, title: str = "") -> Figure:
    """Images `[N, D]` in rows of `columns`, grey values from 0 (black) to 1."""
    rows = -(-len(x) // columns)
    height, width = (side + GAP for side in shape)
    canvas = x.new_ones(rows * columns, height, width)
    canvas[: len(x), GAP:, GAP:] = x.detach().reshape(-1, *shape)
    canvas = canvas.reshape(rows, columns, height, width).transpose(1, 2).reshape(rows * height, columns * width)
    size = min(7.0, 0.7 * columns)
    figure = Figure(figsize=(size, size * rows * height / (columns * width) + 0.4 * bool(title)), layout="constrained")
    ax = figure.subplots()
    ax.imshow(canvas.cpu().clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title)
    return figure


def reconstructions(structure: nn.Module, x: Tensor, shape: tuple[int, int], y: Tensor | None = None) -> Figure:
    """Data `[N, D]` above their reconstructions."""
    pairs = torch.cat([x, reconstruct(structure, x, y=y)])
    return image_grid(pairs, shape, len(x), "data, and E[x | z] with z from q(z | x)")


def interpolations(structure: nn.Module, x: Tensor, shape: tuple[int, int]) -> Figure:
    """Rows of E[x | z] between neighbours of `x` `[N, D]`."""
    steps = 10
    path = interpolate(structure, x[:-1], x[1:], steps)
    return image_grid(path.flatten(0, 1), shape, steps, "between two codes")


def traversals(structure: nn.Module, x: Tensor, shape: tuple[int, int], layer: str | None = None, **options) -> Figure:
    """E[x | z] with one unit a row moved over its range, for each of the data `[N, D]`; `options` as in `traverse`."""
    path = traverse(structure, x, layer, **options)
    return image_grid(path.flatten(0, 2), shape, path.shape[2], f"one unit of {layer or 'the top layer'} a row")


def pca(codes: dict[str, Tensor], labels: Tensor | None = None) -> Figure:
    """First two principal components of each layer's codes `[N, z_i]`, coloured by class."""
    columns = min(len(codes), 6)
    rows = -(-len(codes) // columns)
    figure = Figure(figsize=(2.6 * columns + 0.6 * (labels is not None), 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for ax in axes[len(codes) :]:
        ax.set_axis_off()
    for ax, (name, z) in zip(axes, codes.items(), strict=False):
        z = z.detach().cpu().reshape(len(z), -1).double()
        z = z - z.mean(0)
        directions = torch.linalg.svd(z, full_matrices=False).Vh[:2]
        points = torch.nn.functional.pad(z @ directions.T, (0, 2 - len(directions)))
        colours = "C0" if labels is None else labels.cpu()
        dots = ax.scatter(*points.T, c=colours, cmap=_class_colours(labels), s=3, linewidths=0)
        ax.set(title=f"PCA of {name}", xticks=[], yticks=[])
    if labels is not None:
        figure.colorbar(dots, ax=figure.axes, ticks=labels.unique().tolist(), label="class", fraction=0.03)
    return figure


def _colour_layers(ax, number: int) -> None:
    """Lines of many layers take their colours from a scale, where a cycle would give one to several."""
    if number > 10:
        ax.set_prop_cycle(color=colormaps["turbo"](np.linspace(0.05, 0.95, number)))


def _name_layers(ax, number: int, **options) -> None:
    """A legend, beside the axes where layers are many."""
    if number > 10:
        options = dict(fontsize=7, ncols=-(-number // 18), loc="center left", bbox_to_anchor=(1, 0.5))
    ax.legend(frameon=False, **options)


def _class_colours(labels: Tensor | None) -> str | None:
    """A colour map that tells the classes apart, as far as there are colours."""
    if labels is None:
        return None
    return "tab10" if len(labels.unique()) <= 10 else "tab20"


def active_units(activity: dict[str, Activity]) -> Figure:
    """Variance over the data of each unit's posterior mean, sorted; above the line it is active."""
    figure, ax = _axes("unit (sorted)", "Var_x( E_q[u | x] )", "active units")
    _colour_layers(ax, len(activity))
    for name, layer in activity.items():
        values = layer.variance.sort(descending=True).values.clamp_min(1e-6).cpu()
        ax.plot(range(1, len(values) + 1), values, ".-", label=f"{name}: {layer.active} of {len(values)}")
    ax.axhline(ACTIVE, color="0.6", linestyle="--")
    ax.set_yscale("log")
    _name_layers(ax, len(activity))
    return figure


def latent_manifold(structure: nn.Module, like: Tensor, shape: tuple[int, int], size: int = 20) -> Figure:
    """E[x | z] over the unit square through the inverse normal CDF, for a 2-D top layer."""
    return image_grid(manifold(structure, like, size).flatten(0, 1), shape, size, "latent manifold")


def gradient_quality(comparison: Comparison) -> Figure:
    """Values below log p(x); the model's gradient by bias and noise; signal-to-noise against K, model and guide.

    A hollow bias is within its noise; a ratio in the grey is not told from 0 by that many draws.
    """
    figure = Figure(figsize=(11, 8), layout="constrained")
    values, bias, *ratios = figure.subplots(2, 2).flat
    families = _families(comparison.rows)
    colours = {name: f"C{i}" if i < 10 else "k" for i, name in enumerate(families)}
    _values(values, comparison)
    _bias_and_noise(bias, families, colours)
    for ax, group in zip(ratios, ("model", "guide"), strict=True):
        _signal_to_noise(ax, families, colours, group)
        ax.axhspan(0, 1 / len(comparison.rows[0].values) ** 0.5, color="0.93")
    if bias.get_legend_handles_labels()[0]:
        bias.legend(frameon=False, fontsize=8)
    return figure


def training_curves(comparison: TrainingComparison) -> Figure:
    """Test ELBO over training time, a line an estimator; final log p(x) in the legend. Nats per datum."""
    figure, ax = _axes(
        "seconds of training", "test ELBO, nats per datum", f"{comparison.structure}, same start and time"
    )
    for name, history in comparison.histories.items():
        label = f"{name}: log p {comparison.log_p[name]:.2f}"
        ax.plot([m.seconds for m in history], [m.test_elbo for m in history], label=label)
    curves = [m.test_elbo for history in comparison.histories.values() for m in history]
    _show_above(ax, _lowest_tenth(curves), max(curves))
    ax.legend(frameon=False, fontsize=8)
    return figure


def _values(ax, comparison: Comparison) -> None:
    ax.set(title=f"value on {comparison.num_rows} rows", xlabel="nats per datum")
    for i, row in enumerate(reversed(comparison.rows)):
        ax.errorbar(row.value, i, xerr=row.stderr, fmt="o", color="C0", markersize=4)
    ax.set_yticks(range(len(comparison.rows)), [r.estimator for r in reversed(comparison.rows)], fontsize=8)
    ax.axvline(comparison.log_p, color="0.5", linestyle="--", label=f"IS, {comparison.num_samples:,} samples")
    if comparison.log_p_annealed is not None:
        ax.axvline(comparison.log_p_annealed, color="C1", linestyle=":", label="annealed IS")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)


def _bias_and_noise(ax, families: dict[str, list[EstimatorQuality]], colours: dict[str, str]) -> None:
    for name, rows in families.items():
        for i, row in enumerate(rows):
            if (g := row.gradients.get("model")) is None or g.std == 0:
                continue
            x, filled = max(g.bias, g.bias_noise), colours[name] if g.bias > g.bias_noise else "none"
            label = name if i == 0 else None
            ax.scatter(x, g.std, facecolors=filled, edgecolors=colours[name], s=24, label=label)
            ax.annotate(row.num_particles, (x, g.std), fontsize=7, xytext=(4, 3), textcoords="offset points")
    title = "gradient for the model: bias and noise, by K"
    _logarithmic(ax, title=title, xlabel="distance of the mean from d log p(x)", ylabel="sd(g)")


def _signal_to_noise(ax, families: dict, colours: dict[str, str], group: str) -> None:
    for name, rows in families.items():
        points = sorted((r.num_particles, r.gradients[group].snr) for r in rows if group in r.gradients)
        points = [(k, snr) for k, snr in points if snr]
        if points:
            ax.plot(*zip(*points, strict=True), "o-", markersize=4, color=colours[name])
    _logarithmic(ax, title=f"signal-to-noise, {group} parameters", xlabel="K", ylabel="|E g| / sd(g)")


def _logarithmic(ax, **labels) -> None:
    ax.set(xscale="log", yscale="log", **labels)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    ax.spines[["top", "right"]].set_visible(False)


def _families(rows: list[EstimatorQuality]) -> dict[str, list[EstimatorQuality]]:
    """{name without K: its estimators}, in the order of their first."""
    families: dict[str, list[EstimatorQuality]] = {}
    for row in rows:
        name = re.sub(rf"(?<=[( ]){row.num_particles}(, |(?=\)))", "", row.estimator, count=1)
        families.setdefault(name.replace(", )", ")").replace("()", ""), []).append(row)
    return families


def draw(
    structure: nn.Module, data: Dataset, history: list[EpochMetrics], *, supervised: bool | None = None
) -> dict[str, Figure]:
    """Every picture that suits the structure and the data: {name: figure}."""
    x, labels = data.test_rows(MAX_POINTS)
    y = labels if takes_labels(structure, supervised) else None
    figures = {"elbo": elbo_curves(history), "kl_per_layer": kl_curves(history)} if history else {}
    activity = posterior_activity(structure, x, num_samples=20, y=y)
    classes = None if labels is None or labels.ndim > 1 else labels  # several factors have no one colour
    figures |= {"active_units": active_units(activity), "pca": pca(posterior_samples(structure, x, y=y), classes)}
    if len(data.shape) == 2:
        figures |= _pictures(structure, data, y is not None)
    return figures


def save(figures: dict[str, Figure], folder: Path) -> None:
    """Write each figure as a PNG into `folder`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        partial = folder / f"{name}.png.partial"
        figure.savefig(partial, format="png", dpi=130)
        os.replace(partial, folder / f"{name}.png")


def save_array(path: Path, x: Tensor) -> None:
    """Write a tensor as .npy, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        np.save(file, x.detach().cpu().numpy(), allow_pickle=False)
    os.replace(partial, path)


def _pictures(structure: nn.Module, data: Dataset, supervised: bool) -> dict[str, Figure]:
    (shown, y_shown), (x, y) = data.test_rows(10), data.test_rows(64)
    if not supervised:
        y_shown = y = None
    figures = {"reconstructions": reconstructions(structure, shown, data.shape, y_shown)}
    if can_generate(structure, x, y):
        samples = sample_prior(structure, len(x), x, y=y)
        figures["samples"] = image_grid(samples, data.shape, 8, "E[x | z] with z from the prior")
    if y is None and len(x) > 1:
        figures["interpolations"] = interpolations(structure, data.test_rows(6)[0], data.shape)
    if y is None and planar_layer(structure, x) is not None:
        figures["manifold"] = latent_manifold(structure, x, data.shape)
    return figures


def _axes(xlabel: str, ylabel: str, title: str):
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    ax = figure.subplots()
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if xlabel == "epoch":
        ax.xaxis.get_major_locator().set_params(integer=True)
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax
