"""Full variational Bayes over the weights of a VAE: why a first attempt learns nothing, and what makes it learn.

    python examples/bayesian_decoder.py --root FOLDER       # MNIST: 1 %, 10 % and all of the images
    python examples/bayesian_decoder.py --root FOLDER --data freyfaces --out runs/bayesian_faces    # Frey Face
    python examples/bayesian_decoder.py --smoke             # seconds, on the embedded digits

One hidden layer of 500 tanh units in encoder and decoder, 10 latent units, batches of 100 (Kingma & Welling 2014). The
attempt: prior N(0, 1) on every weight, posterior N(mu, sigma^2) with sigma^2 = 1e-3 at first, one draw of the weights
shared by a batch; started from scratch, or from the point estimate. The remedy: a Laplace prior as wide as a unit's
inputs allow; small sigma at first; local reparameterization; and the KL of the weights times 0.1 (a cold posterior, no
longer a bound on the evidence). The other rows change one of these at a time; or they are what others do about a
network's weights: an ensemble, stochastic weight averaging, the Laplace approximation. "ELBO given w" is E_q(w)[ELBO],
of which the KL of the weights is not yet taken off. Finished rows are kept under --out, and not computed again.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

from pyro_lvae import (
    SWAG,
    VAE,
    BayesianWeights,
    Dataset,
    FusedAdam,
    calibration,
    elbo,
    fit,
    generative,
    laplace,
    linear,
    load,
    predictive_log_likelihood,
    prune,
    weight_kl,
)
from pyro_lvae.bayes.posteriors import Delta, MeanField
from pyro_lvae.bayes.priors import Laplace, Normal
from pyro_lvae.conditionals import Bernoulli
from pyro_lvae.conditionals import Normal as NormalLikelihood
from pyro_lvae.experiments import fixed_settings, parsed, parser_of, read_rows, script, write_rows
from pyro_lvae.results import EpochMetrics, write_text

WIDE = dict(prior=partial(Normal, scale=1.0), posterior=partial(MeanField, sigma=math.sqrt(1e-3)), noise="shared")
FITTED = dict(prior=partial(Laplace, over_fan_in=True), posterior=MeanField, noise="local_reparameterization", kl=0.1)
PRUNED = (0.5, 0.75)  # parts of the weights, those of least signal to noise


def vae(data: Dataset, hidden: int, z_dim: int) -> VAE:
    """The network of the attempt."""
    likelihood = Bernoulli if data.is_binary else partial(NormalLikelihood, min_variance=1e-3)
    options = dict(num_hidden=1, batch_norm=False, activation=nn.Tanh, likelihood=likelihood)
    return VAE(data.x_dim, z_dim, hidden, **options)


def part_of(data: Dataset, fraction: float) -> Dataset:
    """The first rows of a fixed shuffle; binary data is drawn once, so that there is something to overfit."""
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    x = data.x_train[order[: max(2, round(fraction * len(order)))]]
    if data.binarize:
        x = torch.bernoulli(x, generator=torch.Generator().manual_seed(1))
    return replace(data, x_train=x, y_train=None, y_test=None, binarize=False)


@dataclass
class Trained:
    """What a row is measured on.

    Attributes:
        draws: structures with their weights put in, which predictions are averaged over.
        point: one set of weights that stands for them, where there is one.
        history: of training; of an ensemble, of its first member.
        bayesian: the posterior over weights, of which the KL and signal to noise are read, where there is one.
    """

    draws: list[nn.Module]
    point: nn.Module | None
    history: list[EpochMetrics]
    bayesian: BayesianWeights | None = None


def train(structure: nn.Module, data: Dataset, args: Namespace, **options) -> list[EpochMetrics]:
    """As many steps for every row of the table."""
    epochs = num_epochs(data, args)
    falling = partial(CosineAnnealingLR, T_max=epochs, eta_min=0.01 * args.lr)
    common = dict(epochs=epochs, batch_size=args.batch_size, monitor_size=args.monitor_size, callbacks=())
    return fit(
        structure, data, optimizer=partial(FusedAdam, lr=args.lr), **common | dict(lr_scheduler=falling) | options
    )


def num_epochs(data: Dataset, args: Namespace) -> int:
    return max(1, round(args.steps / math.ceil(len(data.x_train) / args.batch_size)))


def point_estimate(data: Dataset, args: Namespace, seed: int = 0) -> Trained:
    """Maximum likelihood, as every structure of the package is trained."""
    torch.manual_seed(args.seed + seed)
    structure = vae(data, args.hidden, args.z_dim)
    history = train(structure, data, args)
    return Trained([structure], structure, history)


def ensemble(data: Dataset, args: Namespace, members: int = 5) -> Trained:
    """Point estimates from several seeds (Lakshminarayanan et al. 2017)."""
    found = [point_estimate(data, args, seed=i) for i in range(members)]
    return Trained([member.point for member in found], None, found[0].history)


def weight_averaging(data: Dataset, args: Namespace) -> Trained:
    """SWAG: the weights of the last half of training at a tenth of the learning rate (Maddox et al. 2019)."""
    torch.manual_seed(args.seed)
    structure, half = vae(data, args.hidden, args.z_dim), num_epochs(data, args) // 2
    swag = SWAG(structure, start=half)
    history = train(
        structure, data, args, callbacks=(swag,), lr_scheduler=partial(MultiStepLR, milestones=[half], gamma=0.1)
    )
    return Trained([swag.draw() for _ in range(args.num_draws)], None, history)


def laplace_approximation(data: Dataset, args: Namespace) -> Trained:
    """Around the decoder's maximum a posteriori under the fan-in prior, by at most 1,000 rows (MacKay 1992)."""
    torch.manual_seed(args.seed)
    structure = vae(data, args.hidden, args.z_dim)
    where = generative(structure, data.x_train[:2])
    prior = partial(Normal, over_fan_in=True)
    at_maximum = BayesianWeights(structure, where, prior=prior, posterior=Delta)
    history = train(at_maximum, data, args)
    bayesian = laplace(at_maximum, data.x_train[:1000], size=len(data.x_train))
    return _of(bayesian, history, args)


def variational(variant: dict, data: Dataset, args: Namespace) -> Trained:
    """A posterior over the weights by the bound of the appendix of Kingma & Welling (2014)."""
    torch.manual_seed(args.seed)
    structure, kl = vae(data, args.hidden, args.z_dim), variant.get("kl", 1.0)
    if variant.get("start"):
        structure = point_estimate(data, args).point
    if kl == "batch":  # every batch counts it whole
        kl = max(1.0, len(data.x_train) / args.batch_size)
    where = variant.get("where", "all")
    if where == "decoder":
        where = generative(structure, data.x_train[:2])
    options = {name: value for name, value in variant.items() if name not in ("start", "kl", "where", "warm_up")}
    bayesian = BayesianWeights(structure, where, **options)
    warm_up = round(variant.get("warm_up", 0.0) * num_epochs(data, args))
    of_weights = linear(0.0, kl, epochs=warm_up) if warm_up else kl
    history = train(bayesian, data, args, beta={"z*": 1.0, "weights.*": of_weights})
    return _of(bayesian, history, args)


def _of(bayesian: BayesianWeights, history: list[EpochMetrics], args: Namespace) -> Trained:
    draws = [bayesian.draw() for _ in range(args.num_draws)]
    return Trained(draws, bayesian.mean(), history, bayesian)


def run(name: str, data: Dataset, args: Namespace) -> dict:
    """Train one row and measure it; nats per image."""
    make = VARIANTS[name]
    trained = make(data, args) if callable(make) else variational(make, data, args)
    found = dict(rows=len(data.x_train), seconds=trained.history[-1].seconds) | measure(trained, data, args)
    if name == "point estimate":  # the best epoch is chosen on held-out rows, in the point estimate's favour
        found["best_validation_elbo"] = max(m.test_elbo for m in trained.history)
    return found


@torch.no_grad()
def measure(trained: Trained, data: Dataset, args: Namespace) -> dict:
    """Figures of training and held-out rows; `None` where a row has no such thing."""
    torch.manual_seed(args.seed + 1)
    x, held_out, draws = data.x_train[: args.num_images], data.x_test[: args.num_images], trained.draws
    some = held_out[: max(2, args.num_images // 4)]
    likely = predictive_log_likelihood(draws, some, args.num_samples).averaged
    unlikely = predictive_log_likelihood(draws, unlike(data, args)[: len(some)], args.num_samples).averaged
    is_known = torch.cat([torch.ones_like(likely), torch.zeros_like(unlikely)])
    found = dict(
        train_elbo=_bound(draws, x),
        weight_kl=weight_kl(trained.bayesian) / len(data.x_train) if trained.bayesian else None,
        validation_elbo=_bound(draws, held_out),
        validation_elbo_at_mean=_bound([trained.point], held_out) if trained.point else None,
        validation_log_p=likely.mean().item(),
        calibration_error=100 * calibration(draws, some).error,
        unlike=roc_auc_score(is_known, torch.cat([likely, unlikely])),
    )
    if trained.bayesian is None:
        return found
    return found | {f"pruned_{part}": _bound([prune(trained.bayesian, part)], held_out) for part in PRUNED}


def unlike(data: Dataset, args: Namespace) -> Tensor:
    """Images that no model was trained on: of another data set, or the held-out ones turned by half a turn."""
    if args.unlike is None:
        return data.x_test.flip(-1)
    x = load(args.unlike, args.root).x_test
    if x.shape[1] != data.x_dim:
        raise SystemExit(f"rows of {args.unlike} have {x.shape[1]} pixels, those of {data.name} {data.x_dim}")
    return torch.bernoulli(x, generator=torch.Generator().manual_seed(1))


def _bound(draws: list[nn.Module], x: Tensor) -> float:
    return torch.stack([elbo(structure, x).mean() for structure in draws]).mean().item()


_COLUMNS = {
    "train_elbo": ("train ELBO given w", ".1f"),
    "weight_kl": ("KL(w)/N", ".1f"),
    "validation_elbo": ("held-out ELBO given w", ".1f"),
    "validation_elbo_at_mean": ("at the mean", ".1f"),
    **{f"pruned_{part}": (f"{part:.0%} pruned", ".1f") for part in PRUNED},
    "validation_log_p": ("held-out log p(x)", ".1f"),
    "calibration_error": ("calibration error, %", ".2f"),
    "unlike": ("AUROC of other images", ".3f"),
}


def table(results: dict[str, dict[str, dict]]) -> str:
    """Markdown, a row for each variant and size of data; nats per image."""
    heads = ["rows", "variant", *(head for head, _ in _COLUMNS.values())]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for of_size in results.values():
        for name, r in of_size.items():
            values = ["" if r.get(k) is None else format(r[k], form) for k, (_, form) in _COLUMNS.items()]
            lines.append(" | ".join([f"| {r['rows']:,}", name, *values]) + " |")
            if "best_validation_elbo" in r:
                best = ["", "", f"{r['best_validation_elbo']:.1f}", *[""] * (len(_COLUMNS) - 3)]
                lines.append(" | ".join([f"| {r['rows']:,}", f"{name}, best epoch", *best]) + " |")
    return "\n".join(lines)


# What each row is trained by: a function, or what `BayesianWeights` is given, with `start`, `kl`, `where`, `warm_up`.
VARIANTS: dict[str, Callable | dict] = {
    "point estimate": point_estimate,
    "ensemble of 5": ensemble,
    "stochastic weight averaging": weight_averaging,
    "Laplace approximation": laplace_approximation,
    "the attempt": WIDE,
    "the attempt, from the point estimate": WIDE | dict(start=True),
    "the attempt, KL counted once a batch": WIDE | dict(kl="batch"),
    "the attempt, KL x 0.1": WIDE | dict(kl=0.1),
    "the remedy": FITTED,
    "the remedy, from the point estimate": FITTED | dict(start=True),
    "the remedy, from the point estimate, warm-up": FITTED | dict(start=True, warm_up=0.5),
    "the remedy, decoder alone": FITTED | dict(where="decoder"),
    "the remedy, decoder's hidden layer, full KL": FITTED | dict(where="decoder.*", kl=1.0),
    "the remedy, full KL": FITTED | dict(kl=1.0),
    "the remedy, KL x 0.01": FITTED | dict(kl=0.01),
    "the remedy, prior N(0, 1)": FITTED | dict(prior=WIDE["prior"]),
    "the remedy, sigma^2 = 1e-3 at first": FITTED | dict(posterior=WIDE["posterior"]),
    "the remedy, shared draws": FITTED | dict(noise="shared"),
}


def main(argv: list[str] | None = None) -> dict:
    args = _arguments(argv)
    data, path = load(args.data, args.root), args.out / "results.json"
    settings = fixed_settings(args, "fractions", "variants")
    results = read_rows(path, settings)
    for fraction in args.fractions:
        part, done = part_of(data, fraction), results.setdefault(str(fraction), {})
        for name in args.variants or VARIANTS:
            if name not in done:
                done[name] = run(name, part, args)
                write_rows(path, settings, results)
    write_text(args.out / "results.md", table(results) + "\n")
    print(table(results))
    return results


def _arguments(argv: list[str] | None) -> Namespace:
    parser = parser_of(__doc__, "runs/bayesian_decoder", smoke="a few steps of small models on the digits")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.01, 0.1, 1.0], help="of the training rows")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="all if left out")
    parser.add_argument("--steps", type=int, default=2000, help="of training, for each")
    parser.add_argument("--lr", type=float, default=2e-3, help="of Adam; it falls to a hundredth by a cosine")
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=500)
    parser.add_argument("--z_dim", type=int, default=10)
    parser.add_argument("--num_draws", type=int, default=10, help="of the weights, for evaluation")
    parser.add_argument("--num_samples", type=int, default=100, help="importance samples for each draw")
    parser.add_argument("--num_images", type=int, default=1000, help="of training and held-out rows, for evaluation")
    parser.add_argument("--unlike", default=None, help="data of other images; the held-out ones turned, if left out")
    parser.add_argument("--monitor_size", type=int, default=1000)
    return parsed(
        parser,
        argv,
        data="digits",
        fractions=[0.1],
        steps=8,
        hidden=8,
        z_dim=2,
        num_draws=2,
        num_samples=5,
        num_images=20,
        monitor_size=20,
    )


if __name__ == "__main__":
    script(main)
