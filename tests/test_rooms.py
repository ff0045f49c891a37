"""Imports point down the list of rooms, never up; and what is heavy is imported where it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_lvae

PACKAGE = Path(__file__).parents[1] / "pyro_lvae"

# Lowest first. A room may import the rooms before it.
ROOMS = [
    *(
        "_version",
        "malloc",
        "schedules",
        "nets",
        "words",
        "conditionals",
        "critics",
        "structures",
        "data",
        "traces",
        "contract",
        "annealing",
        "objectives",
    ),
    *(
        "optim",
        "kernels",
        "step",
        "compile",
        "auto",
        "distributed",
        "svi",
        "results",
        "checkpoint",
        "experiments",
        "callbacks",
        "bayes",
        "alternation",
        "monitor",
        "loop",
        "train",
        "evaluate",
        "comparison",
        "features",
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
        assert set(_imports(path)) <= {"schedules", "nets", "words", "conditionals", "critics"}


FOR_USE = {"torch", "pyro", "numpy"}  # what the first name used loads
HEAVY = FOR_USE | {"matplotlib", "sklearn", "torchvision", "tensorboard", "arviz", "jsonargparse", "rich"}


def _heavy_after(code: str) -> set[str]:
    """The heavy packages that a fresh Python holds when it exits, having run `code`."""
    code = f"import atexit, sys; atexit.register(lambda: print('\\n', *{HEAVY!r} & set(sys.modules))); {code}"
    done = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_import_pyro_lvae_is_light():
    assert _heavy_after("import pyro_lvae; dir(pyro_lvae); pyro_lvae.__version__") == set()
    assert _heavy_after("from pyro_lvae import LadderVAE, fit") == FOR_USE


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"], ["nonsense"]], ids=str)
def test_help_is_light(argv):
    assert _heavy_after(f"from pyro_lvae.cli import main; main({argv!r})") == set()


def test_public_names_are_found_where_they_are_said_to_be():
    found = {name: getattr(pyro_lvae, name) for name in pyro_lvae.__all__}
    assert set(found) < set(dir(pyro_lvae))
    for name, value in found.items():
        assert value.__module__.startswith(f"pyro_lvae.{pyro_lvae._MODULE_OF[name]}"), name
    assert not set(found) & set(ROOMS), "a name that is also a room's would be either, by the order of imports"
    assert pyro_lvae.conditionals.Normal.__module__ == "pyro_lvae.conditionals"


def test_unknown_names_are_refused_as_usual():
    with pytest.raises(AttributeError, match="module 'pyro_lvae' has no attribute 'LaderVAE'"):
        _ = pyro_lvae.LaderVAE
    with pytest.raises(ImportError, match="cannot import name 'LaderVAE'"):
        exec("from pyro_lvae import LaderVAE")


def test_one_room_imports_matplotlib():
    for path in FILES:
        if "matplotlib" in path.read_text():
            assert _room(path) == "plots"
