"""Estimators in words: `IWAE(50)` to the object and back."""

from __future__ import annotations

import ast
import importlib
import inspect
import math

from pyro.infer import ELBO


def label(estimator: ELBO) -> str:
    """The class with its arguments: those up to the last number of anything, and what is not the default after it.

    `parse` reads it again, for the package's own estimators.

    >>> from pyro_lvae import DReG, Renyi
    >>> label(DReG(50, prior=True)), label(Renyi(-1.0, 5))
    ('DReG(50, prior=True)', 'Renyi(-1.0, 5)')
    """
    parameters = inspect.signature(type(estimator)).parameters
    shown = []
    counted = max((i for i, name in enumerate(parameters) if name.startswith("num_")), default=-1)
    for position, (name, parameter) in enumerate(parameters.items()):
        value = getattr(estimator, name, parameter.default)
        if position <= counted:
            shown.append(repr(value))
        elif value != parameter.default and name != "max_plate_nesting":  # which Pyro's find out for themselves
            shown.append(f"{name}={value!r}")
    return f"{type(estimator).__name__}({', '.join(shown)})"


def parse(text: str, known: dict[str, type]) -> list[ELBO]:
    """Estimators from a list such as `SampledELBO, IWAE(50), DReG(50, alpha=0.5), my_module.MyELBO()`.

    Nothing is evaluated but numbers, strings, tuples and dicts as arguments.

    Args:
        known: {name: class}; any other is imported by its path.

    Raises:
        ValueError: it is no such list, or an estimator refuses its arguments.
    """
    try:
        tree = ast.parse(text.strip().rstrip(",") or "()", mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no list of estimators ({error.msg}); write IWAE(50), DReG(50)") from error
    return [_made(node, known) for node in (tree.elts if isinstance(tree, ast.Tuple | ast.List) else [tree])]


def _made(node: ast.expr, known: dict[str, type]) -> ELBO:
    text = ast.unparse(node)
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    cls = _class(ast.unparse(call.func), known)
    try:
        return cls(*map(_literal, call.args), **{k.arg: _literal(k.value) for k in call.keywords})
    except (TypeError, ValueError) as error:
        signature = str(inspect.signature(cls)).split(" ->")[0].replace("'", "")
        raise ValueError(f"{text}: {error}; the arguments are {cls.__name__}{signature}") from error


def _class(name: str, known: dict[str, type]) -> type:
    if name in known:
        return known[name]
    module, _, last = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), last) if module else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no estimator {name!r} ({error})") from error
    if not (isinstance(cls, type) and issubclass(cls, ELBO)):
        raise ValueError(f"there is no estimator {name!r}; known are {', '.join(known)}, or a path my_module.MyELBO")
    return cls


def _literal(node: ast.expr):
    """A literal; `inf` is one."""

    class Infinity(ast.NodeTransformer):
        def visit_Name(self, name: ast.Name):
            return ast.Constant(math.inf) if name.id == "inf" else name

    return ast.literal_eval(Infinity().visit(node))
