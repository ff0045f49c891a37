"""Five latent layers, four ways: VAE, VAE+BN, VAE+BN+WU and LVAE+BN+WU (Sonderby et al. 2016, section 3.1).

    python examples/ladder_mnist.py --root FOLDER        # 4 x 30 epochs on MNIST
    python examples/ladder_mnist.py --smoke              # seconds, on the embedded digits

The paper's claim: batch normalisation (BN) and warm-up (WU) wake the upper layers, and the ladder
guide uses more of them. Each model has a run folder of its own under --out, with its report.html; stopped or
done, the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from pyro_lvae import HierarchicalVAE, LadderVAE, Summary, linear, load
from pyro_lvae.results import read_summary, write_json, write_text
from pyro_lvae.runs import SUMMARY, trained


def models(x_dim: int, **sizes) -> dict:
    """Makers of the four structures, and whether each is trained with warm-up."""
    return {
        "VAE": (lambda: HierarchicalVAE(x_dim, batch_norm=False, **sizes), False),
        "VAE+BN": (lambda: HierarchicalVAE(x_dim, **sizes), False),
        "VAE+BN+WU": (lambda: HierarchicalVAE(x_dim, **sizes), True),
        "LVAE+BN+WU": (lambda: LadderVAE(x_dim, **sizes), True),
    }


def table(results: dict[str, Summary]) -> str:
    """Markdown, one row a model; nats per image."""
    layers = list(next(iter(results.values())).kl_per_layer)
    heads = ["model", "train ELBO", "test ELBO", "test log p(x)"]
    heads += [f"KL {n}" for n in layers] + [f"active {n}" for n in layers]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, s in results.items():
        cells = [name, *(f"{v:.2f}" for v in (s.train_elbo, s.test_elbo, s.test_log_likelihood))]
        cells += [f"{s.kl_per_layer[n]:.2f}" for n in layers] + [f"{s.active_units[n]}/{s.units[n]}" for n in layers]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def train_one(make, data, warm_up: int, args, folder: Path) -> Summary:
    """Train one model, or finish or read what an earlier call with the same settings left in `folder`."""
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "root")} | {"warm_up": warm_up}
    if (folder / "settings.json").exists() and json.loads((folder / "settings.json").read_text()) != settings:
        raise SystemExit(f"{folder} holds a run with other settings; name another folder with --out")
    write_json(folder / "settings.json", settings)
    if (folder / SUMMARY).exists():
        return read_summary(folder / SUMMARY)
    torch.manual_seed(args.seed)
    structure = make()
    return trained(
        structure,
        data,
        folder,
        num_samples=args.num_samples,
        num_images=args.num_images,
        epochs=args.epochs,
        batch_size=args.batch_size,
        beta=linear(0, 1, epochs=warm_up) if warm_up else 1.0,
    )


def main(argv: list[str] | None = None) -> dict[str, Summary]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two epochs of small models on the digits")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--root", default=None, help="folder of the data")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--warm_up", type=int, default=10, help="epochs of warm-up")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--num_samples", type=int, default=500, help="importance samples")
    parser.add_argument("--num_images", type=int, default=1000, help="test images for the log-likelihood")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/ladder_mnist"))
    args, sizes = parser.parse_args(argv), {}
    if args.smoke:
        args.data, args.epochs, args.warm_up, args.num_samples, args.num_images = "digits", 2, 1, 20, 50
        args.out = args.out.with_name(args.out.name + "-smoke")
        sizes = dict(z_dims=(8, 4, 2), hidden_dims=(32, 16, 8))

    data = load(args.data, args.root)
    results = {}
    for name, (make, warms_up) in models(data.x_dim, **sizes).items():
        print(name, flush=True)
        results[name] = train_one(make, data, args.warm_up if warms_up else 0, args, args.out / name)
    write_text(args.out / "table.md", table(results) + "\n")
    print(table(results))
    return results


if __name__ == "__main__":
    main()
