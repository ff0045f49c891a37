"""Auto-encoding variational Bayes, replicated: manifolds, draws and batch sizes, depth of the encoder, activations.

    python examples/aevb.py --root FOLDER                        # all four
    python examples/aevb.py --root FOLDER --parts depth          # one of them
    python examples/aevb.py --smoke                              # seconds, on the embedded digits

After Kingma & Welling (2014) and a replication of them: one hidden layer of 500 tanh units, on Frey Face 200 as in the
paper (the report does not say), the bound L^B with a closed-form KL, batches of 100. Adam stands in for AdaGrad.

- manifolds: two latent units; E[x|z] over the unit square through the inverse normal CDF, of MNIST and of Frey Face.
- samples: the bound against draws L a datum and batch size M, on Frey Face; L x M models, each one compiled step where
  that pays.
- depth: encoders of one to four hidden layers, N_z = 10.
- activations: sigmoid, tanh and ReLU, N_z = 10, with their time.

L^A against L^B is in compare_estimators.py, the autoencoder against the VAE in autoencoder.py. Tables and pictures are
under --out; stopped or done, the same command goes on from there.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

from pyro_lvae import VAE, AnalyticELBO, Dataset, fit, load
from pyro_lvae.conditionals import Bernoulli, Normal
from pyro_lvae.evaluate import elbo
from pyro_lvae.experiments import finish_rows, markdown_rows, parsed, parser_of, script
from pyro_lvae.loop import CHECKPOINT
from pyro_lvae.plots import latent_manifold, lines, save
from pyro_lvae.results import write_text

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "ReLU": nn.ReLU}


def vae(data: Dataset, args, z_dim: int | None = None, **options) -> VAE:
    """The VAE of the paper; `options` say what differs."""
    torch.manual_seed(args.seed)
    likelihood = Bernoulli if data.is_binary else partial(Normal, min_variance=1e-3)
    plain = dict(hidden_dim=args.hidden, num_hidden=1, batch_norm=False, activation=nn.Tanh, likelihood=likelihood)
    return VAE(data.x_dim, z_dim or args.z_dim, **plain | options)


def train(structure: nn.Module, data: Dataset, folder: Path, args, epochs: int, L: int = 1, **options) -> dict:
    """Train, or go on with what is in `folder`; bounds and seconds, epoch by epoch."""
    history = fit(
        structure,
        data,
        AnalyticELBO(num_particles=L),
        epochs=epochs,
        lr_scheduler=partial(ExponentialLR, gamma=args.gamma),
        precision=args.precision,
        out=folder,
        resume=(folder / CHECKPOINT).exists(),
        checkpoint_every=max(1, epochs // 20),
        **{"batch_size": args.batch_size} | options,
    )
    return {
        "train bound": [m.train_elbo for m in history],
        "test bound": [m.test_elbo for m in history],
        "seconds": [m.seconds for m in history],
    }


def at_the_end(rows: dict[str, dict]) -> dict[str, dict]:
    """The last value of each curve."""
    return {name: {k: curve[-1] for k, curve in row.items()} for name, row in rows.items()}


# ---------------------------------------------------------------------- the parts: each a table


def manifolds(args, out: Path, settings: dict) -> str:
    def row(name: str, data: str, hidden: int, epochs: int) -> dict:
        rows = load(data, args.root)
        structure = vae(rows, args, z_dim=2, hidden_dim=hidden)
        found = train(structure, rows, out / name, args, epochs)
        save({name: latent_manifold(structure, rows.x_test, rows.shape)}, out)
        return found

    makers = {"data": partial(row, "data", args.data, args.hidden, args.epochs)}
    makers |= {"faces": partial(row, "faces", args.faces, args.face_hidden, args.face_epochs)}
    settings = settings | {"epochs": args.epochs, "face_epochs": args.face_epochs}
    return markdown_rows("N_z = 2", at_the_end(finish_rows(out / "results.json", settings, makers, tell=print)))


def samples(args, out: Path, settings: dict) -> str:
    data = load(args.faces, args.root)

    def row(L: int, batch_size: int) -> dict:
        structure, folder = vae(data, args, hidden_dim=args.face_hidden), out / f"{L}-{batch_size}"
        options = dict(batch_size=batch_size, monitor_size=1)  # the epochs are short, and their ends not looked at
        seconds = train(structure, data, folder, args, args.sweep_epochs, L, **options)["seconds"][-1]
        torch.manual_seed(args.seed)  # the same noise for every model
        every = (data.train_rows(len(data.x_train))[0], data.x_test)
        bounds = (elbo(structure, x, num_samples=10).mean().item() for x in every)
        return dict(zip(("train bound", "test bound", "seconds"), (*bounds, seconds), strict=True))

    makers = {f"L = {L}, M = {M}": partial(row, L, M) for M in args.batch_sizes for L in args.L}
    rows = finish_rows(out / "results.json", settings | {"epochs": args.sweep_epochs}, makers, tell=print)
    ends = {name: rows[name] for name in makers}
    save({"bounds": heatmaps(ends, args.L, args.batch_sizes)}, out)
    return markdown_rows(f"{args.faces}, {args.sweep_epochs} epochs", ends)


def compared(rows: dict[str, dict], title: str, out: Path) -> str:
    """Bounds of several models over the epochs, and at the end."""
    panels = {
        bound: {name: (range(1, len(r[bound]) + 1), r[bound]) for name, r in rows.items()}
        for bound in ("train bound", "test bound")
    }
    save({"bounds": lines(panels, "epoch", "nats per image")}, out)
    return markdown_rows(title, at_the_end(rows))


def depth(args, out: Path, settings: dict) -> str:
    data = load(args.data, args.root)

    def row(layers: int) -> dict:
        structure = vae(data, args, num_hidden=layers, decoder_num_hidden=1)
        return train(structure, data, out / str(layers), args, args.epochs)

    makers = {str(n): partial(row, n) for n in args.depths}
    rows = finish_rows(out / "results.json", settings | {"epochs": args.epochs}, makers, tell=print)
    return compared({name: rows[name] for name in makers}, "hidden layers of the encoder", out)


def activations(args, out: Path, settings: dict) -> str:
    data = load(args.data, args.root)

    def row(name: str) -> dict:
        structure = vae(data, args, activation=ACTIVATIONS[name])
        return train(structure, data, out / name, args, args.epochs)

    makers = {name: partial(row, name) for name in ACTIVATIONS}
    rows = finish_rows(out / "results.json", settings | {"epochs": args.epochs}, makers, tell=print)
    return compared(rows, "activation", out)


PARTS = {"manifolds": manifolds, "samples": samples, "depth": depth, "activations": activations}


def heatmaps(ends: dict[str, dict], draws: list[int], batch_sizes: list[int]) -> Figure:
    """Train and test bound by L and M."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for ax, bound in zip(figure.subplots(1, 2), ("train bound", "test bound"), strict=True):
        values = [[ends[f"L = {L}, M = {M}"][bound] for M in batch_sizes] for L in draws]
        image = ax.imshow(values, aspect="auto", origin="lower")
        ax.set(title=bound, xlabel="batch size M", ylabel="draws L")
        ax.set_xticks(range(len(batch_sizes)), batch_sizes)
        ax.set_yticks(range(len(draws)), draws)
        figure.colorbar(image, ax=ax, label="nats per image")
    return figure


def main(argv: list[str] | None = None) -> dict[str, str]:
    args = _arguments(argv)
    names = ("data", "faces", "z_dim", "hidden", "face_hidden", "batch_size", "gamma", "precision", "seed")
    settings = {k: getattr(args, k) for k in names}
    tables = {}
    for name in args.parts:
        tables[name] = PARTS[name](args, args.out / name, settings)
        write_text(args.out / name / "results.md", tables[name] + "\n")
        print(tables[name])
    return tables


def _arguments(argv: list[str] | None) -> Namespace:
    parser = parser_of(__doc__, "runs/aevb", smoke="small models on the digits")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--faces", default="freyfaces", help="data of the second manifold and of the sweep")
    parser.add_argument("--z_dim", type=int, default=10, help="N_z")
    parser.add_argument("--hidden", type=int, default=500, help="units of the hidden layers, for --data")
    parser.add_argument("--face_hidden", type=int, default=200, help="the same for --faces")
    parser.add_argument("--gamma", type=float, default=1.0, help="factor of the learning rate, an epoch")
    parser.add_argument("--precision", default="float32", choices=["float32", "tf32", "bfloat16"], help="of training")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--face_epochs", type=int, default=1000, help="of the manifold of --faces")
    parser.add_argument("--sweep_epochs", type=int, default=2000, help="of each model of the sweep")
    parser.add_argument("--L", type=int, nargs="+", default=list(range(1, 9)), help="draws a datum")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[20, 60, 100, 140], help="M")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3, 4], help="hidden layers of the encoder")
    parser.add_argument("--batch_size", type=int, default=100, help="of all but the sweep")
    return parsed(
        parser,
        argv,
        data="digits",
        faces="digits",
        epochs=2,
        face_epochs=1,
        sweep_epochs=1,
        z_dim=3,
        hidden=16,
        face_hidden=16,
        L=[1, 2],
        batch_sizes=[100, 200],
    )


if __name__ == "__main__":
    script(main)
