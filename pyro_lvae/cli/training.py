"""`train`: its options, and the runs that it leaves."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name

import torch
from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser, lazy_instance
from pyro.infer import ELBO
from rich.console import Console
from rich.table import Table
from torch import nn

from ..bayes import BayesianWeights
from ..callbacks import ProgressBar, TensorBoard
from ..contract import check, takes_labels
from ..data import Dataset, check_labels, few_labels, load
from ..distributed import processes
from ..evaluate import refuse_global_sites
from ..loop import METRICS
from ..results import Summary, read_metrics
from ..runs import BOARD, CONFIG, Run, RunFiles, auto_device, claim_folder
from ..schedules import Schedule
from ..structures import STRUCTURES, LadderVAE
from ..traces import evaluating, forked_noise, ledger
from ..train import fit
from .parser import Parser

WARM_UP = lazy_instance(Schedule, start=0.0, stop=1.0, length=20)


class _AnyStructure(ABCMeta):
    """Any module with a model and a guide counts as a subclass; the package's own are the known ones."""

    def __subclasscheck__(cls, other) -> bool:
        has_pair = all(callable(getattr(other, name, None)) for name in ("model", "guide"))
        return other is cls or (isinstance(other, type) and issubclass(other, nn.Module) and has_pair)

    def __subclasses__(cls) -> list[type]:
        return list(STRUCTURES)


class AnyStructure(metaclass=_AnyStructure):
    """A latent structure: an `nn.Module` with `model` and `guide`, whose first argument is `x_dim`."""

    @abstractmethod
    def model(self): ...  # abstract, so that it is not offered as a choice itself


# ---------------------------------------------------------------------- the commands


def train(
    config: str,
    data: str = "digits",
    root: str | None = None,
    binarize: bool | None = None,
    structure: Callable[[int], AnyStructure] = LadderVAE,
    bayesian: Callable[[nn.Module], BayesianWeights] | None = None,
    estimator: ELBO | None = None,
    beta: float | Schedule | dict[str, float | Schedule] = WARM_UP,
    seed: int = 0,
    device: str | None = None,
    out: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    num_samples: int = 1000,
    num_images: int = 1000,
    tensorboard: bool = True,
    supervised: bool | None = None,
    labels: int | None = None,
    epochs: int = 60,
    **options,
) -> Summary:
    """Train a structure, evaluate it and report, all into one run folder.

    Args:
        config: all options as YAML, kept in the run folder.
        data: a data set by name (`pyro-lvae list`), or an .npz with x_train, x_test[, y_train, y_test].
        root: folder of the data; else PYRO_LVAE_DATA, else the user's cache.
        binarize: draw binary images anew each epoch; left out, as is the custom for the data set.
        structure: a class of the package by name, or your own as my_module.MyVAE; it is given x_dim.
        bayesian: give the structure's weights a posterior: --bayesian BayesianWeights, or any of its options alone,
            --bayesian.where decoder, --bayesian.noise flipout, --bayesian.prior Laplace, --bayesian.posterior LowRank.
        estimator: what training maximises: IWAE, or an ELBO of pyro.infer; left out, SampledELBO
            (Trace_ELBO where a site cannot be reparameterised).
        beta: KL weight: a number, or a schedule: --beta.length 20 warms up from 0 to 1 over 20 epochs.
        seed: of all random numbers.
        device: left out, CUDA where there is one.
        out: run folder; left out, the next free runs/DATA-STRUCTURE-NUMBER.
        resume: see FLAGS.
        overwrite: see FLAGS.
        num_samples: importance samples of the final log-likelihood.
        num_images: test images taken for it, spread evenly over the set.
        tensorboard: write TensorBoard files too.
        supervised: pass the labels to model and guide; left out, where the structure says that it takes them.
        labels: keep so many training labels, as many of each class, and hide the others (for SemiSupervisedVAE).
        epochs: passes over the training data, all in all; a resumed run does the rest of them.
    """
    where = auto_device(device)
    together = processes(where)
    dataset = _load(data, root, binarize, labels).to(where)
    torch.manual_seed(seed)
    module = _build(structure, bayesian, dataset)
    supervised = takes_labels(module, supervised)
    if labels is not None and not supervised:
        raise ValueError(
            f"{type(module).__name__} takes no labels, and --labels {labels} asks to keep some; leave it out"
        )
    if supervised:
        check_labels(dataset)
    name = type(module.structure if isinstance(module, BayesianWeights) else module).__name__
    _check_evaluable(module, dataset, supervised)
    folder = None
    if together.is_first:
        folder = claim_folder(out, f"runs/{dataset.name}-{name}", resume=resume, overwrite=overwrite)
    folder = Path(together.agree(str(folder)))
    if resume:
        _refuse_fewer_epochs(folder, epochs)
    console = Console(quiet=not together.is_first)
    console.print(f"{name} on {dataset.name} ({len(dataset.x_train):,} rows of {dataset.x_dim}) in {folder}")
    board = [TensorBoard(folder / BOARD)] if tensorboard else []
    try:
        history = fit(
            module,
            dataset,
            estimator,
            epochs=epochs,
            beta=beta,
            supervised=supervised,
            out=folder,
            resume=resume,
            overwrite=overwrite,
            callbacks=[RunFiles(folder, config), ProgressBar(), *board],
            **options,
        )
    finally:
        if together.is_first and not any(folder.iterdir()):  # refused before it began
            folder.rmdir()
    run = Run(folder, module, dataset, history, supervised, together)
    summary = run.evaluate(num_samples, num_images)
    if together.is_first:
        print_summary(summary, run.report())
    return summary


def _load(data: str, root: str | None, binarize: bool | None, labels: int | None) -> Dataset:
    """The data, with most labels hidden where that is asked for."""
    whole = load(data, root, binarize=binarize)
    return whole if labels is None else few_labels(whole, labels)


def _build(structure: Callable, bayesian: Callable | None, data: Dataset) -> nn.Module:
    """The structure for the data, on its device; and a posterior around its weights, if that was asked for."""
    module = structure(data.x_dim).to(data.x_train.device)
    if bayesian is None:
        return module
    return bayesian(module).to(data.x_train.device)


def refuse_without_size(chosen) -> None:
    """Raise `ValueError` for a class whose first argument is not meant for D, which it would be given."""
    made = resolve_name(chosen.class_path) if hasattr(chosen, "class_path") else chosen
    if not isinstance(made, type):  # a function has its own size
        return
    first = next(iter(signature(made).parameters.values()), None)
    if first is None or (first.name != "x_dim" and first.default is not first.empty):
        came = "nothing" if first is None else f"{first.name!r}, with a default,"
        raise ValueError(
            f"{made.__name__} has {came} as its first argument, which is given the size D of the data; begin with "
            "x_dim: int"
        )


def _check_evaluable(module: nn.Module, data: Dataset, supervised: bool) -> None:
    """Refuse before training what could not be evaluated after it."""
    x, y = data.train_rows(2)
    args = (x, y) if supervised else (x,)
    check(module, *args)
    if isinstance(module, BayesianWeights):
        return
    with evaluating(module), forked_noise(x.device):
        sites = ledger(module.model, module.guide, *args)
    try:
        refuse_global_sites(sites)
    except ValueError as error:
        raise ValueError(
            f"{error}. The command line evaluates every run so; train this one by pyro_lvae.fit"
        ) from error


def _refuse_fewer_epochs(folder: Path, epochs: int) -> None:
    """A resumed run that has more epochs already would change nothing but its configuration."""
    path = folder / METRICS
    done = max((m.epoch for m in read_metrics(path)), default=0) if path.exists() else 0
    if epochs < done:
        raise ValueError(f"{folder} has {done} epochs, and --epochs {epochs} asks for fewer, all in all; ask for more")


def open_run(folder: str, device: str | None) -> Run:
    """The run in a folder, from its config.yaml and checkpoint."""
    path = Path(folder, CONFIG)
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}; name the folder of a run of `pyro-lvae train`")
    parser = train_parser()
    options = parser.instantiate(parser.parse_path(path))
    data = _load(options.data, options.root, options.binarize, options.labels).to(auto_device(device))
    structure = _build(options.structure, options.bayesian, data)
    supervised = takes_labels(structure, options.supervised)
    return Run(Path(folder), structure, data, [], supervised).load()


FLAGS = {
    "resume": "go on with the run in --out, whose config.yaml is then the default of every option",
    "overwrite": "replace the run in --out",
}


def train_parser() -> ArgumentParser:
    parser = Parser(description=train.__doc__.split("\n")[0])
    parser.add_argument("--config", action=ActionConfigFile, help="options from a YAML file")
    parser.add_function_arguments(train, skip={"config", "resume", "overwrite"}, as_group=False)
    for flag, meaning in FLAGS.items():
        parser.add_argument(f"--{flag}", action=ActionYesNo, default=False, help=meaning)
    return parser


def print_summary(summary: Summary, path: Path) -> None:
    table = Table(box=None, show_header=False)
    for label, value in (*summary.rows(), ("report", str(path))):
        table.add_row(label, value)
    Console().print(table)
