"""Runs of guides and models, and what is read off them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from ..critics import PENALTY, PRIOR_OF
from .messengers import CLOSED_FORM, MeanMessenger, ParticleMessenger, ValuesMessenger, data_frame
from .sites import Ledger, Site


def trace_pair(model: Callable, guide: Callable, *args, num_particles: int | None = None, **kwargs) -> tuple:
    """The traces of `model`, replayed, and of `guide`, with nothing computed from them yet."""
    if num_particles is not None:
        particles = ParticleMessenger(num_particles)
        model, guide = particles(model), particles(guide)
    guide = EnumMessenger(first_available_dim=-2 if num_particles is None else -3)(guide)
    model = EnumMessenger()(model)  # its dims lie to the left of the guide's
    guide_trace = run(guide, *args, **kwargs)
    return replay(model, guide_trace, *args, **kwargs), guide_trace


def run(fn: Callable, *args, **kwargs):
    """The trace of one run of a guide or model."""
    try:
        return poutine.trace(fn).get_trace(*args, **kwargs)
    except (ValueError, RuntimeError) as error:  # to which Pyro adds the shapes of all sites
        raise error.__cause__ if type(error.__cause__) is type(error) else error from None


def replay(model: Callable, guide_trace, *args, **kwargs):
    """The trace of `model` with the latents of `guide_trace`."""
    return run(poutine.replay(model, trace=guide_trace), *args, **kwargs)


def ledger(model: Callable, guide: Callable, *args, num_particles: int | None = None, **kwargs) -> Ledger:
    """Run `guide`, replay `model` against it, and write down every sample site.

    Args:
        num_particles: K draws of the local sites along dim -2; `None` is one draw without that dim.

    A discrete latent that the guide marks `infer={"enumerate": "parallel"}` is enumerated in place of drawn. One that
    the guide leaves out is enumerated where the model marks it so; else the model draws it: its proposal is its prior,
    and its log-ratio is zero.

    Raises:
        ValueError: guide and model both have enumerated latents of their own.
    """
    p, q = map(_sample_sites, trace_pair(model, guide, *args, num_particles=num_particles, **kwargs))
    book = Ledger({name: _site(name, p.get(name), q.get(name)) for name in [*p, *(n for n in q if n not in p)]})
    for name, target in _factors_of_priors(p).items():
        log_factor = book.pop(name).log_p
        book[target] = replace(book[target], log_p=book[target].log_p + log_factor, log_factor=log_factor)
    book.guide_order, book.batch_dims = tuple(q), 1 if num_particles is None else 2
    enumerated = [s.q is None for s in book.values() if s.is_enumerated]
    if any(enumerated) and not all(enumerated):
        raise ValueError("guide and model both enumerate latents; mark them in one of the two")
    return book


def log_densities(fn: Callable, values: dict[str, Tensor], *args, num_particles: int) -> dict[str, Tensor]:
    """{site: log-density} of a model or a guide at given values of its latents: nats, `[K, B]` each.

    Args:
        fn: model or guide; called with `args`.
        values: {latent: `[K, B, ...]`}; other latents are drawn.
        num_particles: K.
    """
    sites = _sample_sites(run(ParticleMessenger(num_particles)(ValuesMessenger(values)(fn)), *args))
    found = {name: _log_prob(site) for name, site in sites.items()}
    for name, target in _factors_of_priors(sites).items():
        found[target] = found[target] + found.pop(name)
    return found


def guide_sites(structure: nn.Module, x: Tensor, y: Tensor | None = None, *, mean: bool = False) -> dict:
    """{latent name: (distribution, value)} of one run of the guide; with `mean`, continuous values are means."""
    guide = MeanMessenger()(structure.guide) if mean else structure.guide
    sites = _sample_sites(run(guide, *_args(x, y)))
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
    return {name: (site["fn"], site["value"]) for name, site in sites.items() if not isinstance(site["fn"], Unit)}


def _factors_of_priors(sites: dict[str, dict]) -> dict[str, str]:
    """{factor: the latent whose prior it multiplies}."""
    return {n: s["infer"][PRIOR_OF] for n, s in sites.items() if PRIOR_OF in s["infer"]}


def _args(x: Tensor, y: Tensor | None) -> tuple:
    return (x,) if y is None else (x, y)


def _sample_sites(trace) -> dict[str, dict]:
    """The sites that carry probability: `pyro.deterministic` and the plates' own are left out."""
    nodes = prune_subsample_sites(trace).nodes
    return {n: s for n, s in nodes.items() if s["type"] == "sample" and not s["infer"].get("_deterministic")}


def _log_prob(site: dict | None) -> Tensor | None:
    if site is None:
        return None
    try:
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    except ValueError as error:
        if "within the support" not in str(error):
            raise
        raise ValueError(
            f"site {site['name']!r}: its distribution does not admit values from {site['value'].min():g} to "
            f"{site['value'].max():g}, or some between; draw grey values as binary (x.bernoulli(), or "
            "binarize=True where they are loaded), or pass another likelihood"
        ) from None  # torch's would print every value
    return scale_and_mask(log_prob, 1.0, site["mask"])


def _site(name: str, p: dict | None, q: dict | None) -> Site:
    either = p if p is not None else q
    frame = data_frame(either)
    plate_scale = 1.0 if frame is None else frame.full_size / frame.size
    log_p, log_q = _log_prob(p), _log_prob(q)
    is_enumerated = (p if q is None else q)["infer"].get("_enumerate_dim") is not None
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
        has_closed_form=q is not None and q["infer"].get(CLOSED_FORM, False),
        mask=either["mask"],
        is_penalty=PENALTY in either["infer"],
    )
