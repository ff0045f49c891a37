"""The steps that critics take between those of the ELBO."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pyro
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .critics import critic_loss, critics_learning, has_critic
from .distributed import Processes
from .optim import settings_of


class CriticSteps:
    """Steps of all critics in a structure on their own loss; none, where there is no critic.

    Args:
        structure: holds the critics.
        optimizer: makes their optimiser.
        steps: how many for each step of the ELBO, all on its batch, with new draws.
        processes: whose gradients are averaged.
    """

    def __init__(
        self,
        structure: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        steps: int,
        processes: Processes = Processes(),  # noqa: B008, frozen
    ):
        self.structure, self.processes = structure, processes
        self.steps, self.optimizer = (steps if has_critic(structure) else 0), None
        self.total, self.count = 0.0, 0
        if self.steps:
            with critics_learning(structure) as parameters:
                self.optimizer = optimizer(parameters)

    def __call__(self, args: tuple) -> None:
        """All steps on a batch, as model and guide take it."""
        for _ in range(self.steps):
            with (
                critics_learning(self.structure) as parameters,
                _still_statistics(self.structure),
                pyro.validation_enabled(False),
            ):
                loss = critic_loss(self.structure, *args)
                found = [loss.detach(), *self._gradients(loss, parameters)]
            if self.processes.size > 1:
                found = self._averaged(found)
                self._agree_on_buffers()
            for p, gradient in zip(parameters, found[1:], strict=True):
                p.grad = gradient
            self.optimizer.step()
            self.total, self.count = self.total + found[0], self.count + 1
            for p in parameters:
                p.grad = None

    def _averaged(self, tensors: list[Tensor]) -> list[Tensor]:
        return [t / self.processes.size for t in self.processes.add_up(tensors)]

    def _agree_on_buffers(self) -> None:
        """What critics keep beside their weights, such as a running log Z, each process has from its own rows."""
        others = (m for m in self.structure.modules() if not isinstance(m, nn.modules.batchnorm._BatchNorm))
        kept = [b for m in others for b in m.buffers(recurse=False) if b.is_floating_point()]
        for buffer, mean in zip(kept, self._averaged(kept) if kept else [], strict=True):
            buffer.copy_(mean)

    def _gradients(self, loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        if any(g is None for g in found):
            raise ValueError(
                f"critic_loss of {type(self.structure).__name__} leaves parameters of a Critic without a gradient; a "
                "structure with several critics adds up the losses of all"
            )
        return list(found)

    def settings(self) -> dict:
        """What a resumed run must have in common with the one that was stopped."""
        if self.optimizer is None:
            return {}
        return {f"critic_{name}": value for name, value in settings_of(self.optimizer).items()}

    def mean_loss(self) -> float | None:
        """The mean loss since the last call, nats; `None` without critics."""
        if not self.count:
            return None
        mean = float(self.total) / self.count
        self.total, self.count = 0.0, 0
        return mean

    def state_dict(self) -> dict | None:
        """That of the optimiser, and the loss so far."""
        if self.optimizer is None:
            return None
        return {"optimizer": self.optimizer.state_dict(), "total": float(self.total), "count": self.count}

    def load_state_dict(self, state: dict | None) -> None:
        """Take up what `state_dict` returned."""
        if self.optimizer is not None and state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self.total, self.count = state["total"], state["count"]


@contextmanager
def _still_statistics(structure: nn.Module) -> Iterator[None]:
    """Batch norm's running statistics stay: the draws for the critic are no further batches."""
    norms = [(m, m.momentum) for m in structure.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m, _ in norms:
        m.momentum = 0.0
    try:
        yield
    finally:
        for m, momentum in norms:
            m.momentum = momentum
