"""How many bytes are alive."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qgalore.storage.quantized_weight import QuantizedWeight


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
