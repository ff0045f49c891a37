"""log p(x) of a ladder VAE as a score of anomalies, against detectors of scikit-learn.

    python examples/anomaly_detection.py --root FOLDER       # four minutes of one core
    python examples/anomaly_detection.py                     # the tables alone
    python examples/anomaly_detection.py --smoke             # seconds, on one table

Each detector is trained on normal rows alone and scores held-out normal rows and anomalies; the AUROC is the
probability that an anomaly scores below a normal row (50 %: by chance). Three kinds of data:

    breast cancer   benign rows are normal, malignant ones anomalies
    digits          8x8 digits that come with scikit-learn, one class left out in turn
    mnist           one digit left out in turn; looked for in --root

Simple images have a high density whatever the model was trained on (Nalisnick et al. 2019): with the digit 1 left out,
the score points the wrong way.

The ladders are trained anew for each; on MNIST they see the images as black and white, the other detectors as grey.
Tables are split several times, and the standard deviation is that over the splits. Finished parts are kept under --out:
a table, JSON and histograms of the scores.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from sklearn.base import BaseEstimator
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from pyro_lvae import LadderVAE, LatentFeatures, load
from pyro_lvae.conditionals import Bernoulli, Normal, StudentT
from pyro_lvae.experiments import fixed_settings, parsed, parser_of, read_rows, script, write_rows
from pyro_lvae.results import write_text

Task = tuple[np.ndarray, np.ndarray, np.ndarray]  # normal rows to train on, to test on; anomalies


class ReconstructionError(BaseEstimator):
    """Minus the squared distance to the nearest point of the plane of the first principal components."""

    def __init__(self, n_components: int = 8):
        self.n_components = n_components

    def fit(self, X, y=None) -> ReconstructionError:
        self.pca_ = PCA(self.n_components).fit(X)
        return self

    def score_samples(self, X) -> np.ndarray:
        return -np.square(X - self.pca_.inverse_transform(self.pca_.transform(X))).sum(1)


def detectors(args: Namespace, rows: int, is_image: bool) -> dict[str, BaseEstimator]:
    """What scores normal rows high: each has `fit` and `score_samples`."""
    likelihoods = {"Gaussian": partial(Normal, min_variance=1e-3), "Student-t": partial(StudentT, min_scale=0.03)}
    sizes = dict(z_dims=(6, 2), hidden_dims=(64, 32), num_hidden=1, batch_norm=False)
    options = dict(batch_size=64, learning_rate=1e-2, num_samples=args.num_samples, random_state=args.seed)
    if is_image:
        likelihoods, sizes = {"Bernoulli": Bernoulli}, dict(z_dims=(32, 16), hidden_dims=(256, 128))
        options |= dict(batch_size=128, learning_rate=2e-3, standardize=False)
    options["epochs"] = max(1, (args.image_steps if is_image else args.steps) * options["batch_size"] // rows)
    ladders = {
        f"ladder, {name}": LatentFeatures(partial(LadderVAE, likelihood=likelihood, **sizes), **options)
        for name, likelihood in likelihoods.items()
    }
    if is_image:
        black = FunctionTransformer(_black_and_white)
        ladders = {name: make_pipeline(black, ladder) for name, ladder in ladders.items()}
    return {
        **ladders,
        "isolation forest": IsolationForest(random_state=args.seed),
        "local outlier factor": _scaled(LocalOutlierFactor(novelty=True), is_image),
        "PCA reconstruction": _scaled(ReconstructionError(32 if is_image else 8), is_image),
    }


def _black_and_white(x: np.ndarray) -> np.ndarray:
    return (x > 0.5).astype(x.dtype)


def _scaled(detector: BaseEstimator, is_image: bool) -> BaseEstimator:
    return detector if is_image else make_pipeline(StandardScaler(), detector)


def tasks(args: Namespace) -> dict[str, list[Task]]:
    """{name: one task a split}."""
    x, y = load_breast_cancer(return_X_y=True)
    found = {"breast cancer": [split(x, y == 0, seed) for seed in range(args.splits)]}
    x, y = load_digits(return_X_y=True)
    found |= {f"digits, {c}": [split(x, y == c, seed) for seed in range(args.splits)] for c in args.classes}
    if args.root is not None:
        found |= {f"mnist, {c}": [mnist(args, c)] for c in args.digits}
    return found


def split(x: np.ndarray, is_anomaly: np.ndarray, seed: int) -> Task:
    """Two thirds of the normal rows to train on, the others and all anomalies to test on."""
    normal = np.random.default_rng(seed).permutation(x[~is_anomaly])
    cut = 2 * len(normal) // 3
    return normal[:cut], normal[cut:], x[is_anomaly]


def mnist(args: Namespace, anomaly: int) -> Task:
    """The first so many training images of other digits; test images of both kinds."""
    data = load("mnist", args.root, binarize=False)
    odd, odd_test = data.y_train == anomaly, data.y_test == anomaly
    train, tests = data.x_train[~odd][: args.images], (data.x_test[~odd_test], data.x_test[odd_test])
    return train.numpy(), *(x[: args.test_images].numpy() for x in tests)


def measure(detector: BaseEstimator, task: Task) -> dict:
    """The AUROC, and the scores themselves for the histograms."""
    train, normal, anomalies = task
    detector.fit(train)
    scores = [detector.score_samples(x) for x in (normal, anomalies)]
    labels = np.repeat([0, 1], [len(normal), len(anomalies)])
    return {"auroc": float(roc_auc_score(labels, -np.concatenate(scores))), "scores": [s.tolist() for s in scores]}


def table(results: dict) -> str:
    """Markdown: AUROC in %, mean and standard deviation over the splits where there are several."""
    methods = list(dict.fromkeys(method for of_task in results.values() for method in of_task))
    lines = ["| anomaly | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for name, of_task in results.items():
        cells = [_spread([100 * r["auroc"] for r in of_task.get(method, [])]) for method in methods]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values):.1f}" if len(values) > 1 else "")


def histograms(results: dict) -> Figure:
    """Scores of normal rows and anomalies in the first split; the lowest hundredth falls into the first bar."""
    columns = max(len(of_task) for of_task in results.values())
    figure = Figure(figsize=(2.4 * columns, 1.6 * len(results)), layout="constrained")
    for row, (name, of_task) in zip(
        figure.subplots(len(results), columns, squeeze=False), results.items(), strict=True
    ):
        for ax in row:
            ax.set_axis_off()
        for ax, (method, found) in zip(row, of_task.items(), strict=False):
            ax.set_axis_on()
            normal, anomalies = map(np.array, found[0]["scores"])
            both = np.concatenate([normal, anomalies])
            bins = np.linspace(np.percentile(both, 1), both.max(), 40)
            for scores, label in ((normal, "normal"), (anomalies, "anomaly")):
                ax.hist(np.clip(scores, bins[0], None), bins, density=True, alpha=0.6, label=label)
            ax.set(yticks=[])
            ax.tick_params(labelsize=6)
            ax.set_title(f"{name}: {method}, {100 * found[0]['auroc']:.0f} %", fontsize=7)
    figure.axes[0].legend(frameon=False, fontsize=6)
    return figure


def main(argv: list[str] | None = None) -> dict:
    args = _arguments(argv)
    path = args.out / "results.json"
    settings = fixed_settings(args, "classes", "digits")
    results = read_rows(path, settings)
    for name, splits in tasks(args).items():
        of_task = results.setdefault(name, {})
        for method, detector in detectors(args, len(splits[0][0]), name.startswith("mnist")).items():
            if method not in of_task:
                print(f"{name}: {method}", flush=True)
                of_task[method] = [measure(detector, task) for task in splits]
                write_rows(path, settings, results)
    write_text(args.out / "results.md", table(results) + "\n")
    histograms(results).savefig(args.out / "scores.png", dpi=120)
    print(table(results))
    return results


def _arguments(argv: list[str] | None) -> Namespace:
    parser = parser_of(__doc__, "runs/anomaly_detection", smoke="a few steps, on one table", data=None)
    parser.add_argument("--root", default=None, help="folder of MNIST; left out, the tables alone")
    parser.add_argument("--classes", type=int, nargs="*", default=[0, 1, 8], help="of the 8x8 digits, left out in turn")
    parser.add_argument("--digits", type=int, nargs="*", default=[0, 1, 8], help="of MNIST, left out in turn")
    parser.add_argument("--splits", type=int, default=3, help="of each table")
    parser.add_argument("--images", type=int, default=10_000, help="of MNIST to train on")
    parser.add_argument("--test_images", type=int, default=800, help="of each kind")
    parser.add_argument("--steps", type=int, default=400, help="of training, on tables")
    parser.add_argument("--image_steps", type=int, default=500, help="of training, on MNIST")
    parser.add_argument("--num_samples", type=int, default=50, help="importance samples")
    return parsed(parser, argv, classes=[], splits=1, steps=4, num_samples=5)


if __name__ == "__main__":
    script(main)
