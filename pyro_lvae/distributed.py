"""Several processes, started by torchrun: what each takes of a batch, and what they add up.

Every process holds the whole structure and takes every n-th row of each batch; gradients are added up, so that a
step is that of one process with the whole batch. accelerate sets the processes up, and is imported only then.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .nets import BatchNorm


@dataclass(frozen=True)
class Processes:
    """This process among its like.

    Attributes:
        rank: 0 is the one that writes.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, rows: Tensor | None) -> Tensor | None:
        """This process's rows of a batch: every `size`-th."""
        return rows if rows is None or self.size == 1 else rows[self.rank :: self.size]

    def add_up(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sum over processes of each tensor, in one message."""
        if self.size == 1:
            return tensors
        from accelerate.utils import reduce

        flat = reduce(torch.cat([t.reshape(-1) for t in tensors]), reduction="sum")
        parts = flat.split([t.numel() for t in tensors])
        return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]

    def agree(self, thing):
        """What the first process has, tensors or plain objects."""
        if self.size == 1:
            return thing
        from accelerate.utils import broadcast, broadcast_object_list

        return broadcast(thing) if isinstance(thing, Tensor) else broadcast_object_list([thing])[0]

    def wait(self) -> None:
        """Until every process has come here."""
        if self.size > 1:
            from accelerate.utils import wait_for_everyone

            wait_for_everyone()

    def by_share(self, function: Callable[..., Tensor], x: Tensor, y: Tensor | None = None) -> Tensor:
        """`function(x, y)` of the shape `[N]`, each process computing its rows; every process gets the whole."""
        if self.size == 1:
            return function(x, y)
        out = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        if len(x) > self.rank:
            out[self.rank :: self.size] = function(self.share(x), self.share(y))
        return self.add_up([out])[0]

    def begin(self, structure: nn.Module) -> None:
        """The first process's weights in all, batch norm over all of the batch, and noise of each its own."""
        if self.size == 1:
            return
        with torch.no_grad():
            for tensor in structure.state_dict(keep_vars=True).values():
                tensor.copy_(self.agree(tensor.detach().clone()))
        for module in structure.modules():
            if isinstance(module, BatchNorm):
                module.synchronised = True
        self.part_noise(torch.initial_seed())

    def part_noise(self, seed: int) -> None:
        """Noise of its own for every process but the first."""
        if not self.is_first:
            torch.manual_seed((seed + self.rank * 0x9E3779B97F4A7C15) % 2**63)

    def check(self, structure: nn.Module, estimator, rows: int, batch_size: int) -> None:
        """Raise `ValueError` for what several processes cannot do."""
        if self.size == 1:
            return
        left = rows % min(batch_size, rows)
        if min(batch_size, rows) < self.size or 1 < left < self.size:
            raise ValueError(
                f"{rows} rows in batches of {batch_size} leave a batch with fewer rows than the {self.size} processes; "
                "choose another batch_size"
            )
        if getattr(estimator, "state_dict", dict)():
            raise ValueError(
                f"{type(estimator).__name__} learns a multiplier from its batch, and {self.size} processes would each "
                "have another; train in one process"
            )
        if getattr(estimator, "size", 0) is None:
            raise ValueError(
                f"{type(estimator).__name__} takes the batch for the data set, and each of {self.size} processes has a "
                "share of it; give size=, the number of training rows"
            )
        foreign = [
            name
            for name, m in structure.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and not isinstance(m, (BatchNorm, nn.SyncBatchNorm))
        ]
        if foreign:
            raise ValueError(
                f"batch norm in {', '.join(foreign)} would take the statistics of each process's rows; use "
                "pyro_lvae.nets.BatchNorm, which takes those of the whole batch, or torch's SyncBatchNorm on CUDA"
            )


def processes(device: str | torch.device | None = None) -> Processes:
    """This process among those that torchrun started; alone, where it did not.

    Args:
        device: where it will compute, which decides how they talk; left out, CUDA where there is one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError(
            "training in several processes needs accelerate; pip install 'pyro-lvae[distributed]'"
        ) from error
    is_on_cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    state = PartialState(cpu=not is_on_cuda)  # on CUDA, the current device is now this process's own
    return Processes(state.process_index, state.num_processes)
