"""The protocol that every latent structure keeps."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Structure(Protocol):
    """A pair over the same sample sites: a generative `model` and an amortized `guide`.

    Any `nn.Module` with these two methods is a structure; nothing need be inherited. The rules
    (`pyro_lvae.check` verifies them):

    1. Networks are ordinary submodules; the likelihood is a module passed in.
    2. One `pyro.plate("data", len(x), dim=-1)` holds every local site, event dims are declared
       (`.to_event(1)`), so each local site's `log_prob` has shape `[B]` for `x` of `[B, D]`.
    3. Leading dims broadcast: with K particles samples are `[K, B, z]` and `log_prob` is `[K, B]`. In evaluation mode
       rows do not influence each other.
    4. The observed site is `"x"` (and `"y"`, if labels are modelled). Latents are `"z1"` nearest
       the data ... `"zL"` on top, or have their paper's symbol. The guide samples every one.
    5. `model` reads `x` only as `obs=` and for its length, dtype and device. Sites after `"x"`, such as auxiliary
       variables with densities r(a|x, z), may depend on the value that `pyro.sample("x", ..., obs=x)` returns.
    6. No KL weight, particle count, data set size, `pyro.param` or `pyro.module` inside.

    A structure that is conditional on labels says so by `takes_labels = True`: they are then passed to it. A submodule
    with a method `advance(step, epoch)` is told where training is before every step, both counted from 0; what it
    changes must be a buffer, so that a compiled step sees it. One with a method `critic_loss(pair, x, y)` and a
    `pyro_lvae.critics.Critic` has the latter trained on the former, in turn with the ELBO.
    """

    def model(self, x: Tensor, y: Tensor | None = None) -> Any: ...

    def guide(self, x: Tensor, y: Tensor | None = None) -> Any: ...
