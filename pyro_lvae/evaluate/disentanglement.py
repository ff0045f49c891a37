"""How far each unit of a code goes with one factor of variation: the FactorVAE metric, MIG, DCI.

All take codes `[N, z]` and factors `[N, F]`, tensors from anywhere; of a structure, `encode(structure, x)["z1"]` gives
codes. Each score lies in [0, 1], and 1 is best. Random numbers come from torch's default generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def factor_vae_score(
    codes: Tensor,
    factors: Tensor,
    *,
    batch_size: int = 64,
    num_train: int = 2000,
    num_test: int = 1000,
    min_variance: float = 0.0,
) -> float:
    r"""The FactorVAE metric (Kim & Mnih 2018, section 4): accuracy of telling the fixed factor from the stillest unit.

    A vote: a batch of rows that agree in factor k, at a value of a random row; its unit is

        d* = argmin_d Var_batch(z_d) / Var(z_d)

    The classifier answers d* with the factor that most training votes of that unit had; its accuracy on other votes is
    the score. Chance is 1/F.

    Args:
        codes: `[N, z]`.
        factors: classes `[N, F]`, integers.
        batch_size: L, rows drawn for a vote, with replacement; a value should have many more.
        num_train, num_test: votes for each factor.
        min_variance: units whose variance over all rows is no more than this never win; constant units never do.
    """
    codes, factors = _checked(codes, factors)
    _check_classes(factors)
    if batch_size < 2 or min(num_train, num_test) < 1:
        raise ValueError(
            f"batch_size is {batch_size}, num_train {num_train}, num_test {num_test}; expected batches of 2 or more, "
            "and at least one vote"
        )
    variance = codes.var(0)
    votes = [
        _votes(codes, k, variance, batch_size, num_train + num_test, variance > min_variance) for k in factors.unbind(1)
    ]
    train, test = (
        torch.stack([torch.bincount(v[part], minlength=codes.shape[1]) for v in votes])
        for part in (slice(num_train), slice(num_train, None))
    )
    return (test.gather(0, train.argmax(0, keepdim=True)).sum() / test.sum()).item()


def mutual_information_gap(codes: Tensor, factors: Tensor, *, num_bins: int = 20) -> float:
    r"""MIG: by how much the best unit for a factor beats the second (Chen et al. 2018, section 4).

        MIG = 1/F sum_k [I(z_j(k); v_k) - max_{j != j(k)} I(z_j; v_k)] / H(v_k),   j(k) = argmax_j I(z_j; v_k)

    The paper takes I of draws of q(z|x); here it is that of the codes themselves, in bins.

    Args:
        codes: `[N, z]`; z of 2 or more.
        factors: classes `[N, F]`, integers.
        num_bins: as in `mutual_information`.
    """
    best, second = mutual_information(codes, factors, num_bins=num_bins).topk(2, 0).values
    entropies = torch.stack([_entropy(_frequencies(k)) for k in factors.cpu().unbind(1)])
    return ((best - second) / entropies).mean().item()


def mutual_information(codes: Tensor, factors: Tensor, *, num_bins: int = 20) -> Tensor:
    """I(z_j; v_k) of every unit and factor, from their joint frequencies: nats, `[z, F]`.

    Args:
        codes: `[N, z]`.
        factors: classes `[N, F]`, integers.
        num_bins: of equal width, from the least to the largest value of each unit. Many bins and few rows make I too
            large, by about (bins - 1)(classes - 1) / 2N.
    """
    codes, factors = _checked(codes, factors)
    _check_classes(factors)
    if num_bins < 2:
        raise ValueError(f"num_bins is {num_bins}; at least 2 are needed")
    low, high = codes.min(0).values, codes.max(0).values
    width = torch.where(high > low, high - low, 1.0)
    bins = ((codes - low) / width * num_bins).long().clamp_max(num_bins - 1)
    classes = [k.unique(return_inverse=True)[1] for k in factors.unbind(1)]
    return torch.stack([torch.stack([_information(j, k) for k in classes]) for j in bins.unbind(1)])


@dataclass(frozen=True)
class DCI:
    """What `dci` found.

    Attributes:
        disentanglement: whether each unit serves one factor.
        completeness: whether each factor is held by one unit.
        informativeness: how well the factors are predicted from the codes.
        importance: of unit i in predicting factor k, R_ik, `[z, F]`; columns sum to 1 (or are 0).
    """

    disentanglement: float
    completeness: float
    informativeness: float
    importance: Tensor


def dci(
    codes: Tensor,
    factors: Tensor,
    *,
    num_trees: int = 20,
    max_depth: int | None = 8,
    test_fraction: float = 0.2,
) -> DCI:
    r"""Disentanglement, completeness, informativeness (Eastwood & Williams 2018), by random forests.

        D_i = 1 - H_F(R_ik / sum_k R_ik),   D = sum_i rho_i D_i,   rho_i = sum_k R_ik / sum_ik R_ik
        C_k = 1 - H_z(R_ik / sum_i R_ik),   C = mean_k C_k

    with entropies H to the base of the number of factors and of units. Informativeness is the mean over factors of
    the accuracy on held-out rows, and of R^2 (at least 0) where factors are floating point; the paper gives an error.

    Args:
        codes: `[N, z]`.
        factors: `[N, F]`; integers are classes, floating-point numbers are regressed.
        num_trees: of the forest of each factor; each split may choose among all units.
        max_depth: of the trees; `None` grows them out. The deeper, the more splits fit noise, which spreads the
            importance over all units: compare codes at one depth, and by as many rows.
        test_fraction: of the rows, held out at random.
    """
    codes, factors = _checked(codes, factors)
    if not 0 < test_fraction < 1 or num_trees < 1:
        raise ValueError(f"test_fraction is {test_fraction}, num_trees {num_trees}; expected one in (0, 1), one from 1")
    order = torch.randperm(len(codes))
    num_test = min(max(2, round(test_fraction * len(codes))), len(codes) - 1)  # R^2 needs two rows
    train, test = order[num_test:], order[:num_test]
    found = [_forest(codes, k, train, test, num_trees, max_depth) for k in factors.unbind(1)]
    importance = torch.stack([r for r, _ in found], 1)
    rho = importance.sum(1) / importance.sum().clamp_min(1e-12)
    return DCI(
        disentanglement=(rho * _concentration(importance)).sum().item(),
        completeness=_concentration(importance.T).mean().item(),
        informativeness=sum(score for _, score in found) / len(found),
        importance=importance,
    )


def _votes(codes: Tensor, factor: Tensor, variance: Tensor, size: int, count: int, is_active: Tensor) -> Tensor:
    """The stillest unit of `count` batches of `size` rows that agree in `factor`: `[count]`."""
    _, value, counts = factor.unique(return_inverse=True, return_counts=True)
    rows = value.argsort(stable=True)  # rows of one value follow each other
    starts = counts.cumsum(0) - counts
    fixed = value[torch.randint(len(codes), (count, 1))]
    drawn = (torch.rand(count, size, dtype=torch.double) * counts[fixed]).long()
    batches = codes[rows[starts[fixed] + drawn]]
    return torch.where(is_active, batches.var(1) / variance, torch.inf).argmin(1)


def _information(j: Tensor, k: Tensor) -> Tensor:
    """I(j; k) = H(j) + H(k) - H(j, k) of two columns of classes 0, 1, ..."""
    both = j * (k.max() + 1) + k
    return _entropy(_frequencies(j)) + _entropy(_frequencies(k)) - _entropy(_frequencies(both))


def _frequencies(classes: Tensor) -> Tensor:
    counts = classes.unique(return_counts=True)[1].double()
    return counts / counts.sum()


def _entropy(p: Tensor) -> Tensor:
    """Nats, over the last dim."""
    return torch.special.entr(p).sum(-1)


def _concentration(importance: Tensor) -> Tensor:
    """1 - entropy of each row, to the base of its length: 1 where one entry has it all, 0 where all are alike."""
    total = importance.sum(1, keepdim=True)
    p = torch.where(total > 0, importance / total.clamp_min(1e-300), 1 / importance.shape[1])
    return 1 - _entropy(p) / math.log(importance.shape[1])


def _forest(
    codes: Tensor, factor: Tensor, train: Tensor, test: Tensor, num_trees: int, max_depth: int | None
) -> tuple[Tensor, float]:
    """Importance of every unit `[z]`, and the score on the test rows."""
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    kind = RandomForestRegressor if factor.is_floating_point() else RandomForestClassifier
    seed = int(torch.randint(2**31, ()))
    forest = kind(num_trees, max_features=None, max_depth=max_depth, random_state=seed)
    z, v = codes.numpy(), factor.numpy()
    forest.fit(z[train], v[train])
    return torch.from_numpy(forest.feature_importances_), max(0.0, forest.score(z[test], v[test]))


def _checked(codes: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the CPU, codes in double precision; or a `ValueError`."""
    for name, of, tensor in (("codes", "z", codes), ("factors", "F", factors)):
        if not isinstance(tensor, Tensor) or tensor.ndim != 2 or min(tensor.shape) < 2:
            what = f"of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise ValueError(f"{name}: {what}; expected a tensor [N, {of}], with N and {of} of 2 or more")
    if len(codes) != len(factors):
        raise ValueError(f"{len(codes)} rows of codes and {len(factors)} of factors; give one row of each a datum")
    if not torch.isfinite(codes).all():
        raise ValueError("codes hold NaN or infinite values; did the training diverge?")
    codes, factors = codes.detach().cpu().double(), factors.detach().cpu()
    if constant := [k for k, v in enumerate(factors.unbind(1)) if (v == v[0]).all()]:
        raise ValueError(f"factors {constant} take one value only; leave their columns out, or give more rows")
    return codes, factors


def _check_classes(factors: Tensor) -> None:
    if factors.is_floating_point():
        raise ValueError(f"factors are {factors.dtype}; expected integer classes: number the values, or cut into bins")
