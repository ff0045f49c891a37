"""The KL weight beta, applied from outside: one handler, and schedules (step, epoch) -> float.

    L_beta = E_q[log p(x|z)] - beta KL(q(z|x) || p(z))

(warm-up: Bowman et al. 2016; Sonderby et al. 2016, eq. 20; cyclical: Fu et al. 2019.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .traces import DATA, data_frame

Beta = float | Tensor


class anneal(Messenger):
    """Scales the log-densities of latent sites by beta, in model and guide alike.

    A context manager around an estimator, or a wrapper of a `model` and its `guide`; structures
    know nothing of it. Observed sites are left alone. Unlike `poutine.scale`, 0 is allowed.

    Args:
        fn: a model or guide to wrap; leave it out to use `with anneal(beta=0.5): ...`.
        beta: one weight for all latent sites, or {site name: weight}, 1 for sites not named.

    >>> with anneal(beta=0.5):
    ...     pass
    """

    def __new__(cls, fn=None, *, beta: Beta | Mapping[str, Beta] = 1.0):
        handler = super().__new__(cls)
        if fn is None:
            return handler
        handler.__init__(beta=beta)
        return handler(fn)

    def __init__(self, fn=None, *, beta: Beta | Mapping[str, Beta] = 1.0):
        super().__init__()
        self.beta = beta

    def _pyro_sample(self, msg: dict) -> None:
        if msg["is_observed"] or type(msg["fn"]).__name__ == "_Subsample":
            return
        beta = self.beta.get(msg["name"], 1.0) if isinstance(self.beta, Mapping) else self.beta
        msg["scale"] = msg["scale"] * beta


class subsample(Messenger):
    """Tells the data plate that its B rows stand for N: local log-densities count N/B times.

    Needed where a structure has global sites, whose own log-density counts once.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def _pyro_sample(self, msg: dict) -> None:
        frame = data_frame(msg)
        if frame is None:
            return
        msg["scale"] = msg["scale"] * self.size / frame.full_size
        msg["cond_indep_stack"] = tuple(map(self._resized, msg["cond_indep_stack"]))

    def _resized(self, frame: CondIndepStackFrame) -> CondIndepStackFrame:
        return frame._replace(full_size=self.size) if frame.name == DATA else frame


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
        if not (self.start >= 0 and self.stop >= 0):
            raise ValueError(f"the schedule goes from {self.start} to {self.stop}; a KL weight must be 0 or more")
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
        return self.length > (epochs if self.unit == "epochs" else steps)


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


def as_schedule(beta: float | Schedule) -> Schedule:
    """A number as a constant schedule; a schedule as it is."""
    if isinstance(beta, Schedule):
        return beta
    if not beta >= 0:
        raise ValueError(f"beta is {beta}; a KL weight must be 0 or more")
    return constant(float(beta))


def _length(epochs: int | None, steps: int | None) -> dict:
    if (epochs is None) == (steps is None):
        raise ValueError(f"epochs={epochs}, steps={steps}; give exactly one of them")
    return {"length": epochs, "unit": "epochs"} if steps is None else {"length": steps, "unit": "steps"}
