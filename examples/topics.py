"""Topics of 20 Newsgroups: NVDM (Miao et al. 2016) and ProdLDA (Srivastava & Sutton 2017).

    python examples/topics.py --root FOLDER      # NVDM with K = 50 and 200, ProdLDA with K = 50
    python examples/topics.py --smoke            # seconds, on documents with three planted topics

Each model has the data set of its paper: 2,000 words for NVDM, 1,995 lemmata for ProdLDA. A twentieth of the training
documents is held out; of NVDM the epoch with the lowest perplexity on them is kept. Deviations from NVDM's paper, which
improve the held-out perplexity: the encoder gets log(1 + x) and has batch norm and dropout, the KL weight is warmed up,
and encoder and decoder are trained together. ProdLDA is trained as in its authors' published code, and its topics are
read off after batch norm.

Perplexity is exp(-1/D sum_d ELBO_d / N_d). NPMI counts words together in a document; the ProdLDA paper counts them in
windows of 20 words, which bags of words have lost, so its figure is another one. Finished rows are kept under --out,
and not computed again.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from dataclasses import replace
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_lvae import (
    NVDM,
    AnalyticELBO,
    Callback,
    Dataset,
    FusedAdam,
    ProdLDA,
    fit,
    kl_per_layer,
    linear,
    load,
    log_likelihood,
    nearest_words,
    npmi,
    perplexity,
    plots,
    topics,
)
from pyro_lvae.experiments import fixed_settings, parsed, parser_of, read_rows, script, write_rows
from pyro_lvae.results import EpochMetrics, write_text

NVDM_OPTIONS = dict(
    data="20newsgroups",
    make=partial(NVDM, transform=torch.log1p, batch_norm=True, dropout=0.2),
    optimizer=partial(FusedAdam, lr=2e-3),
    chosen=True,
    batch_size=64,
    warm_up=0.4,
)
PRODLDA_OPTIONS = dict(
    data="20newsgroups_prodlda",
    make=ProdLDA,
    optimizer=partial(FusedAdam, lr=2e-3, betas=(0.99, 0.999)),
    chosen=False,
    batch_size=200,
    warm_up=0.0,
)
# What each row is trained with. `warm_up` is a share of the epochs; with `chosen`, the learning rate falls by a cosine,
# and the epoch is kept that is best on held-out documents.
MODELS: dict[str, dict] = {
    "NVDM, K = 50": NVDM_OPTIONS | dict(z_dim=50, epochs=300),
    "NVDM, K = 200": NVDM_OPTIONS | dict(z_dim=200, epochs=150),
    "ProdLDA, K = 50": PRODLDA_OPTIONS | dict(z_dim=50, epochs=100),
}
QUERIES = ("weapons", "medical", "companies", "define", "israel", "book")  # of the NVDM paper's table


class KeepBest(Callback):
    """Keeps the weights of the epoch with the lowest perplexity on held-out documents."""

    def __init__(self, structure: nn.Module, x: Tensor):
        self.structure, self.x, self.perplexity = structure, x, float("inf")
        self.epoch, self.weights = 0, copy.deepcopy(structure.state_dict())

    def on_epoch(self, metrics: EpochMetrics) -> None:
        found = perplexity(self.structure, self.x, num_samples=2)
        if found < self.perplexity:
            self.perplexity, self.epoch = found, metrics.epoch
            self.weights = copy.deepcopy(self.structure.state_dict())
        if metrics.epoch % 10 == 0:
            print(f"epoch {metrics.epoch}: held-out perplexity {found:.1f}", flush=True)


def held_out(data: Dataset, share: float = 0.05) -> Dataset:
    """The training documents alone, a part of them (fixed, at random) in place of the test set."""
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    count = max(1, round(share * len(order)))
    x = data.x_train[order]
    return replace(data, x_train=x[count:], x_test=x[:count], y_train=None, y_test=None)


def planted(num_documents: int = 300) -> Dataset:
    """Documents of three topics with four words each, and their vocabulary."""
    noise = torch.Generator().manual_seed(0)
    of_topic = torch.eye(3).repeat_interleave(4, dim=1) * 0.2 + 0.2 / 12
    words = torch.multinomial(of_topic[torch.arange(num_documents) % 3], 40, replacement=True, generator=noise)
    x = torch.zeros(num_documents, 12).scatter_add_(1, words, torch.ones(words.shape))
    vocabulary = tuple(f"{topic}{i}" for topic in ("space", "sport", "belief") for i in range(4))
    return Dataset("planted", x[: num_documents // 2], x[num_documents // 2 :], vocabulary=vocabulary)


def run(name: str, data: Dataset, args: Namespace) -> dict:
    """Train one model and measure it; its curves go into the folder of the results."""
    options, epochs = MODELS[name], args.epochs or MODELS[name]["epochs"]
    part, warm_up = held_out(data), round(options["warm_up"] * epochs)
    torch.manual_seed(args.seed)
    structure = options["make"](data.x_dim, args.z_dim or options["z_dim"])
    best = KeepBest(structure, part.x_test)
    history = fit(
        structure,
        part,
        AnalyticELBO(),
        epochs=epochs,
        batch_size=options["batch_size"],
        beta=linear(0, 1, epochs=warm_up) if warm_up else 1.0,
        optimizer=options["optimizer"],
        lr_scheduler=partial(CosineAnnealingLR, T_max=epochs) if options["chosen"] else None,
        callbacks=(best,) if options["chosen"] else (),
    )
    if options["chosen"]:
        structure.load_state_dict(best.weights)
    found = dict(epochs=epochs, epoch=best.epoch if options["chosen"] else epochs, seconds=history[-1].seconds)
    found |= measure(structure, part, data, args)
    words = bars(structure, found["topics"][:6], data.vocabulary)
    stem = name.replace(", K = ", "-").lower()
    plots.save({stem: plots.elbo_curves(history), f"{stem}-topics": words}, args.out)
    return found


def measure(structure: nn.Module, part: Dataset, data: Dataset, args: Namespace) -> dict:
    """Perplexities, coherence, topics and nearest words."""
    torch.manual_seed(args.seed + 1)
    words, some = data.vocabulary, data.x_test[: args.num_documents]
    found = topics(_weights(structure), words)
    coherence = {split: npmi(found, x, words) for split, x in (("train", data.x_train), ("test", data.x_test))}
    order = coherence["train"].argsort(descending=True).tolist()
    asked = [word for word in QUERIES if word in words] or words[::4]
    return dict(
        train_perplexity=perplexity(structure, part.x_train[: len(data.x_test)]),
        validation_perplexity=perplexity(structure, part.x_test),
        test_perplexity=perplexity(structure, data.x_test),
        sampled_documents=len(some),
        sampled_perplexity=perplexity(structure, some, args.num_samples, estimate=log_likelihood),
        kl=kl_per_layer(structure, some)["z1"],
        npmi_train=coherence["train"].mean().item(),
        npmi_test=coherence["test"].mean().item(),
        unique_words=len({word for topic in found for word in topic}) / sum(map(len, found)),
        topics=[found[i] for i in order],
        npmi_of_topics=[coherence["train"][i].item() for i in order],
        nearest={word: nearest_words(structure.R, words, word) for word in asked},
    )


def bars(structure: nn.Module, shown: list[list[str]], vocabulary: tuple[str, ...]) -> Figure:
    """Words of topics, each bar as long as the word weighs in its topic."""
    weights = _weights(structure)
    every, figure = topics(weights, vocabulary), Figure(figsize=(2.2 * len(shown), 2.8), layout="constrained")
    for ax, words in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        topic = weights[every.index(words)]
        ax.barh(words, [topic[vocabulary.index(word)].item() for word in words])
        ax.invert_yaxis()
    return figure


def _weights(structure: nn.Module) -> Tensor:
    """What words weigh in topics, `[K, V]`."""
    return getattr(structure, "experts", structure.R).detach()


_COLUMNS = {
    "train_perplexity": ("train perplexity", ".0f"),
    "validation_perplexity": ("validation", ".0f"),
    "test_perplexity": ("test", ".0f"),
    "sampled_perplexity": ("test, importance sampling", ".0f"),
    "kl": ("KL, nats", ".1f"),
    "npmi_train": ("NPMI, train documents", ".3f"),
    "npmi_test": ("test documents", ".3f"),
    "unique_words": ("different words in topics", ".0%"),
    "epoch": ("epoch", "d"),
    "seconds": ("seconds", ".0f"),
}


def report(results: dict[str, dict]) -> str:
    """Markdown: the figures, a row a model; then the most coherent topics, and the nearest words."""
    heads = ["model", *(head for head, _ in _COLUMNS.values())]
    parts = [["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]]
    for name, r in results.items():
        parts[0].append(" | ".join([f"| {name}", *(format(r[k], form) for k, (_, form) in _COLUMNS.items())]) + " |")
    for name, r in results.items():
        lines = [f"**{name}**: the most coherent topics (NPMI on the training documents), and the nearest words", ""]
        scored = list(zip(r["npmi_of_topics"], r["topics"], strict=True))[:10]
        lines += [f"- {value:.2f} {' '.join(topic)}" for value, topic in scored]
        lines += [f"- {word}: {', '.join(near)}" for word, near in r["nearest"].items()]
        parts.append(lines)
    return "\n\n".join("\n".join(lines) for lines in parts)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    args = _arguments(argv)
    settings = fixed_settings(args, "models") | {"smoke": args.smoke}
    path = args.out / "results.json"
    results = read_rows(path, settings)
    for name in args.models or MODELS:
        if name not in results:
            print(name, flush=True)
            data = planted() if args.smoke else load(MODELS[name]["data"], args.root)
            results[name] = run(name, data, args)
            write_rows(path, settings, results)
    text = report(results)
    write_text(args.out / "results.md", text + "\n")
    print(text)
    return results


def _arguments(argv: list[str] | None) -> Namespace:
    parser = parser_of(__doc__, "runs/topics", smoke="a few epochs of small models on planted topics", data=None)
    parser.add_argument("--root", default=None, help="folder of the data")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="all if left out")
    parser.add_argument("--epochs", type=int, default=None, help="of each; as in MODELS if left out")
    parser.add_argument("--z_dim", type=int, default=None, help="K of each; as in MODELS if left out")
    parser.add_argument("--num_samples", type=int, default=500, help="importance samples")
    parser.add_argument("--num_documents", type=int, default=1000, help="test documents for them")
    return parsed(parser, argv, epochs=5, z_dim=3, num_samples=5, num_documents=20)


if __name__ == "__main__":
    script(main)
