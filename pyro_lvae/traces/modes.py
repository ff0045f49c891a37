"""Evaluation mode and noise, for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..nets import evaluation_mode


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; every submodule's own mode is restored afterwards."""
    with evaluation_mode(module), torch.no_grad():
        yield


@contextmanager
def fixed_noise(device: torch.device, seed: int = 0) -> Iterator[None]:
    """Draws inside come from `seed`; the caller's random state is untouched."""
    with forked_noise(device):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def forked_noise(device: torch.device) -> Iterator[None]:
    """Draws inside leave the caller's random state untouched."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
