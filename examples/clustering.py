"""Clustering by variational deep embedding, and what simpler models reach (Jiang et al. 2017, table 2).

    python examples/clustering.py --root FOLDER        # MNIST
    python examples/clustering.py --smoke              # seconds, on the embedded digits

Rows: a mixture of Gaussians (scikit-learn) on pixels, on the codes of a VAE, on those of an autoencoder, and on the
latter laid out by UMAP (McConville et al. 2019; `pip install -e '.[clustering]'`); VaDE, which starts from that
autoencoder and the clusters of the layout: for --given_epochs they are given to it, then it trains freely, by which it
moves away from them a little. The autoencoder is VaDE with beta = 0. In the paper VaDE starts from the mixture of the
codes and trains freely at once: `--start mixture --given_epochs 0`. Accuracy of clusters matched to classes by the
Hungarian method; labels are used for nothing else. As in the paper, grey values are taken as probabilities, and the
training set is what is clustered (test accuracy beside it). With `--start labels`, VaDE starts from the classes
instead: no result, but a view of what its objective prefers. Stopped or done, the same command goes on from there;
--seeds names the seeds, and the median over them is printed.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from pyro_lvae import (
    VAE,
    Dataset,
    FusedAdam,
    VaDE,
    cluster_probabilities,
    clustering_accuracy,
    encode,
    fit,
    load,
)
from pyro_lvae.conditionals import Bernoulli
from pyro_lvae.experiments import fixed_settings, markdown, parsed, parser_of, read_rows, script, write_rows
from pyro_lvae.loop import CHECKPOINT
from pyro_lvae.plots import image_grid, pca, save
from pyro_lvae.results import write_json, write_text
from pyro_lvae.traces import fixed_noise, generate

FLOOR = 1e-5  # of variances
PARTS = ("train", "test", "pi", "mu", "sigma2")
Start = dict[str, Tensor]  # clusters of training and test rows, and the parameters of VaDE's mixture


def train(structure: nn.Module, data: Dataset, folder: Path, args, **options) -> None:
    """Train, or finish or read what an earlier call left in `folder`."""
    fit(
        structure,
        data,
        batch_size=args.batch_size,
        optimizer=partial(FusedAdam, lr=args.lr),
        lr_scheduler=partial(StepLR, step_size=args.step_size, gamma=0.9),
        precision=args.precision,
        out=folder,
        resume=(folder / CHECKPOINT).exists(),
        **options,
    )


def mixture_of(codes: Tensor, num_clusters: int, seed: int, covariances: str = "diag") -> GaussianMixture:
    """The likeliest mixture of five starts."""
    mixture = GaussianMixture(num_clusters, covariance_type=covariances, n_init=5, random_state=seed, reg_covar=FLOOR)
    return mixture.fit(codes.numpy())


def clusters_of(mixture: GaussianMixture, *codes: Tensor) -> list[Tensor]:
    return [torch.from_numpy(mixture.predict(part.numpy())) for part in codes]


def from_mixture(train: Tensor, test: Tensor, num_clusters: int, seed: int) -> Start:
    """The mixture of the codes (section 3.3 of Jiang et al.)."""
    mixture = mixture_of(train, num_clusters, seed)
    parameters = map(torch.from_numpy, (mixture.weights_, mixture.means_, mixture.covariances_))
    return dict(zip(PARTS, (*clusters_of(mixture, train, test), *parameters), strict=True))


def from_neighbours(train: Tensor, test: Tensor, num_clusters: int, seed: int) -> Start:
    """The mixture of a layout by UMAP, which draws near neighbours together, set as McConville et al. (2019) do."""
    from umap import UMAP

    num_threads = torch.get_num_threads()
    layout = UMAP(n_neighbors=20, n_components=num_clusters, min_dist=0.0, random_state=seed, n_jobs=1)
    laid_out = [
        torch.from_numpy(found) for found in (layout.fit_transform(train.numpy()), layout.transform(test.numpy()))
    ]
    torch.set_num_threads(num_threads)  # which UMAP sets to all there are
    return from_clusters(
        train, *clusters_of(mixture_of(laid_out[0], num_clusters, seed, "full"), *laid_out), num_clusters
    )


def from_clusters(codes: Tensor, train: Tensor, test: Tensor, num_clusters: int) -> Start:
    """pi, mu and sigma^2 of the codes of each cluster.

    Raises:
        ValueError: a cluster has no rows.
    """
    counts = torch.bincount(train, minlength=num_clusters)
    if (counts == 0).any():
        raise ValueError(f"clusters {(counts == 0).nonzero().flatten().tolist()} have no rows; lower --num_clusters")
    of = [codes[train == c] for c in range(num_clusters)]
    means = torch.stack([part.mean(0) for part in of])
    variances = torch.stack([part.var(0, correction=0) for part in of]) + FLOOR
    return dict(zip(PARTS, (train, test, counts / len(codes), means, variances), strict=True))


def kept(path: Path, make: Callable[[], Start]) -> Start:
    """A start that is in a file already, or is made and written to it."""
    if not path.exists():
        write_json(path, {name: value.tolist() for name, value in make().items()})
    return {name: torch.tensor(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}


def accuracies(train: Tensor, test: Tensor, data: Dataset) -> dict:
    return {"train": clustering_accuracy(train, data.y_train), "test": clustering_accuracy(test, data.y_test)}


def codes_of(structure: nn.Module, data: Dataset) -> tuple[Tensor, Tensor]:
    """Posterior means of z_1 for training and test data."""
    return tuple(encode(structure, x, 1)["z1"] for x in (data.x_train, data.x_test))


def of_codes(train: Tensor, test: Tensor, data: Dataset, *options) -> dict:
    """Accuracies of a mixture fitted to training codes."""
    return accuracies(*clusters_of(mixture_of(train, *options), train, test), data)


def of_vade(vade: VaDE, data: Dataset) -> dict:
    """Accuracies of argmax_c q(c|x)."""
    with fixed_noise(data.x_train.device):
        return accuracies(*(cluster_probabilities(vade, x).argmax(-1) for x in (data.x_train, data.x_test)), data)


@torch.no_grad()
def pictures(vade: VaDE, data: Dataset) -> dict:
    """Ten draws of each cluster, one cluster a row, and the codes by class."""
    components = vade.prior().component_distribution
    z = components.sample((10,)).transpose(0, 1).flatten(0, 1)
    x = generate(vade.eval(), data.x_test[:1].expand(len(z), -1), {"z1": z})["x"][0].mean
    drawn = image_grid(x, data.shape, 10, "draws of p(z|c), decoded; a cluster a row")
    return {"clusters": drawn, "codes": pca(encode(vade, data.x_test[:2000], 1), data.y_test[:2000])}


def run(seed: int, data: Dataset, args, rows: dict, keep) -> None:
    """All rows of one seed."""
    folder, k = args.out / f"seed-{seed}", args.num_clusters
    sizes = dict(num_clusters=k, z_dim=args.z_dim, hidden_dims=tuple(args.hidden))

    def row(name: str, make) -> None:
        if f"{name}, seed {seed}" not in rows:
            rows[f"{name}, seed {seed}"] = make()
            keep()

    pixels = data.x_train[: args.num_pixels]
    if seed == args.seeds[0]:
        row("GMM", lambda: of_codes(pixels, data.x_test, _first(data, len(pixels)), k, seed))
    torch.manual_seed(seed)
    grey = dict(likelihood=partial(Bernoulli, grey=True), activation=nn.ReLU, batch_norm=False)
    vae = VAE(data.x_dim, args.z_dim, args.vae_hidden, **grey)
    if args.vae_epochs:
        train(vae, data, folder / "vae", args, epochs=args.vae_epochs)
        row("VAE + GMM", lambda: of_codes(*codes_of(vae, data), data, k, seed))
    torch.manual_seed(seed)
    vade = VaDE(data.x_dim, **sizes, **grey)
    train(vade, data, folder / "autoencoder", args, epochs=args.pretrain_epochs, beta=0)
    codes = codes_of(vade, data)
    start = kept(folder / "mixture.json", lambda: from_mixture(*codes, k, seed))
    row("AE + GMM", lambda: accuracies(start["train"], start["test"], data))
    if args.start == "neighbours":
        start = kept(folder / "neighbours.json", lambda: from_neighbours(*codes, k, seed))
        row("AE + UMAP + GMM", lambda: accuracies(start["train"], start["test"], data))
    if args.start == "labels":
        start = from_clusters(codes[0], data.y_train, data.y_test, k)
    vade.put_clusters(*(start[name] for name in PARTS[2:]))
    if args.given_epochs:
        given = replace(data, y_train=start["train"], y_test=start["test"])
        train(vade, given, folder / "given", args, epochs=args.given_epochs, supervised=True)
        row("VaDE, clusters given", lambda: of_vade(vade, data))
    train(vade, data, folder / "vade", args, epochs=args.epochs)
    row("VaDE", lambda: of_vade(vade, data))
    save(pictures(vade, data), folder)


def _first(data: Dataset, count: int) -> Dataset:
    return Dataset(data.name, data.x_train[:count], data.x_test, data.y_train[:count], data.y_test, data.shape)


def table(rows: dict[str, dict]) -> str:
    """Medians over the seeds, in %."""
    names = dict.fromkeys(name.split(", seed")[0] for name in rows)
    lines = []
    for name in names:
        of_seeds = [r for key, r in rows.items() if key.split(", seed")[0] == name]
        cells = [f"{100 * median(r[part] for r in of_seeds):.2f}" for part in ("train", "test")]
        lines.append([name, *cells, str(len(of_seeds))])
    return markdown(["model", "accuracy (train) %", "accuracy (test) %", "seeds"], lines)


def main(argv: list[str] | None = None) -> dict:
    args = _arguments(argv)
    data = load(args.data, args.root, binarize=False)
    if data.y_train is None or data.y_test is None:
        raise SystemExit(f"{data.name} has no labels to match clusters to")
    settings = fixed_settings(args, "seeds")
    path = args.out / "results.json"
    rows = read_rows(path, settings)
    for seed in args.seeds:
        run(seed, data, args, rows, lambda: write_rows(path, settings, rows))
    write_text(args.out / "results.md", table(rows) + "\n")
    print(table(rows))
    return rows


def _arguments(argv: list[str] | None) -> Namespace:
    parser = parser_of(__doc__, "runs/clustering", smoke="a few epochs of small models on the digits", seed=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--start", default="neighbours", choices=["neighbours", "mixture", "labels"], help="where VaDE's clusters begin"
    )
    parser.add_argument("--num_clusters", type=int, default=10)
    parser.add_argument("--z_dim", type=int, default=10)
    parser.add_argument("--hidden", type=int, nargs="+", default=[500, 500, 2000], help="widths of the encoder")
    parser.add_argument("--pretrain_epochs", type=int, default=30, help="of the autoencoder")
    parser.add_argument("--given_epochs", type=int, default=15, help="of VaDE with the clusters of its start given")
    parser.add_argument("--epochs", type=int, default=25, help="of VaDE after them")
    parser.add_argument("--vae_epochs", type=int, default=20, help="of the VAE; 0 leaves its row out")
    parser.add_argument("--vae_hidden", type=int, default=500)
    parser.add_argument("--num_pixels", type=int, default=10000, help="rows for the mixture on pixels")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--step_size", type=int, default=1, help="epochs after which the learning rate falls by a tenth"
    )
    parser.add_argument("--precision", default="float32", choices=["float32", "tf32", "bfloat16"], help="of training")
    has_umap = find_spec("umap") is not None
    args = parsed(
        parser,
        argv,
        data="digits",
        seeds=[0],
        hidden=[32, 32],
        z_dim=4,
        vae_hidden=32,
        num_pixels=300,
        pretrain_epochs=3,
        given_epochs=2,
        epochs=3,
        vae_epochs=2,
        **({} if has_umap else {"start": "mixture"}),
    )
    if args.start == "neighbours" and not has_umap:
        parser.error("--start neighbours needs umap-learn: pip install -e '.[clustering]', or take --start mixture")
    return args


if __name__ == "__main__":
    script(main)
