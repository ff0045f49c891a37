"""The deep ladders, in float64: closed forms, ELBOs by hand, what depends on what, and that depth trains.

The one statistical test draws from a fixed seed; with a fresh one it would fail less than once in 1,000 runs.
"""

import math
from functools import partial

import pytest
import torch
from conftest import STRUCTURES
from linear_gaussian import make_linear
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import Bernoulli, MultivariateNormal
from torch.distributions import Normal as TorchNormal
from torch.nn import functional as F

from pyro_lvae import (
    IWAE,
    BidirectionalLadderVAE,
    ConvLadderVAE,
    LadderVAE,
    MixturePrior,
    SampledELBO,
    active_units,
    conditionals,
    kl_per_layer,
    ledger,
    sample_prior,
)
from pyro_lvae.nets import Conv, Onwards, Residual, Shared, linear
from pyro_lvae.objectives import backward
from pyro_lvae.structures.convolutional import image_shape, over_pixels
from pyro_lvae.traces import evaluating, log_densities

BIDIRECTIONAL = partial(BidirectionalLadderVAE, 12, (5, 3, 2), 16)
CONVOLUTIONAL = partial(ConvLadderVAE, 12, (3, 4), (1, 2), (6, 8), 2)
DEEP = {
    "bidirectional": partial(BidirectionalLadderVAE, 12, (3,) * 12, 16),
    "convolutional": partial(ConvLadderVAE, 12, (3, 4), (2, 4, 6), (8, 8, 8), 1),
}


def loud(structure):
    """With heads as large as other layers, whose start is small on purpose."""
    for head in (*structure.evidence, *structure.prior):
        for name, p in head.named_parameters():
            p.data *= 10 if name.endswith("weight") else 1
    return structure.double()


# ------------------------------------------------------------------ closed form


def marginal(structure) -> MultivariateNormal:
    """p(x) of a linear-Gaussian bidirectional ladder: the moments of d, from the top down."""

    def affine(layer):
        return layer.weight.detach(), layer.bias.detach()

    def gaussian(head):
        a, b = affine(head.head[0])
        half = len(b) // 2
        return a[:half], b[:half], torch.diag(F.softplus(b[half:]) + head.min_variance)

    w, mean = affine(structure.top_down[-1].net.inlet)
    cov = w @ w.T
    inlets = [structure.decoder.inlet, *(step.net.inlet for step in structure.top_down[:-1])]
    for inlet, prior in reversed(list(zip(inlets, structure.prior, strict=True))):
        (w, c), (a, b, s) = affine(inlet), gaussian(prior.net)
        skip = torch.eye(len(c)).double() + w @ a  # d + W z, z ~ N(A d + b, S)
        mean, cov = skip @ mean + w @ b + c, skip @ cov @ skip.T + w @ s @ w.T
    a, b, s = gaussian(structure.likelihood)
    return MultivariateNormal(a @ mean + b, a @ cov @ a.T + s)


def test_a_linear_bidirectional_ladder_has_a_known_likelihood():
    options = dict(num_blocks=0, likelihood=conditionals.Normal)
    structure = make_linear(loud(BidirectionalLadderVAE(4, (2, 2, 1), 5, **options)))
    p = marginal(structure)
    x = p.sample((20,))
    with evaluating(structure):
        log_w = ledger(structure.model, structure.guide, x, num_particles=40_000).local_log_weight()
    error = log_w.logsumexp(0) - math.log(len(log_w)) - p.log_prob(x)
    w = log_w.softmax(0)
    stderr = (w.square().sum(0) - 1 / len(w)).clamp_min(0).sqrt()
    assert stderr.median() < 0.2
    assert (error.abs() < 5 * stderr).all()
    assert (log_w.mean(0) < p.log_prob(x)).all()


# ------------------------------------------------------------------ by hand


def draw(mu, var):
    return mu + var.sqrt() * torch.normal(torch.zeros_like(mu), torch.ones_like(mu))


def log_normal(z, mu, var):
    return TorchNormal(mu, var.sqrt()).log_prob(z).sum(-1)


def merged(mu_1, var_1, mu_2, var_2):
    var = 1 / (1 / var_1 + 1 / var_2)
    return (mu_1 / var_1 + mu_2 / var_2) * var, var


def bidirectional_elbo(w, x):
    """L = 3, from the equations; `w` is a state dict."""

    def affine(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def block(name, h):
        return h + affine(f"{name}.3", F.leaky_relu(affine(f"{name}.1", F.leaky_relu(h))))

    def head(name, d):
        out = affine(f"{name}.head.0", d)
        return out[..., : out.shape[-1] // 2], F.softplus(out[..., out.shape[-1] // 2 :]) + 0.01

    def bu(moments):
        return [m[..., : m.shape[-1] // 2] for m in moments]

    def td(moments):
        return [m[..., m.shape[-1] // 2 :] for m in moments]

    d_1 = block("bottom_up.0.blocks.0", affine("bottom_up.0.inlet", x))
    q_1 = head("evidence.0", d_1)
    z_1_bu = draw(*bu(q_1))
    d_2 = block("bottom_up.1.blocks.0", d_1 + affine("bottom_up.1.inlet", z_1_bu))
    q_2 = head("evidence.1", d_2)
    z_2_bu = draw(*bu(q_2))
    q_3 = head("evidence.2", block("bottom_up.2.blocks.0", d_2 + affine("bottom_up.2.inlet", z_2_bu)))
    z_3 = draw(*q_3)
    down_2 = block("top_down.1.net.blocks.0", affine("top_down.1.net.inlet", z_3))
    p_2 = head("prior.1.net", down_2)
    q_2_td = merged(*td(q_2), *td(p_2))
    z_2_td = draw(*q_2_td)
    entering = affine("top_down.0.net.inlet", torch.cat([z_2_bu, z_2_td], -1))
    down_1 = block("top_down.0.net.blocks.0", down_2 + entering)
    p_1 = head("prior.0.net", down_1)
    q_1_td = merged(*td(q_1), *td(p_1))
    z_1_td = draw(*q_1_td)
    down_0 = block("decoder.blocks.0", down_1 + affine("decoder.inlet", torch.cat([z_1_bu, z_1_td], -1)))
    log_p = Bernoulli(logits=affine("likelihood.logits", down_0)).log_prob(x).sum(-1)
    log_p = log_p + log_normal(z_3, torch.zeros(2).double(), torch.ones(2).double())
    log_p = log_p + log_normal(z_2_bu, *bu(p_2)) + log_normal(z_2_td, *td(p_2))
    log_p = log_p + log_normal(z_1_bu, *bu(p_1)) + log_normal(z_1_td, *td(p_1))
    log_q = log_normal(z_3, *q_3) + log_normal(z_2_bu, *bu(q_2)) + log_normal(z_2_td, *q_2_td)
    return log_p - log_q - log_normal(z_1_bu, *bu(q_1)) - log_normal(z_1_td, *q_1_td)


def by_loop(x, weight, bias, stride=1):
    """A convolution of images `[B, C, H, W]`, an output pixel at a time."""
    side = weight.shape[-1]
    x = F.pad(x, [side // 2] * 4)
    rows, columns = (range(0, n - side + 1, stride) for n in x.shape[-2:])
    patches = [[x[:, :, i : i + side, j : j + side].flatten(1) for j in columns] for i in rows]
    return torch.stack([torch.stack([p @ weight.flatten(1).T + bias for p in row], -1) for row in patches], -2)


def convolutional_elbo(w, x):
    """z_1 at 3 x 4, z_2 and z_3 at 2 x 2, two maps each; from the equations."""

    def conv(name, h, **options):
        return by_loop(h, w[f"{name}.weight"], w[f"{name}.bias"], **options)

    def block(name, h):
        return h + conv(f"{name}.3", F.silu(conv(f"{name}.1", F.silu(h))))

    def head(name, d):
        out = conv(f"{name}.head.0.0", d)
        return out[:, :2].flatten(1), F.softplus(out[:, 2:]).flatten(1) + 0.01

    h_1 = block("bottom_up.0.0", conv("stem.1", x.reshape(-1, 1, 3, 4)))
    h_2 = block("bottom_up.1.1", conv("bottom_up.1.0", h_1, stride=2))
    h_3 = block("bottom_up.2.0", h_2)
    q_3 = head("evidence.2", h_3)
    z_3 = draw(*q_3)
    d_2 = block("top_down.1.net.blocks.0", conv("top_down.1.net.inlet.1", z_3.reshape(-1, 2, 2, 2)))
    p_2 = head("prior.1.net", d_2)
    q_2 = merged(*head("evidence.1", h_2), *p_2)
    z_2 = draw(*q_2)
    d_1 = d_2 + conv("top_down.0.net.inlet.1", z_2.reshape(-1, 2, 2, 2))
    d_1 = d_1[:, :, [0, 0, 1]][..., [0, 0, 1, 1]]  # 2 x 2 to 3 x 4, each pixel by its nearest
    d_1 = block("top_down.0.net.blocks.1", conv("top_down.0.net.blocks.0", d_1))
    p_1 = head("prior.0.net", d_1)
    q_1 = merged(*head("evidence.0", h_1), *p_1)
    z_1 = draw(*q_1)
    d_0 = block("decoder.blocks.0", d_1 + conv("decoder.inlet.1", z_1.reshape(-1, 2, 3, 4)))
    log_p = Bernoulli(logits=conv("likelihood.logits.0", d_0).flatten(1)).log_prob(x).sum(-1)
    log_p = log_p + log_normal(z_3, torch.zeros(8).double(), torch.ones(8).double())
    log_p = log_p + log_normal(z_2, *p_2) + log_normal(z_1, *p_1)
    return log_p - log_normal(z_3, *q_3) - log_normal(z_2, *q_2) - log_normal(z_1, *q_1)


@pytest.mark.parametrize(
    ("make", "by_hand"), [(BIDIRECTIONAL, bidirectional_elbo), (CONVOLUTIONAL, convolutional_elbo)]
)
def test_elbo_and_gradient_equal_those_written_by_hand(make, by_hand, x):
    structure, x = loud(make()), x.double()
    for name, p in structure.named_parameters():
        p.data.add_(0.1 * torch.randn_like(p) if name.endswith("bias") else 0)
    torch.manual_seed(1)
    loss = Trace_ELBO().differentiable_loss(structure.model, structure.guide, x)
    loss.backward()
    weights = {k: v.detach().clone().requires_grad_() for k, v in structure.state_dict().items()}
    torch.manual_seed(1)
    bound = by_hand(weights, x).sum()
    bound.backward()
    torch.testing.assert_close(-loss.detach(), bound.detach())
    for name, parameter in structure.named_parameters():
        torch.testing.assert_close(-parameter.grad, weights[name].grad, msg=name)


# ------------------------------------------------------------------ what depends on what


def test_a_bidirectional_ladder_factorises_as_its_paper_has_it(x):
    structure, number = loud(BidirectionalLadderVAE(12, (2, 2, 2, 2), 8)), 4
    halves = [(i, way) for i in range(1, number) for way in ("bu", "td")]
    sites = {f"z{i}_{way}": (i, way) for i, way in halves} | {f"z{number}": (number, "top")}

    def in_guide(j, by):  # q of which sites is given z_j^by
        if by != "bu":
            return {f"z{i}_td" for i in range(1, j)}
        above = {f"z{i}_{way}" for i, way in halves if i > j}
        return above | {f"z{number}"} | {f"z{i}_td" for i in range(1, j)}

    def in_model(j, by):
        return {f"z{i}_{way}" for i, way in halves if i < j} | {"x"}

    assert_changes(structure, x.double(), {n: in_model(*s) for n, s in sites.items()}, structure.model)
    assert_changes(structure, x.double(), {n: in_guide(*s) for n, s in sites.items()}, structure.guide)


def test_every_layer_of_a_convolutional_ladder_has_skip_connections_to_all_below(x):
    structure = loud(ConvLadderVAE(12, (3, 4), (2, 2), (6, 6), 1))
    below = {f"z{i}": {f"z{j}" for j in range(1, i)} for i in range(1, 5)}
    assert_changes(structure, x.double(), {n: sites | {"x"} for n, sites in below.items()}, structure.model)
    assert_changes(structure, x.double(), below, structure.guide)


def assert_changes(structure, x, expected, fn):
    """With all latents held but one, exactly the sites expected, and that one, change their density."""
    with torch.no_grad():
        values = {n: s.value for n, s in ledger(structure.model, structure.guide, x, num_particles=1).latents.items()}
        before = log_densities(fn, values, x, num_particles=1)
        for name, sites in expected.items():
            after = log_densities(fn, values | {name: values[name] + 1}, x, num_particles=1)
            assert {n for n in after if not torch.equal(after[n], before[n])} == sites | {name}, name


@pytest.mark.parametrize("make", [BIDIRECTIONAL, CONVOLUTIONAL])
def test_particles_and_data_are_each_as_if_alone(make, x):
    structure, x = make().double(), x.double()
    sites = ledger(structure.model, structure.guide, x, num_particles=3)
    for k, b in ((0, 0), (2, 4)):
        values = {n: s.value[k : k + 1, b : b + 1] for n, s in sites.latents.items()}
        log_p = log_densities(structure.model, values, x[b : b + 1], num_particles=1)
        log_q = log_densities(structure.guide, values, x[b : b + 1], num_particles=1)
        for name, site in sites.items():
            torch.testing.assert_close(log_p[name][0, 0], site.log_p[k, b])
            torch.testing.assert_close(log_q.get(name, torch.zeros(1, 1).double())[0, 0], site.log_q[k, b])


@pytest.mark.parametrize("make", [BIDIRECTIONAL, CONVOLUTIONAL])
@pytest.mark.parametrize("estimator", [SampledELBO, lambda: IWAE(3)])
def test_the_top_down_path_is_computed_once(make, estimator, x):
    structure, calls = make(), []
    for net in (*structure.top_down, *structure.prior):
        net.net.register_forward_hook(lambda m, *_: calls.append(m))
    backward(estimator(), structure, (x,), per=1)
    assert len(calls) == len(set(calls)) == 4


# ------------------------------------------------------------------ depth


@pytest.mark.parametrize("name", DEEP)
def test_twelve_layers_begin_near_their_prior(name, x):
    structure = DEEP[name]()
    sites = ledger(structure.model, structure.guide, x)
    for n, site in sites.latents.items():
        units = site.value.shape[-1]
        assert site.kl().mean() < 0.2 * units, n  # merging with equal evidence costs log(2)/2 - 1/4 = 0.097 a unit
        assert 0.5 < site.p.variance.min() <= site.p.variance.max() < 2
    assert (sites["x"].p.mean - 0.5).abs().max() < 0.49


@pytest.mark.parametrize("name", DEEP)
def test_twelve_layers_train(name):
    """Images that are one pattern or its inverse: log 2 nats of the 12 log 2 that pixels have one by one."""
    pattern = torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1])
    x = torch.stack([pattern, 1 - pattern]).repeat(8, 1)
    structure = DEEP[name]()
    optimizer, losses = torch.optim.Adam(structure.parameters(), lr=5e-3), []
    for step in range(50):
        optimizer.zero_grad()
        losses.append(backward(SampledELBO(), structure, (x,), per=len(x)).item())
        if step in (0, 49):
            norms = {n: p.grad.norm().item() for n, p in structure.named_parameters()}
            assert all(0 < norm < math.inf for norm in norms.values()), norms
        optimizer.step()
    assert sum(losses[-10:]) / 10 < 6.5 < 12 * math.log(2) < losses[0]


def test_layers_are_told_in_order_of_depth(x):
    structure = STRUCTURES["BidirectionalLadderVAE-deep"]()
    expected = [f"z{i}_{way}" for i in range(1, 12) for way in ("bu", "td")] + ["z12"]
    assert list(kl_per_layer(structure, x, 2)) == list(active_units(structure, x, 2)) == expected
    assert list(kl_per_layer(STRUCTURES["ConvLadderVAE-deep"](), x, 2)) == [f"z{i}" for i in range(1, 13)]


def test_one_layer_is_a_vae(x):
    assert list(kl_per_layer(BidirectionalLadderVAE(12, (3,), 8), x, 2)) == ["z1"]
    assert list(kl_per_layer(ConvLadderVAE(12, (3, 4), (0, 1), (4, 4)), x, 2)) == ["z1"]


def test_a_convolutional_ladder_goes_under_other_structures(x):
    mixture = MixturePrior(12, partial(ConvLadderVAE, shape=(3, 4), layers=(1, 1), channels=(4, 4), z_channels=1), 3)
    assert mixture.top == "z2"
    assert sample_prior(mixture, 5, x).shape == (5, 12)


# ------------------------------------------------------------------ images


@pytest.mark.parametrize(
    ("x_dim", "shape", "expected"),
    [(64, None, (1, 8, 8)), (12, (3, 4), (1, 3, 4)), (12, (3, 2, 2), (3, 2, 2)), (1, None, (1, 1, 1))],
)
def test_image_shapes(x_dim, shape, expected):
    assert image_shape(x_dim, shape) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvLadderVAE(12), r"x_dim is 12, which is no square; give shape=\(C, H, W\) or \(H, W\)"),
        (lambda: ConvLadderVAE(12, (3, 3)), r"shape is \(3, 3\) and x_dim 12; expected .* with C \* H \* W = 12"),
        (lambda: ConvLadderVAE(12, (12,)), r"shape is \(12,\)"),
        (lambda: ConvLadderVAE(0), "x_dim is 0, which is no square"),
        (lambda: ConvLadderVAE(16, layers=(1, 1), channels=(4,)), r"layers is \(1, 1\), channels \(4,\)"),
        (lambda: ConvLadderVAE(16, layers=(0, 0, 0)), "at least one layer in all"),
        (lambda: BidirectionalLadderVAE(16, ()), "give at least one layer"),
        (lambda: BidirectionalLadderVAE(16, (3, 0)), r"z_dims \(3, 0\)"),
        (
            lambda: ConvLadderVAE(16, likelihood=lambda i, d: nn.Sequential(nn.Linear(i, 50), nn.Linear(50, d))),
            "a linear layer from 16 to 50 cannot be a convolution of 16 feature maps over 4 x 4 pixels",
        ),
        (lambda: ConvLadderVAE(16, likelihood=lambda i, d: nn.Flatten()), "Flatten has no linear layer"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_conditional_over_pixels_is_the_same_map_at_each_pixel():
    head = over_pixels(partial(conditionals.Normal, gain=0.1), 5, (2, 3, 4)).double()
    weight, bias = (p.detach() for p in head.head[0][0].parameters())
    assert bias.tolist() == [0, 0, 1, 1]
    assert weight.std() < 0.1
    h = torch.randn(6, 7, 5, 3, 4).double()
    p = head(h)
    raw = torch.einsum("oc,kbchw->kbohw", weight[..., 0, 0], h) + bias[:, None, None]
    torch.testing.assert_close(p.mean, raw[:, :, :2].flatten(2))
    torch.testing.assert_close(p.variance, F.softplus(raw[:, :, 2:]).flatten(2) + 1e-5)
    student = over_pixels(conditionals.StudentT, 5, (2, 3, 4)).double()
    assert student(h).event_shape == student.df.shape == (24,)
    dark = over_pixels(partial(conditionals.Bernoulli, mean=0.1), 5, (2, 3, 4))
    torch.testing.assert_close(dark(torch.zeros(5, 3, 4)).base_dist.probs, torch.full((24,), 0.1))
    mean = torch.rand(24)
    started = over_pixels(partial(conditionals.Bernoulli, mean=mean), 5, (2, 3, 4))(torch.zeros(5, 3, 4))
    torch.testing.assert_close(started.base_dist.logits.unflatten(0, (2, 12))[:, 0], mean.logit().view(2, 12).mean(1))


@pytest.mark.parametrize("options", [dict(), dict(stride=2), dict(size=(7, 9)), dict(kernel=1)])
def test_convolutions_take_leading_dims(options):
    conv, x = Conv(3, 4, **options).double(), torch.randn(2, 5, 3, 4, 6).double()
    found, expanded = conv(x), x if "size" not in options else F.interpolate(x.flatten(0, 1), options["size"])
    for k in range(2):
        torch.testing.assert_close(found[k], conv(x[k]))
    rows = expanded.reshape(-1, 3, *expanded.shape[-2:])
    one_by_one = by_loop(rows, conv.weight, conv.bias, options.get("stride", 1))
    torch.testing.assert_close(found.flatten(0, 1), one_by_one)
    assert conv(x[0, 0]).shape == found.shape[2:]


def test_paths_begin_and_go_on():
    inlet, h = linear(5, 4), torch.randn(3, 4)
    step = Onwards(inlet, nn.Identity())
    z = torch.randn(6, 3, 2), torch.randn(6, 3, 3)
    torch.testing.assert_close(step(None, *z), inlet(torch.cat(z, -1)))
    torch.testing.assert_close(step(h, *z), h + inlet(torch.cat(z, -1)))


def test_a_residual_block_begins_as_small_as_its_gain():
    torch.manual_seed(0)
    h = torch.randn(200, 300)
    added = [(Residual(linear, 300, gain=gain)(h) - h).std().item() for gain in (1.0, 0.1)]
    assert added[1] / added[0] == pytest.approx(0.1, rel=0.1)


def test_shared_looks_at_all_its_inputs():
    shared, (a, b) = Shared(Onwards(linear(2, 2), nn.Identity())), torch.randn(2, 3, 2)
    first = shared(a, b)
    assert shared(a, b) is first
    shared(None, b)
    torch.testing.assert_close(shared(a, b), first)
    shared(a, b.clone())
    assert shared(a, b) is not first
    assert isinstance(LadderVAE(12, (3, 2), (8, 8)).top_down[0], Shared)
