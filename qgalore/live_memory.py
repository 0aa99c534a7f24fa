"""Which tensors are alive while a program runs: bytes by kind, the peak, and the line of code that made it.

`LiveMemory` sees every operation of torch, and so every storage that comes into being; it learns of a storage's end
from the storage. On real tensors it measures. On tensors of the meta device, which have shapes but no memory, it plans:
the program runs as it is, and only the answers that it would read from the data are made up, as those of an update in
which nothing goes wrong.

Where the code is told which tensors belong to which of several like parts (`belong`), the peak is also kept for each
visit of a part, so that a plan of few parts can be extended to many.

It does not see what a kernel allocates and frees inside, what an allocator keeps in reserve, and the context of a GPU.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

GRANULARITY = 512  # bytes; the CUDA allocator rounds every size up to a multiple of it
_OURS = tuple(str(Path(__file__).parents[1] / package) + "/" for package in ("qgalore", "peft_pretraining"))
_FSDP = tuple(
    str(Path(torch.__file__).parent / "distributed" / path) for path in ("fsdp/_fully_shard/_", "tensor/_sharding_prop")
)
# What a new storage is for, by the innermost function, of ours or of FSDP2, that is named here:
# (file, function or "", kind).
_KINDS = (
    ("_sharding_prop.py", "", ""),  # shapes of whole tensors, which DTensors ask fake ones for
    ("_fsdp_param.py", "_init_sharded_param", "weights"),
    ("_fsdp_param.py", "init_all_gather_outputs", "gathered weights"),
    ("_fsdp_collectives.py", "foreach_all_gather", "gathered weights"),
    ("_fsdp_collectives.py", "foreach_all_gather_copy_out", "gathered weights"),
    ("_fsdp_collectives.py", "foreach_reduce", "gradients"),
    ("build.py", "meta_model", ""),  # a skeleton of the model, which is on the meta device in any run: not counted
    ("offload.py", "_to_host", ""),  # it stands for host memory
    ("sums.py", "_host", ""),
    ("sums.py", "", "sums"),
    ("loss.py", "forward", "gradients"),  # _HeadLoss makes them there
    ("loss.py", "_head_loss", "logits"),
    ("loss_by_words.py", "_logits", "logits"),
    ("moments.py", "create_moments", "moments"),
    ("projector.py", "_refresh_side", "refresh"),
    ("quantized_weight.py", "_decode", "dequantized weights"),
    ("per_layer.py", "_accumulate", "sums"),
    ("kernel.py", "", "update"),
    ("update.py", "", "update"),
    ("whole_model.py", "", "update"),
    ("optimizer.py", "", "update"),
)


class Peak(NamedTuple):
    """The most memory that was alive at one time."""

    bytes: int
    kinds: dict[str, int]  # bytes by kind
    line: str  # the line of ours that made the last storage, `file:line function`


class Visit(NamedTuple):
    """A stretch of the program, from the first operation on one part's tensors to the first on another's."""

    part: int  # number of the part; -1 before any part was visited
    number: int  # 0-based number of this visit to the part


class LiveMemory(TorchDispatchMode):
    """Counts the storages that come into being while it is active, until they end.

    Kinds are guessed from the code that makes a storage; `mark` sets them right for what is known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[str] = Counter()
        self.bytes = 0
        self.peaks: dict[Visit, Peak] = {}  # of finished visits and of this one, since the last restart
        self._live: dict[int, tuple[int, str, weakref.ref]] = {}  # size, kind, what calls back at the end
        self._parts: dict[int, int] = {}  # the number of the part that a storage belongs to
        self.restart()

    @property
    def peak(self) -> Peak:
        """The most that was alive since the last restart; of equal peaks, the first."""
        return max(self.peaks.values(), key=lambda peak: peak.bytes)

    def __enter__(self) -> "LiveMemory":
        """FSDP2 frees a storage, and takes its memory again, by resizing it, which is no operation of torch."""
        resize = torch.UntypedStorage.resize_

        def noting(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = resize(storage, size)
            self._resized(storage)
            return result

        setattr(torch.UntypedStorage, "resize_", noting)  # noqa: B010  # an assignment has another type
        self._undo = lambda: setattr(torch.UntypedStorage, "resize_", resize)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._undo()
        super().__exit__(*exception)

    def mark(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Says what these tensors are for; storages that were not counted stay so."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._live:
                size, old, watch = self._live[key]
                self._live[key] = size, kind, watch
                self.kinds[old] -= size
                self.kinds[kind] += size

    def belong(self, part: int, tensors: Iterable[Tensor]) -> None:
        """Says which part these tensors belong to. Those from outside must live as long as this object is used."""
        self._parts |= {tensor.untyped_storage()._cdata: part for tensor in tensors}

    def once(self, key: Hashable, function: Callable[[], None], *, done: dict[Hashable, Peak], of: Tensor) -> None:
        """Calls a function that leaves nothing alive behind, and the next time only counts what it needs.

        key: the same for functions that allocate the same.
        done: what functions of these keys need beyond what was alive before.
        of: one of the tensors of the part that the function works on.
        """
        self._visit_part_of([of.untyped_storage()._cdata])
        before = Counter(self.kinds)
        if key not in done:
            outer, self._most = self.peaks.get(self._visit), -1
            self._note_peak("")
            function()
            inner = self.peaks[self._visit]
            more = Counter(inner.kinds)
            more.subtract(before)
            if self.bytes == before.total() and min(more.values(), default=0) >= 0:
                done[key] = Peak(more.total(), dict(+more), inner.line)
            if outer is not None and outer.bytes >= inner.bytes:
                self.peaks[self._visit], self._most = outer, outer.bytes
            return
        self._note_peak("", done[key])

    def restart(self) -> None:
        """Forgets the peaks and visits so far: the peak begins with what is alive now."""
        self._visits: Counter[int] = Counter()
        self.peaks.clear()
        self._visit = Visit(-1, 0)
        self._most = -1
        self._note_peak("")

    def _note_peak(self, line: str, more: Peak | None = None) -> None:
        """more: what is alive for a moment besides."""
        size = self.bytes if more is None else self.bytes + more.bytes
        if size > self._most:
            self._most = size
            kinds, line = (self.kinds, line) if more is None else (self.kinds + Counter(more.kinds), more.line)
            self.peaks[self._visit] = Peak(size, dict(+kinds), line)

    def _visit_part_of(self, storages: Iterable[int]) -> None:
        """Notes which part these storages belong to, if they belong to any."""
        for storage in storages:
            if (part := self._parts.get(storage, self._visit.part)) != self._visit.part:
                self._visit, self._most = Visit(part, self._visits[part]), -1
                self._visits[part] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a tensor made of tensors: its own operations come back here, one by one
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return _good_answer(args[0].dtype)
        result = _call(func, args, kwargs or {})
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor, args)
        return result

    def _note(self, tensor: Tensor, args: Any) -> None:
        """Counts the storage of an operation's result, if it is new. args: of the operation."""
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or not storage.nbytes():
            return
        used = [arg.untyped_storage()._cdata for arg in args if isinstance(arg, Tensor)]
        if key in used:
            return  # a view of something from outside
        self._begin(storage, used)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._live:
            self._forget(storage._cdata)
        if storage.nbytes():
            self._begin(storage, [storage._cdata])

    def _begin(self, storage: torch.UntypedStorage, used: list[int]) -> None:
        """Counts a storage from now on. used: the storages that it is made from."""
        kind, line = _origin()
        if not kind:
            return
        self._visit_part_of(used)
        key, size = storage._cdata, -(-storage.nbytes() // GRANULARITY) * GRANULARITY
        self._live[key] = size, kind, weakref.ref(storage, lambda _: self._end(key))
        self.kinds[kind] += size
        self.bytes += size
        self._note_peak(line)

    def _end(self, key: int) -> None:
        self._forget(key)
        self._parts.pop(key, None)  # another storage may have this number next

    def _forget(self, key: int) -> None:
        size, kind, _ = self._live.pop(key)
        self.kinds[kind] -= size
        self.bytes -= size


def _good_answer(dtype: torch.dtype) -> bool | int | float:
    """What a scalar of a good update could be: yes, it is finite."""
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation returns. On the meta device, torch takes long to find it: shape and dtype are remembered."""
    how = _how(func)
    if how == "any" or not (isinstance(args[0], Tensor) and args[0].is_meta):
        return func(*args, **kwargs)
    if how == "in place":
        return args[0]
    key = (func, *map(_looks, args), *((name, _looks(value)) for name, value in kwargs.items()))
    if (known := _RESULTS.get(key)) is not None:
        shape, stride, dtype = known
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    result = func(*args, **kwargs)
    if isinstance(result, Tensor) and result.is_meta and result.untyped_storage().nbytes() == _dense_bytes(result):
        used = {arg.untyped_storage()._cdata for arg in tree_leaves((args, kwargs)) if isinstance(arg, Tensor)}
        if result.untyped_storage()._cdata not in used:
            _RESULTS[key] = result.shape, result.stride(), result.dtype
    return result


_RESULTS: dict[Hashable, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}


@cache
def _how(func: Any) -> str:
    """What an operation on the meta device does: make a `new` tensor, work `in place` on its first argument, `any`."""
    if func._schema.is_mutable:
        elementwise = torch.Tag.pointwise in func.tags and func._schema.name.endswith("_")
        return "in place" if elementwise else "any"
    return "new" if len(func._schema.returns) == 1 and not func.is_view else "any"


def _looks(value: Any) -> Hashable:
    """What an operation's result depends on, of an argument, where there is no data."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, list | tuple):
        return tuple(map(_looks, value))
    return float if isinstance(value, float) else (type(value), value)


def _dense_bytes(tensor: Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize if tensor.numel() else 0


def _origin() -> tuple[str, str]:
    """The kind of a new storage and the line of ours that makes it."""
    frame: FrameType | None = sys._getframe(3)
    line, kind = "", None
    while frame is not None and kind is None:
        if name := _file(frame.f_code):
            line = line or f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
            kind = _kind_of(frame.f_code)
        frame = frame.f_back
    if kind is None:
        backward = torch._C._current_autograd_node() is not None and not torch.is_grad_enabled()
        kind = "gradients" if backward else "activations"
    return kind, line


@cache
def _file(code: CodeType) -> str:
    """The name of the file, of ours or of FSDP2, that a function is in; "" for code of others."""
    path = code.co_filename
    named = path.startswith(_OURS + _FSDP) and not path.endswith("live_memory.py")
    return path.rpartition("/")[2] if named else ""


@cache
def _kind_of(code: CodeType) -> str | None:
    """What storages that a function makes are for, if _KINDS says so."""
    name, function = _file(code), code.co_name
    return next((kind for file, own, kind in _KINDS if file == name and own in ("", function)), None)
