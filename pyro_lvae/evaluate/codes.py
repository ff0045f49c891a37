"""Binary codes as lossy compression: what they cost, what they lose."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..traces import evaluating
from .chunks import check_rows


@dataclass(frozen=True)
class RateDistortion:
    """Of the truncated codes of N data, means a datum.

    Attributes:
        size: bits of a code as it stands, one a unit.
        rate: bits by an ideal code for units apart, sum_i H(b_i), with the frequencies of these data.
        distortion: -log p(x|code), nats.
        mse: squared error of E[x|code], mean over the D variables.
        ones: share of the units that are 1.
    """

    size: int
    rate: float
    distortion: float
    mse: float
    ones: float


@torch.no_grad()
def rate_distortion(structure: nn.Module, x: Tensor, *, batch_size: int = 1000) -> RateDistortion:
    """Rate and distortion of binary codes.

    Args:
        structure: with `codes(x)` -> `[B, z]` of 0 and 1, and `decode(codes)` -> p(x|codes), as `SparseVAE` has them.
        x: data `[N, D]`.
        batch_size: rows at once.

    Raises:
        ValueError: the structure has no such methods.
    """
    if not all(callable(getattr(structure, name, None)) for name in ("codes", "decode")):
        raise ValueError(f"{type(structure).__name__} has no methods codes and decode, as SparseVAE has them")
    x, _ = check_rows(structure, x)
    log_p, error, codes = [], [], []
    with evaluating(structure):
        for rows in x.split(batch_size):
            codes.append(structure.codes(rows))
            p = structure.decode(codes[-1])
            log_p.append(p.log_prob(rows))
            error.append((p.mean - rows).square().mean(-1))
    bits = torch.cat(codes)
    return RateDistortion(
        size=bits.shape[1],
        rate=_entropy(bits.double().mean(0)).sum().item(),
        distortion=-torch.cat(log_p).mean().item(),
        mse=torch.cat(error).mean().item(),
        ones=bits.mean().item(),
    )


def _entropy(p: Tensor) -> Tensor:
    """Of Bernoulli(p), in bits."""
    return (torch.special.entr(p) + torch.special.entr(1 - p)) / math.log(2)
