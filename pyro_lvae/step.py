"""The loss and gradient of one batch, eagerly: what training, in whatever form, computes in a step."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from .annealing import anneal, subsample
from .objectives import backward
from .traces import AutocastMessenger


class Step:
    """Loss and gradient of a batch, eagerly.

    Args:
        structure: the pair; gradients go to those of its parameters that require them.
        estimator: any `pyro.infer.ELBO`.
        size: N, where the structure has global sites: their log-density counts once, that of the rows N/B times.
        clip_norm: largest global norm of the gradient.
        clip_value: largest absolute entry of the gradient, applied after `clip_norm`.
        precision: "bfloat16" runs matrix products of model and guide in it (autocast); weights, draws, densities and
            what the estimator makes of them stay float32. "tf32" lets CUDA round the factors of float32 products to 10
            bits, if `matmul_precision` is entered too.

    Attributes:
        share: the part of a batch that `args` holds, where other processes have the rest; the loss is that part's.
    """

    share = 1.0

    def __init__(
        self,
        structure: nn.Module,
        estimator: ELBO,
        *,
        size: int | None = None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        precision: str = "float32",
    ):
        self.structure, self.estimator, self.size, self.precision = structure, estimator, size, precision
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.pair = _InBfloat16(structure) if precision == "bfloat16" else structure
        self.parameters = [p for p in structure.parameters() if p.requires_grad]

    def __call__(self, args: tuple, beta: dict[str, float]) -> tuple[Tensor, Tensor]:
        """-bound / N in nats, and the norm of its gradient before clipping; the gradient is left in `.grad`."""
        for p in self.parameters:
            p.grad = None
        with self.handlers(beta):
            loss = backward(self.estimator, self.pair, args, per=self.per(args))
        return loss, self.clip()

    def clip(self) -> Tensor:
        """Clip what is in `.grad`; its norm before."""
        with_gradient = [p for p in self.parameters if p.grad is not None]
        gradients = [p.grad for p in with_gradient]
        norm = nn.utils.get_total_norm(gradients)
        for p, gradient in zip(with_gradient, self.clipped(gradients, norm), strict=True):
            p.grad = gradient
        return norm

    def clipped(self, gradients: list[Tensor], norm: Tensor) -> list[Tensor]:
        """Gradients whose global norm is `norm`, clipped."""
        if self.clip_norm is not None:
            shrink = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = [g * shrink for g in gradients]
        if self.clip_value is not None:
            gradients = [g.clamp(-self.clip_value, self.clip_value) for g in gradients]
        return gradients

    @contextmanager
    def handlers(self, beta: dict[str, float | Tensor]):
        """What a step runs under."""
        with ExitStack() as stack:
            stack.enter_context(pyro.validation_enabled(False))
            stack.enter_context(anneal(beta=beta))
            if self.size is not None:
                stack.enter_context(subsample(self.size))
            yield

    def per(self, args: tuple) -> float:
        """What the bound is divided by: the rows that it stands for."""
        return (len(args[0]) if self.size is None else self.size) / self.share


class _InBfloat16(nn.Module):
    """A structure whose matrix products are in bfloat16."""

    def __init__(self, structure: nn.Module):
        super().__init__()
        self.structure = structure
        products = AutocastMessenger(next(structure.parameters()).device, torch.bfloat16)
        self.model, self.guide = products(structure.model), products(structure.guide)


@contextmanager
def matmul_precision(precision: str):
    """While a block lasts, torch's float32 matrix products may use TF32, if that is the precision."""
    if precision != "tf32":
        yield
        return
    cuda = torch.backends.cuda.matmul
    try:
        before, tell, tf32 = torch.get_float32_matmul_precision(), torch.set_float32_matmul_precision, "high"
    except RuntimeError:  # torch was told by its newer names, and answers to no other
        before, tell, tf32 = cuda.fp32_precision, partial(setattr, cuda, "fp32_precision"), "tf32"
    try:
        tell(tf32)
        yield
    finally:
        tell(before)
