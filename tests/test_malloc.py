"""Memory that is freed stays while a step is repeated, and goes back afterwards."""

import mmap
import os
import resource
import subprocess
import sys

import pytest
import torch

from pyro_lvae import VAE, Dataset, fit, log_likelihood, malloc
from pyro_lvae.malloc import _glibc, kept_memory


def _keeps_any_size() -> bool:
    libc = _glibc()
    return libc is not None and all(libc.mallopt(malloc._MMAP_THRESHOLD, size) for size in (2**26, 2**25))


pytestmark = pytest.mark.skipif(not _keeps_any_size(), reason="no glibc, an old one, or told what to do")
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
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, key: value})


@pytest.mark.parametrize("most", [2**25, 2**40])
def test_older_versions_of_glibc_keep_what_they_can(monkeypatch, most):
    """Which give blocks above 32 MiB back whatever one asks; to ask for more changes nothing there."""
    accepted = {}

    class Libc:
        def mallopt(self, parameter, value):
            if parameter == malloc._MMAP_THRESHOLD and value > most:
                return 0
            accepted[parameter] = value
            return 1

        def malloc_trim(self, _):
            return 1

    monkeypatch.setattr(malloc, "_glibc", Libc)
    with kept_memory():
        assert accepted == {malloc._MMAP_THRESHOLD: min(most, 2**30), malloc._TRIM_THRESHOLD: 2**30}
    assert accepted == {malloc._MMAP_THRESHOLD: 2**25, malloc._TRIM_THRESHOLD: 2**26}
