"""The two models, and everything that trains them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature

import pyro
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import COMPILER, Contender, Run, repeated
from benchmarks.plain import Plain, PlainLadder, PlainVAE
from pyro_lvae import VAE, Dataset, FusedAdam, LadderVAE, SampledELBO, fit, for_svi, linear
from pyro_lvae.loop import Loop
from pyro_lvae.malloc import kept_memory

ADAM, FUSED = "PyTorch by hand, Adam", "PyTorch by hand, Adam(fused=True)"
BY_HAND_COMPILED = "PyTorch by hand, torch.compile, Adam"
BY_HAND_COMPILED_FUSED = "PyTorch by hand, torch.compile, Adam(fused=True)"
BY_HAND_REPLAYED = "PyTorch by hand, torch.compile(mode='reduce-overhead'), Adam(fused=True)"
EAGER, COMPILED = "pyro_lvae, eager", "pyro_lvae, compiled"
SVI_DEFAULTS = "Pyro SVI, defaults"
PRODUCTS = "its matrix products alone"


@dataclass(frozen=True)
class Model:
    """One of the two, as this library and as PyTorch alone have it; an epoch has `rows` rows, cut to whole batches."""

    ours: Callable[[], nn.Module]
    plain: Callable[[], Plain]
    batch_size: int
    rows: int

    def epoch(self) -> Tensor:
        return binary(self.rows // self.batch_size * self.batch_size)


MODELS = {
    "vae": Model(lambda: VAE(784, 20, 400, num_hidden=1, batch_norm=False), PlainVAE, 128, 10_000),
    "ladder": Model(lambda: LadderVAE(784), PlainLadder, 256, 5_120),
}


def binary(rows: int) -> Tensor:
    """Random rows of 784 binary pixels."""
    return (torch.rand(rows, 784) > 0.8).float()


def contenders(name: str) -> dict[str, Contender]:
    """All that is compared on one training step of a model."""
    model = MODELS[name]
    x, rows = binary(model.batch_size), model.epoch()
    steps = len(rows) // model.batch_size
    epoch = dict(unit=steps, has_data=True)
    peer = dict(needs=("benchmarks.in_numpyro",), only="cpu")
    found = {
        EAGER: Contender(lambda: step_of(loop(model.ours(), x, compile=False), x)),
        COMPILED: Contender(lambda: step_of(loop(model.ours(), x, compile=True), x), needs=COMPILER),
        f"{COMPILED}, bfloat16": Contender(
            lambda: step_of(loop(model.ours(), x, compile=True, precision="bfloat16"), x), needs=COMPILER
        ),
        f"{COMPILED}, tf32": Contender(lambda: _in_tf32(model, x), needs=COMPILER, only="cuda"),
        PRODUCTS: Contender(lambda: keeping(repeated(Products(lambda: model.plain()(x).backward())))),
        ADAM: Contender(lambda: by_hand(model.plain(), x)),
        FUSED: Contender(lambda: by_hand(model.plain(), x, fused=True)),
        BY_HAND_COMPILED: Contender(lambda: by_hand(torch.compile(model.plain()), x), needs=COMPILER),
        BY_HAND_COMPILED_FUSED: Contender(lambda: by_hand(torch.compile(model.plain()), x, fused=True), needs=COMPILER),
        BY_HAND_REPLAYED: Contender(
            lambda: by_hand(torch.compile(model.plain(), mode="reduce-overhead"), x, fused=True),
            needs=COMPILER,
            only="cuda",
        ),
        SVI_DEFAULTS: Contender(lambda: svi(model.ours(), Trace_ELBO(), x)),
        "Pyro, tuned": Contender(lambda: tuned(model.ours(), x)),
        "NumPyro, jitted step": Contender(lambda: _numpyro().step(name, x.numpy()), **peer),
        f"{EAGER}, epoch of fit": Contender(lambda: epoch_of(model.ours(), rows, model.batch_size, False), **epoch),
        f"{COMPILED}, epoch of fit": Contender(
            lambda: epoch_of(model.ours(), rows, model.batch_size, True), needs=COMPILER, **epoch
        ),
        "NumPyro, jitted epoch": Contender(
            lambda: repeated(_numpyro().epoch(name, rows.numpy(), model.batch_size)), **epoch, **peer
        ),
    }
    if name == "vae":
        needs = ("benchmarks.in_pythae",)
        found["pythae, epoch of its trainer"] = Contender(
            lambda: _pythae(rows, model), needs=needs, only="cpu", **epoch
        )
    return found


def loop(
    structure: nn.Module,
    rows: Tensor,
    *,
    compile: bool,
    batch_size: int | None = None,
    estimator: ELBO | None = None,
    precision: str = "float32",
) -> Loop:
    """`fit`'s own loop at its defaults, annealed, over the rows, which are drawn anew from their grey values."""
    beta = dict.fromkeys([f"z{i + 1}" for i in range(structure.num_layers)], linear(0.1, 1, epochs=10**6))
    given = dict(batch_size=batch_size or len(rows), monitor_size=1, has_global_sites=False)
    given |= dict(compile=compile, precision=precision)
    defaults = {name: p.default for name, p in signature(fit).parameters.items()}
    options = {
        name: defaults[name] for name, p in signature(Loop).parameters.items() if _is_open(p) and name in defaults
    }
    return Loop(
        structure,
        Dataset("rows", rows, rows[:2]),
        SampledELBO() if estimator is None else estimator,
        FusedAdam(structure.parameters()),
        None,
        beta,
        **(options | given),
    )


def _is_open(parameter: Parameter) -> bool:
    return parameter.kind is Parameter.KEYWORD_ONLY and parameter.default is Parameter.empty


def step_of(loop: Loop, x: Tensor) -> Run:
    """Steps of `fit` on one batch, loss and gradient checked to be finite."""
    return _insisting(loop, lambda: loop.optimise((x,)))


def epoch_of(structure: nn.Module, rows: Tensor, batch_size: int, compile: bool) -> Run:
    """Epochs of `fit`: order, gather, Bernoulli draws, steps, and the monitoring of one row."""
    trained = loop(structure, rows, compile=compile, batch_size=batch_size)
    return _insisting(trained, lambda: trained.train(trained.epoch + 1, math.inf, 1, []))


def _insisting(loop: Loop, call: Callable[[], object]) -> Run:
    """Calls one after another, as in training; the loop, which goes on eagerly where it cannot compile, may not."""
    asked, run = loop.gradient.compile, repeated(call)

    def insist(count: int) -> None:
        run(count)
        if asked and loop.gradient.compiled is None:
            raise RuntimeError("the step could not be compiled; is there a C++ compiler? --skip compile goes without")

    return keeping(insist)


def keeping(run: Run) -> Run:
    """The same calls, between which freed memory is kept, as `fit` keeps it, until nothing runs them any more."""
    memory = kept_memory()
    memory.__enter__()
    run.memory = memory
    return run


def _in_tf32(model: Model, x: Tensor) -> Run:
    torch.set_float32_matmul_precision("high")  # as `fit` does
    return step_of(loop(model.ours(), x, compile=True, precision="tf32"), x)


def by_hand(model: nn.Module, x: Tensor, **options) -> Run:
    """Hand-written PyTorch."""
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, **options)

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        model(x).backward()
        adam.step()

    return repeated(step)


class Products(TorchDispatchMode):
    """The matrix products and convolutions that a call makes, made again by torch, one after another.

    Attributes:
        calls: each with the tensors of that call.
    """

    def __init__(self, call: Callable[[], object]):
        super().__init__()
        self.calls: list[Callable[[], object]] = []
        with self:
            call()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in _PRODUCTS:
            self.calls.append(partial(operation, *args, **(kwargs or {})))
        return operation(*args, **(kwargs or {}))

    @torch.no_grad()
    def __call__(self) -> None:
        for call in self.calls:
            call()


_aten = torch.ops.aten
_PRODUCTS = {o.default for o in (_aten.mm, _aten.addmm, _aten.bmm, _aten.convolution, _aten.convolution_backward)}


def svi(structure: nn.Module, estimator: ELBO, x: Tensor) -> Run:
    """Pyro's own SVI, everything at its defaults."""
    svi = SVI(*for_svi(structure), pyro.optim.Adam({"lr": 1e-3}), estimator)
    return repeated(lambda: svi.step(x))


def tuned(structure: nn.Module, x: Tensor) -> Run:
    """Pyro's loss with no validation, no parameter store, and one fused Adam."""
    adam, estimator = torch.optim.Adam(structure.parameters(), lr=1e-3, fused=True), Trace_ELBO()

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        with pyro.validation_enabled(False):
            estimator.differentiable_loss(structure.model, structure.guide, x).backward()
        adam.step()

    return repeated(step)


def _numpyro():
    from benchmarks import in_numpyro

    return in_numpyro


def _pythae(rows: Tensor, model: Model) -> Run:
    from benchmarks import in_pythae

    return repeated(in_pythae.epoch(rows, model.batch_size))
