"""Time of one training step of the paper's five-layer ladder, batch 256, on 784 binary inputs, eager.

    python -m benchmarks                    # a minute or two; writes benchmarks/results/step.json

Interleaved: every repeat times each contender in turn. Reported are medians over the repeats, and ratios to the
hand-written PyTorch with its default Adam, which mean the same on every machine that is otherwise quiet.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO

from benchmarks.plain import PlainLadder
from pyro_lvae import Dataset, FusedAdam, LadderVAE, for_svi, linear
from pyro_lvae.loop import Loop
from pyro_lvae.results import write_json


def plain(optimizer: Callable) -> Callable:
    """Hand-written PyTorch."""
    model = PlainLadder()
    adam = optimizer(model.parameters(), lr=1e-3)

    def step(x):
        adam.zero_grad(set_to_none=True)
        model(x).backward()
        adam.step()

    return step


def ours() -> Callable:
    """A step of `fit`: annealed, its loss and gradient checked to be finite."""
    ladder, rows = LadderVAE(784), torch.ones(2, 784)
    loop = Loop(
        ladder,
        Dataset("rows", rows, rows),
        Trace_ELBO(),
        FusedAdam(ladder.parameters()),
        None,
        {f"z{i}": linear(0, 1, epochs=2) for i in range(1, 6)},
        batch_size=256,
        clip_norm=None,
        clip_value=None,
        supervised=False,
        monitor_size=1,
        has_global_sites=False,
        out=None,
    )
    return lambda x: loop.optimise((x,))


def svi() -> Callable:
    """Pyro's own SVI, everything at its defaults."""
    return SVI(*for_svi(LadderVAE(784)), pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step


CONTENDERS = {
    "PyTorch by hand, Adam": lambda: plain(torch.optim.Adam),
    "PyTorch by hand, Adam(fused=True)": lambda: plain(lambda p, lr: torch.optim.Adam(p, lr=lr, fused=True)),
    "pyro_lvae": ours,
    "Pyro SVI, defaults": svi,
}


def measure(steps: int, repeats: int, batch_size: int) -> dict[str, float]:
    """{contender: median milliseconds a step}."""
    torch.manual_seed(0)
    x = (torch.rand(batch_size, 784) > 0.8).float()
    contenders, times = {name: make() for name, make in CONTENDERS.items()}, {name: [] for name in CONTENDERS}
    for repeat in range(repeats + 1):  # the first warms up
        for name, step in contenders.items():
            started = time.perf_counter()
            for _ in range(steps):
                step(x)
            times[name] += [1e3 * (time.perf_counter() - started) / steps] if repeat else []
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step.json")
    args = parser.parse_args()
    times = measure(args.steps, args.repeats, args.batch_size)
    base = next(iter(times.values()))
    for name, ms in times.items():
        print(f"{name:36} {ms:8.2f} ms/step   {ms / base:5.2f}")
    settings = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    write_json(args.out, {"ms_per_step": times, **settings, "batch_size": args.batch_size})


if __name__ == "__main__":
    main()
