"""A parser whose errors are a sentence."""

from __future__ import annotations

import re
from inspect import signature

from jsonargparse import ArgumentParser

from ..bayes import POSTERIORS, PRIORS, BayesianWeights
from ..data import DATASETS
from ..objectives import ESTIMATORS
from ..optim import FusedAdam
from ..structures import STRUCTURES
from ..structures.denoising import CORRUPTIONS
from ..structures.flows import FLOWS
from ..structures.sparse import CODES

KNOWN = {
    "structure": [cls.__name__ for cls in STRUCTURES],
    "estimator": [cls.__name__ for cls in ESTIMATORS],
    "data": list(DATASETS),
    "bayesian.prior": [cls.__name__ for cls in PRIORS],
    "bayesian.posterior": [cls.__name__ for cls in POSTERIORS],
    "structure.base": [cls.__name__ for cls in STRUCTURES],
    "structure.flow": [cls.__name__ for cls in FLOWS],
    "structure.code": [cls.__name__ for cls in CODES],
    "structure.corruption": [f"{f.__module__}.{f.__name__}" for f in CORRUPTIONS],
}


GROUPS = {"structure": STRUCTURES, "estimator": ESTIMATORS, "optimizer": [FusedAdam], "bayesian": [BayesianWeights]}


class Parser(ArgumentParser):
    """jsonargparse's, which tells every type that an option could have had; the reason alone is printed here."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def format_help(self) -> str:
        """Without the hundreds of modules of torch that an activation or a likelihood could be."""
        return re.sub(r",\s+known\s+subclasses:\s[^)]*\)", ")", super().format_help())

    def error(self, message: str, ex: Exception | None = None) -> None:
        if not self.exit_on_error:  # the parser of a class within an option: the outer one says it
            super().error(message, ex)
        self.exit(2, f"{self.prog.replace(' [options]', '')}: {_in_a_sentence(message, self)}\n")


def _in_a_sentence(message: str, parser: ArgumentParser) -> str:
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", " ".join(message.split()))
    text = re.sub(r"\.? (Got value|Given value( type)?): (Namespace|NestedArg)\(.*", "", text)
    if unknown := re.match(r"Subcommand '(\w+)' does not accept option '([^']+)'", text):
        return f"{unknown[1]} has no option {unknown[2]!r}; pyro-lvae {unknown[1]} --help lists them"
    if unknown := re.match(r"[Uu]nrecognized arguments: --([^\s=]+)", text):
        return _unknown(unknown[1], list(parser._option_string_actions))
    key = re.match(r'Parser key "([^"]+)": ?', text)
    if key is None:
        return text
    option, reason = _innermost(key[1], text[key.end() :])
    name = re.search(r"Expected a dot import path string: ([\w.]+)", reason)
    made = re.search(r"Problem with given class_path '(?:\w+\.)*(\w+)': (.*?)(?: - Expected a NoneType.*)?$", reason)
    if made:
        lists = f"; --{option}.help {made[1]} lists them" if "is not accepted" in made[2] else ""
        return f"--{option} {made[1]}: {made[2]}{lists}"
    if name and option in KNOWN:
        return f"there is no {option} {name[1]!r}; known are {', '.join(KNOWN[option])}, or a path my_module.MyClass"
    if name:
        return f"--{option}: there is no {name[1]!r}; give the path of a class or function, my_module.name"
    if choice := re.match(r"Expected a typing\.Literal\[(.*?)\]\. Got value: (\S+)", reason):
        return f"--{option} is {choice[2]!r}; expected one of {choice[1]}"
    if untyped := re.search(r"Parameter '(\w+)' from '([\w.]+)\.__init__' does not specify a type", reason):
        return f"--{option} {untyped[2]}: its parameter {untyped[1]!r} has no type to read an option by; annotate it"
    if unknown := re.search(r"Option '([\w.]+)' is not accepted", reason):
        return f"--{option}: there is no option {unknown[1]!r}; {_help_of(option)}"
    if pair := re.search(r"Expected '(\S+)' to be a subclass of AnyStructure", reason):
        return f"--{option} {pair[1]}: a structure is an nn.Module with model and guide, and this is none"
    return f"--{option}: {reason[:1].lower()}{reason[1:]}"


def _unknown(name: str, options: list[str]) -> str:
    """An option that there is not, and the one that is meant, where it stands by its last name or with a hyphen."""
    last = name.replace("-", "_")
    meant = [f"--{last}"] if f"--{last}" in options else []
    for group, classes in GROUPS.items():
        if f"--{group}" in options or f"--{group}.help" in options:
            meant += [f"--{group}.{last}" for c in classes if last in list(signature(c).parameters)[1:]]
    return f"there is no option --{name}; {f'do you mean {meant[0]}?' if meant else '--help lists them'}"


def _help_of(option: str) -> str:
    return f"--{option}.help {'lists them' if option == 'bayesian' else 'NAME lists those of a class'}"


def _innermost(option: str, reason: str) -> tuple[str, str]:
    """The option of a class within an option that is at fault, and why, out of a list of types."""
    reason = re.sub(r"^Type .*? expects a function or a callable class: ", "", reason)
    if key := re.match(r'Parser key "([^"]+)": ?', reason):
        return f"{option}.{key[1]}", reason[key.end() :]
    for pattern in (
        r'Errors: .*?Parser key "([^"]+)": ',
        r'Parser key "([\w.]+)":(?=(?:(?!Parser key).)*Expected a dot import)',
    ):
        if found := list(re.finditer(pattern, reason)):
            option, reason = f"{option}.{found[-1][1]}", reason[found[-1].end() :]
    return option, reason
