"""Experiments of several rows: their options, which rows are finished, and their table."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from .checkpoint import CheckpointError
from .results import write_json


def parser_of(doc: str, out: str, smoke: str, data: str | None = "mnist", seed: int | None = 0) -> ArgumentParser:
    """A parser of what experiments share: --smoke, --data and --root, --seed, --out.

    Args:
        doc: what it tells before the options.
        out: folder of the results.
        smoke: what --smoke does.
        data: name of the data; there is neither --data nor --root if None.
        seed: there is no --seed if None.
    """
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help=smoke)
    if data is not None:
        parser.add_argument("--data", default=data)
        parser.add_argument("--root", default=None, help="folder of the data")
    if seed is not None:
        parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of the results")
    return parser


def parsed(parser: ArgumentParser, argv: Sequence[str] | None, **smoke) -> Namespace:
    """The options of an experiment; with `--smoke`, `smoke` are the defaults, and results go to NAME-smoke."""
    args = parser.parse_args(argv)
    if args.smoke:
        if isinstance(out := parser.get_default("out"), Path):
            smoke["out"] = out.with_name(f"{out.name}-smoke")
        parser.set_defaults(**smoke)
        args = parser.parse_args(argv)
    return args


def fixed_settings(args: Namespace, *free: str) -> dict:
    """The options that rows depend on: all but --out, --root, --smoke and those that are `free`."""
    return {k: v for k, v in vars(args).items() if k not in ("out", "root", "smoke", *free)}


def script(main: Callable[[], object]) -> None:
    """Run an experiment as a script, which says in a sentence what is wrong with its input, or that it was stopped."""
    try:
        main()
    except (OSError, ValueError, CheckpointError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'stopped'}", file=sys.stderr)
        sys.exit(130)


def read_rows(path: Path, settings: dict) -> dict[str, dict]:
    """The finished rows of an experiment by name, as `write_rows` left them; none where there is no such file.

    Raises:
        ValueError: the file holds rows of other settings, or something else; or the table of an experiment is beside
            where it would be.
    """
    table = path.with_suffix(".md")
    if not path.exists():
        if table.exists():
            raise ValueError(f"{table} is there, and no {path.name} that it is the table of; name another folder")
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        there = dict(kept["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of an experiment; name another folder") from error
    _refuse_others(path, there, settings)
    return kept["results"]


def settle(folder: Path, settings: dict) -> None:
    """Leave the settings of a run in its folder; a folder of other settings is refused, a ValueError."""
    path = folder / "settings.json"
    if path.exists():
        _refuse_others(path, json.loads(path.read_text(encoding="utf-8")), settings)
    write_json(path, settings)


def _refuse_others(path: Path, there: dict, settings: dict) -> None:
    changed = {k: (there.get(k), settings.get(k)) for k in {**there, **settings} if settings.get(k) != there.get(k)}
    if changed:
        raise ValueError(f"{path} holds results of other settings (there, here): {changed}; name another folder")


def write_rows(path: Path, settings: dict, rows: dict[str, dict]) -> None:
    """Write the rows of an experiment, whole or not at all."""
    write_json(path, {"settings": settings, "results": rows})


def finish_rows(
    path: Path,
    settings: dict,
    makers: Mapping[str, Callable[[], dict]],
    names: Sequence[str] | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, dict]:
    """The rows of an experiment: all that earlier calls finished, and those of `names` as their makers give them.

    Args:
        path: file of the rows; written before the first, so that a stopped one is not finished under other settings,
            and after each.
        settings: what the rows depend on.
        makers: {name: makes the row}.
        names: the rows wanted; all if left out.
        tell: called with what is found, and with the name of each row that is made.

    Raises:
        ValueError: a name has no maker, or as for `read_rows`.
    """
    if unknown := [name for name in names or () if name not in makers]:
        raise ValueError(f"there are no rows {unknown}; there are {list(makers)}")
    rows = read_rows(path, settings)
    if tell is not None and rows:
        tell(f"in {path} already: {', '.join(rows)}")
    write_rows(path, settings, rows)
    for name in makers if names is None else names:
        if name not in rows:
            if tell is not None:
                tell(name)
            rows[name] = makers[name]()
            write_rows(path, settings, rows)
    return rows


def markdown_rows(first: str, rows: Mapping[str, Mapping], digits: Mapping[str, int] | None = None) -> str:
    """A Markdown table of rows by name, numbers with two digits or as `digits` says; `first` heads the names.

    What a row lacks, as one from before a column was there does, is left empty.
    """
    heads = list(dict.fromkeys(head for row in rows.values() for head in row))
    places = dict.fromkeys(heads, 2) | dict(digits or {})

    def cell(row: dict, head: str) -> str:
        value = row.get(head, "")
        return value if isinstance(value, str) else f"{value:.{places[head]}f}"

    return markdown([first, *heads], [[name, *(cell(r, h) for h in heads)] for name, r in rows.items()])


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a | within a cell is escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    return "\n".join([line(heads), "|---" * len(heads) + "|", *map(line, rows)])
