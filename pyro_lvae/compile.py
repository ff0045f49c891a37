"""A step traced once through Pyro and run as one compiled graph; functions without gradients likewise.

Pyro's handlers run in Python at every step, and what they arrange is the same each time. Here that arrangement is
traced once, forward and backward, down to tensor operations, and the graph, with the kernels of `kernels.py`, is
compiled by torch's inductor: no handler, no autograd and no module is entered again.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import contextmanager

import pyro
import torch
from torch import Tensor, nn

from .kernels import decompositions, lean
from .objectives import learned
from .step import Step
from .traces import forked_noise

# Noise is torch's own and in the order of the eager step, which reordering would change (in torch 2.11; later versions
# leave draws in place); the graph on CUDA is ours.
_OPTIONS = {"fallback_random": True, "reorder_for_locality": False, "triton.cudagraphs": False}


class CompileError(RuntimeError):
    """A step cannot be compiled; says why, and what to do about it."""


class CompiledStep:
    r"""A `Step` as one compiled graph for batches of one shape; a smaller last batch is left to the `Step`.

    Traced in fake tensors, so that nothing runs twice and no noise is drawn. Parameters, buffers, KL weights
    and what the estimator has learned are inputs; batch-norm statistics are updated in place. The noise is torch's own,
    from the default generator and in the same order: compiled and eager losses agree to float rounding. On CUDA the
    graph is captured and replayed (`torch.cuda.CUDAGraph`).

    Args:
        step: what to compile. Its estimator must not wait for values on its way: those of this package do not.
        args: a batch as `model` and `guide` take it; its shapes are those of the graph.
        beta: the KL weights by site; their values are inputs.

    Raises:
        CompileError: the structure's control flow depends on values, the estimator waits for one, or
            there is no C++ compiler.
    """

    def __init__(self, step: Step, args: tuple, beta: dict[str, float]):
        self.step, self.names = step, tuple(beta)
        self.like = args[0]
        self.shapes, self.share = _shapes(args), step.share
        self._modules = list(step.structure.modules())
        self.modes = [m.training for m in self._modules]
        named = [*step.structure.named_parameters(), *step.structure.named_buffers()]
        self._trained = {n: p for n, p in named if p.requires_grad}
        self._fixed = {n: t for n, t in named if not t.requires_grad}
        self._weights = [t.detach() for t in (*self._trained.values(), *self._fixed.values())]
        self._has_gradient = [True] * len(self._trained)
        self._compiled = self._compile(args, beta)
        if self.like.device.type == "cuda":
            self._compiled = _Replayed(self._compiled, self._inputs(args, beta), len(self._weights))

    def fits(self, args: tuple) -> bool:
        """Whether a batch is of the shape of the graph, and all else as it was traced."""
        is_alike = _shapes(args) == self.shapes and self.step.share == self.share
        return is_alike and [m.training for m in self._modules] == self.modes

    def __call__(self, args: tuple, beta: dict[str, float]) -> tuple[Tensor, Tensor]:
        """As of `Step`."""
        for p in self._trained.values():
            p.grad = None  # the last step's memory serves this one
        with torch.no_grad():
            loss, norm, *rest = self._compiled(*self._inputs(args, beta))
        gradients = iter(rest[: sum(self._has_gradient)])
        for p, is_there in zip(self._trained.values(), self._has_gradient, strict=True):
            p.grad = next(gradients) if is_there else None
        if state := dict(zip(learned(self.step.estimator), rest[sum(self._has_gradient) :], strict=True)):
            self.step.estimator.load_state_dict(state)
        return loss, norm

    def _inputs(self, args: tuple, beta: dict[str, float]) -> list[Tensor]:
        weights = torch.tensor([float(beta[n]) for n in self.names], dtype=self.like.dtype)
        weights = weights.pin_memory() if self.like.is_cuda else weights  # so that the host need not wait
        weights = weights.to(self.like.device, non_blocking=True)
        state = [t.to(self.like.device) for t in learned(self.step.estimator).values()]
        return [*self._weights, *state, weights, *(a for a in args if a is not None)]

    def _compile(self, args: tuple, beta: dict[str, float]) -> Callable:
        estimator = type(self.step.estimator).__name__
        if not hasattr(self.step.estimator, "differentiable_loss"):
            raise CompileError(f"{estimator} has no differentiable_loss; use an estimator of pyro_lvae")
        what = f"{estimator} on {type(self.step.structure).__name__}"
        return _compiled(self._traced(args), self._inputs(args, beta), what)

    def _traced(self, args: tuple) -> Callable:
        """The step as a function of tensors alone."""
        step, is_there = self.step, [a is not None for a in args]
        estimator, names = copy.copy(step.estimator), list(learned(step.estimator))

        def run(*inputs: Tensor) -> list[Tensor]:
            given = iter(inputs)
            trained = {n: next(given).detach().requires_grad_() for n in self._trained}
            fixed = {n: next(given) for n in self._fixed}
            if names:
                estimator.load_state_dict({n: next(given) for n in names})
            beta = dict(zip(self.names, next(given).unbind(), strict=True))
            batch = tuple(next(given) if there else None for there in is_there)
            with _swapped(step.structure, {**trained, **fixed}), step.handlers(beta), torch.enable_grad():
                loss = estimator.differentiable_loss(step.pair.model, step.pair.guide, *batch)
                loss = loss / step.per(batch)
                found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            self._has_gradient = [g is not None for g in found]
            gradients = [g for g in found if g is not None]
            norm = nn.utils.get_total_norm(gradients, foreach=False)
            return [loss.detach(), norm, *step.clipped(gradients, norm), *learned(estimator).values()]

        return run


class CompiledFunction:
    """A function of a structure's weights and a batch, without gradients, as one compiled graph.

    Args:
        structure: the module whose parameters and buffers are inputs.
        function: of tensors, which runs the structure.
        args: tensors of the shapes that the graph is for.

    Raises:
        CompileError: as for `CompiledStep`.
    """

    def __init__(self, structure: nn.Module, function: Callable[..., Tensor], args: tuple[Tensor, ...]):
        named = dict((*structure.named_parameters(), *structure.named_buffers()))
        self.shapes, self._weights = _shapes(args), [t.detach() for t in named.values()]

        def run(*inputs: Tensor) -> list[Tensor]:
            given = iter(inputs)
            with _swapped(structure, {n: next(given) for n in named}), torch.no_grad():
                return [function(*given)]

        self._run = _compiled(run, [*self._weights, *args], type(structure).__name__)

    def fits(self, args: tuple) -> bool:
        """Whether these are of the shapes of the graph."""
        return _shapes(args) == self.shapes

    def __call__(self, *args: Tensor) -> Tensor:
        with torch.no_grad():
            return self._run(*self._weights, *args)[0]


def _compiled(run: Callable, inputs: list[Tensor], what: str) -> Callable:
    """A function of tensors, traced in fake ones and compiled; or a `CompileError`."""
    from torch._inductor import compile as inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        with forked_noise(inputs[0].device), pyro.validation_enabled(False):
            table = decompositions(inputs[0].device)
            graph = make_fx(run, table, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
            graph = lean(graph)
    except Exception as error:
        raise CompileError(
            f"{what} cannot be traced: {_first_line(error)}. What compiles never asks a tensor for its value (.item(), "
            "if, float()); of Pyro's estimators most do, those of pyro_lvae do not (for Trace_ELBO use SampledELBO, "
            "for TraceMeanField_ELBO AnalyticELBO)"
        ) from error
    try:
        with torch.no_grad(), _cached() as fake, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of parts of its own
            return inductor(graph, [fake.from_tensor(t, static_shapes=True) for t in inputs], options=_OPTIONS)
    except Exception as error:
        raise CompileError(
            f"torch's inductor could not compile {what}: {_first_line(error)}. On the CPU it needs a C++ compiler "
            "(g++ or clang++, on PATH or named by CXX)"
        ) from error


class _Replayed:
    """A function of tensors as a CUDA graph: its first arguments keep their memory, the others are copied in.

    Raises:
        CompileError: an operation cannot be captured.
    """

    def __init__(self, compiled: Callable, inputs: list[Tensor], num_static: int):
        self.num_static = num_static
        self.inputs = [*inputs[:num_static], *(t.clone() for t in inputs[num_static:])]
        before = [t.clone() for t in inputs[:num_static]]  # the warm-up moves batch-norm statistics
        try:
            with torch.no_grad(), torch.cuda.device(inputs[0].device):
                self.graph, self.outputs = _captured(compiled, self.inputs)
        except RuntimeError as error:
            raise CompileError(f"the compiled step cannot become a CUDA graph: {_first_line(error)}") from error
        finally:
            for t, value in zip(inputs, before, strict=False):
                t.copy_(value)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        for static, now in zip(self.inputs[self.num_static :], inputs[self.num_static :], strict=True):
            static.copy_(now, non_blocking=True)
        self.graph.replay()
        return list(self.outputs)


def _captured(compiled: Callable, inputs: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of the call, on the current device, and the memory that its outputs are in."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with forked_noise(inputs[0].device), torch.cuda.stream(side):
        for _ in range(3):
            compiled(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        outputs = compiled(*inputs)
    return graph, outputs


@contextmanager
def _swapped(module: nn.Module, tensors: dict[str, Tensor]):
    """The module with other parameters and buffers, wherever in it the same one stands under several names."""
    by_identity = {id(t): tensors[n] for n, t in (*module.named_parameters(), *module.named_buffers())}
    places = [
        (kept, name, t)
        for m in module.modules()
        for kept in (m._parameters, m._buffers)
        for name, t in kept.items()
        if t is not None
    ]
    try:
        for kept, name, t in places:
            kept[name] = by_identity[id(t)]
        yield
    finally:
        for kept, name, t in places:
            kept[name] = t


@contextmanager
def _cached():
    """Lets inductor keep its results on disk, as `torch.compile` does: the same step then compiles in seconds.

    Yields the mode for fake tensors to compile for; of real ones inductor takes sizes for symbols there.
    """
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    fake = FakeTensorMode(shape_env=ShapeEnv())
    with tracing(TracingContext(fake)):
        yield fake


def _shapes(args: tuple) -> list:
    return [None if a is None else (a.shape, a.dtype, a.device) for a in args]


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
