"""The composition root: train | evaluate | report | sample | list."""

from __future__ import annotations

import os
import sys
from abc import ABCMeta, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser, Namespace, lazy_instance
from pyro.infer import ELBO
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from . import plots
from .annealing import Schedule
from .callbacks import ProgressBar, TensorBoard
from .checkpoint import CheckpointError
from .conditionals import Bernoulli, Normal
from .contract import ContractError, check
from .data import DATASETS, DataError, Dataset, load
from .evaluate import refuse_global_sites, sample_prior
from .loop import NonFiniteLoss
from .objectives import ESTIMATORS
from .results import Summary
from .runs import BOARD, CONFIG, Run, RunFiles, auto_device, claim_folder
from .structures import STRUCTURES, LadderVAE
from .traces import evaluating, forked_noise, ledger
from .train import fit

ERRORS = (CheckpointError, ContractError, DataError, FileExistsError, FileNotFoundError, NonFiniteLoss, ValueError)
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
    supervised: bool = False,
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
        estimator: what training maximises: IWAE, or an ELBO of pyro.infer; left out, Trace_ELBO.
        beta: KL weight: a number, or a schedule: --beta.length 20 warms up from 0 to 1 over 20 epochs.
        seed: of all random numbers.
        device: left out, CUDA where there is one.
        out: run folder; left out, the next free runs/DATA-STRUCTURE-NUMBER.
        resume: see FLAGS.
        overwrite: see FLAGS.
        num_samples: importance samples of the final log-likelihood.
        num_images: the first so many test images are taken for it.
        tensorboard: write TensorBoard files too.
        supervised: pass the labels to model and guide, for structures that use them; the package's own ignore y.
        epochs: passes over the training data, all in all; a resumed run does the rest of them.
    """
    dataset = load(data, root, binarize=binarize).to(auto_device(device))
    torch.manual_seed(seed)
    module = structure(dataset.x_dim).to(dataset.x_train.device)
    name = type(module).__name__
    _check_evaluable(module, dataset, supervised)
    folder = claim_folder(out, f"{dataset.name}-{name}", resume=resume, overwrite=overwrite)
    Console().print(f"{name} on {dataset.name} ({len(dataset.x_train):,} rows of {dataset.x_dim}) in {folder}")
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
        if not any(folder.iterdir()):  # refused before it began
            folder.rmdir()
    run = Run(folder, module, dataset, _estimator_name(estimator), history, supervised)
    summary = run.evaluate(num_samples, num_images)
    _print(summary, run.report())
    return summary


def _check_evaluable(module: nn.Module, data: Dataset, supervised: bool) -> None:
    """Refuse before training what could not be evaluated after it."""
    x, y = data.train_rows(2)
    args = (x, y) if supervised else (x,)
    check(module, *args)
    with evaluating(module), forked_noise(x.device):
        refuse_global_sites(ledger(module.model, module.guide, *args))


def _estimator_name(estimator: ELBO | None) -> str:
    return "Trace_ELBO" if estimator is None else type(estimator).__name__


def evaluate(
    run: str, num_samples: int = 5000, num_images: int | None = None, seed: int = 0, device: str | None = None
) -> Summary:
    """Evaluate a trained run anew: ELBO, importance-sampled log p(x), KL and active units per layer.

    Args:
        run: the run folder; its summary.json and report.html are renewed.
        num_samples: importance samples of the log-likelihood.
        num_images: the first so many test images are taken for it; left out, all.
        seed: of the random numbers.
        device: left out, CUDA where there is one.
    """
    opened = _open(run, device)
    torch.manual_seed(seed)
    summary = opened.evaluate(num_samples, num_images)
    _print(summary, opened.report())
    return summary


def report(run: str, seed: int = 0, device: str | None = None) -> Path:
    """Draw the pictures of a trained run and write its report.html.

    Args:
        run: the run folder.
        seed: of the random numbers in the pictures.
        device: left out, CUDA where there is one.
    """
    opened = _open(run, device)
    torch.manual_seed(seed)
    if opened.summary is None:
        raise FileNotFoundError(f"{run} has not been evaluated; run `pyro-lvae evaluate {run}` first")
    path = opened.report()
    Console().print(f"report: {path}")
    return path


def sample(run: str, num_samples: int = 64, out: str | None = None, seed: int = 0, device: str | None = None) -> Path:
    """Draw from the prior of a trained run, with the test set's labels where it is supervised.

    Args:
        run: the run folder.
        num_samples: how many.
        out: a .png for a picture, or an .npy for the means E[x|z]; left out, RUN/samples-SEED.png (.npy
            where the data are no images). An existing file is not overwritten.
        seed: of the random numbers.
        device: left out, CUDA where there is one.
    """
    opened = _open(run, device)
    is_image = len(opened.data.shape) == 2
    path = Path(out) if out else opened.folder / f"samples-{seed}{'.png' if is_image else '.npy'}"
    if path.exists():
        raise FileExistsError(f"{path} exists; name another file with --out")
    if path.suffix not in (".png", ".npy") or (path.suffix == ".png" and not is_image):
        raise ValueError(f"{path} must end in .npy{' or .png' if is_image else ', for the data are no images'}")
    torch.manual_seed(seed)
    labels = opened.data.y_test[torch.arange(num_samples) % len(opened.data.y_test)] if opened.supervised else None
    x = sample_prior(opened.structure, num_samples, opened.data.x_test, y=labels)
    if path.suffix == ".png":
        plots.save({path.stem: plots.image_grid(x, opened.data.shape, 8)}, path.parent)
    else:
        plots.save_array(path, x)
    Console().print(f"{num_samples} samples: {path}")
    return path


def list_() -> None:
    """List the structures, estimators, likelihoods and data sets that have names."""
    console = Console()
    for title, lines in (
        ("structures  (--structure)", _first_lines({s.__name__: s for s in STRUCTURES})),
        ("estimators  (--estimator)", {e.__name__: line for e, line in ESTIMATORS.items()}),
        ("likelihoods  (--structure.likelihood)", _first_lines({c.__name__: c for c in (Bernoulli, Normal)})),
        ("data sets  (--data)", _first_lines(DATASETS)),
    ):
        table = Table(title=title, title_justify="left", box=None, show_header=False)
        for name, line in lines.items():
            table.add_row(f"[bold]{name}", escape(line))
        console.print(table, "")


def _first_lines(things: dict) -> dict[str, str]:
    return {name: (thing.__doc__ or "").strip().split("\n")[0] for name, thing in things.items()}


# ---------------------------------------------------------------------- from words to calls

FLAGS = {
    "resume": "go on with the run in --out, whose config.yaml is then the default of every option",
    "overwrite": "replace the run in --out",
}
COMMANDS = {"train": train, "evaluate": evaluate, "report": report, "sample": sample, "list": list_}


def main(argv: list[str] | None = None) -> None:
    """Entry point of `pyro-lvae` and `python -m pyro_lvae`."""
    argv = sys.argv[1:] if argv is None else argv
    if os.getcwd() not in sys.path:  # a structure of the user's own lies where the command was typed
        sys.path.insert(0, os.getcwd())
    parser = _parser()
    options = _parse(parser, argv)
    command = options.subcommand
    arguments = _arguments(parser, options) if command == "train" else options[command].as_dict()
    try:
        COMMANDS[command](**arguments)
    except KeyboardInterrupt as stop:
        Console(stderr=True).print(f"\n{stop or 'stopped'}", markup=False)
        sys.exit(130)
    except ERRORS as error:
        Console(stderr=True).print(f"pyro-lvae {command}: {error}", markup=False, highlight=False)
        sys.exit(1)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="pyro-lvae", description=sys.modules[__package__].__doc__)
    commands = parser.add_subcommands()
    for name, function in COMMANDS.items():
        made = _train_parser() if name == "train" else _command_parser(function)
        commands.add_subcommand(name, made, help=made.description)
    return parser


def _train_parser() -> ArgumentParser:
    parser = ArgumentParser(description=train.__doc__.split("\n")[0])
    parser.add_argument("--config", action=ActionConfigFile, help="options from a YAML file")
    parser.add_function_arguments(train, skip={"config", "resume", "overwrite"}, as_group=False)
    for flag, meaning in FLAGS.items():
        parser.add_argument(f"--{flag}", action=ActionYesNo, default=False, help=meaning)
    return parser


def _command_parser(function: Callable) -> ArgumentParser:
    parser = ArgumentParser(description=function.__doc__.split("\n")[0])
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    return parser


def _parse(parser: ArgumentParser, argv: list[str]) -> Namespace:
    """`train --out RUN --resume` takes RUN/config.yaml as the default of every option."""
    options = parser.parse_args(argv)
    if options.subcommand != "train" or not options.train.resume or options.train.out is None:
        return options
    config = Path(options.train.out, CONFIG)
    return parser.parse_args(["train", "--config", str(config), *argv[1:]]) if config.exists() else options


def _arguments(parser: ArgumentParser, options: Namespace) -> dict:
    """The arguments of `train`: classes made, and all options once more as YAML."""
    kept = options.train.clone()
    kept.resume = kept.overwrite = False  # asked of this call, not of the next that reads the file
    text = _train_parser().dump(kept)
    return {**parser.instantiate(options).train.as_dict(), "config": text}


def _open(folder: str, device: str | None) -> Run:
    """The run in a folder, from its config.yaml and checkpoint."""
    path = Path(folder, CONFIG)
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}; name the folder of a run of `pyro-lvae train`")
    parser = _train_parser()
    options = parser.instantiate(parser.parse_path(path))
    data = load(options.data, options.root, binarize=options.binarize).to(auto_device(device))
    structure = options.structure(data.x_dim).to(data.x_train.device)
    return Run(Path(folder), structure, data, _estimator_name(options.estimator), [], options.supervised).load()


def _print(summary: Summary, path: Path) -> None:
    table = Table(box=None, show_header=False)
    for label, value in (*summary.rows(), ("report", str(path))):
        table.add_row(label, value)
    Console().print(table)
