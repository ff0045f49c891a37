"""FusedAdam is torch's Adam; the average of weights is what its formula says."""

import copy

import pytest
import torch

from pyro_lvae import FusedAdam
from pyro_lvae.optim import WeightAverage


def descend(make, steps=7):
    torch.manual_seed(0)
    w, b, idle = (torch.nn.Parameter(torch.randn(n)) for n in (5, 3, 2))
    optimizer = make([w, b, idle])
    for i in range(steps):
        optimizer.zero_grad()
        (w.square().sum() + (b - i).pow(4).sum()).backward()
        optimizer.step()
    return torch.cat([w, b, idle]).detach(), optimizer


def test_same_steps_and_state_as_torch():
    ours, mine = descend(lambda p: FusedAdam(p, lr=0.1, betas=(0.8, 0.99), eps=1e-4, weight_decay=0.1))
    theirs, adam = descend(
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.99), eps=1e-4, weight_decay=0.1, fused=True)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for i, state in adam.state_dict()["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(mine.state_dict()["state"][i][name], value, rtol=0, atol=0)


def test_a_default_device_is_not_that_of_the_steps():
    p = torch.ones(2, requires_grad=True)
    adam, p.grad = FusedAdam([p]), torch.ones(2)
    with torch.device("meta"):
        adam.step()
    assert adam.state[p]["step"] == 1
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.999))


def test_a_flagged_step_changes_nothing():
    w, b = (torch.nn.Parameter(torch.ones(n)) for n in (4, 2))
    optimizer = FusedAdam([w, b], lr=0.1)
    for flag, grad in ((0.0, 1.0), (1.0, float("nan")), (0.0, 1.0)):
        w.grad, b.grad, optimizer.found_inf = torch.full((4,), grad), torch.full((2,), grad), torch.tensor(flag)
        before = w.detach().clone()
        optimizer.step()
        assert torch.equal(w, before) == bool(flag)
    assert [optimizer.state[p]["step"].item() for p in (w, b)] == [2, 2]


def test_a_copy_goes_on():
    w = torch.nn.Parameter(torch.ones(4))
    optimizer = FusedAdam([w], lr=0.1)
    for count in (1, 2):
        for adam in (copy.deepcopy(optimizer), optimizer):
            (copied,) = adam.param_groups[0]["params"]
            copied.grad = torch.ones(4)
            adam.step()
            assert adam.state[copied]["step"] == count


def test_closure():
    w = torch.nn.Parameter(torch.ones(4))
    optimizer = FusedAdam([w], lr=0.1)

    def closure():
        loss = w.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4
    assert torch.allclose(w, torch.full((4,), 0.9))


def test_the_average_of_weights_and_buffers_by_hand():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).double()
    net[0].register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    average = WeightAverage(net, decay=0.7)
    by_hand = {name: value.clone() for name, value in net.state_dict().items()}
    for t in range(1, 30):
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn_like(p))
        net(torch.randn(5, 2).double())
        net[0].mask[0] = t
        average.update(t)
        d = min(0.7, (1 + t) / (10 + t))
        for name, value in net.state_dict().items():
            is_copied = name in ("0.mask", "1.num_batches_tracked")
            by_hand[name] = value.clone() if is_copied else d * by_hand[name] + (1 - d) * value
    live = {name: value.clone() for name, value in net.state_dict().items()}
    torch.testing.assert_close(average.state_dict(), by_hand, rtol=1e-12, atol=1e-12)
    with average.in_place():
        torch.testing.assert_close(dict(net.state_dict()), by_hand, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dict(net.state_dict()), live, rtol=0, atol=0)


@pytest.mark.parametrize("decay", [0.0, 1.0, -1, 2, "0.9"])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(
        ValueError, match=f"the decay of the average of weights is {decay!r}; expected a number between"
    ):
        WeightAverage(torch.nn.Linear(2, 2), decay)


def test_each_parameter_has_a_count_of_its_own():
    """Where gradients come and go, in two groups and one that joins, through a checkpoint: steps as of torch's Adam."""
    torch.manual_seed(0)
    start = [torch.randn(n) for n in (2, 3, 4)]
    theirs, ours = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    adams = [
        make([{"params": p[:2], "lr": 0.1}, {"params": p[2:], "lr": 0.01}])
        for make, p in ((lambda g: torch.optim.Adam(g, fused=True), theirs), (FusedAdam, ours))
    ]
    for i, present in enumerate(((0, 1, 2), (0, 2), (1,), (0, 1), (0, 1, 3), (2,), (0, 1, 2, 3), (0, 1, 2, 3))):
        if i == 2:
            for p, adam in zip((theirs, ours), adams, strict=True):
                p.append(torch.nn.Parameter(torch.ones(2)))
                adam.add_param_group({"params": p[3:], "lr": 0.1})
        if i == 4:
            adams[1].load_state_dict(copy.deepcopy(adams[1].state_dict()))
        for p, adam in zip((theirs, ours), adams, strict=True):
            for j, q in enumerate(p):
                q.grad = torch.full_like(q, 1.0 + i) if j in present else None
            adam.step()
    for p, q in zip(theirs, ours, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(adams[0].state[p]["step"], adams[1].state[q]["step"])


def test_its_state_is_good_for_torchs_adam():
    """Counts share memory, but no two are one number: Adams that are not fused add to each of them."""
    ws = [torch.nn.Parameter(torch.ones(n)) for n in (2, 3)]
    ours, theirs = FusedAdam(ws), torch.optim.Adam(ws)
    for w in ws:
        w.grad = torch.ones_like(w)
    ours.step()
    theirs.load_state_dict(ours.state_dict())
    for i, foreach in enumerate((True, False)):
        theirs.param_groups[0].update(fused=False, foreach=foreach)
        theirs.step()
        assert [theirs.state[w]["step"].item() for w in ws] == [2 + i, 2 + i]
    torch.testing.assert_close(ws[0].detach(), torch.full((2,), 0.997))
