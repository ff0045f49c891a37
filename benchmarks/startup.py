"""Seconds that processes take to start."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import Contender, interleave, repeated
from benchmarks.tables import as_rows, print_table, save


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5)


def main(args: argparse.Namespace) -> None:
    timings, _ = interleave(contenders, 1, args.repeats, args.skip)
    rows = as_rows(timings, ["import torch"], scale=1, unit="s")
    print_table("start of a process", rows)
    save(args.out, "startup", {"commands": rows}, repeats=args.repeats)


def contenders() -> dict[str, Contender]:
    """The commands."""
    script = Path(sys.executable).with_name("pyro-lvae")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "pyro_lvae"]
    python = [sys.executable, "-c"]
    commands = {
        "import torch": [*python, "import torch"],
        "import pyro_lvae": [*python, "import pyro_lvae"],
        "from pyro_lvae import fit": [*python, "from pyro_lvae import fit"],
        "pyro-lvae --help": [*command, "--help"],
        "python": [*python, "pass"],
    }
    return {name: Contender(lambda c=c: repeated(lambda: _start(c))) for name, c in commands.items()}


def _start(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
