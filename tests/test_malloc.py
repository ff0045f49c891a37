"""Memory that is freed stays while a step is repeated, and goes back afterwards."""

import mmap
import resource
import subprocess
import sys

import pytest
import torch

from pyro_lvae import VAE, Dataset, fit, log_likelihood
from pyro_lvae.malloc import _glibc, kept_memory

pytestmark = pytest.mark.skipif(_glibc() is None, reason="no glibc, or told by the environment what to do")
BLOCK = 36 * 2**20  # bytes; beyond what glibc keeps of its own accord


def _faults_so_far() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _pages() -> int:
    """Times the kernel is asked for a block that is new; fewer where its pages are large."""
    before = _faults_so_far()
    with mmap.mmap(-1, BLOCK) as fresh:
        for at in range(0, BLOCK, 4096):
            fresh[at] = 1
    return _faults_so_far() - before


PAGES = _pages()


def _faults(times: int = 5) -> int:
    """Times the kernel was asked for pages while a block was made and freed so often."""
    before = _faults_so_far()
    for _ in range(times):
        torch.ones(BLOCK, dtype=torch.uint8)
    return _faults_so_far() - before


def _is_kept() -> bool:
    """Whether a block finds the memory of the last, once the heap has found its shape."""
    return any(_faults() < PAGES for _ in range(6))


def test_a_block_is_made_from_the_memory_of_the_last():
    with kept_memory():
        assert _is_kept()
    assert _faults(1) >= PAGES / 2


def test_blocks_within_blocks_count_as_one():
    with kept_memory():
        with kept_memory():
            pass
        assert _is_kept()
    assert _faults(1) >= PAGES / 2


def test_memory_goes_back_after_an_error():
    with pytest.raises(ZeroDivisionError), kept_memory():
        1 / 0  # noqa: B018
    assert _faults(1) >= PAGES / 2


def test_training_and_importance_sampling_keep_theirs():
    entered = []

    class Watched(VAE):
        def guide(self, x, y=None):
            entered.append(_is_kept())
            return super().guide(x, y)

    x = torch.ones(4, 6)
    structure = Watched(6, 2, 3, num_hidden=1)
    fit(structure, Dataset("rows", x, x), epochs=1, batch_size=4, compile=False, monitor_size=1)
    during = len(entered)
    log_likelihood(structure, x, num_samples=3)
    assert any(entered[:during])
    assert any(entered[during:])
    assert _faults(1) >= PAGES / 2


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_=1000", "GLIBC_TUNABLES=glibc.malloc.trim_threshold=1000"])
def test_the_environment_has_the_last_word(name):
    key, value = name.split("=", 1)
    code = "from pyro_lvae.malloc import _glibc, kept_memory\nwith kept_memory(): assert _glibc() is None"
    subprocess.run([sys.executable, "-c", code], check=True, env={key: value})
