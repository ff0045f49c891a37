"""The default optimiser; and the moving average of what it trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def settings_of(optimizer: torch.optim.Optimizer) -> dict:
    """The class and the plain defaults of an optimiser: what a resumed run must have in common with a stopped one."""
    plain = {k: v for k, v in optimizer.defaults.items() if isinstance(v, bool | int | float | str | tuple)}
    return {"optimizer": type(optimizer).__name__, **plain}


class WeightAverage:
    r"""The exponential moving average of a module's weights (Polyak & Juditsky 1992, discounted).

        theta~_t = d_t theta~_t-1 + (1 - d_t) theta_t,  d_t = min(decay, (1 + t) / (10 + t))

    for t = 1, 2 ..., which forgets the first weights soon. Batch norm's running statistics are averaged alike; other
    buffers are those of the module.

    Args:
        module: what is trained; its weights are the first average.
        decay: between 0 and 1; about 1 / (1 - decay) steps are remembered.

    Raises:
        ValueError: the decay is out of range.
    """

    def __init__(self, module: nn.Module, decay: float):
        if not (isinstance(decay, float) and 0 < decay < 1):
            raise ValueError(f"the decay of the average of weights is {decay!r}; expected a number between 0 and 1")
        self.module, self.decay = module, decay
        self.live = {name: t.detach() for name, t in _averaged(module)}
        self.mean = {name: t.clone() for name, t in self.live.items()}

    @torch.no_grad()
    def update(self, t: int) -> None:
        """Take in the weights after step number `t`."""
        decay = min(self.decay, (1 + t) / (10 + t))
        torch._foreach_lerp_(list(self.mean.values()), list(self.live.values()), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """That of the module, with the average in place of its weights."""
        return self.module.state_dict() | self.mean

    @torch.no_grad()
    def put(self) -> None:
        """Put the average in place of the module's weights."""
        torch._foreach_copy_(list(self.live.values()), list(self.mean.values()))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in place of the weights, which come back afterwards."""
        kept = [t.clone() for t in self.live.values()]
        self.put()
        try:
            yield
        finally:
            torch._foreach_copy_(list(self.live.values()), kept)


def _averaged(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and batch norm's statistics, under every name that they have."""
    yield from module.named_parameters(remove_duplicate=False)
    for name, m in module.named_modules(remove_duplicate=False):
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats:
            yield from ((f"{name}.{key}".lstrip("."), getattr(m, key)) for key in ("running_mean", "running_var"))


class FusedAdam(torch.optim.Adam):
    """torch's Adam in one kernel a step, without the bookkeeping around it (Kingma & Ba 2015).

    State and checkpoints are those of `torch.optim.Adam(fused=True)`; the counts of steps in a group share memory.

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

    found_inf: Tensor | None = None  # of the class, since copies of an optimiser have its state alone

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self._counted: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._counted = {}

    @torch.no_grad()
    def step(self, closure=None):
        """One step on the gradients in `.grad`; parameters without one are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for i, group in enumerate(self.param_groups):
            self._update(i, group, [p for p in group["params"] if p.grad is not None])
        return loss

    def _update(self, i: int, group: dict, params: list[Tensor]) -> None:
        if not params:
            return
        states = [self.state[p] or self._begin(p) for p in params]
        counts = self._counts(i, states)
        counts += 1
        torch._fused_adam_(
            params,
            [p.grad for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
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
            counts -= self.found_inf

    def _counts(self, i: int, states: list[dict]) -> Tensor:
        """The states' numbers of steps in one tensor, of which each has its entry, so that they are counted at once."""
        counts, known = self._counted.get(i, (None, []))
        if len(known) != len(states) or any(s["step"] is not step for s, step in zip(states, known, strict=True)):
            counts = torch.stack([s["step"] for s in states])
            for state, step in zip(states, counts.unbind(), strict=True):
                state["step"] = step
            self._counted[i] = counts, [s["step"] for s in states]
        return counts

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
