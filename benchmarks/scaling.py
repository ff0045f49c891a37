"""Time of a step against layers L, particles K of IWAE, batch size and rows N; and IWAE K=50 against Pyro's."""

from __future__ import annotations

import argparse
from functools import partial

import pyro
import torch
from pyro.infer import RenyiELBO
from torch import Tensor, nn

from benchmarks.contenders import MODELS, binary, epoch_of, loop, step_of, svi
from benchmarks.measure import COMPILER, Contender, Run, add_device, interleave, repeated
from benchmarks.tables import as_rows, print_table, save
from pyro_lvae import IWAE, LadderVAE, for_svi

Z_DIMS, HIDDEN = (64, 32, 16, 8, 4, 4, 4, 4), (512, 256, 128, 64, 32, 32, 32, 32)
POINTS = {"L": (1, 2, 3, 4, 5, 6, 7, 8), "K": (1, 5, 10, 20, 50), "batch": (32, 64, 256, 1024)}
POINTS["N"] = (1_024, 4_096, 16_384, 61_440)
QUICK = {"L": (1, 2), "K": (1, 5), "batch": (32, 64), "N": (1_024, 2_048)}
COMPILED_LAYERS = (1, 2, 4, 8)
TITLES = {
    "L": "ladder, batch 256, against the number of layers",
    "K": "five-layer ladder, batch 256, against the particles of IWAE",
    "batch": "five-layer ladder, against the batch size",
    "N": "VAE, batch 128, against the rows of data: ms a step, epochs as in `fit`",
    "renyi": "five-layer ladder, IWAE, batch 256, against Pyro's RenyiELBO",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sweeps", choices=list(TITLES), nargs="*", default=list(TITLES))
    parser.add_argument("--steps", type=int, help="of each contender in a repeat (5; quick: 1)")
    parser.add_argument("--repeats", type=int, help="(7; quick: 2)")
    add_device(parser)
    parser.add_argument("--quick", action="store_true", help="two points each, K=5 for 50, few repeats")


def main(args: argparse.Namespace) -> None:
    steps, repeats = args.steps or (1 if args.quick else 5), args.repeats or (2 if args.quick else 7)
    for sweep in args.sweeps:
        found = measure(sweep, args, steps, repeats)
        save(args.out, f"scaling_{sweep}", found, args.device, steps=steps, repeats=repeats, quick=args.quick)


def measure(sweep: str, args: argparse.Namespace, steps: int, repeats: int) -> dict:
    """All points of one sweep, interleaved."""
    table = partial(renyi, 5 if args.quick else 50)
    if sweep != "renyi":
        table = partial(points, sweep, (QUICK if args.quick else POINTS)[sweep])
    timings, skipped = interleave(table, steps, repeats, args.skip, args.device)
    rows = as_rows(timings, [next(iter(timings))])
    print_table(TITLES[sweep], rows)
    return {"contenders": rows, "skipped": skipped}


def points(sweep: str, values: tuple[int, ...]) -> dict[str, Contender]:
    """Ours, eager and compiled, at each value."""
    modes = {"eager": False, "compiled": True}
    return {
        f"{sweep}={value}, {mode}": at(sweep, value, compile)
        for mode, compile in modes.items()
        for value in values
        if not (compile and sweep == "L" and value not in COMPILED_LAYERS)
    }


def at(sweep: str, value: int, compile: bool) -> Contender:
    """One point."""
    needs = COMPILER if compile else ()
    if sweep == "N":
        vae = MODELS["vae"]
        run = lambda: epoch_of(vae.ours(), binary(value), vae.batch_size, compile)  # noqa: E731
        return Contender(run, unit=-(-value // vae.batch_size), needs=needs, has_data=True)
    layers = value if sweep == "L" else 5
    particles = value if sweep == "K" else None
    x = binary(value if sweep == "batch" else 256)
    return Contender(lambda: _step(_ladder(layers), x, particles, compile), needs=needs)


def renyi(particles: int) -> dict[str, Contender]:
    """The same bound by both."""
    x, pyros, ours, few = binary(256), "Pyro RenyiELBO", "pyro_lvae IWAE", max(1, particles // 10)
    found = {
        f"{pyros}, SVI defaults": Contender(lambda: svi(_ladder(5), _theirs(particles), x)),
        f"{pyros}, tuned": Contender(lambda: _tuned(_ladder(5), _theirs(particles), x)),
        f"{ours}, eager": Contender(lambda: _step(_ladder(5), x, particles, False)),
        f"{ours}, compiled": Contender(lambda: _step(_ladder(5), x, particles, True), needs=COMPILER),
        f"{ours}, compiled, bfloat16": Contender(
            lambda: _step(_ladder(5), x, particles, True, precision="bfloat16"), needs=COMPILER
        ),
        f"{ours}, resampled={few}, eager": Contender(lambda: _step(_ladder(5), x, particles, False, resampled=few)),
        f"{ours}, resampled={few}, compiled": Contender(
            lambda: _step(_ladder(5), x, particles, True, resampled=few), needs=COMPILER
        ),
    }
    return {f"{name}, K={particles}": contender for name, contender in found.items()}


def _ladder(layers: int) -> LadderVAE:
    return LadderVAE(784, Z_DIMS[:layers], HIDDEN[:layers])


def _step(
    structure: nn.Module,
    x: Tensor,
    particles: int | None,
    compile: bool,
    *,
    resampled: int | None = None,
    precision: str = "float32",
) -> Run:
    estimator = None if particles is None else IWAE(particles, resampled=resampled)
    return step_of(loop(structure, x, compile=compile, estimator=estimator, precision=precision), x)


def _theirs(particles: int) -> RenyiELBO:
    return RenyiELBO(alpha=0, num_particles=particles, vectorize_particles=True, max_plate_nesting=1)


def _tuned(structure: nn.Module, estimator: RenyiELBO, x: Tensor) -> Run:
    """No validation and one fused Adam; the bound has no loss to differentiate, and needs the parameter store."""
    adam, pair = torch.optim.Adam(structure.parameters(), lr=1e-3, fused=True), for_svi(structure)

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        with pyro.validation_enabled(False):
            estimator.loss_and_grads(*pair, x)
        adam.step()

    return repeated(step)
