"""Structures around another structure: what they change, they change by handlers at its sample sites."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints

from ..critics import factor
from ..nets import evaluation_mode


class Around(nn.Module):
    """Any structure `base`, with distributions at some of its sites exchanged.

    Args:
        x_dim: size D of the data `[B, D]`.
        base: makes the structure from `x_dim`: a class, or `functools.partial` of one.
    """

    def __init__(self, x_dim: int, base: Callable[[int], nn.Module]):
        super().__init__()
        self.base = base(x_dim)
        self.x_dim = x_dim

    def _refuse_own_guide(self) -> None:
        """Raise `ValueError` where the base is of no use with another guide."""
        if owner := next((m for m in self.base.modules() if getattr(m, "has_own_guide", False)), None):
            raise ValueError(
                f"{type(self).__name__} changes the guide, and {type(owner).__name__} has a guide of its own, whose "
                "density its critic learns; take another base"
            )

    @property
    def takes_labels(self) -> bool:
        """Whether the structure within is conditional on labels."""
        return bool(getattr(self.base, "takes_labels", False))

    def model(self, x: Tensor, y: Tensor | None = None):
        return self.base.model(x, y)

    def guide(self, x: Tensor, y: Tensor | None = None):
        return self.base.guide(x, y)

    def _in_guide(self) -> dict[str, tuple[TorchDistribution, Tensor]]:
        """{local latent: (distribution, draw) for two rows of zeros} of the base's guide, in its order."""
        return self._seen(self.base.guide)

    def _in_model(self, in_guide: dict[str, tuple[TorchDistribution, Tensor]]) -> dict[str, tuple]:
        """The same of the base's model, at the draws of the guide."""
        return self._seen(self.base.model, {name: value for name, (_, value) in in_guide.items()})

    def _top(self, in_guide: dict[str, tuple[TorchDistribution, Tensor]]) -> tuple[str, TorchDistribution]:
        """The first local latent that the base's model samples, and its prior, which is to be exchanged.

        Raises:
            ValueError: the guide does not sample it, it is no real vector, or its prior has parameters, which would
                be left without a use, or a factor beside it, which would be left without its density.
        """
        name, (prior, value) = next(iter(self._in_model(in_guide).items()))
        what = f"{type(self).__name__} exchanges the prior of the top layer of {type(self.base).__name__}, {name!r}"
        if name not in in_guide:
            raise ValueError(f"{what}, and the guide does not sample it; let it, or the model begin with another layer")
        if not is_real_vector(prior):
            raise ValueError(f"{what}, which is no vector of real numbers: {type(prior).__name__} {prior.support}")
        if getattr(prior, "has_factor", False):
            raise ValueError(
                f"{what}, and a factor beside it, learned for that very prior, would stay; put the one that learns it "
                "around this one"
            )
        if prior.log_prob(value).requires_grad:
            raise ValueError(
                f"{what}, which has parameters that would have no use then; take a base with a fixed prior"
            )
        return name, prior

    def _seen(self, run: Callable, values: dict[str, Tensor] | None = None) -> dict[str, tuple]:
        """{local latent: (distribution, value)} of a run on two rows of zeros, with the values given."""
        like = next(self.base.parameters(), torch.zeros(()))
        x, y = like.new_zeros(2, self.x_dim), None
        if self.takes_labels:
            y = torch.zeros(2, dtype=torch.long, device=like.device)
        quiet = torch.random.fork_rng(devices=[like.device] if like.device.type == "cuda" else [])
        try:
            with evaluation_mode(self.base), quiet, poutine.block(), Seen(values or {}) as seen:
                run(x, y)
        except Exception as error:
            raise ValueError(
                f"{type(self).__name__} looks at the layers of {type(self.base).__name__} on two rows of zeros "
                f"{tuple(x.shape)}{' with labels 0' if self.takes_labels else ''}, and it fails there: {error}"
            ) from error
        if not seen.sites:
            raise ValueError(f"{type(self.base).__name__} has no latent inside the data plate")
        return seen.sites


class Exchange(Messenger):
    """At the sites named, the distribution that is made from the one that stands there."""

    def __init__(self, makers: dict[str, Callable[[TorchDistribution], TorchDistribution]]):
        super().__init__()
        self.makers = makers

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.makers:
            shape = msg["fn"].batch_shape
            made = self.makers[msg["name"]](msg["fn"])
            msg["fn"] = made if made.batch_shape == shape else made.expand(shape)


class Beside(Messenger):
    """After the site named, and inside its plates, a factor of its value, as `pyro_lvae.critics.factor` has it."""

    def __init__(self, name: str, factor: str, log_factor: Callable[[Tensor], Tensor], **of):
        super().__init__()
        self.name, self.factor, self.log_factor, self.of = name, factor, log_factor, of

    def _pyro_post_sample(self, msg: dict) -> None:
        if msg["name"] == self.name:
            factor(self.factor, self.log_factor(msg["value"]), **self.of)


def _is_local_latent(msg: dict) -> bool:
    is_local = any(frame.name == "data" for frame in msg["cond_indep_stack"])
    return is_local and not msg["is_observed"] and isinstance(msg["fn"], TorchDistributionMixin)


class Seen(Messenger):
    """Remembers the latents inside the data plate, by name and in order; those named take the values given.

    Attributes:
        sites: {name: (distribution, value)}, values without gradient.
    """

    def __init__(self, values: dict[str, Tensor]):
        super().__init__()
        self.values = values
        self.sites: dict[str, tuple[TorchDistribution, Tensor]] = {}

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True

    def _pyro_post_sample(self, msg: dict) -> None:
        if _is_local_latent(msg):
            self.sites[msg["name"]] = (msg["fn"], msg["value"].detach())


@torch.no_grad()
def drawn(pair: nn.Module, x: Tensor, y: Tensor | None) -> dict[str, tuple[TorchDistribution, Tensor]]:
    """{local latent: (distribution, draw)} of one run of the guide."""
    with poutine.block(), Seen({}) as seen:
        pair.guide(*((x,) if y is None else (x, y)))
    return seen.sites


def distribution_at(name: str, run: Callable, *args, at_means: bool = False) -> TorchDistribution:
    """The distribution of a site in a run of a model or guide, which goes no further; latents before it are drawn, or
    stand at their means.
    """
    try:
        with poutine.block(), _Until(name, at_means):
            run(*args)
    except _Reached as reached:
        return reached.fn
    raise ValueError(f"there is no site {name!r}")


class _Reached(Exception):
    def __init__(self, fn: TorchDistribution):
        self.fn = fn


class _Until(Messenger):
    def __init__(self, name: str, at_means: bool):
        super().__init__()
        self.name, self.at_means = name, at_means

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] == self.name:
            raise _Reached(msg["fn"])
        if self.at_means and _is_local_latent(msg):
            msg["value"], msg["done"] = msg["fn"].mean, True


def is_real_vector(fn: TorchDistribution) -> bool:
    """Whether draws are vectors of real numbers without bounds."""
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return len(fn.event_shape) == 1 and isinstance(support, type(constraints.real))
