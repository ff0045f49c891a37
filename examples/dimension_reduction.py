"""A ladder VAE as a feature extractor, against linear and kernel methods: tables, windows of a time series, outliers.

    python examples/dimension_reduction.py               # seven minutes of one core
    python examples/dimension_reduction.py --smoke       # seconds

Eight features of each row, by PCA, factor analysis, kernel PCA and a two-layer ladder VAE, once with Gaussian and once
with Student-t likelihood. Measured on held-out rows, by cross-validation: the accuracy of a linear classifier on the
features, and, for the methods that are densities, log p(x) in nats. Everything once more with a part of the training
entries replaced by wide noise, the held-out rows staying clean.

Data: two tables that come with scikit-learn, and windows of noisy Van der Pol oscillators, to be told apart by their
nonlinearity at random phase. Finished parts are kept under --out: a table, JSON and two pictures.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from sklearn.base import BaseEstimator, clone
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.decomposition import PCA, FactorAnalysis, KernelPCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pyro_lvae import LadderVAE, LatentFeatures
from pyro_lvae.conditionals import Normal, StudentT
from pyro_lvae.experiments import fixed_settings, parsed, parser_of, read_rows, script, write_rows
from pyro_lvae.results import write_text

CLEAN, CONTAMINATED = "clean", "contaminated"
LIKELIHOODS = {"Gaussian": partial(Normal, min_variance=1e-3), "Student-t": partial(StudentT, min_scale=0.03)}


def oscillators(rows: int, length: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Windows `[rows, 3 length]` of x'' = mu (1 - x^2) x' - x + noise, and which of three mu it was.

    (Van der Pol 1926.) Euler steps of 0.02, a reading every 0.3 by three noisy sensors that mix x and x'; each window
    begins at a random time.
    """
    g, step, every = np.random.default_rng(seed), 0.02, 15
    labels = np.arange(rows) % 3
    mu, state = np.array([0.3, 1.0, 2.0])[labels], g.normal(size=(2, rows))
    burn_in, readings = g.integers(1000, 2000, rows), []
    for _ in range(2000 + every * length):
        x, v = state
        push = mu * (1 - x**2) * v - x
        state = np.stack([x + step * v, v + step * push + 0.2 * step**0.5 * g.normal(size=rows)])
        readings.append(state)
    at = burn_in[:, None] + every * np.arange(length)
    found = np.stack(readings)[at, :, np.arange(rows)[:, None]]  # [rows, length, 2]
    sensors = np.array([[1.0, 0.0, 0.7], [0.0, 1.0, 0.7]])
    windows = found @ sensors + 0.2 * g.normal(size=(rows, length, 3))
    return windows.reshape(rows, -1), labels


def tables(args: Namespace) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{name: rows and labels}."""
    data = {
        "breast cancer": load_breast_cancer(return_X_y=True),
        "wine": load_wine(return_X_y=True),
        "oscillators": oscillators(args.windows),
    }
    return {name: data[name] for name in args.data}


def reducers(args: Namespace, rows: int) -> dict[str, BaseEstimator]:
    """The methods, each with as many features; the ladder's are shared out to its two layers."""
    top = args.features // 4
    sizes = dict(z_dims=(args.features - top, top), hidden_dims=(64, 32), num_hidden=1, batch_norm=False)
    options = dict(
        epochs=max(1, args.steps * args.batch_size // rows),
        batch_size=args.batch_size,
        learning_rate=args.lr,
        num_samples=args.num_samples,
        standardize=False,  # the pipeline does it, for all methods alike
        random_state=args.seed,
    )
    ladders = {
        f"ladder, {name}": LatentFeatures(partial(LadderVAE, likelihood=likelihood, **sizes), **options)
        for name, likelihood in LIKELIHOODS.items()
    }
    return {
        "PCA": PCA(args.features),
        "factor analysis": FactorAnalysis(args.features, random_state=args.seed),
        "kernel PCA": KernelPCA(args.features, kernel="rbf", random_state=args.seed),
        **ladders,
    }


def contaminate(x: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """A part of the entries, at random, replaced by N(m, (10 s)^2), with m and s of their columns."""
    g = np.random.default_rng(seed)
    noise = x.mean(0) + 10 * x.std(0) * g.normal(size=x.shape)
    return np.where(g.random(x.shape) < fraction, noise, x)


def measure(reducer: BaseEstimator, x: np.ndarray, y: np.ndarray, fraction: float, args) -> dict:
    """Accuracy, and nats a row in units of the columns' standard deviations, in each fold."""
    folds = StratifiedKFold(args.folds, shuffle=True, random_state=args.seed)
    found = {"accuracy": [], "log_p": []}
    for train, test in folds.split(x, y):
        scaler = StandardScaler()
        inside = scaler.fit_transform(contaminate(x[train], fraction, args.seed) if fraction else x[train])
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # factor analysis on outliers
            fitted, outside = clone(reducer).fit(inside), scaler.transform(x[test])
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        classifier.fit(fitted.transform(inside), y[train])
        found["accuracy"].append(float(classifier.score(fitted.transform(outside), y[test])))
        if hasattr(fitted, "score_samples"):
            jacobian = np.log(scaler.scale_ / x.std(0)).sum()
            found["log_p"].append(float(fitted.score_samples(outside).mean() - jacobian))
    return found


def table(results: dict) -> str:
    """Markdown: mean and standard deviation over the folds."""
    heads = ["data", "features", "accuracy %", "log p(x), nats", "contaminated: accuracy %", "log p(x), nats"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, of_data in results.items():
        for method in of_data[CLEAN]:
            cells = [name, method]
            for kind in (CLEAN, CONTAMINATED):
                found = of_data[kind][method]
                cells += [_spread([100 * a for a in found["accuracy"]], 1), _spread(found["log_p"], 2)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}" if values else ""


def bars(results: dict) -> Figure:
    """Accuracy and log-density, a column for each data set."""
    figure = Figure(figsize=(3.2 * len(results), 5), layout="constrained")
    axes = figure.subplots(2, len(results), squeeze=False)
    for column, (name, of_data) in zip(axes.T, results.items(), strict=True):
        for ax, quantity in zip(column, ("accuracy", "log_p"), strict=True):
            for shift, kind in ((-0.2, CLEAN), (0.2, CONTAMINATED)):
                found = {m: r[quantity] for m, r in of_data[kind].items() if r[quantity]}
                middle, spread = ([f(v) for v in found.values()] for f in (np.mean, np.std))
                ax.errorbar(np.arange(len(found)) + shift, middle, spread, fmt="o", ms=4, label=kind)
            ax.set_xticks(range(len(found)), found, rotation=40, ha="right", fontsize=7)
            ax.set_title(name, fontsize=9)
        column[0].set_ylabel("accuracy")
        column[1].set_ylabel("held-out log p(x), nats")
    axes[0, 0].legend(frameon=False, fontsize=7)
    return figure


def scatter(data: dict, args: Namespace) -> Figure:
    """First two principal components of the features of all rows, coloured by class."""
    names = list(reducers(args, 100))
    figure = Figure(figsize=(2.1 * len(names), 2.2 * len(data)), layout="constrained")
    for row, (name, (x, y)) in zip(figure.subplots(len(data), len(names), squeeze=False), data.items(), strict=True):
        x = StandardScaler().fit_transform(x)
        for ax, (method, reducer) in zip(row, reducers(args, len(x)).items(), strict=True):
            codes = PCA(2).fit_transform(reducer.fit_transform(x))
            ax.scatter(*codes.T, c=y, cmap="viridis", s=3, linewidths=0)
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"{name}: {method}", fontsize=7)
    return figure


def main(argv: list[str] | None = None) -> dict:
    args = _arguments(argv)
    path = args.out / "results.json"
    settings = fixed_settings(args, "data")
    results, data = read_rows(path, settings), tables(args)
    for name, (x, y) in data.items():
        of_data = results.setdefault(name, {CLEAN: {}, CONTAMINATED: {}})
        for kind, fraction in ((CLEAN, 0.0), (CONTAMINATED, args.fraction)):
            for method, reducer in reducers(args, len(x)).items():
                if method not in of_data[kind]:
                    print(f"{name}, {kind}: {method}", flush=True)
                    of_data[kind][method] = measure(reducer, x, y, fraction, args)
                    write_rows(path, settings, results)
    write_text(args.out / "results.md", table(results) + "\n")
    bars(results).savefig(args.out / "results.png", dpi=120)
    scatter(data, args).savefig(args.out / "features.png", dpi=120)
    print(table(results))
    return results


def _arguments(argv: list[str] | None) -> Namespace:
    parser = parser_of(__doc__, "runs/dimension_reduction", smoke="a few steps, on a few oscillators", data=None)
    parser.add_argument("--data", nargs="+", default=["breast cancer", "wine", "oscillators"])
    parser.add_argument("--windows", type=int, default=900, help="of the oscillators")
    parser.add_argument("--features", type=int, default=8)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--fraction", type=float, default=0.05, help="of the training entries that are replaced")
    parser.add_argument("--steps", type=int, default=800, help="of training")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--num_samples", type=int, default=300, help="importance samples")
    return parsed(parser, argv, data=["oscillators"], windows=60, features=4, folds=2, steps=4, num_samples=5)


if __name__ == "__main__":
    script(main)
