"""How an estimator's gradient comes to differ from that of its value: what reaches the draws is replaced."""

from __future__ import annotations

import torch
from torch import Tensor


class _Note(torch.autograd.Function):
    """The identity on a scalar; backward notes the gradient that arrived, and touches every draw."""

    @staticmethod
    def forward(ctx, value: Tensor, arrived: list, *draws: Tensor) -> Tensor:
        ctx.arrived, ctx.draws = arrived, draws
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        ctx.arrived[:] = [gradient]
        return gradient, None, *map(torch.zeros_like, ctx.draws)


def replace_at_draws(value: Tensor, draws: dict[str, Tensor], gradients: dict[str, Tensor]) -> Tensor:
    r"""`value`, whose gradient with respect to each draw is the one given; 0 where none is.

    A draw z = z(eps, m) of a site lies between the parameters m of its distribution and all that
    is computed from it. Whatever arrives at z in the backward pass is put aside, and what goes on
    from there to m, and so to the parameters of the guide and to draws before z, is
    `gradients[name]`. Densities keep their own paths: log p to the model, log q to the guide.

    Args:
        value: a scalar.
        draws: {site: z}, as `Ledger.draws` has them.
        gradients: {site: d value / d z}, each of the shape of its draw, total derivatives.

    Raises:
        ValueError: a draw is itself a parameter.
    """
    if leaves := [name for name, z in draws.items() if z.is_leaf]:
        raise ValueError(
            f"the draw of site(s) {', '.join(map(repr, leaves))} is itself a parameter; give the site a distribution"
        )
    arrived: list[Tensor] = []
    for name, z in draws.items():
        z.register_hook(_replacement(gradients.get(name), arrived))
    return _Note.apply(value, arrived, *draws.values())


def gradients_at_draws(value: Tensor, draws: dict[str, Tensor]) -> dict[str, Tensor]:
    """{site: d value / d z}: total derivatives, through the draws that follow z as well."""
    if not (draws and torch.is_grad_enabled()):
        return {}
    found = torch.autograd.grad(value, list(draws.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(draws, found, strict=True))


def with_value(gradient_of: Tensor, value: Tensor) -> Tensor:
    """A scalar of one value and of another's gradient."""
    return value.detach() + (gradient_of - gradient_of.detach())


def _replacement(gradient: Tensor | None, arrived: list):
    def hook(before: Tensor) -> Tensor:
        return torch.zeros_like(before) if gradient is None else arrived[0] * gradient

    return hook
