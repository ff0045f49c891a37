"""Reconstruction by an autoencoder and by a VAE, for codes of several sizes.

    python examples/autoencoder.py --root FOLDER        # MNIST
    python examples/autoencoder.py --smoke              # seconds, on the embedded digits

The same networks, one hidden layer of 500 tanh units in encoder and decoder, and the same weight decay; both give the
mean of p(x|z), the VAE at the mean of q(z|x). The likelihood is Bernoulli, with grey values as its probabilities; a
second autoencoder is trained on the squared error. Mean squared error a pixel on test images, against the size of the
code.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from pyro_lvae import AE, VAE, Dataset, FusedAdam, encode, fit, load
from pyro_lvae.conditionals import Bernoulli, Normal
from pyro_lvae.experiments import fixed_settings, markdown, parsed, parser_of, read_rows, script, write_rows
from pyro_lvae.loop import CHECKPOINT
from pyro_lvae.plots import image_grid, lines, save
from pyro_lvae.results import write_text
from pyro_lvae.traces import evaluating, generate

GREY = partial(Bernoulli, grey=True)
MODELS: dict[str, tuple[type[nn.Module], Callable]] = {
    "AE": (AE, GREY),
    "AE, squared error": (AE, partial(Normal, scale=1.0)),
    "VAE": (VAE, GREY),
}


def train(kind: str, z_dim: int, data: Dataset, args) -> nn.Module:
    """Train one model, or finish or read what an earlier call left."""
    torch.manual_seed(args.seed)
    folder = args.out / f"{kind}-{z_dim}"
    cls, likelihood = MODELS[kind]
    options = dict(num_hidden=1, batch_norm=False, activation=nn.Tanh, likelihood=likelihood)
    structure = cls(data.x_dim, z_dim, args.hidden, **options)
    fit(
        structure,
        data,
        epochs=args.epochs,
        batch_size=args.batch_size,
        optimizer=partial(FusedAdam, lr=args.lr, weight_decay=args.weight_decay),
        out=folder,
        resume=(folder / CHECKPOINT).exists(),
    )
    return structure


def reconstructed(structure: nn.Module, x: Tensor) -> Tensor:
    """E[x|z] at the posterior mean of z."""
    codes = encode(structure, x, 1)
    with evaluating(structure):
        return generate(structure, x, codes)["x"][0].mean


def curves(rows: dict[str, dict]) -> Figure:
    """Error against the size of the code."""
    of = {kind: [r for r in rows.values() if r["model"] == kind] for kind in MODELS}
    errors = {kind: ([r["z_dim"] for r in found], [r["mse"] for r in found]) for kind, found in of.items()}
    return lines({"test images": errors}, "size of the code", "squared error a pixel", is_logarithmic=True)


def table(rows: dict[str, dict]) -> str:
    sizes = dict.fromkeys(r["z_dim"] for r in rows.values())
    cells = {(r["model"], r["z_dim"]): f"{r['mse']:.4f}" for r in rows.values()}
    return markdown(["size of the code", *MODELS], [[str(z), *(cells.get((k, z), "") for k in MODELS)] for z in sizes])


def main(argv: list[str] | None = None) -> dict:
    args = _arguments(argv)
    data = load(args.data, args.root, binarize=False)
    settings = fixed_settings(args, "z_dims")
    path = args.out / "results.json"
    rows, shown = read_rows(path, settings), [data.x_test[:10]]
    for z_dim in args.z_dims:
        for kind in MODELS:
            structure, name = train(kind, z_dim, data, args), f"{kind}, {z_dim}"
            shown.append(reconstructed(structure, data.x_test[:10]))
            if name not in rows:
                error = (reconstructed(structure, data.x_test) - data.x_test).square().mean().item()
                rows[name] = {"model": kind, "z_dim": z_dim, "mse": error}
                write_rows(path, settings, rows)
    title = f"data; then {', '.join(MODELS)} for codes of " + ", ".join(map(str, args.z_dims))
    save({"mse": curves(rows), "reconstructions": image_grid(torch.cat(shown), data.shape, 10, title)}, args.out)
    write_text(args.out / "results.md", table(rows) + "\n")
    print(table(rows))
    return rows


def _arguments(argv: list[str] | None) -> Namespace:
    parser = parser_of(__doc__, "runs/autoencoder", smoke="an epoch of small models on the digits")
    parser.add_argument("--z_dims", type=int, nargs="+", default=[2, 5, 10, 20, 50])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=500)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight_decay", type=float, default=1e-6)
    return parsed(parser, argv, data="digits", z_dims=[2, 3], epochs=1, hidden=16)


if __name__ == "__main__":
    script(main)
