"""For people who want `pyro.infer.SVI` itself."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import pyro
from torch import nn

_numbers = itertools.count()


def for_svi(structure: nn.Module) -> tuple[Callable, Callable]:
    """`(model, guide)` of a structure, registered with Pyro's parameter store under a name of its own.

    `SVI.step` on a plain module trains nothing, and two modules under one `pyro.module` name share
    a store, where the second trains nothing; neither says so. Hence one line:

        svi = SVI(*for_svi(structure), pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())

    `fit` needs none of this, and leaves the parameter store empty. Critics, where the structure has some, are left out:
    take steps on `pyro_lvae.critics.critic_loss` in between.
    """
    name = f"structure{next(_numbers)}"

    def register():
        with warnings.catch_warnings():  # of critics, which the ELBO does not train
            warnings.filterwarnings("ignore", ".*was not registered in the param store because requires_grad=False")
            pyro.module(name, structure)

    def model(*args, **kwargs):
        register()
        return structure.model(*args, **kwargs)

    def guide(*args, **kwargs):
        register()
        return structure.guide(*args, **kwargs)

    return model, guide
