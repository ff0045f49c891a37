"""check(structure, x): the rules of a latent structure, each broken one said in a sentence."""

from __future__ import annotations

import copy
import inspect
import os
import traceback
from collections.abc import Iterator

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor, nn

from .conditionals import is_point
from .traces import DATA, data_frame, evaluating, fixed_noise, replay, run, trace_pair

_LIBRARIES = tuple(os.path.dirname(module.__file__) + os.sep for module in (torch, pyro))


class ContractError(ValueError):
    """A structure breaks rules; `.broken` lists one sentence for each."""

    def __init__(self, structure, broken: list[str]):
        self.broken = broken
        lines = "\n".join(f"  - {sentence}" for sentence in broken)
        name = (structure if isinstance(structure, type) else type(structure)).__name__
        super().__init__(f"{name} breaks {len(broken)} rule(s) of a structure:\n{lines}")


def check(structure: nn.Module, x: Tensor, y: Tensor | None = None) -> None:
    """Verify that `structure` keeps the rules of `pyro_lvae.Structure` on a few rows of data.

    Runs guide and model a handful of times in evaluation mode; parameters, buffers, the caller's
    random state and Pyro's parameter store stay as they were.

    Args:
        x: data `[B, D]`; at most its first 4 rows are used.
        y: labels `[B, ...]`, where the structure takes them.

    Raises:
        ContractError: naming every broken rule, with the site, what came and what was expected.
    """
    if broken := list(_broken_rules(structure, x, y)):
        raise ContractError(structure, broken)


def takes_labels(structure: nn.Module, asked: bool | None = None) -> bool:
    """Whether labels are passed: as asked for, or as the structure says (`takes_labels = True`)."""
    return bool(getattr(structure, "takes_labels", False)) if asked is None else asked


def is_set_up(structure) -> bool:
    """Whether it is a module whose `__init__` called that of `nn.Module`."""
    return isinstance(structure, nn.Module) and "_parameters" in vars(structure)


def _broken_rules(structure, x: Tensor, y: Tensor | None) -> Iterator[str]:
    if faults := list(_not_runnable(structure, x)):
        yield from faults
        return
    args = (x[:4],) if y is None else (x[:4], y[:4])
    with evaluating(structure), fixed_noise(x.device), pyro.get_param_store().scope(), pyro.validation_enabled(True):
        try:
            guide_trace = run(structure.guide, *args)
            if observed := list(_observed_in_guide(guide_trace)):
                yield from observed
                return
            model_trace = replay(structure.model, guide_trace, *args)
        except Exception as error:
            yield f"model and guide must run on x of shape {tuple(args[0].shape)}: {_said(error)}{_hint(error)}"
            return
        model, guide = _latents_and_data(model_trace), _latents_and_data(guide_trace)
        if broken := [*_misnamed(model, guide, len(args[0])), *_enumeration(model, guide)]:
            yield from broken
            return
        yield from _pairing(model, guide, y is not None)
        yield from _plates({**guide, **model}, len(args[0]))
        yield from _global_sites(model, guide)
        yield from _scales(model, guide)
        yield from _params(model_trace, guide_trace)
        densities = list(_densities(model, guide, (len(args[0]),)))
        yield from densities
        yield from _reads_data(structure, args, model_trace)
        if not densities:  # or each would be said twice
            yield from _training_mode(structure, args)
            yield from _particles(structure, args)
            yield from _rows(structure, args, {**guide, **{n: s for n, s in model.items() if not s["is_observed"]}})


def _not_runnable(structure, x) -> Iterator[str]:
    if isinstance(structure, type):
        yield f"this is the class {structure.__name__}; give one of its instances, {structure.__name__}(...)"
        return
    if not isinstance(structure, nn.Module):
        yield f"a structure is an nn.Module, this is a {type(structure).__name__}; derive it from torch.nn.Module"
    elif not is_set_up(structure):
        yield "its __init__ does not call that of torch.nn.Module; let it begin with super().__init__()"
    for name in ("model", "guide"):
        method = getattr(structure, name, None)
        if not callable(method):
            yield f"there is no method {name}(x, y=None); write one"
        elif len(inspect.signature(method).parameters) < 2:
            yield f"{name}{inspect.signature(method)} must take labels too: {name}(self, x, y=None)"
    if not isinstance(x, Tensor) or x.ndim != 2 or len(x) == 0:
        what = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        remedy = "flatten images to rows" if isinstance(x, Tensor) else "torch.as_tensor(array) or data.x_train is one"
        yield f"x must be a tensor [B, D] with at least one row, and is {what}; {remedy}"
    elif not x[:4].isfinite().all():
        yield "x holds NaN or infinite values; remove or impute them first"


def _latents_and_data(trace) -> dict[str, dict]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"
    }


def _is_deterministic(site: dict) -> bool:
    return bool(site["infer"].get("_deterministic"))


def _is_factor(site: dict) -> bool:
    return isinstance(site["fn"], Unit)


def _observed_in_guide(guide_trace) -> Iterator[str]:
    for name, site in _latents_and_data(guide_trace).items():
        if site["is_observed"] and not _is_deterministic(site):
            yield f"site {name!r}: observed in the guide; observe it in the model alone"


def _pairing(model: dict, guide: dict, has_labels: bool) -> Iterator[str]:
    expected = {"x", "y"} if has_labels else {"x"}
    observed = {n for n, s in model.items() if s["is_observed"] and not (_is_deterministic(s) or _is_factor(s))}
    if "x" not in observed and not (has_labels and "y" in observed):  # p(y | x) is a model too
        yield f'the model observes {sorted(observed)}, expected "x"; write pyro.sample("x", ..., obs=x)'
    for name in sorted(observed - expected - {"x"}):
        yield f'site {name!r}: observed, and only "x" (and "y" where given) may be; rename it, or make it a latent'
    for name, site in model.items():
        in_model_alone = site["infer"].get("enumerate") or site["is_observed"]
        if not in_model_alone and name not in guide:
            sum_out = ', or mark it infer={"enumerate": "parallel"} in the model' if _can_enumerate(site) else ""
            yield f"site {name!r}: the model samples it and the guide does not; sample it in the guide too{sum_out}"
    for name, site in guide.items():
        if name not in model and not site["infer"].get("is_auxiliary") and not _is_deterministic(site):
            yield f"site {name!r}: the guide samples it and the model does not; give the model a site of that name"


def _misnamed(model: dict, guide: dict, batch: int) -> Iterator[str]:
    """The data plate under another name."""
    plates = [[f for s in sites.values() for f in s["cond_indep_stack"] if f.vectorized] for sites in (model, guide)]
    right = {f.name for frames in plates if any(f.name == DATA for f in frames) for f in frames}
    found = sorted({f.name for frames in plates for f in frames if (f.dim, f.size) == (-1, batch)} - right)
    if found:
        called = ", ".join(map(repr, found))
        yield f'the plate of the data is called {called}; write pyro.plate("{DATA}", len(x), dim=-1)'


def _can_enumerate(site: dict) -> bool:
    return bool(getattr(site["fn"], "has_enumerate_support", False))


def _enumeration(model: dict, guide: dict) -> Iterator[str]:
    alone = {n: s for n, s in model.items() if n not in guide}  # of the others the model has the guide's marks
    for where, sites, known in (("model", alone, ["parallel"]), ("guide", guide, ["parallel", "sequential"])):
        for name, site in sites.items():
            asked = site["infer"].get("enumerate")
            if asked and asked not in known:
                yield f'site {name!r}: marked infer={{"enumerate": {asked!r}}} in the {where}; write "parallel"'
            elif asked and not _can_enumerate(site):
                kind = type(getattr(site["fn"], "base_dist", site["fn"])).__name__
                yield (
                    f"site {name!r}: marked to be enumerated in the {where}, and a {kind} of event shape "
                    f"{tuple(site['fn'].event_shape)} cannot be: single values of discrete distributions can; take the "
                    "mark away"
                )


def _plates(sites: dict, batch: int) -> Iterator[str]:
    if data_frame(sites.get("x", {"cond_indep_stack": ()})) is None and "x" in sites:
        yield f"site 'x': outside the data plate; put it in `with pyro.plate(\"{DATA}\", len(x), dim=-1):`"
    for name, site in sites.items():
        frame = data_frame(site)
        if frame is not None and (frame.dim, frame.size) != (-1, batch):
            yield (
                f"site {name!r}: plate {DATA!r} has size {frame.size} at dim {frame.dim}, expected {batch} at "
                f'dim -1; write pyro.plate("{DATA}", len(x), dim=-1)'
            )
        others = [f.name for f in site["cond_indep_stack"] if f.name != DATA and f.vectorized]
        if others:
            yield f"site {name!r}: inside plate(s) {others}; declare those dims as event dims with .to_event"


def _global_sites(model: dict, guide: dict) -> Iterator[str]:
    inside = f'put it in `with pyro.plate("{DATA}", len(x), dim=-1):`'
    for where, sites, others in (("model", model, guide), ("guide", guide, model)):
        for name, site in sites.items():
            if name == "x" or data_frame(site) is not None or _is_deterministic(site):
                continue
            shape = tuple(site["fn"].batch_shape)
            if shape:
                yield f"site {name!r}: outside the data plate in the {where}, with batch shape {shape}; {inside}"
            elif name in others and data_frame(others[name]) is not None:
                yield f"site {name!r}: outside the data plate in the {where} alone; {inside}"
            elif site["infer"].get("enumerate"):
                yield f"site {name!r}: enumerated outside the data plate; {inside}"


def _scales(model: dict, guide: dict) -> Iterator[str]:
    for where, sites in (("model", model), ("guide", guide)):
        for name, site in sites.items():
            if not (isinstance(site["scale"], float | int) and site["scale"] == 1):
                yield (
                    f"site {name!r}: scaled by {float(site['scale']):g} in the {where}; leave KL weights and N/B "
                    "to pyro_lvae.anneal and fit"
                )


def _params(*traces) -> Iterator[str]:
    names = sorted({n for trace in traces for n, s in trace.nodes.items() if s["type"] == "param"})
    if names:
        yield f"pyro.param or pyro.module is used ({', '.join(names)}); make them nn.Parameters of the structure"


def _densities(model: dict, guide: dict, expected: tuple, note: str = "") -> Iterator[str]:
    for where, sites in (("model", model), ("guide", guide)):
        for name, site in sites.items():
            if data_frame(site) is None or _is_deterministic(site):
                continue
            try:
                shape = tuple(site["fn"].log_prob(site["value"]).shape)
            except Exception as error:
                yield f"site {name!r}: log_prob fails in the {where}{note}: {_said(error)}{_hint(error)}"
                continue
            enumerated = any("_enumerate_dim" in s["infer"] for s in (*model.values(), *guide.values()))
            if (shape[-len(expected) :] if enumerated else shape) != expected:
                yield (
                    f"site {name!r}: log_prob has shape {shape} in the {where}{note}, expected {expected}; "
                    "did you forget .to_event(1)?"
                )


def _reads_data(structure, args: tuple, model_trace) -> Iterator[str]:
    model = _latents_and_data(model_trace)
    if "x" not in model or model["x"]["fn"].shape() != args[0].shape:
        return  # reported by _pairing or _densities
    other = model["x"]["fn"].sample().to(args[0].dtype)  # other data, which the likelihood admits
    held = poutine.condition(structure.model, data={"x": args[0]})  # what follows from the site's value stays
    try:
        again = _latents_and_data(replay(held, model_trace, other, *args[1:]))
    except Exception as error:
        yield f"the model must run on any x of the same shape: {_said(error)}"
        return
    for name, site in model.items():
        if name not in again or _is_deterministic(site):
            continue
        try:
            same = torch.equal(*(s["fn"].log_prob(site["value"]) for s in (site, again[name])))
        except Exception:  # reported by _densities
            continue
        if not same:
            yield (
                f"site {name!r}: its distribution in the model changes with x; read x only as obs= and for len(x), and "
                'after that what pyro.sample("x", ...) returns; and draw no noise but at sites'
            )


def _rows(structure, args: tuple, latents: dict) -> Iterator[str]:
    """Densities of the first rows at given latents, alone and among others."""
    count = len(args[0]) // 2

    def densities(fn, rows: slice) -> dict[str, Tensor]:
        values = {n: s["value"] if data_frame(s) is None else s["value"][rows] for n, s in latents.items()}
        sites = _latents_and_data(run(poutine.condition(fn, data=values), *(a[rows] for a in args)))
        local = {n: s for n, s in sites.items() if data_frame(s) is not None and not _is_deterministic(s)}
        dense = {n: s for n, s in local.items() if not is_point(s["fn"])}  # rounding alone moves a point
        return {n: s["fn"].log_prob(s["value"])[:count] for n, s in dense.items()}

    for where, fn in (("model", structure.model), ("guide", structure.guide)):
        try:
            alone, again, among = (densities(fn, slice(n)) for n in (count, count, None))
        except Exception:  # what cannot be run again at given values is not judged
            continue
        for name, value in alone.items():
            if torch.equal(value, again[name]) and not torch.allclose(value, among[name], rtol=1e-3, atol=1e-2):
                yield (
                    f"site {name!r}: the density of a row in the {where} changes with the rows beside it; in "
                    "evaluation mode every row must be computed by itself"
                )


def _training_mode(structure, args: tuple) -> Iterator[str]:
    """On a copy, for batch norm moves its statistics."""
    if len(args[0]) < 2:
        return  # batch norm cannot train on one row, and need not
    try:
        training = copy.deepcopy(structure).train()
    except Exception:  # what cannot be copied is not judged
        return
    try:
        once, again = (_gradient_leaves(training, [a.detach() for a in args]) for _ in range(2))
    except Exception as error:
        yield f"model and guide must run in training mode too: {_said(error)}{_hint(error)}"
        return
    own = {id(p) for module in (structure, training) for p in module.parameters()}  # a patched method keeps the former
    unlisted = [tuple(p.shape) for key, p in once.items() if key in again and key not in own]
    if unlisted:
        yield (
            f"tensors of shapes {unlisted} want gradients and are not among its parameters, so that nothing would "
            "train or save them; keep layers as attributes or in an nn.ModuleList, tensors as nn.Parameter, and what "
            "is to stay as it is with requires_grad_(False)"
        )


def _gradient_leaves(structure, args: list[Tensor]) -> dict[int, Tensor]:
    """{id: tensor} of what backward would put a gradient into, but for Pyro's own parameters."""
    with torch.enable_grad():
        traces = trace_pair(structure.model, structure.guide, *args)
        densities = [s["fn"].log_prob(s["value"]).sum() for t in traces for s in _latents_and_data(t).values()]
    of_pyro = {id(p) for _, p in pyro.get_param_store().named_parameters()}
    return {id(p): p for p in _leaves(densities) if id(p) not in of_pyro}


def _leaves(values: list[Tensor]) -> list[Tensor]:
    found, seen, todo = [], set(), [v.grad_fn for v in values]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [node.variable] if hasattr(node, "variable") else []
        todo += [following for following, _ in node.next_functions]
    return found


def _particles(structure, args: tuple) -> Iterator[str]:
    note = " with 2 particles"
    try:
        model_trace, guide_trace = trace_pair(structure.model, structure.guide, *args, num_particles=2)
    except Exception as error:
        is_norm = "running_mean should contain" in str(error)
        hint = "; torch's batch norm takes no dim of particles, pyro_lvae.nets.BatchNorm does" if is_norm else ""
        yield f"samples with a leading particle dim [2, B, z] must pass through model and guide: {_said(error)}{hint}"
        return
    sizes = (2, len(args[0]))
    yield from _densities(_latents_and_data(model_trace), _latents_and_data(guide_trace), sizes, note)


def _said(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = next((f for f in reversed(frames) if not f.filename.startswith(_LIBRARIES)), frames[-1])
    message = (str(error).strip() or repr(error)).splitlines()[0]
    return f"{type(error).__name__}: {message} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"


def _hint(error: Exception) -> str:
    if "Shape mismatch inside plate" in str(error):
        return "; did you forget .to_event(1)?"
    if "within the support" in str(error):
        return (
            "; the distribution does not admit these values: binarise the data, or pass another likelihood "
            "(pyro_lvae.conditionals.Normal, for one)"
        )
    if "same dtype" in str(error):
        return "; data and weights must have one dtype: x.float(), or structure.double()"
    if "more than 1 value per channel" in str(error):
        return "; batch norm needs several rows: leave it out (batch_norm=False) where a network sees one"
    if "shapes cannot be multiplied" in str(error):
        return "; a layer was made for rows, or for a latent, of another size (x_dim is to be the columns of x)"
    if "to satisfy the constraint" in str(error):
        return " NaN or out of range; map what a network gives into the constraint, a scale by softplus or exp"
    return ""
