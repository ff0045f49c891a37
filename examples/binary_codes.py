"""Nearly binary codes, read off as bits: what they cost and what they lose.

    python examples/binary_codes.py --root FOLDER        # MNIST
    python examples/binary_codes.py --smoke              # seconds, on the embedded digits

Three priors with mass near 0 and 1 (a Beta with a, b < 1; two narrow Gaussians; a relaxed Bernoulli variable) and a
sparse one, a relaxed Bernoulli that is 1 in a tenth of the cases. A datum's code is q(z|x), truncated. Rate: bits by an
ideal code for units apart; distortion: -log p(x|code) in nats, and the squared error a pixel. Beside them the bound and
log p(x) of the model itself, without truncation.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial

import torch
from torch import Tensor

from pyro_lvae import Dataset, SparseVAE, linear, load, rate_distortion
from pyro_lvae.experiments import fixed_settings, markdown_rows, parsed, parser_of, read_rows, script, write_rows
from pyro_lvae.plots import image_grid, save
from pyro_lvae.results import write_text
from pyro_lvae.runs import trained
from pyro_lvae.structures.sparse import BetaCode, RelaxedBernoulliCode, TwoGaussiansCode
from pyro_lvae.traces import evaluating

CODES = {
    "Beta(0.5, 0.5)": BetaCode,
    "two Gaussians": TwoGaussiansCode,
    "relaxed Bernoulli": RelaxedBernoulliCode,
    "relaxed Bernoulli, a tenth ones": partial(RelaxedBernoulliCode, rate=0.1),
}


def row(name: str, data: Dataset, args) -> tuple[dict, Tensor]:
    """Train one structure, or go on with it; its figures, and test data decoded from bits."""
    torch.manual_seed(args.seed)
    folder = args.out / "".join(c if c.isalnum() else "_" for c in name)
    structure = SparseVAE(data.x_dim, args.z_dim, args.hidden, code=CODES[name])
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
    bits = rate_distortion(structure, data.x_test)
    with evaluating(structure):
        decoded = structure.decode(structure.codes(data.x_test[:10])).mean
    figures = {
        "bits": bits.size,
        "rate (bits)": bits.rate,
        "distortion (nats)": bits.distortion,
        "squared error": bits.mse,
        "ones": bits.ones,
        "test ELBO": found.test_elbo,
        "test log p(x)": found.test_log_likelihood,
    }
    return figures, decoded


def main(argv: list[str] | None = None) -> dict:
    args = _arguments(argv)
    data = load(args.data, args.root)
    settings = fixed_settings(args)
    path = args.out / "results.json"
    rows, shown = read_rows(path, settings), [data.x_test[:10]]
    for name in CODES:
        rows[name], decoded = row(name, data, args)
        shown.append(decoded)
        write_rows(path, settings, rows)
    save({"decoded": image_grid(torch.cat(shown), data.shape, 10, "data; decoded from bits, a prior a row")}, args.out)
    table = markdown_rows("prior", rows, {"bits": 0, "squared error": 4, "rate (bits)": 1})
    write_text(args.out / "results.md", table + "\n")
    print(table)
    return rows


def _arguments(argv: list[str] | None) -> Namespace:
    parser = parser_of(__doc__, "runs/binary_codes", smoke="two epochs of small models on the digits")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--warm_up", type=int, default=5, help="epochs of warm-up")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--z_dim", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=400)
    parser.add_argument("--num_samples", type=int, default=500, help="importance samples")
    parser.add_argument("--num_images", type=int, default=1000, help="test images for the log-likelihood")
    return parsed(parser, argv, data="digits", epochs=2, warm_up=1, z_dim=4, hidden=16, num_samples=5, num_images=20)


if __name__ == "__main__":
    script(main)
