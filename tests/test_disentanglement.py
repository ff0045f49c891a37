"""Disentanglement scores on codes whose score is known: perfect, by chance, rotated, computed by hand."""

import math

import pytest
import torch
from sklearn.metrics import mutual_info_score

from pyro_lvae import dci, encode, factor_vae_score, mutual_information, mutual_information_gap
from pyro_lvae.evaluate import DCI

SIZES = (3, 6, 4, 5)


def grid(sizes=SIZES, repeats=4):
    """Every combination of factors, `[repeats prod(sizes), F]`."""
    return torch.cartesian_prod(*map(torch.arange, sizes)).repeat(repeats, 1)


def rotated(factors, angle=math.pi / 4):
    """Standardised factors, each pair of neighbours turned."""
    v = factors.double()
    v = (v - v.mean(0)) / v.std(0)
    c, s = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.double)
    return torch.cat([v[:, :2] @ turn, v[:, 2:] @ turn], 1)


SCORES = {
    "factor_vae": lambda z, v: factor_vae_score(z, v, num_train=300, num_test=200),
    "mig": mutual_information_gap,
    "disentanglement": lambda z, v: dci(z, v).disentanglement,
    "completeness": lambda z, v: dci(z, v).completeness,
    "informativeness": lambda z, v: dci(z, v).informativeness,
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("permuted", [False, True])
def test_the_factors_themselves_are_perfect(name, permuted):
    """In another order and scale too, and with a dead unit beside them."""
    factors = grid()
    codes = factors.float()
    if permuted:
        codes = torch.cat([codes[:, [2, 0, 3, 1]] * torch.tensor([-1.0, 5.0, 0.01, 2.0]), torch.ones(len(codes), 1)], 1)
    assert SCORES[name](codes, factors) == pytest.approx(1, abs=1e-9)


def test_codes_of_noise_score_as_chance():
    """Each tolerance is at least three times the largest deviation over 30 seeds."""
    factors = grid(repeats=10)
    codes = torch.randn(len(factors), 5)
    assert factor_vae_score(codes, factors) == pytest.approx(1 / 4, abs=0.065)
    assert mutual_information_gap(codes, factors) < 0.01
    found = dci(codes, factors)
    assert found.disentanglement < 0.002
    assert found.completeness < 0.002
    assert found.informativeness == pytest.approx(sum(1 / n for n in SIZES) / 4, abs=0.06)


def test_turned_codes_score_as_the_turn_says():
    """They hold all there is to know. By 45 degrees, two units share two of four factors evenly: H = log 2 / log 4."""
    factors = grid()
    codes = rotated(factors)
    assert SCORES["factor_vae"](codes, factors) == pytest.approx(1 / 2, abs=0.06)  # 800 votes, 3 standard errors
    assert mutual_information_gap(codes, factors) == pytest.approx(0, abs=1e-9)
    found, less = dci(codes, factors), dci(rotated(factors, math.pi / 8), factors)
    for name in ("disentanglement", "completeness"):
        assert getattr(found, name) == pytest.approx(1 / 2, abs=0.02)  # 0.001 over three seeds
        assert 0.55 < getattr(less, name) < 0.9, "half the turn is in between"
    assert found.informativeness > 0.99


def test_a_constant_code_is_chance():
    factors, codes = grid(), torch.zeros(len(grid()), 3)
    assert factor_vae_score(codes, factors, num_train=50, num_test=50) == 1 / 4
    assert mutual_information_gap(codes, factors) == 0
    found = dci(codes, factors)
    assert (found.disentanglement, found.completeness) == pytest.approx((0, 0), abs=1e-12)


def test_votes_of_a_unit_that_two_factors_hold_still():
    """z_1 = v_1 + v_2 and z_2 = v_3 + v_4: a unit tells a pair of factors, never which of the two: 1/2 exactly.

    A batch of 64 that fixes v_1 leaves Var(z_1) / Var at about 1/2 and Var(z_2) / Var at about 1, a standard error of
    0.18 at most apart; 256 rows make a wrong vote rarer than 1e-4.
    """
    factors = grid((4, 4, 4, 4), 1)
    codes = torch.stack([factors[:, 0] + factors[:, 1], factors[:, 2] + factors[:, 3]], 1).float()
    assert factor_vae_score(codes, factors, batch_size=256, num_train=200, num_test=100) == 0.5


def test_a_faint_unit_can_be_left_out():
    """v_1 in a unit of tiny variance: perfect by default, and unknown once that unit may not win."""
    factors = grid((4, 5))
    codes = factors.float() * torch.tensor([1e-3, 1.0])
    assert factor_vae_score(codes, factors, num_train=50, num_test=50) == 1
    assert factor_vae_score(codes, factors, num_train=50, num_test=50, min_variance=0.01) == 0.5


def test_mutual_information_by_hand():
    """Joint frequencies of unit and factor, in sixths: [[2, 1], [0, 3]] and [[3, 0], [0, 3]]; [[1, 2], [1, 2]] and
    [[2, 1], [1, 2]]."""
    factors = torch.tensor([[0, 7], [0, 7], [1, 7], [1, 9], [1, 9], [1, 9]])
    codes = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 1.0], [5.0, 2.0], [5.0, 1.0], [5.0, 2.0]])
    first = 1 / 3 * math.log(2) + 1 / 6 * math.log(1 / 2) + 1 / 2 * math.log(3 / 2)  # sum p log(p / p_j p_k)
    found = mutual_information(codes, factors, num_bins=2)
    assert found[0].tolist() == pytest.approx([first, math.log(2)])
    assert found[1, 0].item() == pytest.approx(0, abs=1e-12), "independent"
    second = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert found[1, 1].item() == pytest.approx(second)
    h_1 = -(1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3))
    gap = (first / h_1 + (math.log(2) - second) / math.log(2)) / 2
    assert mutual_information_gap(codes, factors, num_bins=2) == pytest.approx(gap)


def test_mutual_information_is_that_of_scikit_learn():
    factors, codes = grid(), torch.randn(len(grid()), 3) + grid()[:, :1]
    found = mutual_information(codes, factors, num_bins=7)
    low, high = codes.double().aminmax(dim=0)
    bins = ((codes - low) / (high - low) * 7).long().clamp(max=6)
    expected = [[mutual_info_score(v, z) for v in factors.T] for z in bins.T]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.double))


def test_dci_follows_its_equations(monkeypatch):
    """Importances given, R = [[.9, .4], [.1, .4], [0, .2]]: D and C written out."""
    from pyro_lvae.evaluate import disentanglement

    columns = iter([(torch.tensor([0.9, 0.1, 0.0]).double(), 0.7), (torch.tensor([0.4, 0.4, 0.2]).double(), 0.3)])
    monkeypatch.setattr(disentanglement, "_forest", lambda *_: next(columns))
    found = dci(torch.randn(9, 3), torch.arange(18).reshape(9, 2))

    def entropy(*p):
        return -sum(q * math.log(q) for q in p if q)

    of_units = [1 - entropy(9 / 13, 4 / 13) / math.log(2), 1 - entropy(0.2, 0.8) / math.log(2), 1.0]
    assert found.disentanglement == pytest.approx(sum(w * d for w, d in zip((0.65, 0.25, 0.1), of_units, strict=True)))
    of_factors = [1 - entropy(0.9, 0.1) / math.log(3), 1 - entropy(0.4, 0.4, 0.2) / math.log(3)]
    assert found.completeness == pytest.approx(sum(of_factors) / 2)
    assert found.informativeness == pytest.approx(0.5)
    assert isinstance(found, DCI)
    assert found.importance.shape == (3, 2)


def test_factors_that_are_numbers_are_regressed():
    values = torch.rand(600, 2)
    found = dci(values.flip(1), values)
    assert found.informativeness > 0.99
    assert found.importance.argmax(0).tolist() == [1, 0]
    assert min(found.disentanglement, found.completeness) > 0.95


def test_codes_of_a_structure(x):
    from conftest import STRUCTURES

    codes = encode(STRUCTURES["BetaVAE"](), x)["z1"]
    factors = torch.stack([torch.arange(7) % 2, torch.arange(7) % 3], 1)
    assert 0 <= factor_vae_score(codes, factors, num_train=9, num_test=9) <= 1
    assert 0 <= mutual_information_gap(codes, factors) <= 1


def test_random_numbers_are_torchs():
    factors, codes = grid(), torch.randn(len(grid()), 3)
    for name in ("factor_vae", "informativeness"):
        found = []
        for seed in (1, 1):
            torch.manual_seed(seed)
            found.append(SCORES[name](codes, factors))
        assert found[0] == found[1]


@pytest.mark.parametrize("score", [factor_vae_score, mutual_information_gap, dci])
@pytest.mark.parametrize(
    ("codes", "factors", "message"),
    [
        (torch.zeros(6), torch.zeros(6, 2), r"codes: of shape \(6,\); expected a tensor \[N, z\]"),
        ([[1.0, 2.0]], torch.zeros(6, 2), "codes: a list"),
        (torch.zeros(6, 1), torch.zeros(6, 2), r"codes: of shape \(6, 1\).* 2 or more"),
        (torch.zeros(6, 2), torch.arange(6), r"factors: of shape \(6,\)"),
        (torch.zeros(6, 2), torch.arange(10).reshape(5, 2), "6 rows of codes and 5 of factors"),
        (torch.full((6, 2), math.nan), torch.arange(12).reshape(6, 2), "NaN or infinite"),
        (torch.zeros(6, 2), torch.stack([torch.arange(6), torch.ones(6)], 1).long(), r"factors \[1\] take one value"),
    ],
)
def test_bad_tables_are_refused(score, codes, factors, message):
    with pytest.raises(ValueError, match=message):
        score(codes, factors)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, v: factor_vae_score(z, v.float()), "factors are torch.float32; expected integer classes"),
        (lambda z, v: mutual_information_gap(z, v.double()), "factors are torch.float64"),
        (lambda z, v: factor_vae_score(z, v, batch_size=1), "batch_size is 1"),
        (lambda z, v: mutual_information(z, v, num_bins=1), "num_bins is 1"),
        (lambda z, v: dci(z, v, test_fraction=1.0), "test_fraction is 1.0"),
    ],
)
def test_bad_options_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(8, 2), torch.arange(16).reshape(8, 2) % 3)
