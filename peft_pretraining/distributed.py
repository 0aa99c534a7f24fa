"""This process among the others of the run: rank, device, process group."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peft_pretraining.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among the data-parallel ones, as torchrun describes it. Without torchrun it is the only one."""

    rank: int = 0  # 0-based number of this process
    size: int = 1  # number of processes
    local_rank: int = 0  # 0-based number of this process on its machine
    local_size: int = 1  # number of processes on this machine
    device: torch.device = torch.device("cpu")  # the device that this process trains on

    @classmethod
    def from_environment(cls) -> "World":
        """Reads torchrun's variables and picks this process's GPU, or the CPU if there is none.

        Raises UserError if the machine has fewer GPUs than processes.
        """
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        rank, size, local_rank, local_size = (int(os.environ.get(name, default)) for name, default in names.items())
        if not torch.cuda.is_available():
            return cls(rank, size, local_rank, local_size)
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise UserError(
                f"{local_size} processes on a machine with {gpus} GPU: start them with --nproc_per_node {gpus}."
            )
        return cls(rank, size, local_rank, local_size, torch.device("cuda", local_rank))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that logs and saves."""
        return self.rank == 0

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Joins the process group (nccl on GPUs, else gloo) if there are several processes; leaves it at the end."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        try:
            yield
        except UserError as error:
            error.on_one_rank = True
            raise
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place. Every rank gets the same bits."""
        if self.size > 1:
            on_device = tensor.to(self.device)
            dist.all_reduce(on_device)
            tensor.copy_(on_device)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The values that the ranks pass, in the order of the ranks. A value is plain JSON; nothing is unpickled."""
        if self.size == 1:
            return [json.loads(json.dumps(value))]
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [int(self.sum(torch.tensor(len(text) * (rank == self.rank)))) for rank in range(self.size)]
        texts = torch.zeros(self.size, max(sizes), dtype=torch.uint8)
        texts[self.rank, : len(text)] = text
        rows = self.sum(texts)
        return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes, strict=True)]


def use_threads(world: World, *, num_threads: int | None) -> int:
    """Sets the CPU threads of this process and returns their number.

    num_threads: the number to set; None for this process's share of the machine's cores.
    """
    threads = num_threads or max(1, len(os.sched_getaffinity(0)) // world.local_size)
    torch.set_num_threads(threads)
    return threads


def make_deterministic(seed: int) -> None:
    """Makes the losses of a seed the same to the last bit in every run on the same machine."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A read of uninitialized memory is a bug that tests should find; it is not worth a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
