"""Writes safetensors files one tensor at a time, so that memory holds no second copy of a model.

safetensors' own save_file first turns all tensors into bytes. The format: 8 bytes of header length, little-endian; the
header, JSON with dtype, shape and place of each tensor, padded with spaces; the tensors' bytes, widest dtypes first, so
that all are aligned. Source: https://github.com/huggingface/safetensors, "Format".
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64", torch.uint32: "U32",
    torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_ALIGNMENT = 8  # bytes


@dataclass(frozen=True)
class TensorFile:
    """The content of a safetensors file."""

    tensors: dict[str, Tensor]  # on any device
    metadata: dict[str, str] = field(default_factory=dict)  # texts beside them

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, path: Path) -> str:
        """Writes the file and returns its SHA-256, in hexadecimal. Raises OSError."""
        return write_tensors(path, self.tensors, read=self.tensors.__getitem__, metadata=self.metadata)


def write_tensors(
    path: Path, like: Mapping[str, Tensor], *, read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> str:
    """Writes a safetensors file, asking for one tensor after the other. It is on the disk when this returns.

    like: a tensor of the shape and dtype to write for each name; it may be on the meta device.
    read: gives the tensor of a name, on any device.
    metadata: texts that the file holds beside the tensors.
    Returns the file's SHA-256, in hexadecimal. Raises OSError.
    """
    header, places, _ = layout(like, metadata)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        pieces = (_checked_bytes(read(name), like[name]) for name in places)
        for piece in itertools.chain([header], pieces):
            digest.update(piece)
            file.write(piece)
            del piece  # before the next one is read
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def layout(like: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[memoryview, dict[str, int], int]:
    """The header of a file, the places of the tensors in it, in their order, and its size, in bytes.

    like, metadata: see write_tensors.
    """
    names = sorted(like, key=lambda name: (-like[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start, places = 0, {}
    for name in names:
        end = start + like[name].numel() * like[name].element_size()
        header[name] = {
            "dtype": _NAMES[like[name].dtype], "shape": list(like[name].shape), "data_offsets": [start, end]
        }  # fmt: skip
        places[name], start = start, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    begin = memoryview(len(text).to_bytes(8, "little") + text)
    return begin, {name: len(begin) + place for name, place in places.items()}, len(begin) + start


def _checked_bytes(tensor: Tensor, like: Tensor) -> memoryview:
    assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype)
    return to_bytes(tensor)


def to_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor. On a CPU they are its own memory, not a copy, if it is contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
