"""Peak memory of training, each contender in a process of its own.

    python -m benchmarks.memory ladder "pyro_lvae, eager"

`step`: growth of the resident set over a few steps, beyond the weights, the optimiser's state and whatever compiling
has left behind; its high-water mark is set back just before, and the gradients are let go. Linux only.
`process`: the high-water mark at the end, compiling included, beyond what was resident after the imports. Linux only.
On CUDA all that torch's allocator has reserved there, and nothing else is asked.
(`getrusage` would not do: a process begins with the ru_maxrss of the one that started it.)
`tensors`: the largest sum of tensors alive at a moment of a step, where no graph is compiled.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from benchmarks.contenders import BY_HAND_COMPILED_FUSED, COMPILED, EAGER, FUSED, contenders
from benchmarks.measure import COMPILER, without
from benchmarks.tables import print_table
from pyro_lvae.comparison.memory import PeakBytes

NAMES = (EAGER, COMPILED, FUSED, BY_HAND_COMPILED_FUSED)
KINDS = ("step", "process", "tensors")
MEBI = 2**20


def memory_of(model: str, skip: list[str], device: str = "cpu") -> dict[str, dict[str, float | None]]:
    """MiB by contender and kind, and ratios to hand-written eager PyTorch with the fused Adam."""
    names = list(without(dict.fromkeys(NAMES), skip))
    found = {name: _in_a_process(model, name, device) for name in names}
    rows = {
        name: {f"{k}_MiB": None if v[k] is None else v[k] / MEBI for k in KINDS}
        | {f"{k}_ratio": _ratio(v[k], found.get(FUSED, {}).get(k)) for k in KINDS}
        for name, v in found.items()
    }
    print_table(f"{model}, peak memory; ratios to {FUSED!r}", rows)
    return rows


def _in_a_process(model: str, name: str, device: str) -> dict[str, int | None]:
    command = [sys.executable, "-m", "benchmarks.memory", model, name, device]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout.splitlines()[-1])


def _ratio(value: int | None, base: int | None) -> float | None:
    return value / base if value is not None and base else None


def measure(model: str, name: str, device: str = "cpu", steps: int = 10) -> dict[str, int | None]:
    """Bytes, in this process; `None` where the system does not say."""
    with torch.device(device):
        contender = contenders(model)[name]
    for module in COMPILER:  # torch's optimisers import some of it too, at their first step
        import_module(module)
    gc.collect()
    imported = _status("VmRSS")
    with torch.device(device):
        run = contender.make()
    run(3)
    if torch.device(device).type == "cuda":
        return {"step": None, "process": torch.cuda.max_memory_reserved(device), "tensors": None}
    _let_go_of_gradients()
    first, can_reset = _status("VmHWM"), _reset_high_water()
    before = _status("VmRSS")
    run(steps)
    highest = _status("VmHWM")
    return {
        "step": highest - before if can_reset else None,
        "process": max(first, highest) - imported if can_reset else None,
        "tensors": None if contender.needs else _tensors(run),
    }


def _tensors(run) -> int:
    _let_go_of_gradients()
    with PeakBytes(torch.device("cpu")) as counter:
        run(1)
    return counter.peak


def _let_go_of_gradients() -> None:
    """Gradients of every parameter, and what the allocator keeps for later."""
    gc.collect()
    for p in (o for o in gc.get_objects() if type(o) is nn.Parameter):
        p.grad = None
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water() -> bool:
    """Whether the high-water mark could be set back to the present resident set."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(key: str) -> int | None:
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
