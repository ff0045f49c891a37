"""The default optimiser."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def settings_of(optimizer: torch.optim.Optimizer) -> dict:
    """The class and the plain defaults of an optimiser: what a resumed run must have in common with a stopped one."""
    plain = {k: v for k, v in optimizer.defaults.items() if isinstance(v, bool | int | float | str | tuple)}
    return {"optimizer": type(optimizer).__name__, **plain}


class FusedAdam(torch.optim.Adam):
    """torch's Adam in one kernel a step, without the bookkeeping around it (Kingma & Ba 2015).

    State and checkpoints are those of `torch.optim.Adam(fused=True)`.

    Args:
        params: what to train.
        lr: learning rate.
        betas: decay of the running moments.
        eps: added to the root of the second moment.
        weight_decay: L2 penalty.

    Attributes:
        found_inf: a scalar on the device, or `None`; where it is 1, a step leaves everything as it was, which spares
            the host from waiting for the gradient's norm.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure=None):
        """One step on the gradients in `.grad`; parameters without one are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group, [p for p in group["params"] if p.grad is not None])
        return loss

    def _update(self, group: dict, params: list[Tensor]) -> None:
        if not params:
            return
        states = [self.state[p] or self._begin(p) for p in params]
        steps = [s["step"] for s in states]
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            params,
            [p.grad for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            steps,
            amsgrad=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            found_inf=self.found_inf,
        )
        if self.found_inf is not None:
            torch._foreach_sub_(steps, [self.found_inf] * len(steps))

    def _begin(self, p: Tensor) -> dict:
        state = self.state[p]
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        return state


class CriticAdam(FusedAdam):
    """`FusedAdam` with the short memory that critics need, whose task moves with every step of the ELBO.

    The defaults are those of FactorVAE's critic (Kim & Mnih 2018, table 2), but for the learning rate, 1e-4 there.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-3, betas: tuple[float, float] = (0.5, 0.9)):
        super().__init__(params, lr=lr, betas=betas)
