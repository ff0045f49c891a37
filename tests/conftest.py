"""Fixtures: every structure in small, a little data, and the folder of real data where there is one."""

import os
from functools import partial
from pathlib import Path

import pyro
import pytest
import torch
from pyro import poutine

from pyro_lvae import (
    ADGM,
    AE,
    NVDM,
    SDGM,
    VAE,
    BayesianWeights,
    BetaVAE,
    BidirectionalLadderVAE,
    ConditionalVAE,
    ConvLadderVAE,
    Dataset,
    DenoisingVAE,
    FactorVAE,
    FlowVAE,
    HierarchicalVAE,
    ImplicitLikelihoodVAE,
    ImplicitPosteriorVAE,
    LadderVAE,
    MixturePrior,
    OptimalPriorVAE,
    ProdLDA,
    SemiSupervisedVAE,
    SparseVAE,
    VaDE,
    VampPrior,
    VariationalGP,
    linear,
)
from pyro_lvae.conditionals import Normal, StudentT
from pyro_lvae.structures.denoising import masking
from pyro_lvae.structures.flows import IAF, PlanarFlow, SplineFlow
from pyro_lvae.structures.sparse import BetaCode, TwoGaussiansCode

SIZES = dict(x_dim=12, z_dims=(5, 3, 2), hidden_dims=(16, 8, 8))
LADDER = partial(LadderVAE, z_dims=(5, 3), hidden_dims=(16, 8))

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
torch.set_num_threads(1)  # the networks here are so small that threads would only wait for each other


class Labelled(ConditionalVAE):
    """A conditional structure where every datum has a label, given or not."""

    takes_labels = False

    def _condition(self, x, y):
        return super()._condition(x, torch.arange(len(x)) % self.num_classes if y is None else y)


class Clustered(VaDE):
    """VaDE where the cluster of every datum is known, given or not; where not, it does not count as data."""

    def __init__(self, *args):
        super().__init__(*args)
        self.prior.logits.requires_grad_(False)  # of no use where clusters do not count as data

    def model(self, x, y=None):
        with poutine.block(hide=["y"] if y is None else []):
            return super().model(x, torch.arange(len(x), device=x.device) % len(self.prior.logits) if y is None else y)


# Every structure, and every option of one, that the conformance suite goes over.
def _repeated(z):
    """A simulator: every unit of z is seen four times, with noise."""
    return z.repeat_interleave(4, -1) + torch.randn_like(z).repeat_interleave(4, -1)


STRUCTURES = {
    "VAE": partial(VAE, 12, 3, 16),
    "VAE-normal": partial(VAE, 12, 3, 16, likelihood=Normal),
    "VAE-fixed-scale": partial(VAE, 12, 3, 16, likelihood=partial(Normal, scale=0.5)),
    "VAE-student-t": partial(VAE, 12, 3, 16, likelihood=StudentT),
    "HierarchicalVAE": partial(HierarchicalVAE, **SIZES),
    "HierarchicalVAE-skip": partial(HierarchicalVAE, **SIZES, skip=True),
    "HierarchicalVAE-no-bn": partial(HierarchicalVAE, **SIZES, batch_norm=False),
    "LadderVAE": partial(LadderVAE, **SIZES),
    "LadderVAE-gated": partial(LadderVAE, **SIZES, activation=torch.nn.GLU),
    "LadderVAE-one-layer": partial(LadderVAE, 12, (3,), (8,)),
    "LadderVAE-unshared": partial(LadderVAE, **SIZES, share_top_down=False),
    "LadderVAE-skip": partial(LadderVAE, **SIZES, skip=True),
    "LadderVAE-mu-upwards": partial(LadderVAE, **SIZES, mu_upwards=True, head_batch_norm=False),
    "BidirectionalLadderVAE": partial(BidirectionalLadderVAE, 12, (5, 3, 2), 16),
    "BidirectionalLadderVAE-deep": partial(BidirectionalLadderVAE, 12, (3,) * 12, 8),
    "BidirectionalLadderVAE-one-layer": partial(BidirectionalLadderVAE, 12, (3,), 8, likelihood=Normal),
    "ConvLadderVAE": partial(ConvLadderVAE, 12, (3, 4), (0, 3), (8, 8), 2),
    "ConvLadderVAE-deep": partial(ConvLadderVAE, 12, (3, 4), (0, 5, 7), (4, 4, 4), 2, likelihood=StudentT),
    "ConvLadderVAE-colours": partial(ConvLadderVAE, 12, (3, 2, 2), (1, 1), (8, 8), 2, likelihood=Normal),
    "AE": partial(AE, 12, 3, 16),
    "ConditionalVAE": partial(Labelled, 12, 3, 2, 16),
    "ConditionalVAE-learned-prior": partial(Labelled, 12, 3, 2, 16, learn_prior=True),
    "VaDE": partial(VaDE, 12, 4, 3, (16, 8)),
    "VaDE-clusters-given": partial(Clustered, 12, 4, 3, (16, 8)),
    "SparseVAE": partial(SparseVAE, 12, 4, 16),
    "SparseVAE-beta": partial(SparseVAE, 12, 4, 16, code=BetaCode),
    "SparseVAE-two-gaussians": partial(SparseVAE, 12, 4, 16, code=TwoGaussiansCode),
    "MixturePrior": partial(MixturePrior, 12, partial(VAE, z_dim=3, hidden_dim=16), 4),
    "MixturePrior-ladder": partial(MixturePrior, 12, LADDER, 4),
    "VampPrior": partial(VampPrior, 12, partial(VAE, z_dim=3, hidden_dim=16), 5),
    "VampPrior-ladder": partial(VampPrior, 12, LADDER, 5),
    "VampPrior-skip": partial(VampPrior, 12, partial(LADDER, skip=True), 5),
    "VampPrior-hierarchy": partial(VampPrior, 12, partial(HierarchicalVAE, z_dims=(5, 3), hidden_dims=(16, 8)), 5),
    "FlowVAE": partial(FlowVAE, 12, partial(VAE, z_dim=3, hidden_dim=16), IAF, 2),
    "FlowVAE-planar": partial(FlowVAE, 12, partial(VAE, z_dim=3, hidden_dim=16), PlanarFlow, 2),
    "FlowVAE-spline": partial(FlowVAE, 12, partial(VAE, z_dim=3, hidden_dim=16), SplineFlow, 2),
    "FlowVAE-ladder": partial(FlowVAE, 12, LADDER, IAF, 1),
    "FlowVAE-top": partial(FlowVAE, 12, LADDER, IAF, 1, layers="top"),
    "VariationalGP": partial(VariationalGP, 12, (3, 2), (16, 8), num_points=4),
    "VariationalGP-one-layer": partial(VariationalGP, 12, (3,), (16,), num_points=2, xi_dim=1, batch_norm=False),
    "DenoisingVAE": partial(DenoisingVAE, 12, partial(VAE, z_dim=3, hidden_dim=16)),
    "DenoisingVAE-ladder": partial(DenoisingVAE, 12, LADDER, masking, linear(0.5, 0.1, epochs=3)),
    "BetaVAE": partial(BetaVAE, 12, 3, 16),
    "FactorVAE": partial(FactorVAE, 12, partial(VAE, z_dim=3, hidden_dim=16), critic_hidden_dim=16),
    "ImplicitPosteriorVAE": partial(ImplicitPosteriorVAE, 12, 3, 16, noise_dim=5),
    "ImplicitLikelihoodVAE": partial(ImplicitLikelihoodVAE, 12, _repeated, 3, 16),
    "SemiSupervisedVAE": partial(SemiSupervisedVAE, 12, 3, 2, 16),
    "ADGM": partial(ADGM, 12, 3, 2, 16),
    "SDGM": partial(SDGM, 12, 3, 2, 16, a_dim=4),
    "OptimalPriorVAE": partial(OptimalPriorVAE, 12, partial(VAE, z_dim=3, hidden_dim=16), critic_hidden_dim=16),
    "OptimalPriorVAE-ladder": partial(OptimalPriorVAE, 12, LADDER, critic_hidden_dim=16),
    "NVDM": partial(NVDM, 12, 3, 16),
    "NVDM-log1p-bn": partial(NVDM, 12, 3, 16, transform=torch.log1p, batch_norm=True, dropout=0.2),
    "ProdLDA": partial(ProdLDA, 12, 3, 16, dropout=0.2),
}


def _bayesian(make):
    structure = make()
    # which allows no noise a datum; of the last a classifier, for rows with a label
    uses_weights_twice = isinstance(structure, VampPrior | ImplicitPosteriorVAE | SemiSupervisedVAE)
    return BayesianWeights(structure, noise="shared" if uses_weights_twice else "local_reparameterization")


# Every structure, under its own name, once more with a posterior over all its weights.
STRUCTURES |= {f"{name}-bayesian": partial(_bayesian, make) for name, make in STRUCTURES.items() if name.isidentifier()}


# By default CORE meets every estimator, the other structures under their own name these FEW, and options of one, or
# posteriors over its weights, the contract alone but where they are those of CORE; the rest of the matrix is `slow`.
CORE = {"VAE", "HierarchicalVAE", "LadderVAE"}
FEW = {"AnalyticELBO", "IWAE", "RWS"}
QUICK = {name for name in STRUCTURES if name.isidentifier()} | {f"{name}-bayesian" for name in CORE}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        names = getattr(getattr(item, "callspec", None), "params", {})
        structure, estimator = names.get("structure", "VAE"), names.get("estimator")
        is_few = structure in QUICK and not (isinstance(estimator, str) and estimator not in FEW)
        is_basic = getattr(item, "originalname", None) == "test_keeps_the_contract"
        if structure not in CORE and not (is_few or is_basic):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seeded():
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    left = list(pyro.get_param_store())
    pyro.clear_param_store()
    assert not left, "the library leaves Pyro's parameter store empty"


@pytest.fixture(params=STRUCTURES)
def structure(request):
    return STRUCTURES[request.param]()


@pytest.fixture
def x():
    return (torch.rand(7, 12) > 0.5).float()


@pytest.fixture
def tiny():
    """A data set of 45 binary rows with labels."""
    rows = (torch.rand(60, 12) > 0.5).float()
    labels = torch.arange(60) % 3
    return Dataset("tiny", rows[:45], rows[45:], labels[:45], labels[45:], shape=(3, 4))


@pytest.fixture(scope="session")
def data_root():
    """The folder of real data: PYRO_LVAE_DATA, or shared/data beside the checkout."""
    root = Path(os.environ.get("PYRO_LVAE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no folder of real data at {root}; set PYRO_LVAE_DATA")
    return root
