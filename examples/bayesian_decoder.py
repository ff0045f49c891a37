"""Full variational Bayes over the weights of a VAE: why a first attempt learns nothing, and what makes it learn.

    python examples/bayesian_decoder.py --root FOLDER                    # MNIST: 1 %, 10 % and all of the images
    python examples/bayesian_decoder.py --root FOLDER --data freyfaces   # Frey Face
    python examples/bayesian_decoder.py --smoke                          # seconds, on the embedded digits

One hidden layer of 500 tanh units in encoder and decoder, 10 latent units, batches of 100 (Kingma & Welling 2014). The
attempt: prior N(0, 1) on every weight, posterior N(mu, sigma^2) with sigma^2 = 1e-3 at first, one draw of the weights
shared by a batch; started from scratch, or from the point estimate. The remedy: a Laplace prior as wide as a unit's
inputs allow; small sigma at first; local reparameterization; and the KL of the weights times 0.1 (a cold posterior, no
longer a bound on the evidence). The other rows change one of these at a time. Finished rows are kept under --out, and
not computed again.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_lvae import (
    VAE,
    BayesianWeights,
    Dataset,
    FusedAdam,
    elbo,
    fit,
    generative,
    load,
    predictive_log_likelihood,
    weight_kl,
)
from pyro_lvae.bayes.posteriors import MeanField
from pyro_lvae.bayes.priors import Laplace, Normal
from pyro_lvae.conditionals import Bernoulli
from pyro_lvae.conditionals import Normal as NormalLikelihood
from pyro_lvae.experiments import parsed, script
from pyro_lvae.results import write_json, write_text

WIDE = dict(prior=partial(Normal, scale=1.0), posterior=partial(MeanField, sigma=math.sqrt(1e-3)), noise="shared")
FITTED = dict(prior=partial(Laplace, over_fan_in=True), posterior=MeanField, noise="local_reparameterization", kl=0.1)
# What each row gives BayesianWeights; `start`, `kl` and `decoder` are read by `wrap`.
VARIANTS: dict[str, dict | None] = {
    "point estimate": None,
    "the attempt": WIDE,
    "the attempt, from the point estimate": WIDE | dict(start=True),
    "the attempt, KL counted once a batch": WIDE | dict(kl="batch"),
    "the attempt, KL x 0.1": WIDE | dict(kl=0.1),
    "the remedy": FITTED,
    "the remedy, from the point estimate": FITTED | dict(start=True),
    "the remedy, decoder alone": FITTED | dict(decoder=True),
    "the remedy, full KL": FITTED | dict(kl=1.0),
    "the remedy, KL x 0.01": FITTED | dict(kl=0.01),
    "the remedy, prior N(0, 1)": FITTED | dict(prior=WIDE["prior"]),
    "the remedy, sigma^2 = 1e-3 at first": FITTED | dict(posterior=WIDE["posterior"]),
    "the remedy, shared draws": FITTED | dict(noise="shared"),
}


def vae(data: Dataset, hidden: int, z_dim: int) -> VAE:
    """The network of the attempt."""
    likelihood = Bernoulli if _is_binary(data.x_train) else partial(NormalLikelihood, min_variance=1e-3)
    options = dict(num_hidden=1, batch_norm=False, activation=nn.Tanh, likelihood=likelihood)
    return VAE(data.x_dim, z_dim, hidden, **options)


def part_of(data: Dataset, fraction: float) -> Dataset:
    """The first rows of a fixed shuffle; binary data is drawn once, so that there is something to overfit."""
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    x = data.x_train[order[: max(2, round(fraction * len(order)))]]
    if data.binarize:
        x = torch.bernoulli(x, generator=torch.Generator().manual_seed(1))
    return replace(data, x_train=x, y_train=None, y_test=None, binarize=False)


def wrap(structure: VAE, variant: dict, data: Dataset, batch_size: int) -> tuple[BayesianWeights, float]:
    """The Bayesian structure, and the weight of the weights' KL, N/B where every batch counts it whole."""
    options = {k: v for k, v in variant.items() if k not in ("start", "kl", "decoder")}
    where = generative(structure, data.x_train[:2]) if variant.get("decoder") else "all"
    kl = variant.get("kl", 1.0)
    kl = max(1.0, len(data.x_train) / batch_size) if kl == "batch" else kl
    return BayesianWeights(structure, where, **options), kl


def run(name: str, data: Dataset, point: VAE, args: argparse.Namespace) -> tuple[nn.Module, dict]:
    """Train one variant and measure it; nats per image."""
    variant, steps = VARIANTS[name], math.ceil(len(data.x_train) / args.batch_size)
    torch.manual_seed(args.seed)
    structure, beta = vae(data, args.hidden, args.z_dim), 1.0
    if variant is not None:
        start = point if variant.get("start") else structure
        structure, kl = wrap(start, variant, data, args.batch_size)
        beta = {"z*": 1.0, "weights.*": kl}
    epochs = max(1, round(args.steps / steps))
    history = fit(
        structure,
        data,
        epochs=epochs,
        optimizer=partial(FusedAdam, lr=args.lr),
        lr_scheduler=partial(CosineAnnealingLR, T_max=epochs, eta_min=0.01 * args.lr),
        batch_size=args.batch_size,
        beta=beta,
        monitor_size=args.monitor_size,
        callbacks=(),
    )
    found = dict(rows=len(data.x_train), seconds=history[-1].seconds) | measure(structure, data, args)
    if variant is None:  # the best epoch is chosen on held-out rows, in the point estimate's favour
        found["best_validation_elbo"] = max(m.test_elbo for m in history)
    return structure, found


@torch.no_grad()
def measure(structure: nn.Module, data: Dataset, args: argparse.Namespace) -> dict:
    """Bounds of training and held-out rows, conditional on the weights and averaged over draws of them."""
    torch.manual_seed(args.seed + 1)
    x, held_out = data.x_train[: args.num_images], data.x_test[: args.num_images]
    is_bayesian = isinstance(structure, BayesianWeights)
    draws = [structure.draw() for _ in range(args.num_draws)] if is_bayesian else [structure]
    predictive = predictive_log_likelihood(draws, held_out[: args.num_images // 4], args.num_samples)
    point = structure.mean() if is_bayesian else structure
    return dict(
        train_elbo=_bound(draws, x),
        weight_kl=weight_kl(structure) / len(data.x_train) if is_bayesian else 0.0,
        validation_elbo=_bound(draws, held_out),
        validation_elbo_at_mean=_bound([point], held_out),
        validation_log_p=predictive.averaged.mean().item(),
    )


def _bound(draws: list[nn.Module], x: Tensor) -> float:
    return torch.stack([elbo(structure, x).mean() for structure in draws]).mean().item()


def _is_binary(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())


_COLUMNS = ("train_elbo", "weight_kl", "validation_elbo", "validation_elbo_at_mean", "validation_log_p")


def table(results: dict[str, dict[str, dict]]) -> str:
    """Markdown, a row for each variant and size of data; nats per image."""
    heads = [
        "rows",
        "variant",
        "train ELBO",
        "KL of the weights / N",
        "validation ELBO",
        "at the mean",
        "validation log p(x)",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for of_size in results.values():
        for name, r in of_size.items():
            values = [f"{r[k]:.1f}" for k in _COLUMNS]
            lines.append(" | ".join([f"| {r['rows']}", name, *values]) + " |")
            if "best_validation_elbo" in r:
                lines.append(f"| {r['rows']} | {name}, best epoch | | | {r['best_validation_elbo']:.1f} | | |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    args = _arguments(argv)
    data, out = load(args.data, args.root), Path(args.out or f"runs/bayesian_decoder-{args.data}")
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "root", "fractions", "variants", "smoke")}
    path = out / "results.json"
    kept = json.loads(path.read_text()) if path.exists() else {"settings": settings, "results": {}}
    if kept["settings"] != settings:
        raise SystemExit(f"{path} holds results of other settings; name another folder with --out")
    results = kept["results"]
    for fraction in args.fractions:
        part, done = part_of(data, fraction), results.setdefault(str(fraction), {})
        point = None
        for name in args.variants or VARIANTS:
            needs_point = (VARIANTS[name] or {}).get("start", False)
            if point is None and (needs_point and name not in done):
                point = run("point estimate", part, None, args)[0]
            if name not in done:
                structure, done[name] = run(name, part, point, args)
                point = structure if name == "point estimate" else point
                write_json(path, {"settings": settings, "results": results})
    write_text(out / "results.md", table(results) + "\n")
    print(table(results))
    return results


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps of small models on the digits")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--root", default=None, help="folder of the data")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.01, 0.1, 1.0], help="of the training rows")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="all if left out")
    parser.add_argument("--steps", type=int, default=2000, help="of training, for each")
    parser.add_argument("--lr", type=float, default=2e-3, help="of Adam; it falls to a hundredth by a cosine")
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=500)
    parser.add_argument("--z_dim", type=int, default=10)
    parser.add_argument("--num_draws", type=int, default=10, help="of the weights, for evaluation")
    parser.add_argument("--num_samples", type=int, default=100, help="importance samples for each draw")
    parser.add_argument("--num_images", type=int, default=1000, help="of training and held-out rows, for evaluation")
    parser.add_argument("--monitor_size", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=None, help="folder of the results; runs/bayesian_decoder-DATA if left out")
    return parsed(
        parser,
        argv,
        data="digits",
        fractions=[0.1],
        steps=3,
        hidden=8,
        z_dim=2,
        num_draws=2,
        num_samples=5,
        num_images=20,
        monitor_size=20,
    )


if __name__ == "__main__":
    script(main)
