"""The kernel, compiled."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qgalore.kernel import write_rows

MAX_COMPILES = 256  # shapes times constants. torch stops at 8, where it suspects a number that changes


def compiled_rows() -> Callable[..., None]:
    """write_rows, compiled at the first use of each shape and set of constants."""
    compiled = torch.compile(write_rows, dynamic=False, fullgraph=True)

    def run(*given: Any, **named: Any) -> None:
        with torch._dynamo.config.patch(recompile_limit=MAX_COMPILES), _one_loop_a_kernel():
            compiled(*given, **named)

    return run


@contextmanager
def _one_loop_a_kernel() -> Iterator[None]:
    """Keeps torch's C++ code generator from nesting several kernels in one outer loop.

    Ours never fit into one, so it would generate the code of each twice: half of the time that compiling takes. And
    where a store must wait for a read in another kernel, it would fail (a KeyError in torch 2.11 and 2.13).
    """
    from torch._inductor.codegen.cpp import CppScheduling

    name = "_get_outer_loop_fusion_depth"
    usual = getattr(CppScheduling, name, None)
    if usual is None:  # another torch: as it likes
        yield
        return
    setattr(CppScheduling, name, lambda *unused: 0)
    try:
        yield
    finally:
        setattr(CppScheduling, name, usual)
