"""Every example runs: --smoke of each file in examples/."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--smoke"])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_a_new_structure_takes_fewer_than_forty_lines():
    import ast

    tree = ast.parse((Path(__file__).parents[1] / "examples" / "your_own_structure.py").read_text())
    (node,) = (n for n in tree.body if isinstance(n, ast.ClassDef))
    assert node.end_lineno - node.lineno + 1 < 40
