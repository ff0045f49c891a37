"""One VAE, better priors and better posteriors: mixtures, VampPrior, optimal prior, flows, Gaussian process, denoising.

    python examples/priors_and_posteriors.py --root FOLDER        # MNIST
    python examples/priors_and_posteriors.py --smoke              # seconds, on the embedded digits

The same networks (one latent layer of 40 units, two hidden layers of 300, as Tomczak & Welling 2018) and training; each
row puts something else around them; the last ones around a ladder of two such layers. Nats per image; log p(x) by
importance sampling. Each row has a run folder of its own with report.html; stopped or done, the same command goes on
from there.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from pyro_lvae import (
    VAE,
    Dataset,
    DenoisingVAE,
    FlowVAE,
    LadderVAE,
    MixturePrior,
    OptimalPriorVAE,
    VampPrior,
    VariationalGP,
    linear,
    load,
    reconstruct,
)
from pyro_lvae.experiments import finish_rows, fixed_settings, markdown_rows, parsed, parser_of, script
from pyro_lvae.plots import image_grid, save
from pyro_lvae.results import write_text
from pyro_lvae.runs import FIGURES, trained
from pyro_lvae.structures.flows import IAF, PlanarFlow, SplineFlow


def rows_of(x_dim: int, args) -> dict[str, Callable[[], nn.Module]]:
    """Makers of the structures, by the name of their row."""
    base = partial(VAE, z_dim=args.z_dim, hidden_dim=args.hidden, batch_norm=False)
    vamp = partial(VampPrior, base=base, num_pseudo_inputs=args.components)
    z_dims = (args.z_dim, max(2, args.z_dim // 2))
    ladder = partial(LadderVAE, z_dims=z_dims, hidden_dims=(args.hidden,) * 2, batch_norm=False)
    fading = linear(args.noise, 0.0, epochs=max(1, args.epochs // 2))
    return {
        "VAE": lambda: base(x_dim),
        "mixture prior": lambda: MixturePrior(x_dim, base, args.components),
        "VampPrior": lambda: vamp(x_dim),
        "optimal prior": lambda: OptimalPriorVAE(x_dim, base),
        "planar flows": lambda: FlowVAE(x_dim, base, PlanarFlow, args.planar),
        "IAF": lambda: FlowVAE(x_dim, base, IAF, args.autoregressive),
        "spline flows": lambda: FlowVAE(x_dim, base, SplineFlow, args.autoregressive),
        "VampPrior + IAF": lambda: FlowVAE(x_dim, vamp, IAF, args.autoregressive),
        "variational GP": lambda: VariationalGP(
            x_dim, (args.z_dim,), (args.hidden,), num_points=args.points, batch_norm=False
        ),
        "denoising": lambda: DenoisingVAE(x_dim, base, level=args.noise),
        "denoising, coarse to fine": lambda: DenoisingVAE(x_dim, base, level=fading),
        "ladder": lambda: ladder(x_dim),
        "ladder, IAF on top": lambda: FlowVAE(x_dim, ladder, IAF, args.autoregressive, layers="top"),
        "ladder, IAF on both layers": lambda: FlowVAE(x_dim, ladder, IAF, args.autoregressive),
    }


@torch.no_grad()
def pictures(structure: nn.Module, data: Dataset) -> dict[str, Figure]:
    """What a row has that others have not: pseudo-inputs; what a denoising guide is shown and what comes of it."""
    x, found = data.x_test[:20], {}
    for module in structure.modules():
        if isinstance(module, VampPrior):
            found["pseudo_inputs"] = image_grid(module.pseudo_inputs[:100], data.shape, 10, "pseudo-inputs")
        if isinstance(module, DenoisingVAE):
            corrupted = module.corruption(x, torch.tensor(0.2))
            restored = reconstruct(structure, corrupted)
            rows = torch.cat([x, corrupted, restored])
            found["corrupted"] = image_grid(rows, data.shape, len(x), "data; with a fifth drawn anew; restored")
    return found


def row(make: Callable[[], nn.Module], data, folder: Path, args) -> dict:
    """Train one structure, or go on with it; its figures."""
    torch.manual_seed(args.seed)
    structure = make()
    for module in structure.modules():
        if isinstance(module, VampPrior):
            module.start_from(data.x_train)
    found = trained(
        structure,
        data,
        folder,
        num_samples=args.num_samples,
        num_images=args.num_images,
        epochs=args.epochs,
        batch_size=args.batch_size,
        beta=linear(0, 1, steps=args.warm_up * data.num_batches(args.batch_size)),
    )
    save(pictures(structure, data), folder / FIGURES)
    return {
        "test ELBO": found.test_elbo,
        "test log p(x)": found.test_log_likelihood,
        "KL": sum(found.kl_per_layer.values()),
        "active units": sum(count for name, count in found.active_units.items() if name.startswith("z")),
        "seconds": found.seconds,
    }


def main(argv: list[str] | None = None) -> dict:
    args = _arguments(argv)
    data = load(args.data, args.root)
    settings = fixed_settings(args, "rows")
    makers = {
        name: partial(row, make, data, args.out / name.replace(" ", "_").replace(",", ""), args)
        for name, make in rows_of(data.x_dim, args).items()
    }
    rows = finish_rows(args.out / "results.json", settings, makers, args.rows, tell=print)
    table = markdown_rows("model", rows, {"active units": 0, "seconds": 0})
    write_text(args.out / "results.md", table + "\n")
    print(table)
    return rows


def _arguments(argv: list[str] | None) -> Namespace:
    parser = parser_of(__doc__, "runs/priors_and_posteriors", smoke="two epochs of small models on the digits")
    parser.add_argument("--rows", nargs="+", default=None, help="names of rows; all if left out")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--warm_up", type=int, default=5, help="epochs of warm-up, step by step")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--z_dim", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=300)
    parser.add_argument("--components", type=int, default=500, help="of the mixture, and pseudo-inputs")
    parser.add_argument("--planar", type=int, default=10, help="number of planar flows")
    parser.add_argument("--autoregressive", type=int, default=2, help="number of autoregressive flows")
    parser.add_argument("--points", type=int, default=16, help="variational data of the Gaussian process, an image")
    parser.add_argument("--noise", type=float, default=0.2, help="share of pixels drawn anew (at first)")
    parser.add_argument("--num_samples", type=int, default=500, help="importance samples")
    parser.add_argument("--num_images", type=int, default=1000, help="test images for the log-likelihood")
    return parsed(
        parser,
        argv,
        data="digits",
        epochs=2,
        warm_up=1,
        z_dim=3,
        hidden=16,
        components=5,
        planar=1,
        autoregressive=1,
        points=4,
        num_samples=5,
        num_images=20,
    )


if __name__ == "__main__":
    script(main)
