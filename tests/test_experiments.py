"""Rows of an experiment are made once, kept, and tabled."""

import json
from pathlib import Path

import pytest

from pyro_lvae.experiments import (
    finish_rows,
    fixed_settings,
    markdown,
    markdown_rows,
    parsed,
    parser_of,
    read_rows,
    script,
    settle,
    write_rows,
)
from pyro_lvae.plots import lines


def _counting(made, name):
    def make():
        made.append(name)
        return {"value": float(len(made))}

    return make


def test_rows_are_made_once(tmp_path):
    made, told, path = [], [], tmp_path / "rows.json"
    makers = {name: _counting(made, name) for name in "abc"}
    assert finish_rows(path, {"epochs": 1}, makers, ["b"], told.append) == {"b": {"value": 1.0}}
    rows = finish_rows(path, {"epochs": 1}, makers, tell=told.append)
    assert made == ["b", "a", "c"]
    assert told == ["b", f"in {path} already: b", "a", "c"]
    assert rows == read_rows(path, {"epochs": 1}) == {n: {"value": float(i + 1)} for i, n in enumerate("bac")}


def test_a_row_that_fails_leaves_the_others(tmp_path):
    path, makers = tmp_path / "rows.json", {"a": lambda: {"value": 1.0}, "b": lambda: 1 / 0}
    with pytest.raises(ZeroDivisionError):
        finish_rows(path, {}, makers)
    with pytest.raises(ValueError, match="other settings"):  # nor is a first row begun under others gone on with
        finish_rows(path, {"epochs": 3}, makers)
    assert read_rows(path, {}) == {"a": {"value": 1.0}}


def test_rows_that_do_not_belong_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there are no rows \['z'\]; there are \['a'\]"):
        finish_rows(tmp_path / "rows.json", {}, {"a": dict}, ["z"])
    write_rows(tmp_path / "rows.json", {"epochs": 1}, {"a": {}})
    with pytest.raises(ValueError, match=r"\{'seed': \(None, 7\)\}"):
        read_rows(tmp_path / "rows.json", {"epochs": 1, "seed": 7})
    with pytest.raises(
        ValueError, match=r"other settings \(there, here\): \{'epochs': \(1, 2\)\}; name another folder"
    ):
        finish_rows(tmp_path / "rows.json", {"epochs": 2}, {"a": dict})


@pytest.mark.parametrize("content", ["[]", "{}", '{"settings": 1}', "not even JSON"])
def test_files_of_something_else_are_not_overwritten(content, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="no results of an experiment; name another folder"):
        finish_rows(path, {}, {"a": dict})
    assert path.read_text() == content
    (tmp_path / "other").mkdir()
    table = tmp_path / "other" / "results.md"
    table.write_text("mine")
    with pytest.raises(ValueError, match="is the table of; name another folder"):
        finish_rows(table.with_suffix(".json"), {}, {"a": dict})


def test_a_table_of_numbers_and_words():
    rows = {"VAE": {"ELBO": -1.234, "seconds": 9.6, "active": "3, 2"}}
    assert markdown_rows("model", rows, {"seconds": 0}).splitlines() == [
        *("| model | ELBO | seconds | active |", "|---|---|---|---|", "| VAE | -1.23 | 10 | 3, 2 |"),
    ]
    with_an_older_one = markdown_rows("model", rows | {"before": {"seconds": 1.0}}, {"seconds": 0})
    assert with_an_older_one.splitlines()[-1] == "| before |  | 1 |  |"


def test_lines_cut_off_a_start_far_below():
    curve = [-500.0, *(-100.0 - 10 / n for n in range(1, 30))]
    figure = lines({"far": {"a": (range(30), curve)}, "near": {"a": ([1, 2], [1.0, 2.0])}}, "epoch", "nats")
    by_size = lines({"": {"a": (range(30), curve)}}, "latent layers", "nats").axes[0]
    assert by_size.get_ylim()[0] < -500
    far, near = figure.axes
    assert -120 < far.get_ylim()[0] < -102
    assert near.get_ylim()[0] < 1
    assert [ax.get_title() for ax in figure.axes] == ["far", "near"]


def test_a_logarithmic_axis_has_its_ticks_at_the_values():
    figure = lines(
        {"error": {"a": ([2, 5, 20], [3.0, 2.0, 1.0]), "b": ([2, 50], [1.0, 1.0])}}, "size", "", is_logarithmic=True
    )
    axis = figure.axes[0].xaxis
    assert [label.get_text() for label in axis.get_ticklabels()] == ["2", "5", "20", "50"]
    assert not len(axis.get_ticklocs(minor=True))


def test_a_pipe_does_not_break_a_table():
    assert markdown(["p(z|y)"], [["a|b"]]) == "| p(z\\|y) |\n|---|\n| a\\|b |"


def _options(*argv):
    parser = parser_of("What it does.", "runs/e", smoke="seconds", data=None, seed=None)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 4])
    return parsed(parser, argv, epochs=2, sizes=[3])


def test_smoke_changes_what_was_not_given():
    assert vars(_options()) == dict(smoke=False, epochs=50, sizes=[8, 4], out=Path("runs/e"))
    assert vars(_options("--smoke")) == dict(smoke=True, epochs=2, sizes=[3], out=Path("runs/e-smoke"))
    given = _options("--smoke", "--epochs", "50", "--out", "there")
    assert vars(given) == dict(smoke=True, epochs=50, sizes=[3], out=Path("there"))


def test_rows_do_not_depend_on_where_they_are_kept():
    args = parsed(parser_of("", "runs/e", smoke="seconds"), ["--seed", "3", "--root", "there"])
    assert fixed_settings(args) == {"data": "mnist", "seed": 3}
    assert fixed_settings(args, "data") == {"seed": 3}


def test_a_folder_keeps_the_settings_of_its_run(tmp_path):
    settle(tmp_path / "run", {"epochs": 1})
    settle(tmp_path / "run", {"epochs": 1})
    with pytest.raises(ValueError, match=r"settings.json.* \{'epochs': \(1, 2\)\}; name another folder"):
        settle(tmp_path / "run", {"epochs": 2})
    assert json.loads((tmp_path / "run" / "settings.json").read_text()) == {"epochs": 1}


def test_a_script_says_what_is_wrong_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["folder/aevb.py"])

    def fails(error):
        raise error

    with pytest.raises(SystemExit, match="^aevb.py: no such data$"):
        script(lambda: fails(ValueError("no such data")))
    with pytest.raises(SystemExit, match="130"):
        script(lambda: fails(KeyboardInterrupt("stopped after epoch 3")))
    assert capsys.readouterr().err == "\nstopped after epoch 3\n"
    with pytest.raises(ZeroDivisionError):  # a fault of the program keeps its traceback
        script(lambda: 1 / 0)
