"""For people who want `pyro.infer.SVI` itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pyro
from torch import nn

_numbers = itertools.count()


def for_svi(structure: nn.Module) -> tuple[Callable, Callable]:
    """`(model, guide)` of a structure, registered with Pyro's parameter store under a name of its own.

    `SVI.step` on a plain module trains nothing, and two modules under one `pyro.module` name share
    a store, where the second trains nothing; neither says so. Hence one line:

        svi = SVI(*for_svi(structure), pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())

    `fit` needs none of this, and leaves the parameter store empty.
    """
    name = f"structure{next(_numbers)}"

    def model(*args, **kwargs):
        pyro.module(name, structure)
        return structure.model(*args, **kwargs)

    def guide(*args, **kwargs):
        pyro.module(name, structure)
        return structure.guide(*args, **kwargs)

    return model, guide
