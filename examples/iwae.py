"""Importance-weighted autoencoders: one and two latent layers, k = 1, 5, 50, by four bounds.

    python examples/iwae.py --root FOLDER        # MNIST, eight stages, 3,280 epochs a model
    python examples/iwae.py --root FOLDER --stages 2 --batch_size 100 --particles 1 5 --out runs/short
    python examples/iwae.py --smoke              # seconds, on the embedded digits

Burda et al. (2016, table 1 and section 5): the VAE's bound averaged over k draws, and the importance-weighted bound
of k draws (IWAE); beside them the Renyi bound of order 1/2 (Li & Turner 2016), and the doubly reparameterized
gradient of IWAE's bound (DReG; Tucker et al. 2019). A stage i of 1 ... 8 has 3^(i-1) epochs at the learning rate
0.001 * 10^(-(i-1)/7), rounded to 1e-4. As in the authors' code p(x|z) starts at the mean of the data. On test images:
the ELBO, the importance-weighted bound L_k of as many draws as in training, -log p(x) by importance sampling, and units
of each layer whose posterior mean varies. With one draw the four bounds are one. Each row has a run folder under --out;
stopped or done, the same command goes on.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from pyro_lvae import IWAE, Dataset, DReG, FusedAdam, HierarchicalVAE, Renyi, SampledELBO, load
from pyro_lvae.conditionals import Bernoulli
from pyro_lvae.evaluate import log_likelihood
from pyro_lvae.experiments import finish_rows, markdown_rows, parsed, parser_of, script
from pyro_lvae.results import write_text
from pyro_lvae.runs import trained

BOUNDS = {"VAE": SampledELBO, "IWAE": IWAE, "DReG": DReG, "Renyi 1/2": partial(Renyi, 0.5)}


def learning_rate(epoch: int, stages: int) -> float:
    """Of an epoch, counted from 0, as a multiple of the first stage's; the last stage's from its end on."""
    stage = next((i for i in range(stages) if epoch < (3 ** (i + 1) - 1) // 2), stages - 1)
    return round(10 ** (1 - stage / 7), 1) / 10


def make(layers: int, data: Dataset, args) -> nn.Module:
    """The published networks: tanh, two hidden layers between each two latent ones, p(x|z) from the data's mean on."""
    sizes = dict(z_dims=args.z_dims[-layers:], hidden_dims=args.hidden_dims[:layers])
    likelihood = Bernoulli if args.no_mean else partial(Bernoulli, mean=data.x_train.mean(0))
    return HierarchicalVAE(data.x_dim, **sizes, likelihood=likelihood, batch_norm=False, activation=nn.Tanh)


def row(bound: str, k: int, layers: int, data: Dataset, args) -> dict:
    """Train one model, or go on with it; its figures."""
    torch.manual_seed(args.seed)
    structure = make(layers, data, args)
    found = trained(
        structure,
        data,
        args.out / f"{bound.replace(' 1/2', '')}-{k}-{layers}",
        num_samples=args.num_samples,
        num_images=args.num_images,
        estimator=BOUNDS[bound](num_particles=k),
        epochs=(3**args.stages - 1) // 2,
        batch_size=args.batch_size,
        precision=args.precision,
        optimizer=partial(FusedAdam, lr=1e-3, eps=1e-4),
        lr_scheduler=partial(LambdaLR, lr_lambda=partial(learning_rate, stages=args.stages)),
    )
    images = data.x_test if args.num_images is None else data.test_rows(args.num_images)[0]
    torch.manual_seed(args.seed)  # the same noise for every model
    active = [f"{found.active_units[name]} of {size}" for name, size in found.units.items()]
    return {
        "test ELBO": found.test_elbo,
        "test L_k": log_likelihood(structure, images, k).mean().item(),
        "-log p(x)": -found.test_log_likelihood,
        "active units": ", ".join(active),
        "seconds": found.seconds,
    }


def main(argv: list[str] | None = None) -> dict[str, dict]:
    args = _arguments(argv)
    data = load(args.data, args.root)
    settings = {
        k: v for k, v in vars(args).items() if k not in ("out", "root", "bounds", "particles", "layers", "smoke")
    }
    makers: dict[str, Callable[[], dict]] = {}
    for layers in args.layers:
        for k in args.particles:
            for bound in args.bounds if k > 1 else args.bounds[:1]:
                name = f"{bound}, k = {k}, L = {layers}"
                makers[name] = partial(row, bound, k, layers, data, args)
    rows = finish_rows(args.out / "results.json", settings, makers, tell=print)
    table = markdown_rows("model", {name: rows[name] for name in makers}, {"seconds": 0})
    write_text(args.out / "results.md", table + "\n")
    print(table)
    return rows


def _arguments(argv: list[str] | None) -> Namespace:
    parser = parser_of(__doc__, "runs/iwae", smoke="one epoch of small models on the digits")
    parser.add_argument("--bounds", nargs="+", default=list(BOUNDS), choices=list(BOUNDS))
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 5, 50], help="k")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2], choices=(1, 2))
    parser.add_argument(
        "--z_dims", type=int, nargs=2, default=[100, 50], help="units of z1, z2; one layer has the last"
    )
    parser.add_argument("--hidden_dims", type=int, nargs=2, default=[200, 100], help="widths of the MLPs")
    parser.add_argument("--no_mean", action="store_true", help="start p(x|z) at 1/2, not at the mean of the data")
    parser.add_argument("--stages", type=int, default=8, choices=range(1, 9))
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--precision", default="float32", choices=["float32", "tf32", "bfloat16"], help="of training")
    parser.add_argument("--num_samples", type=int, default=5000, help="importance samples of log p(x)")
    parser.add_argument("--num_images", type=int, default=None, help="test images for log p(x); all if left out")
    return parsed(
        parser,
        argv,
        data="digits",
        stages=1,
        batch_size=200,
        z_dims=[4, 2],
        hidden_dims=[16, 8],
        particles=[1, 3],
        layers=[2],
        num_samples=5,
        num_images=20,
    )


if __name__ == "__main__":
    script(main)
