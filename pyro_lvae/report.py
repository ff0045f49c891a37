"""A run folder -> one self-contained HTML page."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from .results import Summary, read_metrics, read_summary, write_text

CAPTIONS = {
    "elbo": "ELBO over epochs at β = 1, in evaluation mode. The grey line is what training maximised, β included.",
    "kl_per_layer": "Each layer's share of KL(q(z|x) ‖ p(z)) on test data. A layer at 0 is not used.",
    "samples": "Means of p(x|z) for draws of the prior.",
    "reconstructions": "Test data in the upper row, their reconstructions in the lower.",
    "interpolations": "Means of p(x|z) on straight lines between the codes of two test data.",
    "manifold": "The unit square, mapped through the inverse normal CDF to the 2-D top layer, and decoded.",
    "active_units": "A unit is active where its posterior mean varies over the data by more than 0.01.",
    "pca": "Draws of q(zᵢ|·) for test data, first two principal components of each layer, by class where there is one.",
}

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6577; --line: #d9dee7; --page: #fff; --card: #f6f7fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #9aa5b8; --line: #343c4a; --page: #14181f; --card: #1c222c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; font: 16px/1.5 system-ui, sans-serif;
       color: var(--ink); background: var(--page); }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .8rem; }
.sub { color: var(--soft); margin: .2rem 0 1.5rem; }
.numbers { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.number { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; }
.number b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.number span { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { font-weight: 600; color: var(--soft); }
.figures { columns: 26rem; column-gap: 1rem; }
figure { margin: 0 0 1rem; padding: .8rem; background: #fff; border: 1px solid var(--line); border-radius: .6rem;
         break-inside: avoid; overflow-x: auto; }
figure img { display: block; width: 100%; max-height: 34rem; object-fit: contain; }
figure.wide { column-span: all; }
figure.wide img { min-width: 44rem; }
figcaption { color: #5b6577; font-size: .85rem; padding-top: .5rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; overflow-x: auto;
      font-size: .82rem; }
@media (max-width: 30rem) { th, td { padding: .35rem .5rem; } }
summary { cursor: pointer; color: var(--soft); }
"""


def write_report(folder: Path) -> Path:
    """Write `report.html` from the `summary.json`, `metrics.jsonl`, `config.yaml` and `figures/` of a run folder.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: the folder holds no `summary.json`.
    """
    if not (folder / "summary.json").exists():
        raise FileNotFoundError(f"{folder} holds no summary.json; run `pyro-lvae evaluate {folder}` first")
    path = folder / "report.html"
    write_text(path, _page(folder, read_summary(folder / "summary.json")))
    return path


def _page(folder: Path, summary: Summary) -> str:
    title = f"{summary.structure} on {summary.data}"
    config = folder / "config.yaml"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p class='sub'>{escape(_subtitle(summary))}</p>",
        f"<div class='numbers'>{_numbers(summary)}</div>",
        "<h2>Layers</h2>",
        f"<div class='scroll'>{_layers(summary)}</div>",
        "<h2>Pictures</h2>",
        f"<div class='figures'>{''.join(map(_figure, _ordered(folder / 'figures')))}</div>",
        "<h2>Run</h2>",
        f"<details><summary>Last epochs</summary><div class='scroll'>{_epochs(folder)}</div></details>",
    ]
    if config.exists():
        text = escape(config.read_text(encoding="utf-8"))
        parts.append(f"<details><summary>config.yaml</summary><pre>{text}</pre></details>")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _subtitle(s: Summary) -> str:
    return (
        f"{s.num_parameters:,} parameters, {s.epochs} epochs by {s.estimator} in {s.seconds:,.0f} s "
        f"({s.images_per_second:,.0f} images/s). Nats per datum throughout."
    )


def _numbers(s: Summary) -> str:
    error = "" if s.test_log_likelihood_stderr is None else f" ± {s.test_log_likelihood_stderr:.2f}"
    log_p = "none" if s.test_log_likelihood is None else f"{s.test_log_likelihood:.2f}"
    items = [
        (log_p, f"test log p(x){error}"),
        (f"{s.test_elbo:.2f}", "test ELBO"),
        (f"{s.train_elbo:.2f}", "train ELBO"),
        (f"{sum(s.kl_per_layer.values()):.2f}", "KL of all layers"),
        (f"{s.num_samples:,} × {s.num_images:,}", "importance samples × test data"),
    ]
    return "".join(f"<div class='number'><b>{escape(v)}</b><span>{escape(k)}</span></div>" for v, k in items)


def _layers(s: Summary) -> str:
    rows = [
        (name, f"{kl:.3f}", f"{s.active_units.get(name, '')}", f"{s.units.get(name, '')}")
        for name, kl in s.kl_per_layer.items()
    ]
    return _table(("layer", "KL (nats)", "active units", "units"), rows)


def _epochs(folder: Path) -> str:
    rows = [
        (str(m.epoch), *(f"{v:.2f}" for v in (m.objective, m.train_elbo, m.test_elbo, m.seconds)), f"{m.lr:g}")
        for m in read_metrics(folder / "metrics.jsonl")[-10:]
    ]
    return _table(("epoch", "objective", "train ELBO", "test ELBO", "seconds", "lr"), rows)


def _table(heads: tuple, rows: list[tuple]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _ordered(folder: Path) -> list[Path]:
    order = list(CAPTIONS)
    known = [folder / f"{name}.png" for name in order]
    return [path for path in known if path.exists()]


def _figure(path: Path) -> str:
    name = path.stem
    image = base64.b64encode(path.read_bytes()).decode()
    wide = " class='wide'" if name == "pca" else ""
    caption = escape(CAPTIONS[name])
    return (
        f"<figure{wide}><img alt='{escape(name)}' src='data:image/png;base64,{image}'>"
        f"<figcaption>{caption}</figcaption></figure>"
    )
