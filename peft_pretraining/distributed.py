"""Where this process stands among the others: rank, device, process group."""

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
    """This process among the data-parallel ones, as torchrun describes it; alone without torchrun.

    rank: 0-based number of this process.
    size: number of processes.
    local_rank: 0-based number of this process on its machine.
    local_size: number of processes on this machine.
    device: where this process trains.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def from_environment(cls) -> "World":
        """Reads torchrun's variables and picks this process's GPU, or the CPU where there is none.

        Raises UserError where the machine has fewer GPUs than processes.
        """

        def read(name: str, default: int) -> int:
            return int(os.environ.get(name, default))

        local_rank, local_size = read("LOCAL_RANK", 0), read("LOCAL_WORLD_SIZE", 1)
        device = torch.device("cpu")
        if torch.cuda.is_available():
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"{local_size} processes on a machine with {torch.cuda.device_count()} GPU: start it with "
                    f"--nproc_per_node {torch.cuda.device_count()}."
                )
            device = torch.device("cuda", local_rank)
        return cls(read("RANK", 0), read("WORLD_SIZE", 1), local_rank, local_size, device)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that logs and saves."""
        return self.rank == 0

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Joins the process group (nccl on GPUs, else gloo; none where this process is alone); leaves it at the end."""
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
        """The sum of a tensor over the ranks, in place; each gets the same bits."""
        if self.size > 1:
            on_device = tensor.to(self.device)
            dist.all_reduce(on_device)
            tensor.copy_(on_device)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """What every rank passed, in their order; plain JSON. It travels as text: nothing is unpickled."""
        if self.size == 1:
            return [json.loads(json.dumps(value))]
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [int(self.sum(torch.tensor(len(text) * (rank == self.rank)))) for rank in range(self.size)]
        texts = torch.zeros(self.size, max(sizes), dtype=torch.uint8)
        texts[self.rank, : len(text)] = text
        rows = self.sum(texts)
        return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes, strict=True)]


def use_threads(world: World, *, num_threads: int | None) -> int:
    """Sets the CPU threads of this process (None: its share of the machine's cores) and returns their number."""
    threads = num_threads or max(1, len(os.sched_getaffinity(0)) // world.local_size)
    torch.set_num_threads(threads)
    return threads


def make_deterministic(seed: int) -> None:
    """Same seed, same machine: the same losses to the last bit."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # What is read before it is written is a bug for a test to find, not worth a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
