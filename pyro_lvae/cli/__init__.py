"""The composition root: train | evaluate | compare | report | sample | list."""

from __future__ import annotations

import sys
from argparse import ArgumentParser

import pyro_lvae

# What each command does, as its function's docstring says: torch need not be loaded to print it.
COMMANDS = {
    "train": "Train a structure, evaluate it and report, all into one run folder.",
    "evaluate": "Evaluate a trained run anew: ELBO, importance-sampled log p(x), KL and active units per layer.",
    "compare": "Compare estimators: value, gap to log p(x), bias and noise of gradients, time and memory; "
    "or train by each.",
    "report": "Draw the pictures of a trained run and write its report.html.",
    "sample": "Draw from the prior of a trained run, with the test set's labels where it is supervised.",
    "list": "List the structures, estimators, likelihoods and data sets that have names.",
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of `pyro-lvae` and `python -m pyro_lvae`."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        _answer(argv)
    from .dispatch import dispatch  # loads torch, which takes seconds

    dispatch(argv)


def _answer(argv: list[str]) -> None:
    """Print the help, the version or what is wrong, and exit."""
    parser = ArgumentParser(prog="pyro-lvae", description=pyro_lvae.__doc__)
    parser.add_argument("--version", action="version", version=f"pyro-lvae {pyro_lvae.__version__}")
    commands = parser.add_subparsers(title="commands (`pyro-lvae COMMAND --help` says more)", metavar="COMMAND")
    for name, line in COMMANDS.items():
        commands.add_parser(name, help=line)
    if not argv:
        parser.exit(2, parser.format_help())
    if argv[0] in ("-h", "--help", "--version"):
        parser.parse_args(argv[:1])
    parser.exit(2, f"pyro-lvae: there is no command {argv[0]!r}; known are {', '.join(COMMANDS)}\n")
