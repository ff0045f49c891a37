"""What a traced graph computes with, where what torch would take can be slow on a CPU, or keeps more than is needed.

Values differ by float rounding alone. On a CPU matrix products of some size are oneDNN's where MKL is not at home, what
many entries read, as a column's deviation in batch norm, is computed once, and in torch 2.14 `log1p` becomes a
logarithm and a correction. The gradients of leaky ReLUs are the same to the bit.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_ENOUGH = 2**24  # multiply-adds of a product, from which oneDNN is ahead
_MANY = 16  # readers of a value, for which it is better kept than computed again
# A CPU takes longer for these than to load what they give.
_COSTLY = {aten.div, aten.reciprocal, aten.sqrt, aten.rsqrt, aten.pow, aten.exp, aten.log, aten.log1p}
_COSTLY |= {aten.sigmoid, aten.tanh, aten.softplus}
_UNTAGGED = {aten.rsub, aten._to_copy, aten.leaky_relu}  # entry by entry, though not every torch says so


def decompositions(device: torch.device) -> dict:
    """What `make_fx` is to take apart on a device: batch norm, for `lean` to look into; in torch 2.14 `log1p`."""
    from torch._decomp import get_decompositions

    if device.type != "cpu":
        return {}
    table = get_decompositions([aten.native_batch_norm, aten.native_batch_norm_backward])
    if not _replaces_log1p():
        return table
    ending_in_it = [aten.binary_cross_entropy_with_logits, aten.softplus, aten.log_sigmoid_forward, aten.logaddexp]
    return {**table, **get_decompositions(ending_in_it), aten.log1p.default: log1p}


def _replaces_log1p() -> bool:
    """In torch 2.14, whose own takes eight times a logarithm, unless a compiler may drop the correction."""
    import torch._inductor.config

    may_reorder = getattr(torch._inductor.config.cpp, "enable_unsafe_math_opt_flag", False)
    return torch.__version__.startswith("2.14.") and not may_reorder


def log1p(x: Tensor) -> Tensor:
    """log(1 + x) to a unit or two in the last place, by a logarithm.

    1 + x is rounded to u, and log(1 + x) = log u + log(1 + (x - (u - 1)) / u), whose second term is that quotient to
    within its square. Where the quotient is no number, x is -1, infinite or none, and log u says all.
    """
    if x.dtype in (torch.bfloat16, torch.float16):  # as torch's own, rounded once
        return log1p(x.float()).to(x.dtype)
    u = 1 + x
    lost = (x - (u - 1)) / u
    return u.log() + torch.where(lost.isnan(), 0.0, lost)


def lean(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph, changed in place.

    Leaky ReLUs keep but what came out, large products are by the faster library, what many read is computed once.
    """
    nodes = list(graph.graph.nodes)
    _once(nodes)
    written = {_memory(n) for node in nodes if _writes(node) for n in node.all_input_nodes}
    use_onednn = torch.backends.mkldnn.enabled and _is_ahead()
    for node in nodes:
        if node.target is aten.leaky_relu_backward.default:
            _by_result(node, written)
        elif use_onednn and node.target in (aten.mm.default, aten.addmm.default) and _is_suited(node):
            *bias, a, b = node.args
            node.target, node.args, node.kwargs = _product(), (a, b, bias[0] if bias else None), {}
    graph.recompile()
    return graph


def _once(nodes: list[fx.Node]) -> None:
    """Keep the values of costly operations that a larger result reads, directly or through cheap ones and views.

    Inductor computes anew for every entry of a result what goes into it entry by entry.
    """
    try:
        from torch._inductor.inductor_prims import force_stride_order  # what it asks the strides of is kept
    except ImportError:
        return
    is_read_by_many = set()
    for node in reversed(nodes):
        if any(_count(u) >= _MANY * _count(node) or u in is_read_by_many for u in _readers(node)):
            is_read_by_many.add(node)
    for node in nodes:
        if node in is_read_by_many and _is_costly(node) and node.meta["val"].is_cpu:
            with node.graph.inserting_after(node):
                kept = node.graph.call_function(force_stride_order, (node, list(node.meta["val"].stride())))
            kept.meta = dict(node.meta)
            node.replace_all_uses_with(kept, delete_user_cb=lambda user, kept=kept: user is not kept)


def _readers(node: fx.Node) -> list[fx.Node]:
    """The nodes into whose loops a value of several entries would go, but for parts of it and what is kept itself."""
    count = _count(node)
    grown = [u for u in node.users if _is_entrywise(u) and _count(u) >= count > 1]
    return [u for u in grown if _count(u) >= _MANY * count or not _is_costly(u)]


def _count(node: fx.Node) -> int:
    """Entries of a tensor."""
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0


def _is_costly(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in _COSTLY and not _writes(node)


def _is_entrywise(node: fx.Node) -> bool:
    """An operation of which each entry reads one of what goes in: arithmetic, or a view."""
    operation = node.target
    if not isinstance(operation, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in operation.tags or operation.is_view or operation.overloadpacket in _UNTAGGED


def _by_result(node: fx.Node, written: set[int]) -> None:
    """The gradient of a leaky ReLU by what came out, which has the sign of what went in and serves the next layer too.

    What has been `written` to since, as by `h += skip`, no longer tells that sign.
    """
    gradient, x, slope, is_result = node.args
    if slope < 0 or is_result:
        return
    for user in x.users:
        is_it = user.target is aten.leaky_relu.default and (*user.args, 0.01)[1] == slope
        if is_it and not {_memory(x), _memory(user)} & written:
            node.args = (gradient, user, slope, True)
            return


def _writes(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "is_mutable", False)


def _memory(node: fx.Node) -> int:
    """What views of one tensor have in common."""
    value = node.meta.get("val")
    is_dense = isinstance(value, Tensor) and value.layout == torch.strided
    return value.untyped_storage()._cdata if is_dense else id(node)


@cache
def _is_ahead() -> bool:
    """An AMD processor with AVX-512, where it was measured: MKL keeps its best kernels for Intel's."""
    backends, path = torch.backends, Path("/proc/cpuinfo")
    if not (backends.mkl.is_available() and backends.mkldnn.is_available() and path.exists()):
        return False
    if backends.cpu.get_cpu_capability() != "AVX512" or "AuthenticAMD" not in path.read_text():
        return False
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    try:  # the operation is torch's own affair, and may change
        return _product()(one, one, one[0]).item() == 2
    except (AttributeError, RuntimeError):
        return False


def _is_suited(node: fx.Node) -> bool:
    """Whether oneDNN is ahead on a product: of float32, of some size, h W' + b or g W, not g' h."""
    *bias, a, b = (n.meta["val"] for n in node.args)
    (m, k), n = a.shape, b.shape[1]
    is_plain = not node.kwargs and all(t.shape == (n,) and t.is_contiguous() for t in bias)
    is_dense = a.is_contiguous() and (b.is_contiguous() or b.t().is_contiguous())
    return is_plain and is_dense and a.dtype == torch.float32 and a.is_cpu and m * k * n >= _ENOUGH


@cache
def _product():
    """a b + bias as an operation of a graph."""
    library = torch.library.Library("pyro_lvae", "FRAGMENT")
    library.define("product(Tensor a, Tensor b, Tensor? bias) -> Tensor")
    library.impl("product", _by_onednn, "CPU")
    library.impl("product", lambda a, b, bias: a.new_empty(a.shape[0], b.shape[1]), "Meta")
    _product.library = library  # else the operation would be taken back with it
    return torch.ops.pyro_lvae.product.default


def _by_onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
