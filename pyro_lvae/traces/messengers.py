"""Handlers that decide what a site's value is, and how many draws of it there are."""

from __future__ import annotations

import copy

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Categorical, Distribution

DATA = "data"  # the name of the one plate that holds every local site
PARTICLE_DIM = -2
CLOSED_FORM = "closed_form_kl"  # in `infer` of a guide's global site whose KL may stand for the sampled ratio


def data_frame(site: dict) -> CondIndepStackFrame | None:
    """The data plate's frame at a site or message, or `None` for a global site."""
    return next((f for f in site["cond_indep_stack"] if f.name == DATA), None)


class ParticleMessenger(Messenger):
    """K independent draws of every local site, along a new dim -2; a global site keeps its one draw.

    `pyro.plate` around the structure would draw global sites K times as well, and an importance-
    weighted bound over draws with different weights each is not a bound.
    """

    def __init__(self, num_particles: int):
        super().__init__()
        self.num_particles = num_particles

    def _pyro_sample(self, msg: dict) -> None:
        if data_frame(msg) is None:
            return
        frame = CondIndepStackFrame("particles", PARTICLE_DIM, self.num_particles, 0, self.num_particles)
        msg["cond_indep_stack"] = (frame, *msg["cond_indep_stack"])
        BroadcastMessenger._pyro_sample(msg)


class MeanMessenger(Messenger):
    """Every continuous site that is not observed takes the mean of its distribution, where it has one, not a draw."""

    def _pyro_sample(self, msg: dict) -> None:
        fn = msg["fn"]
        if msg["is_observed"] or msg["done"] or not isinstance(fn, TorchDistributionMixin):
            return  # the mixin, since `Independent` is no `TorchDistribution`
        if (mean := known_mean(fn)) is not None:
            msg["value"], msg["done"] = mean, True


def known_mean(fn) -> Tensor | None:
    """The mean of a continuous distribution, or `None` where it has or tells none, as Student's t with df <= 1."""
    if fn.support.is_discrete:  # a Categorical's is NaN
        return None
    try:
        mean = fn.mean
    except NotImplementedError:
        return None
    return None if mean.isnan().any() else mean


class ValuesMessenger(Messenger):
    """The sites named take the values given, in place of draws."""

    def __init__(self, values: dict[str, Tensor]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.value_of(msg["name"], msg["fn"]), True

    def value_of(self, name: str, fn) -> Tensor:
        """What a site gets whose distribution is `fn`."""
        return self.values[name]


class RedrawMessenger(ValuesMessenger):
    """The sites named take the values given as draws of their Normals: a gradient reaches mean and deviation."""

    def value_of(self, name: str, fn) -> Tensor:
        return redraw(fn, self.values[name])


class AutocastMessenger(Messenger):
    """Matrix products in a smaller precision; the distributions of sites, and so draws and densities, in float32.

    It holds while a model or guide runs, and not in what is computed from its trace. Flows, whose networks are part of
    the draw, have their products in the smaller one.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.autocast = torch.autocast(device.type, dtype, cache_enabled=False)

    def __enter__(self):
        found = super().__enter__()  # refuses to be entered twice
        self.autocast.__enter__()
        return found

    def __exit__(self, *exception):
        self.autocast.__exit__(*exception)
        super().__exit__(*exception)

    def _pyro_sample(self, msg: dict) -> None:
        msg["fn"] = in_float32(msg["fn"])


def in_float32(fn: Distribution) -> Distribution:
    """The distribution with parameters of at least float32; `fn` itself where they are."""
    wider = {name: wide for name, value in vars(fn).items() if (wide := _in_float32(value)) is not value}
    if not wider:
        return fn
    found = copy.copy(fn)
    vars(found).update(wider)
    if isinstance(fn, Categorical):  # normalised when it was made, to the few digits that it had then
        if "logits" in vars(found):
            found._param = found.logits = found.logits.log_softmax(-1)
            vars(found).pop("probs", None)  # computed from them
        else:
            found._param = found.probs = found.probs / found.probs.sum(-1, True)
    return found


def _in_float32(value):
    if isinstance(value, Distribution):
        return in_float32(value)
    is_small = isinstance(value, Tensor) and value.is_floating_point() and value.itemsize < 4
    return value.float() if is_small else value


def normal_of(fn):
    """The Normal under event dims and expansions, or `None`."""
    while hasattr(fn, "base_dist") and type(fn).__name__ == "Independent":
        fn = fn.base_dist
    return fn if type(fn).__name__ == "Normal" else None


def redraw(fn, value: Tensor) -> Tensor:
    """mu + sigma eps at the eps that gives `value`, with a gradient for mu and sigma alone; `fn` is a Normal."""
    normal = normal_of(fn)
    return normal.loc + normal.scale * ((value - normal.loc) / normal.scale).detach()
