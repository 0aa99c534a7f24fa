"""A process that takes itself for one of many, to be planned: collectives answer at once, with nothing.

torch has a process group for that, `fake`. FSDP2 trains no parameters on the meta device, for they have no values; a
plan needs none. So for as long as a plan takes, that check is off, and the meta device has the streams and events of a
CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def one_of(ranks: int) -> Iterator[None]:
    """Makes this process rank 0 of that many, which holds no fewer rows than any other; of one, changes nothing.

    Raises RuntimeError where it is one of several for real.
    """
    if ranks == 1:
        yield
        return
    if dist.is_initialized():
        raise RuntimeError("several processes can be planned only before this one has joined others")
    import torch.distributed._tools.fake_collectives
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  # both register something
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    group: Any = _fsdp_param_group.FSDPParamGroup
    check = group._validate_no_meta_params
    dist.init_process_group("fake", rank=0, world_size=ranks, store=dist.HashStore())
    try:
        group._validate_no_meta_params = lambda self: None
        torch.meta = _device()  # type: ignore[attr-defined]  # where FSDP2 and meshes look for it
        yield
    finally:
        group._validate_no_meta_params = check
        del torch.meta  # type: ignore[attr-defined]
        dist.destroy_process_group()


def _device() -> SimpleNamespace:
    """What torch.cpu offers, for a device without a number."""
    names = ("Event", "Stream", "current_stream", "device_count", "is_available", "stream")
    return SimpleNamespace(**{name: getattr(torch.cpu, name) for name in names}, current_device=lambda: None)
