"""Contenders timed in turn, each in a process of its own; their table, and the JSON file."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib import import_module, metadata
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch

from pyro_lvae.results import write_json

COMPILER = ("torch._dynamo", "torch._inductor.compile_fx")
PACKAGES = ("torch", "pyro-ppl", "numpyro", "jax", "pythae")
Run = Callable[[int], object]


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Args:
        make: builds it, and returns a function that does a number of calls.
        unit: steps in a call, where a call is a whole epoch; or whatever else times are reported per.
        needs: modules imported before the clock runs; where one is missing, the contender is skipped.
        has_data: whether a call cuts its batches from the data set, rather than being given one.
    """

    make: Callable[[], Run]
    unit: float = 1
    needs: tuple[str, ...] = ()
    has_data: bool = False


@dataclass
class Timing:
    """Seconds a unit, one number a repeat, and seconds of the first call, building and compiling included."""

    first: float
    seconds: list[float] = field(default_factory=list)


def repeated(call: Callable[[], object]) -> Run:
    """Calls one after another."""

    def run(count: int) -> None:
        for _ in range(count):
            call()

    return run


def without(contenders: dict[str, Contender], words: list[str]) -> dict[str, Contender]:
    """Those whose names hold none of the words."""
    return {name: c for name, c in contenders.items() if not any(w.lower() in name.lower() for w in words)}


def interleave(
    table: Callable[[], Mapping[str, Contender]], steps: float, repeats: int, skip: list[str] | None = None
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Every repeat runs each contender in turn, for about `steps` units; and why some were skipped.

    Args:
        table: makes the contenders, here and in the process of each: a function of a module, or a `partial` of one.
        steps: units of a contender in a repeat.
        repeats: how often.
        skip: words in the names of those left out.
    """
    contenders = without(table(), skip or [])
    skipped = {name: reason for name, c in contenders.items() if (reason := _missing(c))}
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}", flush=True)
    with ExitStack() as stack:
        running = {n: stack.enter_context(_Process(table, n)) for n in contenders if n not in skipped}
        timings = {name: Timing(process(1)) for name, process in running.items()}
        for _ in range(repeats):
            for name, process in running.items():
                unit = contenders[name].unit
                calls = max(1, round(steps / unit))
                timings[name].seconds.append(process(calls) / (calls * unit))
    return timings, skipped


def _missing(contender: Contender) -> str:
    try:
        for module in contender.needs:
            import_module(module)
    except ImportError as error:
        return f"not installed: {error}"
    return ""


class _Process:
    """A contender in a process of its own, so that none has another's memory, threads or settings."""

    def __init__(self, table: Callable[[], Mapping[str, Contender]], name: str):
        context = get_context("spawn")
        self.name, (self.end, theirs) = name, context.Pipe()
        self.process = context.Process(target=_serve, args=(table, name, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._receive()

    def __call__(self, calls: int) -> float:
        """Seconds of so many calls; of the first, building included."""
        self.end.send(calls)
        return self._receive()

    def _receive(self) -> float:
        try:
            return self.end.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"{self.name!r} failed; what it says stands above") from None

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_) -> None:
        with suppress(OSError):  # it has failed
            self.end.send(0)
            self.process.join(10)
        self.process.kill()
        self.process.join()


def _serve(table: Callable[[], Mapping[str, Contender]], name: str, end: Connection) -> None:
    torch.manual_seed(0)
    contender = table()[name]
    for module in contender.needs:
        import_module(module)
    if contender.needs == COMPILER:
        _warm_compiler()
    end.send(0.0)
    run = None
    while calls := end.recv():
        started = time.perf_counter()
        run = run or contender.make()
        run(calls)
        end.send(time.perf_counter() - started)


def _warm_compiler() -> None:
    """What torch finds out about the C++ compiler once, so that no contender pays for it."""
    torch.compile(lambda x: x.exp().sum())(torch.ones(64))


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


def save(out: Path, name: str, results: dict, **settings) -> None:
    """`results` with what they were measured on and with, as `NAME.json`."""
    path = out / f"{name}.json"
    write_json(path, {"settings": {**machine(), **settings}, **results})
    print(f"\nwritten to {path}")


def machine() -> dict:
    """What the figures depend on besides the code."""
    return {
        "versions": {package: _version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "processor": _processor(),
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
