"""The only room that runs guides and replays models: one ledger {site: log p, log q} for everyone.

Estimators, evaluation and the contract all read the same ledger, so what a plate, a scale or a
global site means is decided here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.distributions import kl_divergence

DATA = "data"  # the name of the one plate that holds every local site
PARTICLE_DIM = -2


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
    """Every continuous site that is not observed takes the mean of its distribution instead of a draw."""

    def _pyro_sample(self, msg: dict) -> None:
        fn = msg["fn"]
        if msg["is_observed"] or msg["done"] or not isinstance(fn, TorchDistribution):
            return
        if not fn.support.is_discrete:
            msg["value"], msg["done"] = fn.mean, True


class ValuesMessenger(Messenger):
    """The sites named take the values given, in place of draws."""

    def __init__(self, values: dict[str, Tensor]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


@dataclass(frozen=True)
class Site:
    """One sample site, seen from the model (p) and from the guide (q).

    `log_p` and `log_q` are nats, masks applied, scales not. With K particles they have shape
    `[K, B]`; without, `[B]`; for a global site, the site's own. `beta` is the product of the
    `poutine.scale`s on the site, `plate_scale` is N/B of a subsampled data plate. A discrete site that
    the model marks `infer={"enumerate": "parallel"}` and the guide leaves out is enumerated: it, and
    the sites below it, have a further dim on the left.
    """

    name: str
    value: Tensor
    p: TorchDistribution | None
    q: TorchDistribution | None
    log_p: Tensor
    log_q: Tensor
    beta: float | Tensor
    plate_scale: float
    is_observed: bool
    is_local: bool
    is_enumerated: bool = False
    mask: Tensor | bool | None = None

    def kl(self) -> Tensor:
        """KL(q || p) in closed form, nats; log q - log p at the draw, where torch knows no formula.

        `[K, B]` or `[B]` for a local site. Both distributions are given the draws before this site:
        over their expectation it is the site's share of the KL where the guide samples in the
        model's order, and not otherwise.
        """
        if self.p is None or self.q is None:
            return self.log_q - self.log_p
        try:
            kl = kl_divergence(self.q, self.p)
        except NotImplementedError:
            return self.log_q - self.log_p
        return scale_and_mask(kl, 1.0, self.mask)

    @property
    def log_ratio(self) -> Tensor:
        """beta (log p - log q)."""
        return self.beta * (self.log_p - self.log_q)


class Ledger(dict[str, Site]):
    """{site name: Site} in the model's order.

    Attributes:
        guide_order: the guide's sites in its own order.
        batch_dims: 2 with particles (`[K, B]`), 1 without (`[B]`).
    """

    guide_order: tuple[str, ...] = ()
    batch_dims: int = 1

    @property
    def latents(self) -> dict[str, Site]:
        """The sites that are not observed, in the model's order."""
        return {name: site for name, site in self.items() if not site.is_observed}

    @property
    def global_sites(self) -> dict[str, Site]:
        """The sites outside the data plate."""
        return {name: site for name, site in self.items() if not site.is_local}

    @property
    def draws(self) -> dict[str, Tensor]:
        """The guide's draws that a gradient passes through, in the model's order."""
        return {n: s.value for n, s in self.latents.items() if s.q is not None and s.value.requires_grad}

    def without_scores(self) -> Ledger:
        """The same numbers, where no gradient passes through any log q."""
        return self._map(lambda site: replace(site, log_q=site.log_q.detach()))

    def scores_alone(self) -> Ledger:
        """The same numbers, where no gradient passes through any log p."""
        return self._map(lambda site: replace(site, log_p=site.log_p.detach()))

    def unannealed(self) -> Ledger:
        """The same sites at beta = 1."""
        return self._map(lambda site: replace(site, beta=1.0))

    @property
    def rows(self) -> float:
        """N, the rows that the batch stands for: B, unless the data plate is subsampled."""
        return self.plate_scale() * self.local_log_weight().shape[-1]

    def total(self, per_datum: Tensor) -> Tensor:
        """N/B sum_b of a bound a datum `[B]`, with the global sites outside: a scalar, nats."""
        return self.plate_scale() * per_datum.sum() + self.global_log_weight()

    def local_log_weight(self) -> Tensor:
        """Sum over local sites of beta (log p - log q), nats: `[K, B]` with particles, else `[B]`.

        Enumerated sites are summed out: log sum_c p(c) p(x, z | c) / q(z | x). With beta on c, p(c)^beta
        stands in that sum; the entropy of p(c | x, z) is then not annealed with it.
        """
        joint = self._joint()
        return joint.flatten(0, -1 - self.batch_dims).logsumexp(0) if self._is_enumerated else joint

    def local_log_q(self) -> float | Tensor:
        """log q of the local draws, not annealed, nats: `[K, B]` with particles, else `[B]`."""
        return sum(s.log_q for s in self.latents.values() if s.is_local and s.q is not None)

    def kl_shares(self) -> dict[str, Tensor]:
        """{local latent: beta (log q - log p)}, nats, `[K, B]` or `[B]`: their sum has the KL as its mean.

        With an enumerated site c, r(c) = p(c | x, z) stands for q(c | z, x), and every share is its
        expectation under r. (With several, the entropy of r counts with the first.)
        """
        ratios = {n: -s.log_ratio for n, s in self.latents.items() if s.is_local}
        if not self._is_enumerated:
            return ratios
        joint = self._joint()
        log_r = joint - self.local_log_weight()
        first = next(n for n, s in self.items() if s.is_enumerated)
        ratios[first] = ratios[first] + log_r
        return {n: (log_r.exp() * v).flatten(0, -1 - self.batch_dims).sum(0) for n, v in ratios.items()}

    def _map(self, change: Callable[[Site], Site]) -> Ledger:
        book = Ledger({name: change(site) for name, site in self.items()})
        book.guide_order, book.batch_dims = self.guide_order, self.batch_dims
        return book

    @property
    def _is_enumerated(self) -> bool:
        return any(site.is_enumerated for site in self.values())

    def _joint(self) -> Tensor:
        return sum(site.log_ratio for site in self.values() if site.is_local)

    def global_log_weight(self) -> float | Tensor:
        """Sum over global sites of beta (log p - log q), nats: a scalar."""
        return sum(site.log_ratio.sum() for site in self.global_sites.values())

    def plate_scale(self) -> float:
        """N/B of the data plate: 1 unless it is subsampled."""
        return next((site.plate_scale for site in self.values() if site.is_local), 1.0)


def trace_pair(model: Callable, guide: Callable, *args, num_particles: int | None = None, **kwargs) -> tuple:
    """The traces of `model`, replayed, and of `guide`, with nothing computed from them yet."""
    if num_particles is not None:
        particles = ParticleMessenger(num_particles)
        model, guide = particles(model), particles(guide)
    model = EnumMessenger(first_available_dim=-2 if num_particles is None else -3)(model)
    guide_trace = run(guide, *args, **kwargs)
    return replay(model, guide_trace, *args, **kwargs), guide_trace


def run(fn: Callable, *args, **kwargs):
    """The trace of one run of a guide or model."""
    return poutine.trace(fn).get_trace(*args, **kwargs)


def replay(model: Callable, guide_trace, *args, **kwargs):
    """The trace of `model` with the latents of `guide_trace`."""
    return poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)


def ledger(model: Callable, guide: Callable, *args, num_particles: int | None = None, **kwargs) -> Ledger:
    """Run `guide`, replay `model` against it, and write down every sample site.

    Args:
        num_particles: K draws of the local sites along dim -2; `None` is one draw without that dim.

    A latent that the guide leaves out is enumerated where the model marks it so. Else the model
    draws it: its proposal is its prior, and its log-ratio is zero.
    """
    p, q = map(_sample_sites, trace_pair(model, guide, *args, num_particles=num_particles, **kwargs))
    book = Ledger({name: _site(name, p.get(name), q.get(name)) for name in [*p, *(n for n in q if n not in p)]})
    book.guide_order, book.batch_dims = tuple(q), 1 if num_particles is None else 2
    return book


def log_densities(fn: Callable, values: dict[str, Tensor], *args, num_particles: int) -> dict[str, Tensor]:
    """{site: log-density} of a model or a guide at given values of its latents: nats, `[K, B]` each.

    Args:
        fn: model or guide; called with `args`.
        values: {latent: `[K, B, ...]`}; other latents are drawn.
        num_particles: K.
    """
    sites = _sample_sites(run(ParticleMessenger(num_particles)(ValuesMessenger(values)(fn)), *args))
    return {name: _log_prob(site) for name, site in sites.items()}


def guide_sites(structure: nn.Module, x: Tensor, y: Tensor | None = None) -> dict:
    """{latent name: (distribution, value)} of one run of the guide."""
    sites = _sample_sites(run(structure.guide, *_args(x, y)))
    return {name: (site["fn"], site["value"]) for name, site in sites.items()}


def generate(
    structure: nn.Module,
    x: Tensor,
    latents: dict[str, Tensor],
    y: Tensor | None = None,
    *,
    mean: bool = False,
    num_particles: int | None = None,
    draw_labels: bool = False,
) -> dict[str, tuple]:
    """Run the model with `latents` fixed and x not observed: {site name: (distribution, value)}.

    `x` gives the length, dtype and device alone; labels `y`, where they are a site, stay observed.
    With `mean`, the remaining sites take their means in place of draws; with `num_particles`, there
    are K draws `[K, B, ...]`. With `draw_labels`, labels that are a site are drawn too.
    """
    fixed = latents if y is None or draw_labels else {**latents, "y": y}
    model = poutine.condition(poutine.uncondition(structure.model), data=fixed)
    model = MeanMessenger()(model) if mean else model
    model = model if num_particles is None else ParticleMessenger(num_particles)(model)
    sites = _sample_sites(run(model, *_args(x, y)))
    return {name: (site["fn"], site["value"]) for name, site in sites.items()}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; every submodule's own mode is restored afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training


@contextmanager
def fixed_noise(device: torch.device, seed: int = 0) -> Iterator[None]:
    """Draws inside come from `seed`; the caller's random state is untouched."""
    with forked_noise(device):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def forked_noise(device: torch.device) -> Iterator[None]:
    """Draws inside leave the caller's random state untouched."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _args(x: Tensor, y: Tensor | None) -> tuple:
    return (x,) if y is None else (x, y)


def _sample_sites(trace) -> dict[str, dict]:
    """The sites that carry probability: `pyro.deterministic` and the plates' own are left out."""
    nodes = prune_subsample_sites(trace).nodes
    return {n: s for n, s in nodes.items() if s["type"] == "sample" and not s["infer"].get("_deterministic")}


def _log_prob(site: dict | None) -> Tensor | None:
    if site is None:
        return None
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, 1.0, site["mask"])


def _site(name: str, p: dict | None, q: dict | None) -> Site:
    either = p if p is not None else q
    frame = data_frame(either)
    plate_scale = 1.0 if frame is None else frame.full_size / frame.size
    log_p, log_q = _log_prob(p), _log_prob(q)
    is_enumerated = q is None and p["infer"].get("_enumerate_dim") is not None
    if q is None:
        log_q = torch.zeros_like(log_p) if p["is_observed"] or is_enumerated else log_p
    if p is None:
        log_p = torch.zeros_like(log_q)
    return Site(
        name=name,
        value=either["value"],
        p=None if p is None else p["fn"],
        q=None if q is None else q["fn"],
        log_p=log_p,
        log_q=log_q,
        beta=either["scale"] / plate_scale,
        plate_scale=plate_scale,
        is_observed=p is not None and p["is_observed"],
        is_local=frame is not None,
        is_enumerated=is_enumerated,
        mask=either["mask"],
    )
