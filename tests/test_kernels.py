"""What a traced graph computes with in place of what torch would take: the same values, to float rounding."""

import copy
import re

import pytest
import torch
import torch._inductor.config
from test_compile import latents, needs_compiler
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import pyro_lvae.compile
from pyro_lvae import IWAE, VAE, LadderVAE, SampledELBO, kernels, log_likelihood
from pyro_lvae.compile import CompiledStep
from pyro_lvae.kernels import decompositions, lean, log1p
from pyro_lvae.step import Step

aten = torch.ops.aten
CPU = torch.device("cpu")
has_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def ulps(found, exact):
    """Distance in units in the last place of float32."""
    exact32 = exact.float().abs()
    return (found.double() - exact).abs() / (torch.nextafter(exact32, exact32.new_tensor(torch.inf)) - exact32).double()


def test_log1p_is_exact_to_rounding():
    x = torch.logspace(-37, 38, 10_001, dtype=torch.float64).float()
    assert ulps(log1p(x), torch.log1p(x.double())).max() < 2
    x = torch.linspace(-0.999, 3, 100_001)
    assert ulps(log1p(x), torch.log1p(x.double())).max() < 2
    x = -torch.logspace(-37, -1e-3, 10_001, dtype=torch.float64).float()
    assert ulps(log1p(x), torch.log1p(x.double())).max() < 2


def test_log1p_at_its_ends():
    x = torch.tensor([-1.0, -2.0, 0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 3e38])
    torch.testing.assert_close(log1p(x), torch.log1p(x), equal_nan=True)
    torch.testing.assert_close(log1p(x.double()), torch.log1p(x.double()), equal_nan=True)


@pytest.fixture
def slow_log1p(monkeypatch):
    """As if torch's own were slow, whichever torch it is."""
    monkeypatch.setattr(kernels, "_replaces_log1p", lambda: True)


@pytest.mark.parametrize(
    "function",
    [
        F.softplus,
        F.logsigmoid,
        lambda x: F.softplus(x, beta=2.0, threshold=3.0),
        lambda x: F.binary_cross_entropy_with_logits(x, x.sigmoid().detach().round(), reduction="none"),
        lambda x: torch.logaddexp(x, 0.3 * x),
        lambda x: torch.log1p(x.abs()),
    ],
)
def test_what_ends_in_a_log1p(function, slow_log1p):
    """No log1p is left in the graph; values and gradients are as before, far out as well."""
    x = torch.cat([torch.linspace(-9, 9, 91), torch.tensor([-800.0, -60.0, 25.0, 60.0, 800.0])]).double()

    def run(x):
        x = x.detach().requires_grad_()
        y = function(x)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    graph = make_fx(run, decompositions(CPU))(x)
    assert not {node.target for node in graph.graph.nodes} & decompositions(CPU).keys()
    for found, expected in zip(graph(x), run(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)


def test_graphs_of_other_devices_are_left_alone():
    assert decompositions(torch.device("cuda")) == {}


def test_log1p_in_half_precision_is_rounded_once():
    x = torch.logspace(-30, 30, 1000).bfloat16()
    assert torch.equal(log1p(x), torch.log1p(x))


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of parts of its own
def test_compiled_log1p_is_exact_to_rounding(slow_log1p):
    """No flag of the compiler takes the correction out."""
    x = torch.cat([torch.logspace(-37, 38, 5_000), -torch.logspace(-37, -1e-3, 5_000)])
    graph = make_fx(torch.log1p, decompositions(CPU))(x)
    found = torch._inductor.compile(graph, [x])(x)
    assert ulps(found, torch.log1p(x.double())).max() < 3


@pytest.mark.parametrize(("version", "is_slow"), [("2.11.0", False), ("2.14.1+cu130", True), ("2.15.0", False)])
def test_log1p_is_taken_apart_where_it_is_slow(version, is_slow, monkeypatch):
    """But nowhere that a flag lets the compiler drop the correction."""
    monkeypatch.setattr(torch, "__version__", version)
    assert (aten.log1p.default in decompositions(CPU)) == is_slow
    with torch._inductor.config.patch({"cpp.enable_unsafe_math_opt_flag": True}):
        assert aten.log1p.default not in decompositions(CPU)


def test_a_step_of_every_structure(structure, x, monkeypatch):
    """Loss, gradients and batch norm's statistics in float64 as of the eager step, through the same noise."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options=None: graph)
    structure, x = structure.double(), x.double()
    beta = dict.fromkeys(latents(structure, x), 0.5)
    other = copy.deepcopy(structure)
    compiled = CompiledStep(Step(other, SampledELBO()), (x,), beta)
    torch.manual_seed(1)
    expected = Step(structure, SampledELBO())((x,), beta)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled((x,), beta), expected, rtol=1e-9, atol=1e-9)
    for (name, p), q in zip(structure.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-7, atol=1e-9, msg=name)
    torch.testing.assert_close(dict(other.named_buffers()), dict(structure.named_buffers()))


def traced(function, *inputs):
    return make_fx(function, tracing_mode="fake")(*inputs)


def products_of(graph):
    return sum("pyro_lvae.product" in str(node.target) for node in graph.graph.nodes)


def gradient_of(function):
    """The gradient of a function's sum as a function."""

    def run(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0]

    return run


def is_by_result(graph):
    (node,) = graph.graph.find_nodes(op="call_function", target=aten.leaky_relu_backward.default)
    return node.args[3]


@pytest.mark.parametrize("slope", [0.01, 0.2, 0.0, -0.5])
def test_leaky_relu_by_its_result(slope):
    """Its gradient needs no more of what went in, and is the same to the bit; falling branches stay as they are."""
    x = torch.randn(400)
    x[:3] = torch.tensor([0.0, -0.0, -1e-44])
    run = gradient_of(lambda x: F.leaky_relu(x, slope).square())
    graph = lean(traced(run, x))
    assert is_by_result(graph) == (slope >= 0)
    assert torch.equal(graph(x), run(x))


def _residual(x):
    h = F.leaky_relu(2 * x)
    h += 3
    return h * x


def _through_a_view(x):
    h = F.leaky_relu(2 * x)
    h.view(-1)[:200].neg_()
    return h * x


@pytest.mark.parametrize("function", [_residual, _through_a_view])
def test_leaky_relu_whose_result_is_changed_in_place(function):
    """The changed result no longer tells the sign of what went in."""
    x, run = torch.randn(400), gradient_of(function)
    graph = lean(traced(run, x))
    assert not is_by_result(graph)
    assert torch.equal(graph(x), run(x))


def kept(graph):
    return [node.args[0].target for node in graph.graph.nodes if "force_stride_order" in str(node.target)]


def _normalised(x):
    return F.batch_norm(x, None, None, x.new_ones(40), x.new_zeros(40), training=True)


def _rescaled(x):
    scale = x[0].sqrt()
    y = x * scale
    scale += 1
    return y + scale


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (_normalised, [aten.rsqrt.default]),
        (gradient_of(lambda x: _normalised(x).square()), [aten.rsqrt.default]),
        (lambda x: x * (1 + x[0].exp().unsqueeze(0)), [aten.exp.default]),
        (_rescaled, [aten.sqrt.default]),
        (lambda x: x * F.softplus(x[0]), [aten.softplus.default]),
        (lambda x: x * (1 - x[0].sigmoid()), [aten.sigmoid.default]),
        (lambda x: x * x[0].sqrt().reciprocal(), [aten.reciprocal.default]),  # which reads the root once
        (lambda x: x * x.exp()[0], []),  # 40 entries are read by many, not all
        (lambda x: x * x[0, 0].exp(), []),  # what is read is one number
        (lambda x: x.exp() * x, []),
        (lambda x: x[:, 0].exp() * x[:, 1].sqrt(), []),
        (lambda x: x * (2 * x[0] + 1), []),
        (lambda x: x @ x[:40].exp(), []),
    ],
)
def test_what_many_entries_read_is_kept(function, expected, monkeypatch):
    """Through arithmetic, views and changes in place; what the graph gives does not change."""
    monkeypatch.setattr(kernels, "_replaces_log1p", lambda: False)
    x = torch.rand(100, 40, dtype=torch.float64)
    graph = make_fx(function, decompositions(CPU), tracing_mode="fake")(x)
    before = graph(x)
    assert kept(lean(graph)) == expected
    assert torch.equal(graph(x), before)
    torch.testing.assert_close(before, function(x))


def test_nothing_is_kept_on_other_devices():
    with FakeTensorMode():
        x = torch.rand(100, 40, device="cuda")
        graph = make_fx(lambda x: x * x[0].exp())(x)
    assert {node.meta["val"].device.type for node in graph.graph.nodes if "val" in node.meta} == {"cuda"}
    assert not kept(lean(graph))


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of parts of its own
@pytest.mark.parametrize("function", [lambda x: x * x[0].sqrt(), _rescaled])
def test_what_is_kept_is_written_down_by_inductor(function):
    """Beside the result, which else is all that it writes, computing the rest in every row."""
    x = torch.rand(100, 40, dtype=torch.float64)
    for prepare, results in ((lambda graph: graph, 1), (lean, 2)):
        graph = prepare(make_fx(function, tracing_mode="fake")(x))
        compiled, (code,) = run_and_get_code(torch._inductor.compile, graph, [x])
        assert len(set(re.findall(r"out_ptr\d+", code))) == results
        torch.testing.assert_close(compiled(x), function(x))


@pytest.fixture
def always_ahead(monkeypatch):
    """oneDNN's products on whatever processor the tests run."""
    monkeypatch.setattr(kernels, "_is_ahead", lambda: True)


@has_onednn
@pytest.mark.parametrize("is_transposed", [False, True], ids=["h W'", "g W"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_large_products_are_onednns(is_transposed, has_bias, always_ahead):
    """Forwards W is transposed, backwards it is not; values as of float64's product."""
    h, w, b = torch.randn(256, 300), torch.randn(300, 256), torch.randn(256)
    w = w.t().contiguous().t() if is_transposed else w

    def function(h, w, b):
        return torch.addmm(b, h, w) if has_bias else h @ w

    graph = lean(traced(function, h, w, b))
    assert products_of(graph) == 1
    exact = h.double() @ w.double() + has_bias * b
    torch.testing.assert_close(graph(h, w, b), exact.float(), rtol=1e-5, atol=1e-3)


@has_onednn
@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda h, w, b: h[:9] @ w, "small"),
        (lambda h, w, b: h.t() @ h, "first factor transposed"),
        (lambda h, w, b: h.double() @ w.double(), "float64"),
        (lambda h, w, b: h.bfloat16() @ w.bfloat16(), "bfloat16"),
        (lambda h, w, b: torch.addmm(b, h, w, alpha=2), "scaled"),
        (lambda h, w, b: torch.addmm(b.expand(256, -1), h, w), "bias by rows"),
        (lambda h, w, b: torch.addmm(b[:1].expand(256), h, w), "bias repeated"),
        (lambda h, w, b: h @ torch.cat([w, w], 1)[:, :256], "part of a wider second factor"),
        (lambda h, w, b: h @ w[:1].expand(300, -1), "second factor repeated"),
        (lambda h, w, b: torch.cat([h, h], 1)[:, :300] @ w, "part of a wider first factor"),
    ],
)
def test_other_products_stay(function, why, always_ahead):
    inputs = torch.randn(256, 300), torch.randn(300, 256), torch.randn(256)
    assert products_of(lean(traced(function, *inputs))) == 0, why


def test_products_stay_where_onednn_is_not_ahead(monkeypatch):
    monkeypatch.setattr(kernels, "_is_ahead", lambda: False)
    h, w = torch.randn(256, 300), torch.randn(300, 256)
    assert products_of(lean(traced(torch.mm, h, w))) == 0


def test_products_stay_where_onednn_is_switched_off(always_ahead, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    h, w = torch.randn(256, 300), torch.randn(300, 256)
    assert products_of(lean(traced(torch.mm, h, w))) == 0


@pytest.fixture
def all_ahead(always_ahead, monkeypatch):
    """However small they are; and the counts of products in the graphs that are traced."""
    counts = []

    def counting(graph):
        graph = lean(graph)
        counts.append(products_of(graph))
        return graph

    monkeypatch.setattr(kernels, "_ENOUGH", 1)
    monkeypatch.setattr(pyro_lvae.compile, "lean", counting)
    return counts


@has_onednn
@needs_compiler
@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: VAE(40, 4, 16, num_hidden=1), 6),
        pytest.param(lambda: LadderVAE(40, (8, 4), (16, 8)), 20, marks=pytest.mark.slow),
    ],
    ids=["VAE", "LadderVAE"],
)
def test_a_compiled_step_with_them(make, count, all_ahead):
    """Loss and gradients of one step as of the eager one, with products forwards and backwards."""
    torch.manual_seed(0)
    eager = make()
    compiled, x = copy.deepcopy(eager), (torch.rand(64, 40) > 0.5).float()
    beta = dict.fromkeys(latents(eager, x), 0.5)
    run = CompiledStep(Step(compiled, IWAE(3)), (x,), beta)
    assert all_ahead[-1] >= count
    torch.manual_seed(1)
    expected = Step(eager, IWAE(3))((x,), beta)
    torch.manual_seed(1)
    torch.testing.assert_close(run((x,), beta), expected, rtol=1e-5, atol=1e-5)
    for (name, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        scale = p.grad.abs().max().item()
        assert (p.grad - q.grad).abs().max() < 1e-4 * scale + 1e-6, name


@has_onednn
@needs_compiler
def test_log_likelihood_with_them(all_ahead):
    """The importance-weighted estimate in compiled chunks is the eager one, draw by draw."""
    torch.manual_seed(0)
    vae, x = VAE(40, 4, 16), (torch.rand(2, 40) > 0.5).float()
    torch.manual_seed(1)
    eager = log_likelihood(vae, x, 600, compile=False)
    torch.manual_seed(1)
    torch.testing.assert_close(log_likelihood(vae, x, 600, compile=True), eager, rtol=1e-5, atol=1e-4)
    assert all_ahead[-1] > 0
