"""How much memory a call takes at its peak."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """The largest memory alive at one moment inside, beyond what was alive before."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.peak, self._live = device, 0, 0
        self._refs: dict[int, weakref.ref] = {}

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._live = torch.cuda.memory_allocated(self.device)
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - self._live
        self._refs.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.device.type != "cuda":
            given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for t in tree_leaves(out):
                if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given | self._refs.keys():
                    self._hold(t.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def free(_):
            if self._refs.pop(key, None) is not None:
                self._live -= size

        self._refs[key] = weakref.ref(storage, free)
        self._live += size
        self.peak = max(self.peak, self._live)
