"""A VAE given labels: digits of a class on demand, and the style of one digit given to others.

    python examples/conditional.py --root FOLDER        # MNIST
    python examples/conditional.py --smoke              # seconds, on the embedded digits

Pictures: draws of z_1 decoded under every label, a column a draw; and test digits on the left, their style decoded
under every other label. Style is epsilon in z_1 = mu_p(y) + sigma_p(y) epsilon, which is z_1 itself where p(z_1|y) is
N(0, I). The table has log p(x|y) for both forms of the prior p(z_1|y), and log p(x) of a plain VAE, which is
lower by what a label tells about x.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial

import torch
from matplotlib.figure import Figure
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_lvae import VAE, ConditionalVAE, Dataset, linear, load
from pyro_lvae.experiments import finish_rows, fixed_settings, markdown_rows, parsed, parser_of, script
from pyro_lvae.plots import image_grid, save
from pyro_lvae.results import write_text
from pyro_lvae.runs import trained
from pyro_lvae.traces import evaluating, generate, guide_sites


def models(data: Dataset, args) -> dict:
    """Makers of the structures, by the name of their row."""
    sizes = dict(z_dim=args.z_dim, hidden_dim=args.hidden)
    return {
        "VAE": partial(VAE, data.x_dim, **sizes),
        "ConditionalVAE": partial(ConditionalVAE, data.x_dim, 10, **sizes),
        "ConditionalVAE, p(z|y) learned": partial(ConditionalVAE, data.x_dim, 10, learn_prior=True, **sizes),
    }


def prior(structure: nn.Module, data: Dataset, y: Tensor) -> TorchDistribution:
    """p(z_1|y)."""
    return generate(structure, data.x_test[:1].expand(len(y), -1), {}, y)["z1"][0]


def decoded(structure: nn.Module, data: Dataset, epsilon: Tensor, y: Tensor) -> Tensor:
    """E[x|z, y] at z = mu_p(y) + sigma_p(y) epsilon."""
    p = prior(structure, data, y)
    z = p.mean + p.stddev * epsilon
    return generate(structure, data.x_test[:1].expand(len(y), -1), {"z1": z}, y)["x"][0].mean


def on_demand(structure: nn.Module, data: Dataset, columns: int = 10) -> Figure:
    """A row a label, a column a draw of epsilon ~ N(0, I)."""
    epsilon = torch.randn(columns, structure.z_dim).repeat(10, 1)
    with evaluating(structure):
        x = decoded(structure, data, epsilon, torch.arange(10).repeat_interleave(columns))
    return image_grid(x, data.shape, columns, "a label a row, a draw of epsilon a column")


def transfer(structure: nn.Module, data: Dataset, rows: int = 8) -> Figure:
    """Test data, and the epsilon of the mean of q(z|x, its label) under all labels."""
    x, y = data.x_test[:rows], data.y_test[:rows]
    with evaluating(structure):
        p, z = prior(structure, data, y), guide_sites(structure, x, y)["z1"][0].mean
        epsilon = ((z - p.mean) / p.stddev).repeat_interleave(10, 0)
        made = decoded(structure, data, epsilon, torch.arange(10).repeat(rows))
    pairs = torch.cat([x.unsqueeze(1), made.reshape(rows, 10, -1)], 1).flatten(0, 1)
    return image_grid(pairs, data.shape, 11, "a test digit; its style under the labels 0 to 9")


def row(name: str, make, data: Dataset, args) -> dict:
    """Train one structure, or go on with it; its figures, and pictures where it takes labels."""
    torch.manual_seed(args.seed)
    structure, folder = make(), args.out / name.replace(" ", "_").replace(",", "").replace("|", "_")
    found = trained(
        structure,
        data,
        folder,
        num_samples=args.num_samples,
        num_images=args.num_images,
        epochs=args.epochs,
        batch_size=args.batch_size,
        beta=linear(0, 1, epochs=args.warm_up),
    )
    if isinstance(structure, ConditionalVAE):
        save({"on_demand": on_demand(structure, data), "transfer": transfer(structure, data)}, folder)
    kl = sum(found.kl_per_layer.values())
    return {"test ELBO": found.test_elbo, "test log p": found.test_log_likelihood, "KL": kl}


def main(argv: list[str] | None = None) -> dict:
    args = _arguments(argv)
    data = load(args.data, args.root)
    settings = fixed_settings(args)
    makers = {name: partial(row, name, make, data, args) for name, make in models(data, args).items()}
    rows = finish_rows(args.out / "results.json", settings, makers, tell=print)
    text = markdown_rows("model", rows)
    write_text(args.out / "results.md", text + "\n")
    print(text)
    return rows


def _arguments(argv: list[str] | None) -> Namespace:
    parser = parser_of(__doc__, "runs/conditional", smoke="two epochs of small models on the digits")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--warm_up", type=int, default=5, help="epochs of warm-up")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--z_dim", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=400)
    parser.add_argument("--num_samples", type=int, default=500, help="importance samples")
    parser.add_argument("--num_images", type=int, default=1000, help="test images for the log-likelihood")
    return parsed(parser, argv, data="digits", epochs=2, warm_up=1, z_dim=2, hidden=16, num_samples=5, num_images=20)


if __name__ == "__main__":
    script(main)
