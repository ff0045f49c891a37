"""Schedules (step, epoch) -> float: KL weights, noise levels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Real


@dataclass(frozen=True)
class Schedule:
    """A weight that goes from `start` to `stop` over `length`, `cycles` times, then stays at `stop`.

    Counted in epochs, it changes once an epoch (as in the ladder paper); in steps, every step.
    Make one with `constant`, `linear` or `cyclical`.

    Args:
        start: value in the first epoch (step).
        stop: value from epoch (step) `length` on.
        length: number of epochs (steps) until then; 0 is constant at `stop`.
        unit: "epochs" or "steps".
        cycles: how often the way from `start` to `stop` is gone.
        ramp: the part of each cycle spent rising; the rest stays at `stop`.
    """

    start: float = 0.0
    stop: float = 1.0
    length: int = 0
    unit: str = "epochs"
    cycles: int = 1
    ramp: float = 1.0

    def __post_init__(self):
        if self.unit not in ("epochs", "steps"):
            raise ValueError(f"unit is {self.unit!r}; expected 'epochs' or 'steps'")
        numbers = {name: getattr(self, name) for name in ("start", "stop", "length", "cycles", "ramp")}
        if odd := {name: value for name, value in numbers.items() if not isinstance(value, Real)}:
            raise ValueError(f"{odd} of a schedule; expected numbers")
        if not (self.start >= 0 and self.stop >= 0):
            raise ValueError(f"the schedule goes from {self.start} to {self.stop}; both must be 0 or more")
        if self.length < 0 or self.cycles < 1 or not 0 < self.ramp <= 1:
            raise ValueError(
                f"length={self.length}, cycles={self.cycles}, ramp={self.ramp}; expected length >= 0, "
                "cycles >= 1 and 0 < ramp <= 1"
            )

    def __call__(self, step: int, epoch: int) -> float:
        """The weight at a step and epoch, both counted from 0 since training began."""
        now = epoch if self.unit == "epochs" else step
        if now >= self.length:
            return float(self.stop)
        phase = (now * self.cycles / self.length) % 1.0
        return self.start + (self.stop - self.start) * min(1.0, phase / self.ramp)

    def ends_after(self, steps: int, epochs: int) -> bool:
        """Whether training of this length stops before the schedule has reached `stop`."""
        return self(max(0, steps - 1), max(0, epochs - 1)) != self.stop


def constant(value: float = 1.0) -> Schedule:
    """The same weight throughout. At 1 the annealed objective is the ELBO itself.

    >>> constant(0.5)(step=0, epoch=0)
    0.5
    """
    return Schedule(value, value)


def linear(start: float = 0.0, stop: float = 1.0, *, epochs: int | None = None, steps: int | None = None) -> Schedule:
    """Linear warm-up from `start` to `stop` in so many epochs or steps (Sonderby et al. 2016).

    >>> [linear(0, 1, epochs=4)(step=0, epoch=e) for e in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return replace(Schedule(start, stop), **_length(epochs, steps))


def cyclical(
    start: float = 0.0,
    stop: float = 1.0,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    cycles: int = 4,
    ramp: float = 0.5,
) -> Schedule:
    """`cycles` warm-ups in so many epochs or steps altogether (Fu et al. 2019).

    >>> [cyclical(0, 1, epochs=8, cycles=2)(step=0, epoch=e) for e in range(9)]
    [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    """
    return Schedule(start, stop, cycles=cycles, ramp=ramp, **_length(epochs, steps))


def _length(epochs: int | None, steps: int | None) -> dict:
    if (epochs is None) == (steps is None):
        raise ValueError(f"epochs={epochs}, steps={steps}; give exactly one of them")
    return {"length": epochs, "unit": "epochs"} if steps is None else {"length": steps, "unit": "steps"}
