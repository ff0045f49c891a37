"""What is done with a trained run, and what there is to choose from."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import plots
from ..bayes import POSTERIORS, PRIORS, BayesianWeights
from ..conditionals import Bernoulli, Normal, StudentT
from ..data import DATASETS
from ..evaluate import sample_prior
from ..objectives import ESTIMATORS
from ..results import Summary
from ..structures import STRUCTURES
from ..structures.denoising import CORRUPTIONS
from ..structures.flows import FLOWS
from ..structures.sparse import CODES
from ..words import BagOfWords
from .training import open_run, print_summary

LIKELIHOODS = (Bernoulli, Normal, StudentT, BagOfWords)


def evaluate(
    run: str, num_samples: int = 5000, num_images: int | None = None, seed: int = 0, device: str | None = None
) -> Summary:
    """Evaluate a trained run anew: ELBO, importance-sampled log p(x), KL and active units per layer.

    Args:
        run: the run folder; its summary.json and report.html are renewed.
        num_samples: importance samples of the log-likelihood.
        num_images: test images taken for it, spread evenly over the set; left out, all.
        seed: of the random numbers.
        device: left out, CUDA where there is one.
    """
    opened = open_run(run, device)
    torch.manual_seed(seed)
    summary = opened.evaluate(num_samples, num_images)
    print_summary(summary, opened.report())
    return summary


def report(run: str, seed: int = 0, device: str | None = None) -> Path:
    """Draw the pictures of a trained run and write its report.html.

    Args:
        run: the run folder.
        seed: of the random numbers in the pictures.
        device: left out, CUDA where there is one.
    """
    opened = open_run(run, device)
    torch.manual_seed(seed)
    if opened.summary is None:
        raise FileNotFoundError(f"{run} has not been evaluated; run `pyro-lvae evaluate {run}` first")
    path = opened.report()
    Console().print(f"report: {path}")
    return path


def sample(run: str, num_samples: int = 64, out: str | None = None, seed: int = 0, device: str | None = None) -> Path:
    """Draw from the prior of a trained run, with the test set's labels where it is supervised.

    Where the weights have a posterior, all are drawn with one draw of them.

    Args:
        run: the run folder.
        num_samples: how many.
        out: a .png for a picture, or an .npy for the means E[x|z]; left out, RUN/samples-SEED.png (.npy
            where the data are no images). An existing file is not overwritten.
        seed: of the random numbers.
        device: left out, CUDA where there is one.
    """
    opened = open_run(run, device)
    is_image = len(opened.data.shape) == 2
    path = Path(out) if out else opened.folder / f"samples-{seed}{'.png' if is_image else '.npy'}"
    if path.exists():
        raise FileExistsError(f"{path} exists; name another file with --out")
    if path.suffix not in (".png", ".npy") or (path.suffix == ".png" and not is_image):
        raise ValueError(f"{path} must end in .npy{' or .png' if is_image else ', for the data are no images'}")
    torch.manual_seed(seed)
    labels = opened.data.y_test[torch.arange(num_samples) % len(opened.data.y_test)] if opened.supervised else None
    structure = opened.structure.draw() if isinstance(opened.structure, BayesianWeights) else opened.structure
    x = sample_prior(structure, num_samples, opened.data.x_test, y=labels)
    if path.suffix == ".png":
        plots.save({path.stem: plots.image_grid(x, opened.data.shape, 8)}, path.parent)
    else:
        plots.save_array(path, x)
    Console().print(f"{num_samples} samples: {path}")
    return path


def list_() -> None:
    """List the structures, estimators, likelihoods and data sets that have names."""
    console = Console()
    for title, lines in (
        ("structures  (--structure)", _first_lines({s.__name__: s for s in STRUCTURES})),
        ("estimators  (--estimator)", {e.__name__: line for e, line in ESTIMATORS.items()}),
        ("flows  (--structure.flow of FlowVAE)", _first_lines({c.__name__: c for c in FLOWS})),
        ("codes  (--structure.code of SparseVAE)", _first_lines({c.__name__: c for c in CODES})),
        (
            "corruptions  (--structure.corruption of DenoisingVAE)",
            _first_lines({f"{f.__module__}.{f.__name__}": f for f in CORRUPTIONS}),
        ),
        (
            "likelihoods  (--structure.likelihood)",
            _first_lines({f"{c.__module__}.{c.__name__}": c for c in LIKELIHOODS}),
        ),
        ("priors of weights  (--bayesian.prior)", _first_lines({c.__name__: c for c in PRIORS})),
        ("posteriors of weights  (--bayesian.posterior)", _first_lines({c.__name__: c for c in POSTERIORS})),
        ("data sets  (--data)", _first_lines(DATASETS)),
    ):
        table = Table(title=title, title_justify="left", box=None, show_header=False)
        for name, line in lines.items():
            table.add_row(f"[bold]{name}", escape(line))
        console.print(table, "")


def _first_lines(things: dict) -> dict[str, str]:
    return {name: (thing.__doc__ or "").strip().split("\n")[0] for name, thing in things.items()}
