"""ELBO estimators; each one is a `pyro.infer.ELBO`. Pyro's own plug in as they are."""

from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from .base import LedgerELBO, backward, learned, with_nesting
from .constrained import GECO, ConstrainedELBO
from .decomposed import BetaTCELBO
from .elbo import AnalyticELBO, BetaELBO, FreeBits, KLBalanced, SampledELBO, default_estimator
from .importance import CIWAE, IWAE, MIWAE, PIWAE, RWS, TVO, Renyi
from .named import label
from .named import parse as _parse
from .path import STL, DReG
from .support import check_supported

# What `pyro-lvae list` names, with a line on each.
ESTIMATORS = {
    SampledELBO: "L^A: the ELBO, every density at a sample (the default)",
    AnalyticELBO: "L^B: the ELBO with analytic KL; guide and model in the same order",
    STL: "the ELBO; the guide's gradient without its score: zero variance at the exact posterior",
    IWAE: "importance-weighted bound of K particles, per datum",
    DReG: "the bound of IWAE; the guide's gradient doubly reparameterised, for any K",
    Renyi: "Renyi bound of order alpha, from VR-max (-inf) over IWAE (0) to the ELBO (1)",
    PIWAE: "the model learns from IWAE, the guide from MIWAE",
    MIWAE: "mean of M bounds of IWAE",
    CIWAE: "mixture of ELBO and IWAE",
    TVO: "thermodynamic variational objective; discrete guides too",
    RWS: "reweighted wake-sleep; discrete guides too",
    BetaELBO: "beta-VAE: a fixed KL weight, one or a layer's own",
    BetaTCELBO: "beta-TCVAE: weights for mutual information, total correlation and the units' KLs",
    FreeBits: "the ELBO, a layer's first nats free of charge",
    KLBalanced: "the ELBO, KL weight moved to large layers during warm-up",
    ConstrainedELBO: "best reconstruction with KL below epsilon, the multiplier learned",
    GECO: "least KL with distortion below a limit, the multiplier learned",
    Trace_ELBO: "Pyro's ELBO, every density at a sample",
    TraceMeanField_ELBO: "Pyro's ELBO with analytic KL",
    TraceEnum_ELBO: "Pyro's ELBO, discrete latents marked for enumeration summed out",
    TraceGraph_ELBO: "Pyro's ELBO with score-function gradients where a site has no rsample",
    RenyiELBO: "Pyro's Renyi bound, for local sites without subsampling",
}


def parse(text: str) -> list[ELBO]:
    """Estimators from a list such as `SampledELBO, IWAE(50), DReG(50, alpha=0.5), my_module.MyELBO()`.

    >>> [label(e) for e in parse("IWAE(50), PIWAE(2, 3)")]
    ['IWAE(50)', 'PIWAE(2, 3)']
    """
    return _parse(text, {cls.__name__: cls for cls in ESTIMATORS})


__all__ = [cls.__name__ for cls in ESTIMATORS if cls.__module__.startswith(__name__)]
__all__ += [
    "ESTIMATORS",
    "LedgerELBO",
    "backward",
    "check_supported",
    "learned",
    "default_estimator",
    "label",
    "with_nesting",
    "parse",
]
