"""VAE, beta-VAE, its constrained form, beta-TCVAE and FactorVAE on dSprites: does one unit go with one factor?

    python examples/beta_vae.py --root FOLDER        # five models, 10 epochs each, about half an hour of one core
    python examples/beta_vae.py --smoke              # seconds, on bars drawn here

The beta-VAE maximises E[log p(x|z)] - beta KL (Higgins et al. 2017). The constrained form is given a budget epsilon
instead of beta, KL < epsilon, and learns the multiplier; its budget here is what the beta-VAE used, so its multiplier
should come out near beta. (--epsilon sets another.) The beta-TCVAE (Chen et al. 2018) weighs the total correlation of
q(z) alone, estimated from the batch, and so does FactorVAE (Kim & Mnih 2018), by a critic. Each model is scored on the
posterior means of the test images by the FactorVAE metric, MIG and DCI (D, C, I). Measured by the first command, a
single seed, nats an image:

    model         KL     E[log p(x|z)]   multiplier   active units   FactorVAE   MIG    D      C      I
    VAE           17.12   -80.54                      9 of 10        0.53        0.03   0.05   0.09   0.50
    beta-VAE, 4    8.52  -113.77                      3              0.27        0.01   0.04   0.10   0.48
    constrained    8.41  -114.74         3.96         3              0.44        0.08   0.05   0.11   0.48
    beta-TCVAE     9.48  -109.52                      4              0.44        0.05   0.06   0.15   0.53
    FactorVAE     13.67   -96.60                     10              0.33        0.02   0.05   0.07   0.49

The multiplier finds beta. The scores do not show disentangling: the FactorVAE metric is 0.20 by chance, and beta-VAE
and constrained form, alike in their bounds, differ in it by 0.17. The training is short and small: 6,480 steps, 256
hidden units in place of 1200, 46,080 of the 737,280 images (a tenth of them for the test), Adam in place of Adagrad.

Under --out: a run folder each, traversals and reconstructions as PNG, results.json, results.md. Stopped or done, the
same command goes on from there.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pyro_lvae import (
    BetaELBO,
    BetaTCELBO,
    BetaVAE,
    ConstrainedELBO,
    CriticAdam,
    Dataset,
    FactorVAE,
    LedgerELBO,
    active_units,
    dci,
    elbo,
    encode,
    factor_vae_score,
    fit,
    kl_per_layer,
    load,
    mutual_information_gap,
    plots,
)
from pyro_lvae.experiments import fixed_settings, parsed, parser_of, read_rows, script, write_rows
from pyro_lvae.loop import CHECKPOINT
from pyro_lvae.results import write_text

Scores = dict[str, float | None]
MIN_VARIANCE = 0.01  # units that vary less are dead, and take no part in the FactorVAE metric
MODELS = ["VAE", "beta-VAE", "constrained", "beta-TCVAE", "FactorVAE"]
COLUMNS = {
    "kl": "KL",
    "reconstruction": "E[log p(x given z)]",
    "elbo": "ELBO",
    "multiplier": "multiplier",
    "active": "active units",
    "factor_vae": "FactorVAE",
    "mig": "MIG",
    "disentanglement": "D",
    "completeness": "C",
    "informativeness": "I",
}


def bars(side: int = 8) -> Dataset:
    """Horizontal and vertical bars: kind, length, x and y are the factors."""
    factors = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(5), torch.arange(5))
    images = torch.zeros(len(factors), side, side)
    for image, (kind, length, x, y) in zip(images, factors.tolist(), strict=True):
        image[y : y + (3 + length if kind else 2), x : x + (2 if kind else 3 + length)] = 1
    order = torch.randperm(len(factors), generator=torch.Generator().manual_seed(0))
    images, factors = images.flatten(1)[order], factors[order]
    return Dataset("bars", images[50:], images[:50], factors[50:], factors[:50], shape=(side, side))


# ------------------------------------------------------------------ training


def makers(args: Namespace, data: Dataset, results: dict[str, Scores]) -> dict[str, Callable]:
    """{name: () -> (structure, estimator)}, in the order of the table."""
    beta_vae = partial(BetaVAE, z_dim=args.z_dim, hidden_dim=args.hidden_dim)
    factor = partial(FactorVAE, base=beta_vae, gamma=args.gamma, critic_hidden_dim=args.critic_hidden_dim)
    return {
        "VAE": lambda: (beta_vae(data.x_dim), BetaELBO(1.0)),
        "beta-VAE": lambda: (beta_vae(data.x_dim), BetaELBO(args.beta)),
        "constrained": lambda: (beta_vae(data.x_dim), ConstrainedELBO(_budget(args, results))),
        "beta-TCVAE": lambda: (beta_vae(data.x_dim), BetaTCELBO(args.tc_beta, size=len(data.x_train))),
        "FactorVAE": lambda: (factor(data.x_dim), BetaELBO(1.0)),
    }


def _budget(args: Namespace, results: dict[str, Scores]) -> float:
    if args.epsilon is None and "beta-VAE" not in results:
        raise SystemExit("the constrained form has the KL of the beta-VAE as its budget: give --epsilon, or name both")
    return results["beta-VAE"]["kl"] if args.epsilon is None else args.epsilon


def train(structure: nn.Module, estimator: LedgerELBO, data: Dataset, args: Namespace, folder: Path) -> Scores:
    """Train, or finish what an earlier call with the same settings began in `folder`; then score."""
    history = fit(
        structure,
        data,
        estimator,
        epochs=args.epochs,
        batch_size=args.batch_size,
        critic_optimizer=partial(CriticAdam, lr=1e-4),
        out=folder,
        resume=(folder / CHECKPOINT).exists(),
    )
    torch.manual_seed(args.seed)  # scores do not depend on whether the training was resumed
    return {"seconds": history[-1].seconds, **history[-1].learned, **scores(structure, data)}


# ------------------------------------------------------------------ what came of it


def scores(structure: nn.Module, data: Dataset) -> Scores:
    """Nats an image, and the metrics, on the test images."""
    x, factors = data.x_test, data.y_test
    codes = encode(structure, x, 1)["z1"]  # of a single layer, one draw gives the exact mean
    kl, bound = kl_per_layer(structure, x, 3)["z1"], elbo(structure, x, 3).mean().item()
    found = dci(codes, factors)
    return {
        "kl": kl,
        "reconstruction": bound + kl,
        "elbo": bound,
        "active": active_units(structure, x, 1)["z1"],
        "factor_vae": factor_vae_score(codes, factors, min_variance=MIN_VARIANCE),
        "mig": mutual_information_gap(codes, factors),
        "disentanglement": found.disentanglement,
        "completeness": found.completeness,
        "informativeness": found.informativeness,
    }


def pictures(structure: nn.Module, data: Dataset, name: str, folder: Path) -> None:
    """Traversals of one test image, the unit that varies most first; and reconstructions of ten."""
    order = encode(structure, data.x_test, 1)["z1"].var(0).argsort(descending=True).tolist()
    figures = {
        f"traversals_{name}": plots.traversals(structure, data.x_test[:1], data.shape, "z1", units=order),
        f"reconstructions_{name}": plots.reconstructions(structure, data.x_test[:10], data.shape),
    }
    plots.save(figures, folder)


def table(results: dict[str, Scores]) -> str:
    """Markdown, one row a model; nats per image."""
    lines = ["| model | " + " | ".join(COLUMNS.values()) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, found in results.items():
        cells = [f"{found[key]:.{0 if key == 'active' else 2}f}" if key in found else "" for key in COLUMNS]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Scores]:
    parser = parser_of(__doc__, "runs/beta_vae", smoke="five epochs of small models on bars", data=None)
    parser.add_argument("--root", default=None, help="folder of the data")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--z_dim", type=int, default=10)
    parser.add_argument("--hidden_dim", type=int, default=256)
    parser.add_argument("--beta", type=float, default=4.0)
    parser.add_argument("--tc_beta", type=float, default=6.0, help="weight of the beta-TCVAE's total correlation")
    parser.add_argument("--gamma", type=float, default=35.0, help="weight of FactorVAE's total correlation")
    parser.add_argument("--critic_hidden_dim", type=int, default=256, help="width of FactorVAE's critic")
    parser.add_argument("--epsilon", type=float, default=None, help="nats; the KL of the beta-VAE if left out")
    args = parsed(parser, argv, epochs=5, batch_size=16, z_dim=4, hidden_dim=16, critic_hidden_dim=16)

    data = bars() if args.smoke else load("dsprites", args.root)
    path, settings = args.out / "results.json", fixed_settings(args, "models") | {"smoke": args.smoke}
    results: dict[str, Scores] = read_rows(path, settings)
    write_rows(path, settings, results)
    for name in args.models:
        if name in results:
            continue
        print(name, flush=True)
        torch.manual_seed(args.seed)
        structure, estimator = makers(args, data, results)[name]()
        results[name] = train(structure, estimator, data, args, args.out / name)
        pictures(structure, data, name, args.out)
        write_rows(path, settings, results)
    write_text(path.with_suffix(".md"), table(results) + "\n")
    print(table(results))
    return results


if __name__ == "__main__":
    script(main)
