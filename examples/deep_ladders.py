"""Ladders of five, ten and six latent layers: dense, bidirectional, convolutional.

    python examples/deep_ladders.py --root FOLDER        # MNIST
    python examples/deep_ladders.py --smoke              # seconds, on the embedded digits

The ladder of Sonderby et al. (2016), whose layers see only their neighbours, against two whose deterministic paths
have skip connections: BIVA (Maaloe et al. 2019), and a ladder of feature maps as very deep VAEs have them. Nats per
image; log p(x) by importance sampling. Each row has a run folder of its own under --out: its report.html shows samples,
reconstructions and the KL of every layer. Stopped or done, the same command goes on from there.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

from pyro_lvae import (
    BidirectionalLadderVAE,
    ConvLadderVAE,
    FreeBits,
    FusedAdam,
    KLBalanced,
    LadderVAE,
    SampledELBO,
    linear,
    load,
)
from pyro_lvae.experiments import finish_rows, fixed_settings, markdown, markdown_rows, parsed, parser_of, script
from pyro_lvae.results import write_text
from pyro_lvae.runs import trained

ESTIMATORS = {e.__name__: e for e in (SampledELBO, FreeBits, KLBalanced)}
FIGURES = ("test ELBO", "test log p(x)", "KL", "active units", "parameters", "seconds")


def rows_of(data, args) -> dict[str, Callable[[], nn.Module]]:
    """Makers of the structures, by the name of their row."""
    x_dim, ladder, deep = data.x_dim, args.ladder, args.bidirectional
    return {
        f"ladder, {len(ladder)} layers": lambda: LadderVAE(x_dim, ladder, [args.hidden] * len(ladder)),
        f"bidirectional, {len(deep)} layers": lambda: BidirectionalLadderVAE(x_dim, deep, args.hidden),
        f"convolutional, {sum(args.layers)} layers": lambda: ConvLadderVAE(
            x_dim, data.shape, args.layers, args.channels, args.z_channels
        ),
    }


def row(make: Callable[[], nn.Module], data, folder: Path, args) -> dict:
    """Train one structure, or go on with it; its figures, and those of its layers."""
    torch.manual_seed(args.seed)
    found = trained(
        make(),
        data,
        folder,
        estimator=ESTIMATORS[args.estimator](),
        num_samples=args.num_samples,
        num_images=args.num_images,
        epochs=args.epochs,
        batch_size=args.batch_size,
        beta=linear(0, 1, steps=args.warm_up * data.num_batches(args.batch_size)),
        optimizer=partial(FusedAdam, lr=args.lr),
        lr_scheduler=partial(ExponentialLR, gamma=args.gamma),
        precision=args.precision,
    )
    kl, active = found.kl_per_layer, found.active_units
    values = (found.test_elbo, found.test_log_likelihood, sum(kl.values()), sum(active.values()))
    layers = {name: [nats, active[name], found.units[name]] for name, nats in kl.items()}
    return dict(zip(FIGURES, (*values, found.num_parameters, found.seconds), strict=True)) | {"layers": layers}


def tables(rows: dict[str, dict]) -> str:
    """Markdown: a row a model, and a row a layer."""
    figures = {name: {k: row[k] for k in FIGURES} for name, row in rows.items()}
    layers = [
        [name, layer, f"{kl:.2f}", f"{active} of {units}"]
        for name, row in rows.items()
        for layer, (kl, active, units) in row["layers"].items()
    ]
    whole = markdown_rows("model", figures, dict.fromkeys(FIGURES[3:], 0))
    return f"{whole}\n\n{markdown(['model', 'layer', 'KL', 'active units'], layers)}"


def main(argv: list[str] | None = None) -> dict:
    args = _arguments(argv)
    data = load(args.data, args.root)
    settings = fixed_settings(args, "rows")
    makers = {
        name: partial(row, make, data, args.out / name.split(",")[0], args)
        for name, make in rows_of(data, args).items()
    }
    rows = finish_rows(args.out / "results.json", settings, makers, args.rows, tell=print)
    write_text(args.out / "results.md", tables(rows) + "\n")
    print(tables(rows))
    return rows


def _arguments(argv: list[str] | None) -> Namespace:
    parser = parser_of(__doc__, "runs/deep_ladders", smoke="two epochs of small models on the digits")
    parser.add_argument("--rows", nargs="+", default=None, help="names of rows; all if left out")
    parser.add_argument(
        "--estimator",
        default="SampledELBO",
        choices=list(ESTIMATORS),
        help="of training; figures are plain ELBOs",
    )
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--warm_up", type=int, default=10, help="epochs of warm-up, step by step")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--gamma", type=float, default=1.0, help="factor of the learning rate, an epoch")
    parser.add_argument("--precision", default="float32", choices=["float32", "tf32", "bfloat16"], help="of training")
    parser.add_argument("--hidden", type=int, default=256, help="width of the dense networks")
    parser.add_argument("--ladder", type=int, nargs="+", default=[64, 32, 16, 8, 4], help="units of each layer")
    sizes = [40, 36, 32, 28, 24, 20, 16, 12, 8, 4]
    parser.add_argument("--bidirectional", type=int, nargs="+", default=sizes, help="units of each layer")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2, 2, 1], help="latent ones, each resolution")
    parser.add_argument("--channels", type=int, nargs="+", default=[8, 16, 32, 32, 32], help="maps, each resolution")
    parser.add_argument("--z_channels", type=int, default=4, help="maps of a latent layer")
    parser.add_argument("--num_samples", type=int, default=200, help="importance samples")
    parser.add_argument("--num_images", type=int, default=500, help="test images for the log-likelihood")
    return parsed(
        parser,
        argv,
        data="digits",
        epochs=2,
        warm_up=1,
        hidden=16,
        ladder=[4] * 5,
        bidirectional=[3] * 10,
        channels=[4, 8, 8, 8, 8],
        z_channels=1,
        num_samples=5,
        num_images=20,
    )


if __name__ == "__main__":
    script(main)
