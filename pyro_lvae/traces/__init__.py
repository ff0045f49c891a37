"""The only room that runs guides and replays models: one ledger {site: log p, log q} for everyone.

Estimators, evaluation and the contract all read the same ledger, so what a plate, a scale or a
global site means is decided here and nowhere else.
"""

from .messengers import CLOSED_FORM, DATA, AutocastMessenger, RedrawMessenger, data_frame, known_mean, normal_of, redraw
from .modes import evaluating, fixed_noise, forked_noise
from .runs import generate, guide_sites, ledger, log_densities, replay, run, trace_pair
from .sites import Ledger, Site

__all__ = [
    "AutocastMessenger",
    "CLOSED_FORM",
    "DATA",
    "Ledger",
    "RedrawMessenger",
    "Site",
    "data_frame",
    "evaluating",
    "fixed_noise",
    "forked_noise",
    "generate",
    "guide_sites",
    "known_mean",
    "ledger",
    "log_densities",
    "normal_of",
    "redraw",
    "replay",
    "run",
    "trace_pair",
]
