"""Fixtures: every structure in small, a little data, and the folder of real data where there is one."""

import os
from functools import partial
from pathlib import Path

import pyro
import pytest
import torch

from pyro_lvae import NVDM, VAE, BayesianWeights, Dataset, HierarchicalVAE, LadderVAE, ProdLDA
from pyro_lvae.conditionals import Normal

SIZES = dict(x_dim=12, z_dims=(5, 3, 2), hidden_dims=(16, 8, 8))

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
torch.set_num_threads(1)  # the networks here are so small that threads would only wait for each other

# Every structure, and every option of one, that the conformance suite goes over.
STRUCTURES = {
    "VAE": partial(VAE, 12, 3, 16),
    "VAE-normal": partial(VAE, 12, 3, 16, likelihood=Normal),
    "VAE-fixed-scale": partial(VAE, 12, 3, 16, likelihood=partial(Normal, scale=0.5)),
    "HierarchicalVAE": partial(HierarchicalVAE, **SIZES),
    "HierarchicalVAE-no-bn": partial(HierarchicalVAE, **SIZES, batch_norm=False),
    "LadderVAE": partial(LadderVAE, **SIZES),
    "LadderVAE-one-layer": partial(LadderVAE, 12, (3,), (8,)),
    "LadderVAE-unshared": partial(LadderVAE, **SIZES, share_top_down=False),
    "LadderVAE-mu-upwards": partial(LadderVAE, **SIZES, mu_upwards=True, head_batch_norm=False),
    "NVDM": partial(NVDM, 12, 3, 16),
    "NVDM-log1p-bn": partial(NVDM, 12, 3, 16, transform=torch.log1p, batch_norm=True, dropout=0.2),
    "ProdLDA": partial(ProdLDA, 12, 3, 16, dropout=0.2),
}


def _bayesian(make):
    return BayesianWeights(make(), noise="local_reparameterization")


# Every structure, under its own name, once more with a posterior over all its weights.
STRUCTURES |= {f"{name}-bayesian": partial(_bayesian, make) for name, make in STRUCTURES.items() if name.isidentifier()}


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
