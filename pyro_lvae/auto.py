"""A step that is compiled where that was asked for, or where it pays."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from torch import Tensor

from .compile import CompiledStep, CompileError
from .step import Step

TRIAL = 6  # eager steps, the first of them not counted, by which "auto" judges


class AutoStep:
    """A `Step`, eager until it is compiled; it stays eager where it cannot be.

    Args:
        step: what to run.
        compile: whether to compile it; "auto": if that pays, as the first few steps tell.
        hindrance: why it cannot be compiled, where that is known.
        say: told what was decided and why, and `unasked`: whether that is not what was asked for.

    Attributes:
        compile: as given; False once it is to stay eager.
        compiled: the graph, once there is one.
    """

    def __init__(self, step: Step, compile: bool | str, hindrance: str | None, say: Callable[..., None]):
        self.step, self.compile, self.hindrance, self.say = step, compile, hindrance, say
        self.compiled: CompiledStep | None = None
        self._seconds: list[float] = []

    def __call__(
        self, args: tuple, beta: dict[str, float], *, num_left: Callable[[float], int] | None
    ) -> tuple[Tensor, Tensor]:
        """As of `Step`.

        Args:
            args: a batch.
            beta: KL weights by site.
            num_left: given the seconds of an eager step, how many such batches are to come; `None` for a batch that
                others are not like, for which nothing is compiled.
        """
        if self.compile and self.compiled is None and num_left is not None:
            self._consider(args, beta, num_left)
        if self.compiled is not None and self.compiled.fits(args):
            return self.compiled(args, beta)
        started = time.perf_counter()
        found = self.step(args, beta)
        if self.compile == "auto":
            self._seconds.append(time.perf_counter() - started)
        return found

    def _consider(self, args: tuple, beta: dict[str, float], num_left: Callable[[float], int]) -> None:
        """Compile, if asked to or if it pays."""
        if self.hindrance is not None:
            return self._stay_eager(self.hindrance)
        if self.compile == "auto":
            if len(self._seconds) < TRIAL:
                return
            seconds = median(self._seconds[1:])
            is_worth_it, reason = pays(seconds, num_left(seconds), len(self.step.parameters))
            if not is_worth_it:
                return self._stay_eager(f"compiling {reason}")
            self.say(f"compiling the training step {reason}")
        try:
            started = time.perf_counter()
            self.compiled = CompiledStep(self.step, args, beta)
            self.say(f"compiled in {time.perf_counter() - started:.0f} s")
        except CompileError as error:
            self._stay_eager(str(error))

    def _stay_eager(self, reason: str) -> None:
        was_asked, self.compile = self.compile is True, False
        self.say(f"training eagerly: {reason}", unasked=was_asked)


def pays(seconds: float, steps: int, tensors: int) -> tuple[bool, str]:
    """Whether compiling saves one and a half times the time that it takes; and what it would save and take, in words.

    Measured on two cores: up to half a second for each parameter tensor, and about a third of a step's time saved.

    Args:
        seconds: of an eager step.
        steps: how many are to come.
        tensors: trained parameters.
    """
    saved, cost = 0.33 * seconds * steps, 5.0 + 0.5 * tensors
    return saved > 1.5 * cost, f"would save about {saved:.0f} s of {seconds * steps:.0f} s and take up to {cost:.0f} s"
