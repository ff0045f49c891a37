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
            count = num_left(seconds)
            is_worth_it, reason = pays(saved_of_a_step(seconds) * count, seconds * count, len(self.step.parameters))
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


def pays(saved: float, total: float, tensors: int) -> tuple[bool, str]:
    """Whether compiling saves one and a half times what it takes: about 5 s, and half a second a parameter tensor.

    Args:
        saved: seconds, of all that is to come.
        total: seconds that are to come, eagerly.
        tensors: parameters of the structure.

    Returns:
        The answer; and what compiling would save and take, in words.
    """
    cost = 5.0 + 0.5 * tensors
    why = f"would save about {saved:.0f} s of {total:.0f} s and take about {cost:.0f} s"
    is_worth_it = saved > 1.5 * cost
    return is_worth_it, why if is_worth_it else f"{why}; it is done from {1.5 * cost:.0f} s saved on"


def saved_of_a_step(seconds: float) -> float:
    """What compiling saves of a training step, most of which is what Python takes whatever the particles.

    A third of 40 ms and little beyond: 12 of 38 ms for a ladder by one particle, 12 of 75 by five, 22 of 214 by twenty
    (`benchmarks/results/scaling_K.json`).
    """
    return 0.33 * min(seconds, 0.04) + 0.07 * max(0.0, seconds - 0.04)
