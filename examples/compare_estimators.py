"""Which estimator when: closed-form KLs against sampled ones, and what more particles do to gradients.

    python examples/compare_estimators.py --root FOLDER        # MNIST
    python examples/compare_estimators.py --smoke              # seconds, on the embedded digits

1. L^A (`SampledELBO`, every density at a sample) against L^B (`AnalyticELBO`, KL in closed form), one
   sample each, for latent sizes N_z of 3 to 200 (Kingma & Welling 2014, eqs. 6 and 7). The structure is a ladder
   with z1 of N_z units and z2 of half as many; `--num_layers 1` leaves one layer, which is the plain VAE.
2. On a trained ladder, the signal-to-noise ratio of the guide's gradient against K: it falls for `IWAE`
   (Rainforth et al. 2018) and rises for `DReG` (Tucker et al. 2019; Bauer & Mnih 2021).

Results go into --out: two pictures, a table and JSON. Stopped, the same command goes on from there.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from pyro_lvae import IWAE, AnalyticELBO, DReG, LadderVAE, SampledELBO, compare, fit, linear, load, load_weights, plots
from pyro_lvae.experiments import parsed, parser_of, script, settle
from pyro_lvae.loop import CHECKPOINT
from pyro_lvae.results import read_metrics, write_json, write_text

ESTIMATORS = {"L^A": SampledELBO, "L^B": AnalyticELBO}


def ladder(x_dim: int, size: int, num_layers: int, hidden: int) -> LadderVAE:
    """One hidden layer of tanh units, as in the first VAE; z1 of `size` units, z2 of half as many."""
    z_dims, hidden_dims = (size, max(1, size // 2)), (hidden, hidden // 2)
    options = dict(num_hidden=1, batch_norm=False, activation=nn.Tanh)
    return LadderVAE(x_dim, z_dims[:num_layers], hidden_dims[:num_layers], **options)


def train(folder: Path, structure: nn.Module, data, estimator, args, **options):
    """Train, or finish, or read what an earlier call with the same settings left in the folder."""
    settings = {"data": args.data, "seed": args.seed, "structure": str(structure)}
    settings |= {name: str(value) for name, value in options.items()}
    settle(folder, settings)
    epochs = options.pop("epochs")
    if (folder / CHECKPOINT).exists() and load_weights(structure, folder / CHECKPOINT)["epoch"] >= epochs:
        return read_metrics(folder / "metrics.jsonl")
    print(f"training {folder.name}", flush=True)
    return fit(structure, data, estimator, epochs=epochs, out=folder, resume=(folder / CHECKPOINT).exists(), **options)


def sampled_against_analytic(data, args) -> dict[str, dict[str, list[float]]]:
    """{N_z: {"L^A" | "L^B": test ELBO of every epoch, nats per image}}, same start and seed for both."""
    curves: dict[str, dict[str, list[float]]] = {}
    for size in args.sizes:
        for name, estimator in ESTIMATORS.items():
            torch.manual_seed(args.seed)
            structure = ladder(data.x_dim, size, args.num_layers, args.hidden)
            options = dict(epochs=args.epochs, batch_size=args.batch_size)
            history = train(args.out / f"N_z={size}, {name}", structure, data, estimator(1), args, **options)
            curves.setdefault(str(size), {})[name] = [m.test_elbo for m in history]
    return curves


def bound_table(curves: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: test ELBO after the first, the middle and the last epoch."""
    lines = ["| N_z | epoch | L^A | L^B | L^B - L^A |", "|---|---|---|---|---|"]
    for size, by in curves.items():
        last = len(by["L^A"])
        for epoch in sorted({1, (last + 1) // 2, last}):
            a, b = (by[name][epoch - 1] for name in ESTIMATORS)
            lines.append(f"| {size} | {epoch} | {a:.2f} | {b:.2f} | {b - a:+.2f} |")
    return "\n".join(lines)


def bound_curves(curves: dict[str, dict[str, list[float]]]) -> Figure:
    """One panel a latent size."""
    panels = {
        f"N_z = {size}": {name: (range(1, len(elbos) + 1), elbos) for name, elbos in by.items()}
        for size, by in curves.items()
    }
    return plots.lines(panels, "epoch", "test ELBO, nats per image")


def trained_ladder(data, args) -> LadderVAE:
    """Two layers; the last epochs maximise the bound of IWAE, which widens the guide to the posterior's tails."""
    torch.manual_seed(args.seed)
    sizes = dict(z_dims=(args.snr_size, args.snr_size // 2), hidden_dims=(args.hidden, args.hidden // 2))
    structure = LadderVAE(data.x_dim, **sizes, num_hidden=1)
    options = dict(batch_size=args.batch_size, epochs=args.snr_epochs, beta=linear(0, 1, epochs=args.snr_epochs // 4))
    train(args.out / "ladder", structure, data, SampledELBO(1), args, **options)
    options = dict(batch_size=args.batch_size, epochs=args.iwae_epochs)
    train(args.out / "ladder, IWAE", structure, data, IWAE(10), args, **options)
    return structure.double()


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__, "runs/compare_estimators", smoke="small models, one epoch, on the digits")
    parser.add_argument("--sizes", type=int, nargs="+", default=[3, 5, 10, 20, 200], help="latent sizes N_z")
    parser.add_argument("--num_layers", type=int, default=2, choices=(1, 2))
    parser.add_argument("--hidden", type=int, default=500, help="hidden units")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--snr_size", type=int, default=4, help="units of z1 in the ladder of part 2")
    parser.add_argument("--snr_epochs", type=int, default=12)
    parser.add_argument("--iwae_epochs", type=int, default=3)
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--num_rows", type=int, default=10, help="images of the batch of part 2")
    parser.add_argument("--num_repeats", type=int, default=200, help="draws of each gradient")
    args = parsed(
        parser,
        argv,
        data="digits",
        sizes=[2, 4],
        hidden=16,
        epochs=1,
        snr_epochs=1,
        iwae_epochs=1,
        particles=[1, 4],
        num_rows=2,
        num_repeats=3,
        snr_size=4,
    )
    reference = dict(num_samples=5000, reference_particles=2000, num_temperatures=100)
    if args.smoke:
        reference = dict(num_samples=20, reference_particles=10, num_temperatures=3)

    data = load(args.data, args.root)
    curves = sampled_against_analytic(data, args)
    write_json(args.out / "bounds.json", curves)
    write_text(args.out / "bounds.md", bound_table(curves) + "\n")
    print(bound_table(curves))

    x = data.test_rows(args.num_rows)[0].double()
    estimators = [make(k) for k in args.particles for make in (IWAE, DReG)]
    estimators += [DReG(args.particles[-1], prior=True)]
    found = compare(trained_ladder(data, args), x, estimators, num_repeats=args.num_repeats, **reference)
    write_json(args.out / "gradients.json", found)
    plots.save({"bounds": bound_curves(curves), "gradients": plots.gradient_quality(found)}, args.out)
    for title, (heads, rows) in found.tables().items():
        print("\n" + title, *("  ".join(f"{cell:>18}" for cell in row) for row in (heads, *rows)), sep="\n")
    print(f"\nresults: {args.out}")


if __name__ == "__main__":
    script(main)
