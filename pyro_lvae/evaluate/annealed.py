"""Annealed importance sampling: log p(x) where the guide is a poor proposal, from below and from above."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to

from ..malloc import kept_memory
from ..traces import Ledger, evaluating, forked_noise, generate, ledger, log_densities
from .chunks import MEMORY, args_of, check_rows, cost_of
from .likelihood import refuse_global_sites, refuse_points
from .watched import watched

TARGET = 0.65  # acceptance of Hamiltonian Monte Carlo at its most efficient (Neal 2011)
RATE = 0.2  # of the adaptation, in log step size for each unit of acceptance


def ais_log_likelihood(
    structure: nn.Module,
    x: Tensor,
    num_chains: int = 16,
    num_temperatures: int = 500,
    num_leapfrog: int = 10,
    *,
    start: str = "prior",
    y: Tensor | None = None,
    memory: int = MEMORY,
) -> Tensor:
    r"""log p(x) by annealed importance sampling with Hamiltonian Monte Carlo (Neal 2001; Wu et al. 2017).

        f_t(z) = p_0(z)^(1-t) p(x, z)^t,  0 = t_0 < ... < t_T = 1
        log w  = sum_j (t_j - t_j-1) [log p(x, z_j-1) - log p_0(z_j-1)],  z_j ~ kernel of f_tj from z_j-1
        log p(x) ~ log 1/K sum_k w_k

    A lower bound in expectation, whatever the guide is. Temperatures lie on a sigmoid, dense at both ends.
    A first run with a few chains adapts the leapfrog step of every temperature and datum to an
    acceptance of 0.65; the run that counts then keeps them fixed, so that E[w] is p(x) exactly.
    Sites with constrained support, also one that depends on other latents, move in unconstrained coordinates.

    Args:
        x: data `[N, D]`.
        num_chains: K, a datum.
        num_temperatures: T. The cost is K T (num_leapfrog + 1) gradients of the model a datum, and min(4, K) (T + 25)
            (num_leapfrog + 1) more to adapt the steps.
        num_leapfrog: steps of one trajectory.
        start: p_0, "prior" for p(z), or "guide" for q(z|x), which is quicker where the guide is good.
        y: labels `[N, ...]`, where the structure takes them.
        memory: bytes that a chunk of rows may take, about.

    Returns:
        Nats, `[N]`.

    Raises:
        ValueError: a latent is discrete or global; an argument is out of range.
    """
    x, y = check_rows(structure, x, y)
    path = _Path(structure, num_chains, num_temperatures, num_leapfrog, start)

    def below(args: tuple) -> Tensor:
        return path.forward(args, path.adapt(args))

    return torch.cat(path.by_chunk(x, y, memory, below))


def check_annealable(structure: nn.Module, x: Tensor, y: Tensor | None = None, *, start: str = "prior") -> None:
    """Raise `ValueError`, by name, for sites that Hamiltonian Monte Carlo cannot move."""
    with evaluating(structure), forked_noise(x.device):
        first = ledger(structure.model, structure.guide, *args_of(x, y, slice(None)))
    latents, instead = first.latents, "use log_likelihood"
    if discrete := [n for n, s in latents.items() if s.p is None or s.p.support.is_discrete]:
        raise ValueError(
            f"site(s) {_names(discrete)}: Hamiltonian Monte Carlo moves continuous sites of the model alone; sum "
            f"discrete ones out (a mixture distribution), or {instead}"
        )
    refuse_global_sites(first)
    refuse_points(first)
    if start == "guide":
        _check_densities(first)
    if start == "guide" and (left_out := [n for n, s in latents.items() if s.q is None]):
        raise ValueError(f"site(s) {_names(left_out)}: the guide leaves them out; take start='prior'")


def _check_densities(sites: Ledger) -> None:
    """Raise `ValueError` where log q is known at the guide's own draws alone, as after planar flows."""
    for name, site in sites.latents.items():
        if site.q is None:
            continue
        try:
            site.q.log_prob(site.value.clone())  # a clone, of which no flow remembers the noise
        except KeyError as error:
            raise ValueError(
                f"site {name!r}: the flows of its guide have no inverse, so that its density is known at their own "
                "draws alone; take start='prior'"
            ) from error


@dataclass(frozen=True)
class Bracket:
    """log p(x) of simulated data between two stochastic bounds, nats, `[N]`.

    Attributes:
        x: the data, drawn from the model.
        lower: annealed importance sampling, at most log p(x) in expectation.
        upper: the same chain backwards from the z that made x, at least log p(x) in expectation.
    """

    x: Tensor
    lower: Tensor
    upper: Tensor

    def __repr__(self) -> str:
        return f"Bracket({len(self.x)} data: log p(x) from {self.lower.mean():.2f} to {self.upper.mean():.2f} nats)"

    @property
    def gap(self) -> Tensor:
        """upper - lower: in expectation, no less than the error of either."""
        return self.upper - self.lower


def bidirectional_monte_carlo(
    structure: nn.Module,
    like: Tensor,
    num_chains: int = 16,
    num_temperatures: int = 500,
    num_leapfrog: int = 10,
    *,
    start: str = "prior",
    y: Tensor | None = None,
    memory: int = MEMORY,
) -> Bracket:
    r"""log p(x) from both sides, on data drawn from the model itself (Grosse et al. 2015; Wu et al. 2017).

    With (z, x) ~ p(z, x), z is an exact draw from p(z | x): annealing from there to p_0 gives an unbiased estimate
    of 1 / p(x), and so an upper bound of log p(x) in expectation, next to the lower bound of
    `ais_log_likelihood`. Its gap says how far to trust that on real data, so far as they resemble these.

    Args:
        like: gives number of rows N, dtype and device, `[N, D]`; its values are not used.
            (Nor are those of labels that the model samples: then both sides are of log p(x, y).)
        num_chains, num_temperatures, num_leapfrog, start, y, memory: as for `ais_log_likelihood`.

    Raises:
        ValueError: as `ais_log_likelihood`.
    """
    like, y = check_rows(structure, like, y)
    path = _Path(structure, num_chains, num_temperatures, num_leapfrog, start)

    def both(given: tuple) -> tuple[Tensor, Tensor, Tensor]:
        drawn = generate(structure, given[0], {}, *given[1:], draw_labels=True)
        drawn = {name: value for name, (_, value) in drawn.items()}
        args = (drawn.pop("x").to(like), *(drawn.pop("y", labels).to(labels) for labels in given[1:]))
        steps = path.adapt(args)
        return args[0], path.forward(args, steps), path.backward(args, drawn, steps)

    with pyro.validation_enabled(False):  # the values of `like` are nobody's business
        parts = path.by_chunk(like, y, memory, both)
    return Bracket(*map(torch.cat, zip(*parts, strict=True)))


@dataclass(frozen=True)
class _Path:
    """The way from p_0(z) to p(x, z), for one structure."""

    structure: nn.Module
    num_chains: int
    num_temperatures: int
    num_leapfrog: int
    start: str

    def __post_init__(self):
        for name in ("num_chains", "num_temperatures", "num_leapfrog"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number, at least 1")
        if self.start not in ("prior", "guide"):
            raise ValueError(f"start is {self.start!r}; expected 'prior' or 'guide'")

    @kept_memory()
    def by_chunk(self, x: Tensor, y: Tensor | None, memory: int, estimate: Callable[[tuple], Any]) -> list:
        """`estimate(arguments)` of as many rows at once as `memory` admits, in evaluation mode."""
        check_annealable(self.structure, *args_of(x, y, slice(0, 1)), start=self.start)
        with evaluating(self.structure):
            rows, _ = cost_of(self.structure, x, y).chunk(self.num_chains, memory // 3)  # backward makes twice as much
        found = []
        for i in watched(range(0, len(x), rows), f"annealing {len(x)} rows"):
            args = args_of(x, y, slice(i, i + rows))
            check_annealable(self.structure, *args, start=self.start)  # with Pyro's validation of these rows
            with evaluating(self.structure), pyro.validation_enabled(False):
                found.append(estimate(args))
        return found

    def temperatures(self) -> list[float]:
        """t_0 = 0 ... t_T = 1: a sigmoid over [-4, 4], rescaled (Wu et al. 2017)."""
        ends = [1 / (1 + math.exp(-4 * (2 * j / self.num_temperatures - 1))) for j in range(self.num_temperatures + 1)]
        return [(s - ends[0]) / (ends[-1] - ends[0]) for s in ends]

    def adapt(self, args: tuple) -> Tensor:
        """Step sizes `[T, B]`, from a run with a few chains."""
        chains = _Chains.start(self, args, min(4, self.num_chains))
        step = torch.full((len(args[0]),), 0.1, dtype=args[0].dtype, device=args[0].device)
        for _ in range(25):  # from a guess to the right size at t = 0
            step = step * (RATE * (chains.move(0.0, step) - TARGET)).exp()
        steps = []
        for t in watched(self.temperatures()[1:], "annealing: step sizes"):
            step = step * (RATE * (chains.move(t, step) - TARGET)).exp()
            steps.append(step)
        return torch.stack(steps)

    def forward(self, args: tuple, steps: Tensor) -> Tensor:
        """log 1/K sum_k w_k, `[B]`."""
        chains, t = _Chains.start(self, args, self.num_chains), self.temperatures()
        log_w = torch.zeros_like(chains.difference)
        for j in watched(range(self.num_temperatures), "annealing"):
            log_w += (t[j + 1] - t[j]) * chains.difference
            if j + 1 < self.num_temperatures:  # a move after the last weight would change nothing
                chains.move(t[j + 1], steps[j])
        return log_w.logsumexp(0) - math.log(self.num_chains)

    def backward(self, args: tuple, z: dict[str, Tensor], steps: Tensor) -> Tensor:
        """-log 1/K sum_k 1/w_k, `[B]`, of chains that start at an exact draw `z` of the posterior."""
        z = {name: value.expand(self.num_chains, *value.shape) for name, value in z.items()}
        chains, t = _Chains(self, args, z), self.temperatures()
        log_w = torch.zeros_like(chains.difference)
        for j in watched(range(self.num_temperatures)[::-1], "annealing, backwards"):
            if j + 1 < self.num_temperatures:
                chains.move(t[j + 1], steps[j])
            log_w += (t[j + 1] - t[j]) * chains.difference
        return math.log(self.num_chains) - (-log_w).logsumexp(0)


class _Unconstrained(Messenger):
    """The model's latents at unconstrained positions, mapped to their supports as these are, site by site.

    Attributes:
        mapped: {site: value in its support}; with `invert`, {site: position} of values given.
        jacobian: sum of log |dz/du|, `[K, B]`.
    """

    def __init__(self, given: dict[str, Tensor], *, invert: bool = False):
        super().__init__()
        self.given, self.invert, self.mapped, self.jacobian = given, invert, {}, 0.0

    def _pyro_sample(self, msg: dict) -> None:
        name = msg["name"]
        if name not in self.given:
            return
        to_support, given = biject_to(msg["fn"].support), self.given[name]
        if self.invert:
            self.mapped[name] = to_support.inv(given)
            return
        z = self.mapped[name] = to_support(given)
        self.jacobian = self.jacobian + _rows_of(to_support.log_abs_det_jacobian(given, z))
        msg["value"], msg["done"] = z, True


class _Chains:
    """K Markov chains for each datum, and the densities where they stand.

    Attributes:
        u: {site: unconstrained position `[K, B, ...]`}.
        base: log p_0 of it, with the Jacobian, `[K, B]`.
        difference: log p(x, z) - log p_0(z), `[K, B]`.
    """

    def __init__(self, path: _Path, args: tuple, z: dict[str, Tensor]):
        self.path, self.args = path, args
        start = _Unconstrained(z, invert=True)
        log_densities(start(path.structure.model), z, *args, num_particles=len(next(iter(z.values()))))
        self.u = start.mapped
        self.base, self.difference = self._densities(self.u)

    @classmethod
    def start(cls, path: _Path, args: tuple, num_chains: int) -> _Chains:
        """Chains at draws from p_0."""
        model, guide = path.structure.model, path.structure.guide
        if path.start == "prior":
            drawn = generate(path.structure, args[0], {"x": args[0]}, *args[1:], num_particles=num_chains)
            given = ("x", "y")[: len(args)]  # without labels, a site y is a latent like any other
            z = {name: value for name, (_, value) in drawn.items() if name not in given}
        else:
            sites = ledger(model, guide, *args, num_particles=num_chains)
            z = {name: site.value for name, site in sites.latents.items()}
        return cls(path, args, z)

    def move(self, t: float, step: Tensor) -> Tensor:
        """One Hamiltonian trajectory at temperature t; the mean acceptance of each datum, `[B]`."""
        u, old = self.u, self.base + t * self.difference
        momentum = {name: torch.randn_like(v) for name, v in u.items()}
        kinetic = _kinetic(momentum)
        gradient = self._gradient(u, t)[0]
        for _ in range(self.path.num_leapfrog):
            half = {n: p + 0.5 * _per_row(step, p) * gradient[n] for n, p in momentum.items()}
            u = {n: v + _per_row(step, v) * half[n] for n, v in u.items()}
            gradient, base, difference = self._gradient(u, t)
            momentum = {n: p + 0.5 * _per_row(step, p) * gradient[n] for n, p in half.items()}
        log_accept = base + t * difference - old + kinetic - _kinetic(momentum)
        accept = log_accept.nan_to_num(nan=-math.inf).clamp_max(0).exp()  # a trajectory that diverged is refused
        moved = torch.rand_like(accept) < accept
        self.u = {n: torch.where(_like(moved, v), u[n], v) for n, v in self.u.items()}
        self.base = torch.where(moved, base, self.base)
        self.difference = torch.where(moved, difference, self.difference)
        return accept.mean(0)

    def _gradient(self, u: dict[str, Tensor], t: float) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        u = {name: v.detach().requires_grad_() for name, v in u.items()}
        with torch.enable_grad():
            base, difference = self._densities(u)
            gradient = torch.autograd.grad((base + t * difference).sum(), list(u.values()))
        return dict(zip(u, gradient, strict=True)), base.detach(), difference.detach()

    def _densities(self, u: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(base, difference) at u."""
        count, moved = len(next(iter(u.values()))), _Unconstrained(u)
        log_p = log_densities(moved(self.path.structure.model), {}, *self.args, num_particles=count)
        z, jacobian, joint = moved.mapped, moved.jacobian, sum(log_p.values())
        if self.path.start == "prior":
            prior = sum(log_p[name] for name in z)
        else:
            prior = sum(log_densities(self.path.structure.guide, z, *self.args, num_particles=count).values())
        return prior + jacobian, joint - prior


def _names(sites) -> str:
    return ", ".join(map(repr, sites))


def _kinetic(momentum: dict[str, Tensor]) -> Tensor:
    return sum(0.5 * _rows_of(p.square()) for p in momentum.values())


def _rows_of(value: Tensor) -> Tensor:
    """Summed over whatever follows `[K, B]`."""
    return value.flatten(2).sum(-1) if value.ndim > 2 else value


def _per_row(step: Tensor, like: Tensor) -> Tensor:
    return step.reshape(-1, *[1] * (like.ndim - 2))


def _like(moved: Tensor, value: Tensor) -> Tensor:
    return moved.reshape(*moved.shape, *[1] * (value.ndim - 2))
