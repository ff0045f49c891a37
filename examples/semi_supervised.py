"""MNIST with 100 labels: M1+M2 (Kingma et al. 2014), ADGM and SDGM (Maaloe et al. 2016), and a classifier alone.

    python examples/semi_supervised.py --root FOLDER        # three splits of each
    python examples/semi_supervised.py --smoke              # seconds, on the embedded digits

A split is which 100 training images keep their labels, ten of each class. M1 is a VAE of all images; M2, a
`SemiSupervisedVAE` with a Normal likelihood, learns on its codes. ADGM and SDGM learn on the images. The classifier
(logistic regression) sees the 100 labelled images alone. Error on all test images. Labelled images are repeated until
they are a tenth of an epoch, so that steps on them are not rare. Finished splits are kept under --out; each has a run
folder with report.html, and stopped ones go on.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from pyro_lvae import (
    ADGM,
    SDGM,
    VAE,
    Dataset,
    SemiSupervisedVAE,
    encode,
    few_labels,
    label_probabilities,
    load,
    sample_prior,
)
from pyro_lvae.conditionals import Normal
from pyro_lvae.experiments import fixed_settings, markdown_rows, parsed, parser_of, read_rows, script, write_rows
from pyro_lvae.plots import image_grid, save
from pyro_lvae.results import write_text
from pyro_lvae.runs import trained

CODES = 50  # size of M1's codes


def train(structure, data: Dataset, folder: Path, args, epochs: int):
    """Train, or go on with what is in `folder`."""
    trained(
        structure,
        data,
        folder,
        num_samples=args.num_samples,
        num_images=args.num_images,
        epochs=epochs,
        batch_size=args.batch_size,
    )
    return structure


def error(probabilities: Tensor, y: Tensor) -> float:
    """Share of rows whose most probable label is wrong, in percent."""
    return 100 * (probabilities.argmax(-1) != y).float().mean().item()


def codes_of(data: Dataset, folder: Path, args) -> Dataset:
    """The codes that M1 gives to all images, standardised; labels as they are."""
    torch.manual_seed(0)
    plain = Dataset(data.name, data.x_train, data.x_test, shape=data.shape, binarize=data.binarize)
    m1 = VAE(data.x_dim, args.z_dim or CODES, args.hidden_dim)
    m1 = train(m1, plain, folder, args, args.epochs_m1)
    train_codes, test_codes = (encode(m1, x, 1)["z1"] for x in (data.train_rows(len(data.x_train))[0], data.x_test))
    loc, scale = train_codes.mean(0), train_codes.std(0)
    active = scale > 0.05  # dead units have no code
    return Dataset(
        f"{data.name}-codes",
        ((train_codes - loc) / scale)[:, active],
        ((test_codes - loc) / scale)[:, active],
        data.y_train,
        data.y_test,
    )


def rows_of(data: Dataset, codes: Callable[[], Dataset], args) -> dict[str, Callable[[int, Path], float]]:
    """{row: (split, folder) -> test error in percent}."""
    few = partial(few_labels, count=args.labels, share=args.share)
    num_classes = int(data.y_train.max()) + 1
    sizes = dict(num_classes=num_classes, z_dim=args.z_dim or CODES, hidden_dim=args.hidden_dim)

    def alpha(usual: float) -> float:
        return usual if args.alpha is None else args.alpha

    def classifier(split: int, folder: Path) -> float:
        part = few_labels(data, args.labels, seed=split)
        known = part.y_train >= 0
        regression = LogisticRegression(max_iter=5000)
        regression.fit(part.x_train[known].numpy(), part.y_train[known].numpy())
        return error(torch.as_tensor(regression.predict_proba(data.x_test.numpy())), data.y_test)

    def m2(split: int, folder: Path) -> float:
        part = few(codes(), seed=split)
        torch.manual_seed(split)
        likelihood = partial(Normal, min_variance=1e-2)
        structure = SemiSupervisedVAE(part.x_dim, likelihood=likelihood, **sizes, alpha=alpha(1.0))
        structure = train(structure, part, folder, args, args.epochs_m2)
        return error(label_probabilities(structure, part.x_test, 1), part.y_test)

    def auxiliary(cls, split: int, folder: Path) -> float:
        part = few(data, seed=split)
        torch.manual_seed(split)
        structure = train(cls(data.x_dim, **sizes, alpha=alpha(50.0)), part, folder, args, args.epochs)
        like, y = data.x_test[:1], torch.arange(num_classes).repeat_interleave(10)
        save({"by_label": image_grid(sample_prior(structure, len(y), like, y=y), data.shape, columns=10)}, folder)
        return error(label_probabilities(structure, data.x_test, 10), data.y_test)

    return {"classifier": classifier, "M1+M2": m2, "ADGM": partial(auxiliary, ADGM), "SDGM": partial(auxiliary, SDGM)}


def main(argv: list[str] | None = None) -> dict:
    args = _arguments(argv)
    data = load(args.data, args.root)
    settings = fixed_settings(args, "rows", "splits")
    path, kept = args.out / "results.json", {}

    def codes() -> Dataset:
        if "codes" not in kept:
            kept["codes"] = codes_of(data, args.out / "M1", args)
        return kept["codes"]

    rows = read_rows(path, settings)
    for name, run in rows_of(data, codes, args).items():
        for split in args.splits if name in args.rows else ():
            key = f"split {split}"
            if key not in rows.setdefault(name, {}):
                print(name, key, flush=True)
                rows[name][key] = run(split, args.out / f"{name}-{split}")
                write_rows(path, settings, rows)
    table = markdown_rows("model, test error in %", {name: _with_mean(found) for name, found in rows.items() if found})
    write_text(args.out / "results.md", table + "\n")
    print(table)
    return rows


def _with_mean(found: dict[str, float]) -> dict[str, float]:
    values = list(found.values())
    return found | {"mean": mean(values), "standard deviation": stdev(values) if len(values) > 1 else 0.0}


def _arguments(argv: list[str] | None) -> Namespace:
    names = ["classifier", "M1+M2", "ADGM", "SDGM"]
    parser = parser_of(__doc__, "runs/semi_supervised", smoke="small models on the digits", seed=None)
    parser.add_argument("--rows", nargs="+", default=names, choices=names)
    parser.add_argument("--splits", nargs="+", type=int, default=[0, 1, 2], help="seeds of the splits")
    parser.add_argument("--labels", type=int, default=100)
    parser.add_argument("--share", type=float, default=0.1, help="of rows with a label in an epoch")
    weight = "weight of log q(y|x) of each such row; 1 for M2 and 50 for the others if left out"
    parser.add_argument("--alpha", type=float, default=None, help=weight)
    parser.add_argument("--z_dim", type=int, default=None, help="size of the codes; 50 if left out")
    parser.add_argument("--hidden_dim", type=int, default=500)
    parser.add_argument("--epochs_m1", type=int, default=40)
    parser.add_argument("--epochs_m2", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=100, help="of ADGM and SDGM")
    parser.add_argument("--batch_size", type=int, default=200)
    parser.add_argument("--num_samples", type=int, default=100, help="importance samples of the reports")
    parser.add_argument("--num_images", type=int, default=200, help="test rows for them")
    return parsed(
        parser,
        argv,
        data="digits",
        splits=[0],
        z_dim=4,
        hidden_dim=16,
        epochs_m1=3,
        epochs_m2=3,
        epochs=2,
        num_samples=3,
        num_images=20,
    )


if __name__ == "__main__":
    script(main)
