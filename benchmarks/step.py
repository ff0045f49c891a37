"""One training step of the VAE 784-400-20-400-784 (batch 128) and of the five-layer ladder (batch 256)."""

from __future__ import annotations

import argparse
from functools import partial

from benchmarks.contenders import ADAM, FUSED, MODELS, SVI_DEFAULTS, contenders
from benchmarks.measure import add_device, interleave, without
from benchmarks.memory import memory_of
from benchmarks.tables import as_rows, print_table, save

NOTE = """ms: a step. data: whether cutting the batches from the data set is included, an epoch at a time; in `fit` also
the drawing of binary pixels from grey values. Compare those rows with each other, the others with each other.
recipe_h: hours of so many such steps as the ladder paper trains, 2,000 epochs of 60,000 images. On CUDA, kernels:
ms of a step in which its kernels run."""
RECIPE_STEPS = 2000 * 235


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=list(MODELS), nargs="*", default=list(MODELS))
    parser.add_argument("--steps", type=int, default=20, help="of each contender in a repeat; at least one epoch")
    parser.add_argument("--repeats", type=int, default=9)
    add_device(parser)
    parser.add_argument("--no_memory", action="store_true", help="leave out the peak memory")


def main(args: argparse.Namespace) -> None:
    results = {model: measure(model, args) for model in args.model}
    save(args.out, "step", results, args.device, steps=args.steps, repeats=args.repeats)


def measure(model: str, args: argparse.Namespace) -> dict:
    """Times and memory of one model."""
    chosen = without(contenders(model), args.skip)
    timings, skipped = interleave(partial(contenders, model), args.steps, args.repeats, args.skip, args.device)
    rows = as_rows(timings, [ADAM, FUSED, SVI_DEFAULTS])
    for name, row in rows.items():
        row["data"] = chosen[name].has_data
        if model == "ladder":
            row["recipe_h"] = row["ms"] * RECIPE_STEPS / 3.6e6
    size = {"batch_size": MODELS[model].batch_size, "rows_of_an_epoch": len(MODELS[model].epoch())}
    print_table(f"{model}, batch {size['batch_size']}", rows)
    print(NOTE)
    memory = {} if args.no_memory else memory_of(model, args.skip, args.device)
    return {**size, "contenders": rows, "skipped": skipped, "memory": memory}
