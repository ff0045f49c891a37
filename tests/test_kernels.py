"""Which kernels a traced graph runs on a CPU: the same values, to float rounding."""

import copy

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from pyro_lvae import IWAE, VAE, LadderVAE, SampledELBO, kernels, log_likelihood
from pyro_lvae.compile import CompiledStep, Step
from pyro_lvae.kernels import decompositions, lean, log1p

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
def test_what_ends_in_a_log1p(function):
    """No log1p is left in the graph; values and gradients are as before, far out as well."""
    x = torch.cat([torch.linspace(-9, 9, 91), torch.tensor([-800.0, -60.0, 25.0, 60.0, 800.0])]).double()

    def run(x):
        x = x.detach().requires_grad_()
        y = function(x)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    graph = make_fx(run, decompositions(CPU))(x)
    assert not any("log1p" in str(node.target) for node in graph.graph.nodes)
    for found, expected in zip(graph(x), run(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)


def test_graphs_of_other_devices_are_left_alone():
    assert decompositions(torch.device("cuda")) == {}


@pytest.mark.parametrize("slope", [0.01, 0.2, 0.0, -0.5])
def test_leaky_relu_by_its_result(slope):
    """Its gradient needs no more of what went in, and is the same to the bit; falling branches stay as they are."""
    x = torch.randn(400)
    x[:3] = torch.tensor([0.0, -0.0, -1e-44])

    def run(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(F.leaky_relu(x, slope).square().sum(), x)[0]

    graph = lean(make_fx(run)(x))
    (node,) = graph.graph.find_nodes(op="call_function", target=aten.leaky_relu_backward.default)
    assert node.args[3] == (slope >= 0)
    assert torch.equal(graph(x), run(x))


def traced(function, *inputs):
    return make_fx(function, tracing_mode="fake")(*inputs)


def products_of(graph):
    return sum("pyro_lvae.product" in str(node.target) for node in graph.graph.nodes)


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
    ],
)
def test_other_products_stay(function, why, always_ahead):
    inputs = torch.randn(256, 300), torch.randn(300, 256), torch.randn(256)
    assert products_of(lean(traced(function, *inputs))) == 0, why


def test_products_stay_where_onednn_is_not_ahead(monkeypatch):
    monkeypatch.setattr(kernels, "_is_ahead", lambda: False)
    h, w = torch.randn(256, 300), torch.randn(300, 256)
    assert products_of(lean(traced(torch.mm, h, w))) == 0


@has_onednn
@pytest.mark.parametrize("estimator", [SampledELBO(), IWAE(3)], ids=["ELBO", "IWAE"])
@pytest.mark.parametrize("make", [lambda: VAE(256, 64, 256), lambda: LadderVAE(256, (64, 8), (256, 64))])
def test_a_compiled_step_with_them(make, estimator, always_ahead):
    """Loss and gradients of one step as of the eager one."""
    torch.manual_seed(0)
    eager = make()
    compiled, x = copy.deepcopy(eager), (torch.rand(256, 256) > 0.5).float()
    beta = {"z1": 0.5, "z2": 0.5} if isinstance(eager, LadderVAE) else {"z1": 0.5}
    run = CompiledStep(Step(compiled, copy.deepcopy(estimator)), (x,), beta)
    torch.manual_seed(1)
    expected = Step(eager, estimator)((x,), beta)
    torch.manual_seed(1)
    torch.testing.assert_close(run((x,), beta), expected, rtol=1e-5, atol=1e-5)
    for (name, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        scale = p.grad.abs().max().item()
        assert (p.grad - q.grad).abs().max() < 1e-4 * scale + 1e-6, name


@has_onednn
def test_log_likelihood_with_them(always_ahead, monkeypatch):
    """The importance-weighted estimate in compiled chunks is the eager one, draw by draw."""
    torch.manual_seed(0)
    vae, x = VAE(256, 64, 256), (torch.rand(2, 256) > 0.5).float()
    torch.manual_seed(1)
    eager = log_likelihood(vae, x, 600, compile=False)
    torch.manual_seed(1)
    torch.testing.assert_close(log_likelihood(vae, x, 600, compile=True), eager, rtol=1e-5, atol=1e-3)
