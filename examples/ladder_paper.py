"""Figure 3 of the ladder paper: one to five latent layers, by VAE, VAE+BN, VAE+BN+WU and LVAE+BN+WU.

    python examples/ladder_paper.py --root FOLDER        # MNIST, 20 models of 2,000 epochs
    python examples/ladder_paper.py --root FOLDER --epochs 30 --warm_up 10 --lr 1e-3 --out runs/short
    python examples/ladder_paper.py --smoke              # seconds, on the embedded digits

Sonderby et al. (2016, section 3.1) claim that batch normalisation (BN) and warm-up (WU) wake the upper layers, that
without them a layer more does not help, and that the ladder guide uses the most. Sizes, optimiser, clipping, epochs
and warm-up are the authors'. Other than in their published runs, the ladder shares the top-down networks of guide and
model and passes on d_n upwards, as their text has it, and batch norm is evaluated with its running statistics. Under
--out: results.md with a row a model, bounds.png against the number of layers, active_units.png over training with and
without warm-up, and a run folder a model, whose figures/pca.png is figure 6. Stopped or done, the same command goes
on from there.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pyro_lvae import Callback, Dataset, FusedAdam, HierarchicalVAE, LadderVAE, ProgressBar, kl_per_unit, linear, load
from pyro_lvae.conditionals import Bernoulli, Normal
from pyro_lvae.experiments import finish_rows, fixed_settings, markdown_rows, parsed, parser_of, script
from pyro_lvae.plots import lines, save
from pyro_lvae.results import write_text
from pyro_lvae.runs import trained

VARIANTS = ("VAE", "VAE+BN", "VAE+BN+WU", "LVAE+BN+WU")
BOUNDS = ("train ELBO", "test ELBO", "test log p(x)")


class ActiveUnits(Callback):
    """Counts the active units of every layer after each epoch, as JSON lines in `path`: those of 0.01 nats and more."""

    def __init__(self, structure: nn.Module, x: torch.Tensor, path: Path):
        self.structure, self.x, self.path = structure, x, path

    def on_start(self, epoch: int, epochs: int, num_batches: int) -> None:
        write_text(self.path, "".join(f"{json.dumps(found)}\n" for found in counted(self.path)[:epoch]))

    def on_epoch(self, metrics) -> None:
        with torch.random.fork_rng(), open(self.path, "a", encoding="utf-8") as file:
            units = kl_per_unit(self.structure, self.x)
            file.write(json.dumps({name: int((kl > 0.01).sum()) for name, kl in units.items()}) + "\n")


def counted(path: Path) -> list[dict[str, int]]:
    """Active units of each layer, epoch by epoch."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def make(variant: str, layers: int, data: Dataset, args) -> nn.Module:
    """The structure of a row."""
    kind = LadderVAE if variant.startswith("LVAE") else HierarchicalVAE
    likelihood = Bernoulli if data.is_binary else partial(Normal, min_variance=1e-2)
    sizes = dict(z_dims=args.z_dims[:layers], hidden_dims=args.hidden_dims[:layers])
    return kind(data.x_dim, **sizes, likelihood=likelihood, batch_norm="BN" in variant)


def row(variant: str, layers: int, data: Dataset, args) -> dict:
    """Train one model, or go on with it; its figures."""
    torch.manual_seed(args.seed)
    structure, folder = make(variant, layers, data, args), args.out / f"{variant}-{layers}"
    found = trained(
        structure,
        data,
        folder,
        num_samples=args.num_samples,
        num_images=args.num_images,
        epochs=args.epochs,
        batch_size=args.batch_size,
        beta=linear(0, 1, epochs=args.warm_up) if "WU" in variant else 1.0,
        optimizer=partial(FusedAdam, lr=args.lr, eps=args.eps),
        clip_norm=4.0,
        clip_value=0.9,
        precision=args.precision,
        callbacks=[ProgressBar(), ActiveUnits(structure, data.test_rows(500)[0], folder / "active_units.jsonl")],
    )
    kl, active = found.kl_per_layer, counted(folder / "active_units.jsonl")[-1]
    bounds = dict(zip(BOUNDS, (found.train_elbo, found.test_elbo, found.test_log_likelihood), strict=True))
    of_layers = {"KL of layers": list(kl.values()), "active units": [active[name] for name in kl]}
    return {"variant": variant, "layers": layers, **bounds, **of_layers, "seconds": found.seconds}


def table(rows: dict[str, dict]) -> str:
    """Markdown, a row a model; nats per datum."""

    def cells(r: dict) -> dict:
        kl = ", ".join(f"{v:.2f}" for v in r["KL of layers"])
        return {k: r[k] for k in BOUNDS} | {
            "KL, z1 upwards": kl,
            "active units": ", ".join(map(str, r["active units"])),
            "seconds": r["seconds"],
        }

    return markdown_rows("model", {name: cells(r) for name, r in rows.items()}, {"seconds": 0})


def bounds_by_layers(rows: dict[str, dict]) -> dict[str, dict[str, tuple]]:
    """The panels of figure 3."""
    of = {v: [r for r in rows.values() if r["variant"] == v] for v in VARIANTS}
    return {b: {v: ([r["layers"] for r in of[v]], [r[b] for r in of[v]]) for v in VARIANTS if of[v]} for b in BOUNDS}


def active_over_training(out: Path, layers: int) -> dict[str, dict[str, tuple]]:
    """A panel a model of that many layers: active units of each layer, epoch by epoch."""
    panels = {}
    for variant in VARIANTS:
        if epochs := counted(out / f"{variant}-{layers}" / "active_units.jsonl"):
            numbers = range(1, len(epochs) + 1)
            panels[variant] = {name: (numbers, [e[name] for e in epochs]) for name in epochs[0]}
    return panels


def main(argv: list[str] | None = None) -> dict[str, dict]:
    args = _arguments(argv)
    data = load(args.data, args.root)
    settings = fixed_settings(args, "layers", "variants")
    makers: dict[str, Callable[[], dict]] = {
        f"{v}, L = {n}": partial(row, v, n, data, args) for n in args.layers for v in args.variants
    }
    rows = finish_rows(args.out / "results.json", settings, makers, tell=print)
    rows = dict(sorted(rows.items(), key=lambda kv: (kv[1]["layers"], VARIANTS.index(kv[1]["variant"]))))
    figures = {"bounds": lines(bounds_by_layers(rows), "latent layers", "nats per datum")}
    if panels := active_over_training(args.out, max(args.layers)):
        figures["active_units"] = lines(panels, "epoch", "active units")
    save(figures, args.out)
    write_text(args.out / "results.md", table(rows) + "\n")
    print(table(rows))
    return rows


def _arguments(argv: list[str] | None) -> Namespace:
    parser = parser_of(__doc__, "runs/ladder_paper", smoke="two epochs of small models on the digits")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3, 4, 5], choices=range(1, 6))
    parser.add_argument("--z_dims", type=int, nargs=5, default=[64, 32, 16, 8, 4], help="units of z1 to z5")
    parser.add_argument("--hidden_dims", type=int, nargs=5, default=[512, 256, 128, 64, 32], help="widths of the MLPs")
    parser.add_argument("--epochs", type=int, default=2000)
    parser.add_argument("--warm_up", type=int, default=200, help="epochs of warm-up")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--eps", type=float, default=1e-4, help="of Adam")
    parser.add_argument("--precision", default="float32", choices=["float32", "tf32", "bfloat16"], help="of training")
    parser.add_argument("--num_samples", type=int, default=5000, help="importance samples")
    parser.add_argument("--num_images", type=int, default=None, help="test rows for log p(x); all if left out")
    return parsed(
        parser,
        argv,
        data="digits",
        layers=[2],
        z_dims=[4, 2, 2, 2, 2],
        hidden_dims=[16, 8, 8, 8, 8],
        epochs=2,
        warm_up=1,
        num_samples=5,
        num_images=20,
    )


if __name__ == "__main__":
    script(main)
