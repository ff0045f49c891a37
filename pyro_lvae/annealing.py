"""The KL weight beta, applied from outside by a handler.

    L_beta = E_q[log p(x|z)] - beta KL(q(z|x) || p(z))

(warm-up: Bowman et al. 2016; Sonderby et al. 2016, eq. 20; cyclical: Fu et al. 2019.)
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real

from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .critics import PRIOR_OF
from .schedules import Schedule, constant
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
        name = msg["infer"].get(PRIOR_OF, msg["name"])  # a factor of a prior goes with its site
        if (msg["is_observed"] and name == msg["name"]) or type(msg["fn"]).__name__ == "_Subsample":
            return
        beta = self.beta.get(name, 1.0) if isinstance(self.beta, Mapping) else self.beta
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


def as_schedule(beta: float | Schedule) -> Schedule:
    """A number as a constant schedule; a schedule as it is."""
    if isinstance(beta, Schedule):
        return beta
    if not isinstance(beta, Real | Tensor):
        came = repr(beta) if isinstance(beta, str) else f"a {type(beta).__name__}"
        raise ValueError(f"beta is {came}; expected a number or a schedule, such as linear(0, 1, epochs=20)")
    if not beta >= 0:
        raise ValueError(f"beta is {beta}; a KL weight must be 0 or more")
    return constant(float(beta))
