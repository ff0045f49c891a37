"""An equal mixture of ladders, p(x) = 1/M sum_m p_m(x): how much of what a ladder misses do others know?

    python examples/ladder_mixture.py --root FOLDER      # MNIST: four ladders, trained, fine-tuned and scored
    python examples/ladder_mixture.py --root FOLDER --members gated:0 gated:1 --runs runs/a/IWAE-10 runs/b/IWAE-10
    python examples/ladder_mixture.py --smoke            # seconds, on the embedded digits

The mixture is a generative model itself, whose first latent is the number m of the ladder. Each log p_m(x) is estimated
with the ladder's own guide. A member is DESIGN:SEED, of the designs

    leaky   five layers, leaky rectifiers, as published (Sonderby et al. 2016)
    gated   five layers, gated linear units
    skip    the same, each latent layer connected to all below it
    vamp    three layers, gated, skip, with a VampPrior (Tomczak & Welling 2018); sizes of the first two, and the
            second's again

trained by the ELBO and then with ten importance samples, or taken from the run folders named by --runs (of which two
of one design need two seeds, whatever they were). Under --out: a run folder a part of the training, each ladder's
log p(x) image by image, and results.md. Stopped or done, the same command goes on from there, with more members too.
"""

from __future__ import annotations

import math
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR

from pyro_lvae import IWAE, Dataset, FusedAdam, LadderVAE, VampPrior, linear, load, load_weights, log_likelihood
from pyro_lvae.experiments import fixed_settings, markdown_rows, parsed, parser_of, read_rows, script, write_rows
from pyro_lvae.loop import CHECKPOINT
from pyro_lvae.results import write_text
from pyro_lvae.runs import trained

DESIGNS = ("leaky", "gated", "skip", "vamp")
ROWS = 500  # images scored between two saves


def make(member: str, data: Dataset, args) -> nn.Module:
    """The ladder DESIGN:SEED, untrained."""
    design, seed = member.split(":")
    torch.manual_seed(int(seed))
    z, h = args.z_dims, args.hidden_dims
    if design == "vamp":
        z, h = [z[0], z[1], z[1]], [h[0], h[1], h[1]]
    ladder = partial(
        LadderVAE,
        z_dims=z,
        hidden_dims=h,
        skip=design in ("skip", "vamp"),
        activation=nn.LeakyReLU if design == "leaky" else nn.GLU,
    )
    if design != "vamp":
        return ladder(data.x_dim)
    structure = VampPrior(data.x_dim, ladder, args.pseudo_inputs)
    structure.start_from(data.x_train)
    return structure


def opened(member: str, data: Dataset, args) -> nn.Module:
    """The ladder DESIGN:SEED, untrained or from its run folder."""
    structure = make(member, data, args)
    if args.runs:
        load_weights(structure, Path(args.runs[args.members.index(member)]) / CHECKPOINT)
    return structure


def train(member: str, structure: nn.Module, data: Dataset, args) -> None:
    """By the ELBO, then with several importance samples; or go on with it."""
    common = dict(batch_size=args.batch_size, precision=args.precision, num_samples=100, num_images=args.num_images)
    trained(
        structure,
        data,
        args.out / member.replace(":", "-") / "first",
        epochs=args.epochs,
        beta=linear(0, 1, epochs=args.warm_up),
        optimizer=partial(FusedAdam, lr=args.lr),
        lr_scheduler=partial(CosineAnnealingLR, T_max=args.epochs),
        **common,
    )
    trained(
        structure,
        data,
        args.out / member.replace(":", "-") / "fine",
        estimator=IWAE(args.particles),
        epochs=args.fine_epochs,
        optimizer=partial(FusedAdam, lr=args.fine_lr),
        lr_scheduler=partial(ExponentialLR, gamma=args.fine_gamma),
        average=0.999,
        **common,
    )


def settings_of(member: str, args) -> dict:
    """What the log p(x) of a member depends on."""
    if not args.runs:
        return fixed_settings(args, "members", "runs")
    run = args.runs[args.members.index(member)]
    return {"run": run} | {k: getattr(args, k) for k in ("data", "num_samples", "num_images", "pseudo_inputs")}


def scored_before(member: str, args) -> list[float]:
    """The log p(x) of the first images, as many as an earlier call left; or a `ValueError` for other settings."""
    return read_rows(log_p_of(member, args), settings_of(member, args)).get("log_p", [])


def score(member: str, structure: nn.Module, x: Tensor, args) -> None:
    """Write log p(x) image by image, or go on with it."""
    found = scored_before(member, args)
    for start in range(len(found), len(x), ROWS):
        torch.manual_seed(start)
        found += log_likelihood(structure, x[start : start + ROWS], args.num_samples).tolist()
        write_rows(log_p_of(member, args), settings_of(member, args), {"log_p": found})


def log_p_of(member: str, args) -> Path:
    return args.out / member.replace(":", "-") / "log_p.json"


def errors(log_p: Tensor) -> dict[str, float]:
    """Of a mean over images."""
    return {"standard error": log_p.std().item() / len(log_p) ** 0.5}


def table(members: list[str], log_p: Tensor) -> dict[str, dict]:
    """Each member; and the mixtures of the first two, three, and so on, with what each gains over its best member.

    Args:
        log_p: `[M, N]`.
    """
    alone = {"over the best": "", "its standard error": ""}
    rows = {m: {"log p(x)": of.mean().item()} | errors(of) | alone for m, of in zip(members, log_p, strict=True)}
    for count in range(2, len(log_p) + 1):
        members = log_p[:count]
        mixed = members.logsumexp(0) - math.log(count)
        gain = mixed - members[members.mean(1).argmax()]
        of_gain = {"over the best": gain.mean().item(), "its standard error": errors(gain)["standard error"]}
        rows[f"mixture of the first {count}"] = {"log p(x)": mixed.mean().item()} | errors(mixed) | of_gain
    return rows


def main(argv: list[str] | None = None) -> dict[str, dict]:
    args = _arguments(argv)
    data = load(args.data, args.root)
    x = data.test_rows(args.num_images)[0]
    read_rows(args.out / "results.json", {})
    for member in args.members:  # what is wrong with any of them is said before the first is trained or scored
        opened(member, data, args)
        scored_before(member, args)
    for member in args.members:
        if len(scored_before(member, args)) == len(x):
            print(f"{member}: scored before")
            continue
        print(member)
        ladder = opened(member, data, args)
        if not args.runs:
            train(member, ladder, data, args)
        score(member, ladder, x, args)
    rows = table(args.members, torch.tensor([scored_before(m, args) for m in args.members], dtype=torch.double))
    write_rows(args.out / "results.json", {}, rows)
    text = markdown_rows("model", rows, dict.fromkeys(["over the best", "its standard error"], 3))
    write_text(args.out / "results.md", text + "\n")
    print(text)
    return rows


def _arguments(argv: list[str] | None) -> Namespace:
    parser = parser_of(__doc__, "runs/ladder_mixture", smoke="two small ladders on the digits", seed=None)
    parser.add_argument("--members", nargs="+", default=["gated:0", "gated:1", "leaky:0", "vamp:0"], help="DESIGN:SEED")
    parser.add_argument("--runs", nargs="+", default=None, help="finished run folders, one a member")
    parser.add_argument("--z_dims", type=int, nargs="+", default=[64, 32, 16, 8, 4], help="units of z1 upwards")
    parser.add_argument(
        "--hidden_dims", type=int, nargs="+", default=[512, 256, 128, 64, 32], help="widths of the MLPs"
    )
    parser.add_argument("--pseudo_inputs", type=int, default=300, help="of the VampPrior")
    parser.add_argument("--epochs", type=int, default=220, help="by the ELBO")
    parser.add_argument("--warm_up", type=int, default=40, help="epochs of warm-up")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--precision", default="bfloat16", choices=["float32", "tf32", "bfloat16"], help="of training")
    parser.add_argument("--particles", type=int, default=10, help="importance samples of fine-tuning")
    parser.add_argument("--fine_epochs", type=int, default=64)
    parser.add_argument("--fine_lr", type=float, default=5e-4)
    parser.add_argument("--fine_gamma", type=float, default=0.95, help="factor of the learning rate, an epoch")
    parser.add_argument("--num_samples", type=int, default=5000, help="importance samples of each ladder's log p(x)")
    parser.add_argument("--num_images", type=int, default=10_000, help="test images for log p(x), spread over the set")
    args = parsed(
        parser,
        argv,
        data="digits",
        members=["gated:0", "vamp:1"],
        z_dims=[4, 3, 2],
        hidden_dims=[16, 8, 8],
        pseudo_inputs=5,
        epochs=2,
        warm_up=1,
        particles=2,
        fine_epochs=1,
        num_samples=5,
        num_images=20,
    )
    for member in args.members:
        design, _, seed = member.partition(":")
        if design not in DESIGNS or not seed.isdecimal():
            parser.error(f"a member is {member!r}; expected DESIGN:SEED, of {', '.join(DESIGNS)}: gated:0")
    args.members = [f"{design}:{int(seed)}" for design, seed in (member.split(":") for member in args.members)]
    if len(set(args.members)) < len(args.members):
        parser.error(f"--members {args.members} name one twice; a ladder mixed with itself is itself")
    if args.runs and len(args.runs) != len(args.members):
        parser.error(f"there are {len(args.members)} --members and {len(args.runs)} --runs; give one run a member")
    if len(args.z_dims) < 2 or len(args.z_dims) != len(args.hidden_dims):
        parser.error(
            f"--z_dims {args.z_dims}, --hidden_dims {args.hidden_dims}; give two layers or more, as many of both"
        )
    counts = ("epochs", "fine_epochs", "batch_size", "particles", "pseudo_inputs", "num_samples")
    least = dict.fromkeys(counts, 1) | {"num_images": 2}  # of a standard error
    for name, at_least in least.items():
        if getattr(args, name) < at_least:
            parser.error(f"--{name} is {getattr(args, name)}; give {at_least} or more")
    return args


if __name__ == "__main__":
    script(main)
