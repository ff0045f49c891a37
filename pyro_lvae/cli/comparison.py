"""`compare`: estimators side by side, on a run or on an untrained structure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table
from torch import nn

from .. import comparison as comparing
from .. import plots
from ..contract import takes_labels
from ..data import Dataset, load
from ..inference_data import comparison_draws, save_draws
from ..results import Comparison, TrainingComparison, write_json
from ..runs import auto_device, claim_folder
from ..structures import LadderVAE
from .parser import Parser
from .training import AnyStructure, open_run


def compare(
    run: str | None = None,
    estimators: str = comparing.ESTIMATORS,
    train_seconds: float | None = None,
    data: str = "digits",
    root: str | None = None,
    binarize: bool | None = None,
    structure: Callable[[int], AnyStructure] = LadderVAE,
    num_rows: int = 50,
    num_repeats: int = 100,
    num_samples: int = 5000,
    num_temperatures: int = 100,
    reference_particles: int = 1000,
    batch_size: int = 128,
    seed: int = 0,
    device: str | None = None,
    out: str | None = None,
) -> Comparison | TrainingComparison:
    """Compare estimators: value, gap to log p(x), bias and noise of gradients, time and memory; or train by each.

    Args:
        run: a run folder; left out, an untrained --structure on --data.
        estimators: a list such as "SampledELBO, IWAE(50), DReG(50, alpha=0.5), my_module.MyELBO()".
        train_seconds: train by each estimator for so long instead, from the same weights and seed.
        data: without a run: a data set by name, or an .npz.
        root: without a run: folder of the data.
        binarize: without a run: as for `train`.
        structure: without a run: as for `train`.
        num_rows: test rows in the batch, spread evenly over the set; with train_seconds, those of the log p(x).
        num_repeats: draws of each value and gradient.
        num_samples: importance samples of log p(x).
        num_temperatures: of annealed importance sampling; 0 leaves it out.
        reference_particles: of the gradient of log p(x).
        batch_size: of training.
        seed: of all random numbers.
        device: left out, CUDA where there is one.
        out: folder of the results; left out, the next free RUN/comparison-NUMBER or
            runs/DATA-STRUCTURE-comparison-NUMBER.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows is {num_rows}; at least 1 is needed")
    if out is not None and (Path(out).is_file() or (Path(out).exists() and any(Path(out).iterdir()))):
        raise FileExistsError(f"{out} is not empty; name another folder with --out")
    torch.manual_seed(seed)
    module, dataset, is_supervised, stem = _subject(run, data, root, binarize, structure, device)
    x, y = dataset.test_rows(num_rows)
    if train_seconds is None:
        options = dict(num_repeats=num_repeats, num_samples=num_samples, num_temperatures=num_temperatures)
        options |= dict(reference_particles=reference_particles, y=y if is_supervised else None, seed=seed)
        found = comparing.compare(module, x, estimators, **options)
    else:
        options = dict(max_seconds=train_seconds, num_samples=num_samples, num_images=num_rows)
        options |= dict(batch_size=batch_size, supervised=is_supervised, seed=seed)
        found = comparing.compare_training(module, dataset, estimators, **options)
    _report(found, claim_folder(out, stem))
    return found


def compare_parser() -> ArgumentParser:
    """The parser of `compare`: its run is positional, and may be left out."""
    parser = Parser(description=compare.__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", default=None, help="a run folder; left out, an untrained --structure")
    parser.add_function_arguments(compare, skip={"run"}, as_group=False)
    return parser


def _subject(run, data, root, binarize, structure, device) -> tuple[nn.Module, Dataset, bool, Path]:
    """Structure, data, whether it takes labels, and where results go."""
    if run is not None:
        opened = open_run(run, device)
        return opened.structure, opened.data, opened.supervised, opened.folder / "comparison"
    dataset = load(data, root, binarize=binarize).to(auto_device(device))
    module = structure(dataset.x_dim).to(dataset.x_train.device)
    return module, dataset, takes_labels(module), Path("runs", f"{dataset.name}-{type(module).__name__}-comparison")


def _report(found: Comparison | TrainingComparison, folder: Path) -> None:
    """comparison.json, comparison.png, draws.nc, and the tables."""
    write_json(folder / "comparison.json", found)
    if isinstance(found, Comparison):
        save_draws(folder / "draws.nc", comparison_draws(found))
        picture = plots.gradient_quality(found)
    else:
        picture = plots.training_curves(found)
    plots.save({"comparison": picture}, folder)
    console = Console()
    for title, (heads, rows) in found.tables().items():
        table = Table(*heads, title=title, title_justify="left", box=None)
        for row in rows:
            table.add_row(*row)
        console.print(table, "")
    for name, why in found.skipped.items():
        console.print(f"left out: {name}: {why}", markup=False, highlight=False)
    console.print(f"results: {folder}", markup=False, highlight=False)
