"""Imports point down the list of rooms, never up; and what is heavy is imported where it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyro_lvae"

# Lowest first. A room may import the rooms before it.
ROOMS = [
    *("_version", "nets", "conditionals", "structures", "data", "traces", "contract", "annealing", "objectives"),
    *(
        "svi",
        "results",
        "checkpoint",
        "callbacks",
        "loop",
        "train",
        "evaluate",
        "comparison",
        "inference_data",
        "plots",
    ),
    *("report", "runs", "__init__", "cli", "__main__"),
]


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path):
    """The rooms that a file imports, wherever in it."""
    depth = len(path.relative_to(PACKAGE).parts) - 1
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth + 1:
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pyro_lvae":
            yield [*node.module.split("."), "__init__"][1]


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_is_listed():
    assert {_room(p) for p in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = _room(path)
    for other in _imports(path):
        assert ROOMS.index(other) <= ROOMS.index(room), f"{room} imports {other}, which stands above it"


def test_structures_meet_estimators_and_training_only_above():
    for path in (PACKAGE / "structures").glob("*.py"):
        assert set(_imports(path)) <= {"nets", "conditionals"}


def test_import_pyro_lvae_is_light():
    heavy = {"matplotlib", "sklearn", "torchvision", "tensorboard", "arviz", "jsonargparse", "rich"}
    code = f"import sys, pyro_lvae; print(*{heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], timeout=120, check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def test_one_room_imports_matplotlib():
    for path in FILES:
        if "matplotlib" in path.read_text():
            assert _room(path) == "plots"
