"""From a command line to the function that it names."""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from ..checkpoint import CheckpointError
from ..contract import ContractError
from ..data import DataError
from ..loop import NonFiniteLoss
from ..runs import CONFIG
from .commands import evaluate, list_, report, sample
from .comparison import compare, compare_parser
from .parser import Parser
from .training import refuse_without_size, train, train_parser

ERRORS = (CheckpointError, ContractError, DataError, FileExistsError, FileNotFoundError, NonFiniteLoss, ValueError)

FUNCTIONS = {
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "report": report,
    "sample": sample,
    "list": list_,
}
PARSERS = {"train": train_parser, "compare": compare_parser}


def dispatch(argv: list[str]) -> None:
    """Run the command that `argv` begins with."""
    if os.getcwd() not in sys.path:  # a structure of the user's own lies where the command was typed
        sys.path.insert(0, os.getcwd())
    parser = _parser(_names_structure(argv))
    options = _parse(parser, argv)
    command = options.subcommand
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _say(f"pyro-lvae {command}: {message}")
            FUNCTIONS[command](**_arguments(parser, options))
    except KeyboardInterrupt as stop:
        _say(f"\n{stop or 'stopped'}")
        sys.exit(130)
    except ERRORS as error:
        _say(f"pyro-lvae {command}: {error}")
        sys.exit(1)


def _say(message: str) -> None:
    Console(stderr=True).print(message, markup=False, highlight=False)


def _names_structure(argv: list[str]) -> bool:
    """Whether the command line names a structure, or a file of options on it does."""
    return any(re.fullmatch(r"--structure(=.*)?", word) for word in argv) or any(
        "structure" in options for options in _files(argv)
    )


def _files(argv: list[str]) -> Iterator[dict]:
    """The contents of every --config that can be read; what is wrong with another is said when it is parsed."""
    names = [after for word, after in pairwise(argv) if word == "--config"]
    for name in names + [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]:
        try:
            options = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(options, dict):
            yield options


def _parser(names_structure: bool = False) -> ArgumentParser:
    """With `names_structure`, no default structure hands its options on to that of the command line."""
    parser = Parser(prog="pyro-lvae")
    commands = parser.add_subcommands()
    for name, function in FUNCTIONS.items():
        made = PARSERS[name]() if name in PARSERS else _command_parser(function)
        if names_structure and name in PARSERS:
            made.set_defaults(structure=None)
        commands.add_subcommand(name, made, help=made.description)
    return parser


def _command_parser(function: Callable) -> ArgumentParser:
    parser = Parser(description=function.__doc__.split("\n")[0])
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    return parser


def _parse(parser: ArgumentParser, argv: list[str]) -> Namespace:
    """`train --out RUN --resume` takes RUN/config.yaml as the default of every option."""
    folder = _resumed(argv)
    if folder is None or not (config := Path(folder, CONFIG)).exists():
        return parser.parse_args(argv)
    options = parser.parse_args(["train", "--config", str(config), *argv[1:]])
    kept = yaml.safe_load(config.read_text(encoding="utf-8"))
    if options.train.seed != kept.get("seed", options.train.seed):
        parser.error(
            f"{folder} was begun with seed {kept['seed']}, and a resumed run goes on with its noise; leave --seed out"
        )
    return options


def _resumed(argv: list[str]) -> str | None:
    """The folder of the run that is to be resumed, before any option is looked at: they are those of its structure."""
    words = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    words.add_argument("--out")
    words.add_argument("--resume", nargs="?", const="true", default="false")
    asked, _ = words.parse_known_args(argv[1:])
    given = {key: options[key] for options in _files(argv) for key in ("out", "resume") if key in options}
    is_asked = asked.resume.lower() in ("true", "yes") or given.get("resume") is True
    return (asked.out or given.get("out")) if argv[:1] == ["train"] and is_asked else None


def _arguments(parser: ArgumentParser, options: Namespace) -> dict:
    """The arguments of a command, classes made; for `train`, all options once more as YAML."""
    command = options.subcommand
    if command == "train":
        refuse_without_size(options.train.structure)
    arguments = parser.instantiate(options)[command].as_dict()
    if command != "train":
        return arguments
    kept = options.train.clone()
    kept.resume = kept.overwrite = False  # asked of this call, not of the next that reads the file
    return {**arguments, "config": train_parser().dump(kept)}
