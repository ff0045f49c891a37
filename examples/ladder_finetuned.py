"""The five-layer ladder VAE at length, then fine-tuned: the comparison table of the ladder paper.

    python examples/ladder_finetuned.py --root FOLDER        # MNIST, 2,000 epochs and 200 of each fine-tuning
    python examples/ladder_finetuned.py --smoke              # seconds, on the embedded digits

Sonderby et al. (2016, table 1): -82.12 nats, -81.84 after more epochs at a falling learning rate, -81.74 with ten
importance samples in them. Here the learning rate falls along a cosine in the first part, and each fine-tuning starts
from its end: by IWAE (one sample is the ELBO), by DReG, whose gradients for the guide are less noisy, and with a moving
average of the weights. All stay permutation-invariant, also with --gated, which puts gated linear units into the MLPs,
with --skip, which connects each latent layer to all below it, and with --pseudo_inputs, so many in a VampPrior.
Each part has a run folder under --out; stopped or done, the same command goes on from there. --start names the folder
of a run that is to be trained on in place of the first part; with --start_hidden_dims its MLPs have these
widths, and are widened to --hidden_dims.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR

from pyro_lvae import IWAE, Dataset, DReG, FusedAdam, LadderVAE, VampPrior, linear, load, load_weights
from pyro_lvae.checkpoint import load_checkpoint
from pyro_lvae.experiments import finish_rows, fixed_settings, markdown, markdown_rows, parsed, parser_of, script
from pyro_lvae.loop import CHECKPOINT
from pyro_lvae.results import write_text
from pyro_lvae.runs import trained

ESTIMATORS = {"IWAE": IWAE, "DReG": DReG}
PUBLISHED = {  # permutation-invariant MNIST, log p(x) or a bound on it, nats
    "VAE, 1 layer, flows (Rezende & Mohamed 2015)": -85.10,
    "IWAE, 2 layers, IW = 1 (Burda et al. 2016)": -85.33,
    "IWAE, 2 layers, IW = 50 (Burda et al. 2016)": -82.90,
    "VAE, 2 layers, variational Gaussian process (Tran et al. 2016)": -81.90,
    "LVAE, 5 layers (Sonderby et al. 2016)": -82.12,
    "LVAE, 5 layers, fine-tuned": -81.84,
    "LVAE, 5 layers, fine-tuned, IW = 10": -81.74,
}


def make(data: Dataset, args, hidden_dims: list[int] | None = None) -> nn.Module:
    torch.manual_seed(args.seed)
    hidden_dims = hidden_dims or args.hidden_dims
    activation = nn.GLU if args.gated else nn.LeakyReLU
    options = dict(skip=args.skip, num_hidden=args.num_hidden, activation=activation)
    ladder = partial(LadderVAE, z_dims=args.z_dims, hidden_dims=hidden_dims, **options)
    if not args.pseudo_inputs:
        return ladder(data.x_dim)
    structure = VampPrior(data.x_dim, ladder, args.pseudo_inputs)
    structure.start_from(data.x_train)
    return structure


def train(structure: nn.Module, data: Dataset, folder: Path, args, **options) -> dict:
    """Train, or go on with what is in `folder`; what a row shows."""
    common = {name: getattr(args, name) for name in ("num_samples", "num_images", "batch_size", "precision")}
    found = trained(structure, data, folder, **common, **options)
    log_p = found.test_log_likelihood
    return {"train ELBO": found.train_elbo, "test ELBO": found.test_elbo, "test log p(x)": log_p} | {
        "standard error": found.test_log_likelihood_stderr or 0.0,
        "epochs": found.epochs,
        "seconds": found.seconds,
    }


def first(data: Dataset, folder: Path, args) -> dict:
    """Train from scratch, or go on with it."""
    return train(
        make(data, args),
        data,
        folder,
        args,
        epochs=args.epochs,
        beta=linear(0, 1, epochs=args.warm_up),
        optimizer=partial(FusedAdam, lr=args.lr),
        lr_scheduler=partial(CosineAnnealingLR, T_max=args.epochs),
        average=args.average,
    )


def widen(narrow: nn.Module, wide: nn.Module, halves: int) -> None:
    """Make a ladder with wider MLPs compute what a narrow one does (after Net2Net: Chen et al. 2016).

    New units keep the random weights that lead to them, and those that lead from them to former units are 0. (Net2Net
    begins them as copies.) With gates a layer's units are in two halves, each of which grows.
    """
    with torch.no_grad():
        for s, t in zip(narrow.state_dict().values(), wide.state_dict().values(), strict=True):
            if s.shape == t.shape:
                t.copy_(s)
                continue
            per = len(s) // halves
            halved = torch.cat([torch.arange(per) + i * len(t) // halves for i in range(halves)])
            rows = halved if len(t) > len(s) else torch.arange(len(s))
            t[rows] = s if s.ndim == 1 else nn.functional.pad(s, (0, t.shape[1] - s.shape[1]))


def started(data: Dataset, start: Path, args) -> nn.Module:
    """The ladder at `start`, wider if that was asked for."""
    narrow = make(data, args, args.start_hidden_dims)
    load_weights(narrow, start / CHECKPOINT)
    if not args.start_hidden_dims:
        return narrow
    wide = make(data, args)
    widen(narrow, wide, halves=2 if args.gated else 1)
    return wide


def fine_tuned(estimator, data: Dataset, start: Path, folder: Path, args) -> dict:
    """Train on from the end of the first part, or go on with it."""
    return train(
        started(data, start, args),
        data,
        folder,
        args,
        estimator=estimator,
        epochs=args.fine_epochs,
        optimizer=partial(FusedAdam, lr=args.fine_lr),
        lr_scheduler=partial(ExponentialLR, gamma=args.fine_gamma),
        average=args.fine_average,
    )


def main(argv: list[str] | None = None) -> dict[str, dict]:
    args = _arguments(argv)
    data, start = load(args.data, args.root), Path(args.start or args.out / "first")
    data = data.held_out(args.held_out) if args.held_out else data
    estimators = {
        f"{name}, IW = {k}": ESTIMATORS[name](k)
        for name in args.estimators
        for k in args.particles
        if (name, k) != ("DReG", 1)  # the ELBO, which IWAE is with one sample
    }
    if args.start and args.held_out:
        trained_on = load_checkpoint(start / CHECKPOINT)["identity"]["checksum of the training data"]
        if trained_on != data.checksum():
            raise ValueError(
                f"{start} was trained on other rows than --held_out {args.held_out} leaves, perhaps on those held out; "
                "start from a run with the same --held_out"
            )
    ladder = f"LVAE, {len(args.z_dims)} layers"
    makers: dict[str, Callable[[], dict]] = {} if args.start else {ladder: partial(first, data, start, args)}
    for name, estimator in estimators.items():
        folder = args.out / name.replace(", IW = ", "-")
        makers[f"{ladder}, fine-tuned by {name}"] = partial(fine_tuned, estimator, data, start, folder, args)
    settings = fixed_settings(args, "estimators", "particles")
    rows = finish_rows(args.out / "results.json", settings, makers, tell=print)
    published = markdown(["published", "log p(x)"], [[name, f"{value:.2f}"] for name, value in PUBLISHED.items()])
    table = markdown_rows("model", rows, {"epochs": 0, "seconds": 0}) + "\n\n" + published
    write_text(args.out / "results.md", table + "\n")
    print(table)
    return rows


def _arguments(argv: list[str] | None) -> Namespace:
    parser = parser_of(__doc__, "runs/ladder_finetuned", smoke="small models on the digits")
    parser.add_argument("--estimators", nargs="+", default=list(ESTIMATORS), choices=list(ESTIMATORS))
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 10], help="importance samples of fine-tuning")
    parser.add_argument("--z_dims", type=int, nargs="+", default=[64, 32, 16, 8, 4], help="units of z1 upwards")
    parser.add_argument(
        "--hidden_dims", type=int, nargs="+", default=[512, 256, 128, 64, 32], help="widths of the MLPs"
    )
    parser.add_argument("--num_hidden", type=int, default=2, help="hidden layers in an MLP")
    parser.add_argument("--gated", action="store_true", help="gated linear units in place of leaky rectifiers")
    parser.add_argument("--skip", action="store_true", help="connect each latent layer to all below it")
    parser.add_argument("--pseudo_inputs", type=int, default=0, help="of a VampPrior; 0 for a standard normal prior")
    parser.add_argument("--epochs", type=int, default=2000)
    parser.add_argument("--warm_up", type=int, default=200, help="epochs of warm-up")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--precision", default="float32", choices=["float32", "tf32", "bfloat16"], help="of training")
    parser.add_argument("--average", type=float, default=None, help="decay of the average of weights; none if left out")
    parser.add_argument("--start", default=None, help="run folder to train on, in place of the first part")
    parser.add_argument(
        "--start_hidden_dims", type=int, nargs="+", default=None, help="widths of that run, where they were smaller"
    )
    parser.add_argument("--fine_epochs", type=int, default=200)
    parser.add_argument("--fine_lr", type=float, default=2e-4)
    parser.add_argument("--fine_gamma", type=float, default=0.99, help="factor of the learning rate, an epoch")
    parser.add_argument("--fine_average", type=float, default=0.999, help="decay of the average of weights")
    parser.add_argument("--num_samples", type=int, default=5000, help="importance samples of log p(x)")
    parser.add_argument("--num_images", type=int, default=None, help="test images for log p(x); all if left out")
    parser.add_argument(
        "--held_out", type=int, default=0, help="so many training images in place of the test images, to choose by"
    )
    args = parsed(
        parser,
        argv,
        data="digits",
        z_dims=[4, 3, 2],
        hidden_dims=[16, 8, 8],
        epochs=2,
        warm_up=1,
        fine_epochs=1,
        particles=[1, 2],
        num_samples=5,
        num_images=20,
    )
    if narrow := args.start_hidden_dims:
        fits = args.start and len(narrow) == len(args.hidden_dims) and all(map(int.__le__, narrow, args.hidden_dims))
        if not fits:
            parser.error(
                f"--start_hidden_dims {narrow} go with --start and --hidden_dims as large, not {args.hidden_dims}"
            )
    return args


if __name__ == "__main__":
    script(main)
