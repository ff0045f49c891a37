"""What an estimator cannot do on a structure, said before it is done wrong."""

from __future__ import annotations

from pyro.infer import ELBO, RenyiELBO, TraceEnum_ELBO, TraceMeanField_ELBO

from ..conditionals import is_point
from ..traces import Ledger

# Pyro's estimators that cannot train a structure whose parameters are ordinary `nn.Parameter`s, and what can.
UNSUITED = {
    "ReweightedWakeSleep": "it returns two losses; use pyro_lvae.RWS",
    "TraceTailAdaptive_ELBO": "its loss is always infinite, and it weighs whole batches; use pyro_lvae.RWS or DReG",
    "JitTrace_ELBO": "TorchScript cannot trace modules; use pyro_lvae.SampledELBO or Trace_ELBO",
    "JitTraceEnum_ELBO": "TorchScript cannot trace modules; use TraceEnum_ELBO",
    "JitTraceMeanField_ELBO": "TorchScript cannot trace modules; use pyro_lvae.AnalyticELBO",
    "JitTraceGraph_ELBO": "TorchScript cannot trace modules; use TraceGraph_ELBO",
}


def check_supported(estimator: ELBO, sites: Ledger) -> None:
    """Raise `ValueError` where `estimator` would be silently wrong on a structure with these sites."""
    if hasattr(estimator, "check"):
        estimator.check(sites)
        return
    name = type(estimator).__name__
    if name in UNSUITED:
        raise ValueError(f"{name} does not work here: {UNSUITED[name]}")
    if (enumerated := enumerated_sites(sites)) and not isinstance(estimator, TraceEnum_ELBO):
        raise ValueError(
            f"the model enumerates {names(enumerated)} and {name} would draw from the prior in its place; use "
            "pyro.infer.TraceEnum_ELBO(max_plate_nesting=1), or pyro_lvae.SampledELBO or IWAE"
        )
    if sites.guide_enumerates and not isinstance(estimator, TraceEnum_ELBO):
        raise ValueError(
            f"the guide enumerates {_of_guide(sites)} and {name} would draw it; use "
            "pyro.infer.TraceEnum_ELBO(max_plate_nesting=1), or pyro_lvae.SampledELBO or IWAE"
        )
    if isinstance(estimator, RenyiELBO) and estimator.num_particles > 1:
        check_weights(name, sites, weighs=True, needs_scores=True)
    if sites.global_sites and isinstance(estimator, RenyiELBO):
        raise ValueError(
            f"RenyiELBO weighs whole batches, not data, once there is a site outside the data plate, and there "
            f"{names(sites.global_sites)} lies; use pyro_lvae.IWAE or Renyi"
        )
    if isinstance(estimator, TraceMeanField_ELBO):
        check_analytic(name, sites, instead="Trace_ELBO")


def check_reparameterised(name: str, sites: Ledger, *, local: bool = True) -> None:
    """Raise `ValueError` unless every site of the guide (or every global one) has an `rsample`."""
    asked = sites.latents if local else {n: s for n, s in sites.latents.items() if not s.is_local}
    stuck = [n for n, s in asked.items() if not (s.is_enumerated or (s.q or s.p).has_rsample)]
    if stuck and local:
        raise ValueError(
            f"{name} differentiates through the guide's draws, and {names(stuck)} cannot be reparameterised; use "
            "pyro_lvae.RWS or TVO (weighted samples), pyro.infer.Trace_ELBO or TraceGraph_ELBO (score function), or, "
            'where its values can be listed, infer={"enumerate": "parallel"} and pyro_lvae.SampledELBO or IWAE'
        )
    if stuck:
        raise ValueError(
            f"{name} differentiates through the draws of global sites, and {names(stuck)} cannot be reparameterised; "
            "use pyro.infer.Trace_ELBO or TraceGraph_ELBO (score function)"
        )


def check_densities(name: str, sites: Ledger, *, at_fixed_draws: bool) -> None:
    """Raise `ValueError` where log q cannot be told apart from the draw, or has no parameters of its own.

    A distribution whose transforms cache computes log q(z) from the noise behind z: then z is on no
    path from log q, and z is not what stays fixed.
    """
    if left_out := [n for n, s in sites.latents.items() if s.q is None and not s.is_enumerated]:
        raise ValueError(
            f"the guide leaves out {names(left_out)}, and {name} gives log p and log q gradients of their own; sample "
            "the site in the guide too, or use pyro_lvae.SampledELBO or IWAE"
        )
    if sites.guide_enumerates:
        raise ValueError(
            f"the guide enumerates {_of_guide(sites)}, and {name} treats log q apart from the weights that it "
            "gives; use pyro_lvae.SampledELBO, AnalyticELBO or IWAE"
        )
    if at_fixed_draws and (cached := [n for n, s in sites.latents.items() if s.q is not None and _caches(s.q)]):
        raise ValueError(
            f"{name} needs log q as a function of the draw, and the transforms of {names(cached)} remember the noise "
            "behind it (cache_size=1); use transforms with cache_size=0, or pyro_lvae.SampledELBO, IWAE or PIWAE"
        )


def check_scores(name: str, sites: Ledger) -> None:
    """Raise `ValueError` where the guide's log-density at given draws says nothing of its parameters."""
    points = [n for n, s in sites.latents.items() if s.is_local and s.q is not None and is_point(s.q)]
    if points:
        raise ValueError(
            f"{name} trains the guide by its log-density at the draws, and {names(points)} is a point mass; use "
            "pyro_lvae.SampledELBO"
        )


def check_weights(name: str, sites: Ledger, *, weighs: bool, needs_scores: bool) -> None:
    """Raise `ValueError` where weighed particles would be weighed by, or learn from, what is no density."""
    if weighs and sites.penalties:
        raise ValueError(
            f"{name} weighs particles by all factors of the model, and {names(sites.penalties)} is a penalty of the "
            "training, which would choose among them; use pyro_lvae.SampledELBO"
        )
    implicit = [n for n, s in sites.latents.items() if getattr(s.q, "is_implicit", False)]
    if needs_scores and implicit:
        raise ValueError(
            f"{name} needs the gradient of log q at fixed draws, and log q of {names(implicit)} is a critic's, which "
            "has none; use pyro_lvae.SampledELBO, STL or DReG"
        )


def check_analytic(name: str, sites: Ledger, *, instead: str) -> None:
    """Raise `ValueError` where KL(q || p) site by site, in closed form, does not add up to the KL."""
    if enumerated := enumerated_sites(sites):
        raise ValueError(f"the model enumerates {names(enumerated)}, which {name} cannot sum out; use {instead}")
    if any(s.p is None for s in sites.latents.values()):
        raise ValueError(
            f"{name} with sites that only the guide has is not a bound: a closed-form KL drops their log-density; "
            f"use {instead}"
        )
    check_same_order(name, sites, "would not be a bound", instead=instead)
    deltas = [n for n, s in sites.latents.items() if s.q is not None and is_point(s.q)]
    if deltas:
        raise ValueError(
            f"{name} drops the log-density of a Delta, and {names(deltas)} has one in the guide; use {instead}"
        )


def check_same_order(name: str, sites: Ledger, otherwise: str, *, instead: str) -> None:
    """Raise `ValueError` unless the guide samples in the model's order."""
    model_order, guide_order = tuple(sites.latents), sites.guide_order
    if model_order != guide_order:
        raise ValueError(
            f"{name} takes each layer's densities in p and in q given the same layers before it, so guide and model "
            f"must sample in the same order; the guide samples {names(guide_order)} and the model "
            f"{names(model_order)}, and the result {otherwise}. Use {instead}, or a top-down guide"
        )


def enumerated_sites(sites: Ledger) -> list[str]:
    """Names of the sites that the model enumerates."""
    return [name for name, site in sites.items() if site.is_enumerated and site.q is None]


def _of_guide(sites: Ledger) -> str:
    return names(n for n, s in sites.items() if s.is_enumerated and s.q is not None)


def names(sites) -> str:
    """Site names as a message has them: the first few, and how many more."""
    listed = list(sites)
    more = f" and {len(listed) - 6} more" if len(listed) > 6 else ""
    return ", ".join(repr(n) for n in listed[:6]) + more


def _caches(fn) -> bool:
    while fn is not None:
        if any(getattr(t, "_cache_size", 0) for t in getattr(fn, "transforms", ())):
            return True
        fn = getattr(fn, "base_dist", None)
    return False
