"""Throughput of log p(x) by importance sampling: nanoseconds for each draw of each image.

A call on so many images, and one on three times as many, are timed; `ns` is what the further draws cost, `fixed_s` what
is left of the first call's time: measuring the chunks, tracing, and fetching a compiled graph from its cache. The very
first call, which compiles, stands apart.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from functools import partial
from statistics import median

from torch import Tensor

from benchmarks import plain
from benchmarks.contenders import MODELS, binary
from benchmarks.measure import COMPILER, Contender, Timing, add_device, interleave, repeated, without
from benchmarks.tables import as_rows, print_table, save
from pyro_lvae import log_likelihood

BY_HAND = "PyTorch by hand"
MORE = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=list(MODELS), nargs="*", default=list(MODELS))
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--num_samples", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=7)
    add_device(parser)


def main(args: argparse.Namespace) -> None:
    results = {model: measure(model, args) for model in args.model}
    settings = {name: getattr(args, name) for name in ("images", "num_samples", "repeats")}
    save(args.out, "likelihood", results, args.device, **settings)


def measure(model: str, args: argparse.Namespace) -> dict:
    """Times of one model with random weights."""
    calls = without(estimates(model, args.num_samples), args.skip)
    sizes = (args.images, MORE * args.images)
    table = partial(calls_of, model, args.num_samples, sizes)
    timings, skipped = interleave(table, 1, args.repeats, args.skip, args.device)
    pairs = {n: [timings[f"{n}, {size}"] for size in sizes] for n in calls if f"{n}, {sizes[0]}" in timings}
    rows = as_rows({name: further(*pair) for name, pair in pairs.items()}, [BY_HAND], scale=1e9, unit="ns")
    for name, (small, _) in pairs.items():
        del rows[name]["ns_best"]  # of a difference, the smallest says nothing
        rows[name]["fixed_s"] = args.images * args.num_samples * (median(small.seconds) - 1e-9 * rows[name]["ns"])
    print_table(f"{model}, {sizes[0]} and {sizes[1]} images, {args.num_samples} samples: ns a sample of an image", rows)
    return {"contenders": rows, "skipped": skipped}


def calls_of(model: str, num_samples: int, sizes: tuple[int, ...]) -> dict[str, Contender]:
    """Each estimate on each number of images."""
    x = binary(max(sizes))
    return {
        f"{name}, {size}": Contender(lambda make=make, size=size: _on(make(), x[:size]), size * num_samples, needs)
        for name, (make, needs) in estimates(model, num_samples).items()
        for size in sizes
    }


def further(small: Timing, large: Timing) -> Timing:
    """Seconds a draw, of those that the larger call has more."""
    pairs = zip(small.seconds, large.seconds, strict=True)
    return Timing(small.first, [(MORE * b - a) / (MORE - 1) for a, b in pairs])


def estimates(model: str, num_samples: int) -> dict[str, tuple[Callable, tuple[str, ...]]]:
    """Makers of functions of x, and the modules they need: by hand, and ours with whatever it takes to be compiled."""
    found = {
        BY_HAND: (lambda: _by_hand(model, num_samples), ()),
        "pyro_lvae, eager": (lambda: _ours(model, num_samples, False), ()),
    }
    if "compile" in inspect.signature(log_likelihood).parameters:
        found["pyro_lvae, compiled"] = (lambda: _ours(model, num_samples, True), COMPILER)
    return found


def _on(estimate: Callable[[Tensor], Tensor], x: Tensor):
    return repeated(lambda: estimate(x))


def _by_hand(model: str, num_samples: int) -> Callable[[Tensor], Tensor]:
    net = MODELS[model].plain()
    return lambda x: plain.log_likelihood(net, x, num_samples)


def _ours(model: str, num_samples: int, compile: bool) -> Callable[[Tensor], Tensor]:
    structure, options = MODELS[model].ours(), {"num_samples": num_samples}
    if "compile" in inspect.signature(log_likelihood).parameters:
        options["compile"] = compile
    return lambda x: log_likelihood(structure, x, **options)
