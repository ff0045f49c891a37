"""A bar for evaluations that take long, where somebody is looking on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TypeVar

from torch import distributed

PATIENCE = 5.0  # seconds without a sign of life
T = TypeVar("T")
_shown: list[str] = []  # one bar at a time: that of the outermost loop


def watched(steps: Sequence[T], what: str) -> Iterator[T]:
    """The steps one by one; once they take longer than `PATIENCE`, with a bar on a terminal's standard error."""
    started = time.perf_counter()
    with ExitStack() as stack:
        bar, is_asked = None, len(steps) < 2
        for done, step in enumerate(steps):
            yield step
            if not is_asked and time.perf_counter() - started > PATIENCE:
                bar, is_asked = _open(what, len(steps), stack), True
            if bar is not None:
                bar(done + 1)


def _open(what: str, total: int, stack: ExitStack) -> Callable[[int], None] | None:
    """A bar until the stack unwinds, as a function of what is done; `None` where nobody would see it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    is_first = not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
    if _shown or not (console.is_terminal and is_first):
        return None
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=12), TimeRemainingColumn())
    progress = stack.enter_context(Progress(*columns, console=console, transient=True, refresh_per_second=2))
    _shown.append(what)
    stack.callback(_shown.pop)
    task = progress.add_task(what, total=total)
    return lambda done: progress.update(task, completed=done)
