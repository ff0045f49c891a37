"""Timing protocols of this library beside its peers.

    python -m benchmarks step               # a training step: by hand, Pyro, NumPyro, pythae; memory
    python -m benchmarks scaling --quick    # against layers, particles, batch size, rows
    python -m benchmarks likelihood         # importance-sampled log p(x)
    python -m benchmarks startup            # imports and --help
    python -m benchmarks nodes              # simulated scaling to many processes
    python -m benchmarks precision          # what bfloat16 and TF32 do to the ELBO
    python -m benchmarks step --device cuda # on a GPU; likewise scaling, likelihood, precision

Every repeat times each contender in turn, after a call that is not timed, each in a process of its own, at that
library's defaults. Reported are medians over the repeats, and medians of the ratios repeat by repeat, which mean the
same on every machine that is otherwise quiet. Peers: pip install 'pyro-lvae[bench]'; those not installed are skipped.
Threads: OMP_NUM_THREADS binds torch alone; `taskset -c 0,1` binds every peer.
"""

from __future__ import annotations

import argparse
import os
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch

COMMANDS = ("step", "scaling", "likelihood", "startup", "nodes", "precision")
RESULTS = Path(__file__).parent / "results"


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    torch.manual_seed(0)
    with TemporaryDirectory(prefix="inductor-") as fresh:
        variables = {"JAX_PLATFORMS": "cpu", "TORCHINDUCTOR_CACHE_DIR": str(args.cache or fresh)}
        with patch.dict(os.environ, variables):
            _module(args.command).main(args)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        described = _module(name).__doc__
        command = commands.add_parser(name, help=described.splitlines()[0], description=described, formatter_class=raw)
        command.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
        command.add_argument(
            "--skip", nargs="*", default=[], help="leave out contenders with these words in their name"
        )
        command.add_argument("--cache", type=Path, help="folder of compiled graphs; a fresh one if left out")
        _module(name).add_arguments(command)
    return parser


def _module(name: str):
    return import_module(f"benchmarks.{name}")


if __name__ == "__main__":
    main()
