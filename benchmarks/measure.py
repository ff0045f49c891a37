"""Contenders timed in turn, each in a process of its own."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch

from pyro_lvae.train import as_device

COMPILER = ("torch._dynamo", "torch._inductor.compile_fx")
Run = Callable[[int], object]


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Args:
        make: builds it, and returns a function that does a number of calls.
        unit: steps in a call, where a call is a whole epoch; or whatever else times are reported per.
        needs: modules imported before the clock runs; where one is missing, the contender is skipped.
        has_data: whether a call cuts its batches from the data set, rather than being given one.
        only: the kind of device that it is for, where it is not for all.
    """

    make: Callable[[], Run]
    unit: float = 1
    needs: tuple[str, ...] = ()
    has_data: bool = False
    only: str | None = None


@dataclass
class Timing:
    """Seconds a unit, one number a repeat, and seconds of the first call, building and compiling included.

    On CUDA `kernels` holds the seconds a unit that its kernels run, which no launching of them can fall below.
    """

    first: float
    seconds: list[float] = field(default_factory=list)
    kernels: float | None = None


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`, a name that torch knows and has."""

    def device(name: str) -> str:
        try:
            return str(as_device(name))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parser.add_argument("--device", type=device, default="cpu", help="where the contenders run; cuda, for one")


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
    table: Callable[[], Mapping[str, Contender]],
    steps: float,
    repeats: int,
    skip: list[str] | None = None,
    device: str = "cpu",
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Every repeat runs each contender in turn, once untimed, then for about `steps` units; and why some were skipped.

    Args:
        table: makes the contenders, here and in the process of each: a function of a module, or a `partial` of one.
        steps: units of a contender in a repeat.
        repeats: how often.
        skip: words in the names of those left out.
        device: where they are built.
    """
    contenders = without(table(), skip or [])
    skipped = {name: reason for name, c in contenders.items() if (reason := _missing(c, device))}
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}", flush=True)
    with ExitStack() as stack:
        running = {n: stack.enter_context(_Process(table, n, device)) for n in contenders if n not in skipped}
        timings = {name: Timing(process(1)) for name, process in running.items()}
        for _ in range(repeats):
            for name, process in running.items():
                unit = contenders[name].unit
                calls = max(1, round(steps / unit))
                process(1)  # caches are cold after another's turn, as they are not in training
                timings[name].seconds.append(process(calls) / (calls * unit))
        if torch.device(device).type == "cuda":
            for name, process in running.items():
                timings[name].kernels = process.kernels(1) / contenders[name].unit
    return timings, skipped


def _missing(contender: Contender, device: str) -> str:
    if contender.only not in (None, torch.device(device).type):
        return f"for {contender.only} alone"
    try:
        for module in contender.needs:
            import_module(module)
    except ImportError as error:
        return f"not installed: {error}"
    return ""


class _Process:
    """A contender in a process of its own, so that none has another's memory, threads or settings."""

    def __init__(self, table: Callable[[], Mapping[str, Contender]], name: str, device: str):
        context = get_context("spawn")
        self.name, (self.end, theirs) = name, context.Pipe()
        self.process = context.Process(target=_serve, args=(table, name, device, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._receive()

    def __call__(self, calls: int) -> float:
        """Seconds of so many calls; of the first, building included."""
        self.end.send((_timed, calls))
        return self._receive()

    def kernels(self, calls: int) -> float:
        """Seconds that the kernels of so many calls run on CUDA."""
        self.end.send((_in_kernels, calls))
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
            self.end.send(None)
            self.process.join(10)
        self.process.kill()
        self.process.join()


def _serve(table: Callable[[], Mapping[str, Contender]], name: str, device: str, end: Connection) -> None:
    torch.manual_seed(0)
    with torch.device(device):
        contender = table()[name]
    for module in contender.needs:
        import_module(module)
    if contender.needs == COMPILER:
        _warm_compiler(device)
    end.send(0.0)
    run = None

    def call(calls: int) -> None:
        nonlocal run
        if run is None:
            with torch.device(device):
                run = contender.make()
        run(calls)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    while asked := end.recv():
        measure, calls = asked
        end.send(measure(partial(call, calls)))


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _in_kernels(call: Callable[[], object]) -> float:
    """By torch's profiler, which sees the kernels of a replayed graph too."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
    return 1e-6 * sum(event.self_device_time_total for event in found.key_averages())


def _warm_compiler(device: str) -> None:
    """What torch finds out about its compilers once, so that no contender pays for it."""
    torch.compile(lambda x: x.exp().sum())(torch.ones(64, device=device))
