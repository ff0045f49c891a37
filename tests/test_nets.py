import copy
import pickle

import pytest
import torch
from torch import nn

from pyro_lvae.nets import MLP, BatchNorm, JointMLP, Residual, Shared, linear


@pytest.mark.parametrize("shape", [(7, 5), (3, 7, 5), (5, 5, 5), (2, 3, 7, 5)])
def test_batch_norm_normalises_the_last_dim_over_all_leading_dims(shape):
    x = 3 + 2 * torch.randn(shape, dtype=torch.double)
    out = BatchNorm(5).double()(x)
    expected = (x - x.flatten(0, -2).mean(0)) / (x.flatten(0, -2).var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(out, expected)


def test_mlp_without_layers_is_the_identity():
    mlp, x = MLP(3, 8, num_layers=0), torch.randn(4, 3)
    assert mlp.out_dim == 3
    assert torch.equal(mlp(x), x)


def test_mlp_has_its_width_and_takes_leading_dims():
    mlp = MLP(3, 8, num_layers=2)
    assert mlp.out_dim == 8
    assert mlp(torch.randn(2, 6, 3)).shape == (2, 6, 8)


class SwiGLU(nn.GLU):
    def forward(self, x):
        kept, gate = x.chunk(2, -1)
        return kept * nn.functional.silu(gate)


@pytest.mark.parametrize(("activation", "gate"), [(nn.GLU, torch.sigmoid), (SwiGLU, nn.functional.silu)])
def test_gated_units_have_layers_of_twice_the_width(activation, gate):
    x = torch.randn(5, 4, 3)
    mlp = MLP(3, (8, 6), batch_norm=False, activation=activation)
    h = x
    for layer in (mlp[0], mlp[2]):
        kept, gates = (h @ layer.weight.T).chunk(2, -1)
        h = kept * gate(gates)
    assert mlp.out_dim == 6
    torch.testing.assert_close(mlp(x), h)
    joint = JointMLP((2, 1), 8, 2, activation=activation).eval()
    alone = MLP(3, 8, 2, activation=activation).eval()
    alone[0].weight.data = torch.cat([layer.weight for layer in joint.first], 1).detach()
    alone[3].load_state_dict(joint.rest[0].state_dict())
    torch.testing.assert_close(joint(*x.split([2, 1], -1)), alone(x))


def test_a_residual_block_refuses_gated_units():
    with pytest.raises(ValueError, match="activation is nn.GLU, which halves the width"):
        Residual(linear, 8, activation=nn.GLU)


def test_linear_is_glorot_normal():
    layer = linear(300, 500)
    assert layer.weight.std().item() == pytest.approx((2 / 800) ** 0.5, rel=0.02)
    assert not layer.bias.any()


class _Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.calls = nn.Linear(3, 2), 0

    def forward(self, x):
        self.calls += 1
        return self.net(x)


@pytest.fixture
def shared():
    return Shared(_Counting())


def test_shared_answers_the_second_caller_from_the_first(shared):
    x = torch.randn(4, 3)
    first, second = shared(x), shared(x)
    assert second is first
    assert shared.net.calls == 1
    shared(x)  # the answer is handed out once
    assert shared.net.calls == 2


def test_shared_computes_afresh_for_an_equal_but_other_tensor(shared):
    x = torch.randn(4, 3)
    shared(x), shared(x.clone())
    assert shared.net.calls == 2


@pytest.mark.parametrize("change", ["weights", "mode", "gradients", "swapped"])
def test_shared_computes_afresh_when_the_answer_would_differ(shared, change):
    x = torch.randn(4, 3)
    with torch.no_grad():
        shared(x)
        if change == "weights":
            shared.net.net.weight.add_(1)
        elif change == "mode":
            shared.eval()
        elif change == "swapped":
            shared.net.net.weight = nn.Parameter(torch.ones(2, 3))
    with torch.set_grad_enabled(change == "gradients"):
        out = shared(x)
    assert shared.net.calls == 2
    assert out.requires_grad == (change == "gradients")
    torch.testing.assert_close(out, shared.net.net(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_shared_is_copied_without_its_kept_answer(shared, copied):
    x = torch.randn(4, 3, requires_grad=True) * 1  # not a leaf: such a tensor cannot be deep-copied
    shared(x)
    twin = copied(shared)
    torch.testing.assert_close(twin(x), shared(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_over_processes_are_those_of_the_rows(dtype, monkeypatch):
    """Of one process here; bfloat16 takes 333 rows for 332."""
    monkeypatch.setattr("torch.distributed.nn.functional.all_reduce", lambda t: t)
    x, alone, together = (2 * torch.randn(333, 4) + 1).to(dtype), BatchNorm(4), BatchNorm(4)
    together.synchronised = True
    torch.testing.assert_close(together(x), alone(x.float()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.running_var, alone.running_var, rtol=1e-5, atol=0)
