"""What was timed, as a table and as a JSON file."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from statistics import median

import torch

from benchmarks.measure import Timing
from pyro_lvae.results import write_json

PACKAGES = ("torch", "pyro-ppl", "numpyro", "jax", "pythae")


def ratio(timing: Timing, base: Timing | None) -> float | None:
    """Median of the ratios repeat by repeat: what slows the machine for a while slows both."""
    if base is None:
        return None
    return median(a / b for a, b in zip(timing.seconds, base.seconds, strict=True))


def as_rows(
    timings: dict[str, Timing], bases: list[str], scale: float = 1e3, unit: str = "ms"
) -> dict[str, dict[str, float | None]]:
    """{contender: its median in `unit`, best, ratio to each base, and first call}."""
    return {
        name: {
            unit: scale * median(t.seconds),
            f"{unit}_best": scale * min(t.seconds),
            **({} if t.kernels is None else {"kernels": scale * t.kernels}),
            **{f"ratio_to {base}": ratio(t, timings.get(base)) for base in bases},
            "first_call_s": t.first,
        }
        for name, t in timings.items()
    }


def print_table(title: str, rows: dict[str, dict[str, float | None]]) -> None:
    """Long names of columns are explained below as [1], [2] ..."""
    columns = list(next(iter(rows.values()), {}))
    notes = [c for c in columns if len(c) > 14]
    heads = [f"ratio [{notes.index(c) + 1}]" if c in notes else c for c in columns]
    width = max(map(len, rows), default=0)
    print(f"\n{title}\n{'':{width}}" + "".join(f"{h:>15}" for h in heads))
    for name, row in rows.items():
        print(f"{name:{width}}" + "".join(f"{_cell(row[c]):>15}" for c in columns))
    for i, note in enumerate(notes, 1):
        print(f"[{i}] {note.replace('ratio_to ', 'to ')}")


def _cell(value: float | bool | None) -> str:
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def save(out: Path, name: str, results: dict, device: str = "cpu", **settings) -> None:
    """`results` with what they were measured on and with, as `NAME.json`; on CUDA as `NAME_cuda.json`."""
    kind = torch.device(device).type
    path = out / f"{name}{'' if kind == 'cpu' else f'_{kind}'}.json"
    write_json(path, {"settings": {**machine(device), **settings}, **results})
    print(f"\nwritten to {path}")


def machine(device: str) -> dict:
    """What the figures depend on besides the code."""
    return {
        "versions": {package: _version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
