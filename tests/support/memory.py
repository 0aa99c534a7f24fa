"""How many bytes are alive."""

import gc
import json
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from qgalore.storage.quantized_weight import QuantizedWeight

T = TypeVar("T")


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages that operations made inside this mode and that are still alive; and their peak."""

    def __init__(self, *known):
        """known: tensors from before, which do not count when an operation makes a view of them."""
        super().__init__()
        self.live = self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]
        self._seen = weakref.WeakSet(self._known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self._watch, result)
        return result

    def _watch(self, tensor):
        if isinstance(tensor, QuantizedWeight) or tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size):
        self.live -= size


def allocated_at_most(work: Callable[[], T]) -> tuple[int, T]:
    """The most bytes that torch's CPU allocator had given out at one time during the work, and the work's result."""
    gc.collect()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = work()
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    told = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda event: event["ts"])
    before = told[0]["args"]["Total Allocated"] - told[0]["args"]["Bytes"]  # earlier tests' tensors
    return max(event["args"]["Total Allocated"] for event in told) - before, result
