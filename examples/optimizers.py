"""AdaGrad, RMSProp and Adam on the same VAE, from the same start, over the same batches.

    python examples/optimizers.py --root FOLDER        # MNIST
    python examples/optimizers.py --smoke              # seconds, on the embedded digits

Each at several learning rates, for which one that suits one optimiser is no fair choice for another. The picture shows
each optimiser at the rate whose last training bound is highest; the table shows all. Nats per image. AdaGrad sums its
squared gradients from the start, so that its steps shrink; RMSProp forgets old ones; Adam has momentum besides, and
corrects both averages for their start.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial

import torch
from torch import nn
from torch.optim import Adagrad, RMSprop

from pyro_lvae import VAE, Dataset, FusedAdam, NonFiniteLoss, fit, load
from pyro_lvae.experiments import finish_rows, fixed_settings, markdown, parsed, parser_of, script
from pyro_lvae.loop import CHECKPOINT
from pyro_lvae.plots import lines, save
from pyro_lvae.results import write_text

OPTIMIZERS = {"AdaGrad": Adagrad, "RMSProp": RMSprop, "Adam": FusedAdam}


def row(name: str, lr: float, data: Dataset, args) -> dict:
    """Train the VAE, or go on with it; its bounds epoch by epoch, none if the loss was not finite."""
    torch.manual_seed(args.seed)
    structure = VAE(data.x_dim, args.z_dim, args.hidden, num_hidden=1, batch_norm=False, activation=nn.Tanh)
    folder = args.out / f"{name}-{lr:g}"
    try:
        history = fit(
            structure,
            data,
            epochs=args.epochs,
            batch_size=args.batch_size,
            optimizer=partial(OPTIMIZERS[name], lr=lr),
            out=folder,
            resume=(folder / CHECKPOINT).exists(),
        )
    except NonFiniteLoss as error:
        print(error)
        history = []
    curves = {"train ELBO": [m.train_elbo for m in history], "test ELBO": [m.test_elbo for m in history]}
    return {"optimiser": name, "lr": lr, **curves, "seconds": [m.seconds for m in history]}


def table(rows: dict[str, dict]) -> str:
    """Markdown: bounds after the last epoch."""
    cells = []
    for r in rows.values():
        bounds = [f"{r[k][-1]:.2f}" if r[k] else "not finite" for k in ("train ELBO", "test ELBO")]
        cells.append([r["optimiser"], f"{r['lr']:g}", *bounds])
    return markdown(["optimiser", "learning rate", "train ELBO", "test ELBO"], cells)


def best(rows: dict[str, dict]) -> dict[str, dict]:
    """The row of each optimiser whose last training bound is highest."""
    found: dict[str, dict] = {}
    for r in (r for r in rows.values() if r["train ELBO"]):
        name = r["optimiser"]
        if name not in found or r["train ELBO"][-1] > found[name]["train ELBO"][-1]:
            found[name] = r
    return {f"{name}, {r['lr']:g}": r for name, r in found.items()}


def main(argv: list[str] | None = None) -> dict[str, dict]:
    args = _arguments(argv)
    data = load(args.data, args.root)
    settings = fixed_settings(args, "lrs")
    makers = {f"{name}, {lr:g}": partial(row, name, lr, data, args) for name in OPTIMIZERS for lr in args.lrs}
    rows = finish_rows(args.out / "results.json", settings, makers, tell=print)
    panels = {
        bound: {name: (range(1, len(r[bound]) + 1), r[bound]) for name, r in best(rows).items()}
        for bound in ("train ELBO", "test ELBO")
    }
    save({"bounds": lines(panels, "epoch", "nats per image")}, args.out)
    write_text(args.out / "results.md", table(rows) + "\n")
    print(table(rows))
    return rows


def _arguments(argv: list[str] | None) -> Namespace:
    parser = parser_of(__doc__, "runs/optimizers", smoke="two epochs of a small VAE on the digits")
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-2, 1e-3, 1e-4], help="learning rates")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--z_dim", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=500)
    return parsed(parser, argv, data="digits", epochs=2, z_dim=3, hidden=16)


if __name__ == "__main__":
    script(main)
