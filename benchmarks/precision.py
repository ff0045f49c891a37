"""What the precision of matrix products does to a five-layer ladder: test ELBO and log p(x) after the same epochs.

On CUDA TF32 is the device's; on a CPU, which has none, it is imitated: the factors of every product, forwards and
backwards, are rounded to nearest with TF32's 10 bits of mantissa, and multiplied in float32.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import add_device
from benchmarks.tables import save
from pyro_lvae import Dataset, LadderVAE, elbo, fit, load, log_likelihood

PRECISIONS = ("float32", "tf32", "bfloat16")
_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.addmm.default, _aten.bmm.default)  # the two factors come last


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--root", help="folder of the data")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one model each, per precision")
    parser.add_argument("--precisions", choices=PRECISIONS, nargs="+", default=list(PRECISIONS))
    parser.add_argument("--images", type=int, default=1000, help="test images for log p(x), spread over the set")
    parser.add_argument("--num_samples", type=int, default=1000, help="importance samples an image")
    add_device(parser)


def main(args: argparse.Namespace) -> None:
    data = load(args.data, root=args.root)
    rows = {
        f"{precision}, seed {seed}": measure(data, precision, seed, args)
        for seed in args.seeds
        for precision in args.precisions
    }
    print(f"\nfive-layer ladder on {args.data}, {args.epochs} epochs: nats per image")
    for name, row in rows.items():
        print(f"{name:20}" + "".join(f"{key:>18} {value:.2f}" for key, value in row.items()))
    given = {name: getattr(args, name) for name in ("data", "epochs", "images", "num_samples")}
    save(args.out, "precision", {"runs": rows}, args.device, **given)


def measure(data: Dataset, precision: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """One model trained in a precision and evaluated in float32."""
    torch.manual_seed(seed)
    ladder = LadderVAE(data.x_dim)
    is_imitated = precision == "tf32" and torch.device(args.device).type == "cpu"
    with ImitatedTF32() if is_imitated else nullcontext():
        found = fit(
            ladder,
            data,
            epochs=args.epochs,
            batch_size=256,
            precision="float32" if is_imitated else precision,
            compile=False if is_imitated else "auto",  # a compiled step would hide its products
            device=args.device,
        )
    torch.manual_seed(0)
    x, _ = data.test_rows(args.images)
    log_p = log_likelihood(ladder, x.to(args.device), args.num_samples)
    return {
        "test ELBO": elbo(ladder, data.x_test.to(args.device), 10).mean().item(),
        "log p(x)": log_p.mean().item(),
        "std. error": (log_p.std() / len(log_p) ** 0.5).item(),
        "train objective": found[-1].objective,
    }


class ImitatedTF32(TorchDispatchMode):
    """While it lasts, factors of float32 products are rounded to 10 bits of mantissa, to nearest, ties away from 0."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in _PRODUCTS and args[-1].dtype == torch.float32:
            args = (*args[:-2], *map(rounded, args[-2:]))
        return operation(*args, **(kwargs or {}))


def rounded(x: Tensor) -> Tensor:
    """float32 to the nearest number with 10 bits of mantissa.

    >>> rounded(torch.tensor([1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -3.0, torch.inf])).tolist()
    [1.0009765625, 1.0009765625, 1.0, -3.0, inf]
    """
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
