"""Simulated scaling to many processes, from a step's time and the network's figures.

A step of n processes computes on its share of the batch, then adds up the gradients by a ring all-reduce, which sends
2 (n - 1)/n of them through every link in 2 (n - 1) messages:

    t(n) = fixed + slope B/n + 2 (n - 1)/n bytes/bandwidth + 2 (n - 1) latency

fixed and slope are measured here, at two batch sizes; nothing is overlapped, as `fit` overlaps nothing.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

from benchmarks.tables import print_table, save
from pyro_lvae import FusedAdam, LadderVAE, SampledELBO
from pyro_lvae.step import Step

NETWORKS = {"10 Gbit/s Ethernet": (1.25e9, 50e-6), "100 Gbit/s InfiniBand": (12.5e9, 5e-6)}
COUNTS = (1, 2, 4, 8, 16, 32, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch_size", type=int, default=1024, help="of all processes together, or of each")


def main(args: argparse.Namespace) -> None:
    structure = LadderVAE(784)
    sizes = args.batch_size // 16, args.batch_size
    small, large = (step_seconds(structure, size) for size in sizes)
    slope = (large - small) / (sizes[1] - sizes[0])
    fixed = max(0.0, small - slope * sizes[0])
    gradients = 4 * sum(p.numel() for p in structure.parameters())
    results = {"fixed_s": fixed, "slope_s": slope, "gradient_bytes": gradients}
    for network, link in NETWORKS.items():
        rows = {str(n): speedups(fixed, slope, args.batch_size, gradients, n, *link) for n in COUNTS}
        print_table(f"Speed-up of n processes over one, {network}, batch {args.batch_size}", rows)
        results[network] = rows
    save(args.out, "nodes", results, batch_size=args.batch_size)


def speedups(fixed: float, slope: float, batch: int, size: int, n: int, bandwidth: float, latency: float) -> dict:
    """Images a second against one process: for one batch shared out (strong), and for a batch each (weak)."""
    message = 2 * (n - 1) / n * size / bandwidth + 2 * (n - 1) * latency
    one = fixed + slope * batch
    return {"strong": one / (fixed + slope * batch / n + message), "weak": n * one / (one + message)}


def step_seconds(structure, batch_size: int, repeats: int = 9) -> float:
    """Median of an eager step."""
    x = (torch.rand(batch_size, 784) > 0.8).float()
    step, optimizer, times = Step(structure, SampledELBO()), FusedAdam(structure.parameters()), []
    for _ in range(repeats):
        started = time.perf_counter()
        step((x,), dict.fromkeys((f"z{i}" for i in range(1, 6)), 1.0))
        optimizer.step()
        times.append(time.perf_counter() - started)
    return median(times[1:])
