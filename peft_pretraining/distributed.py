"""This process among the others of the run: rank, device, process group."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from peft_pretraining.errors import UserError

# How long a process waits for the others. Nothing that goes well takes as long: the slowest is a checkpoint of 100 GB
# on a disk of 100 MB/s. What fails does not wait for it, see failure.py; a process that is frozen does.
PATIENCE = timedelta(minutes=30)

# Signals that ask a run to stop. Its data workers leave them to the process that trains.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


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

        Raises UserError if they contradict each other, and if the machine has fewer GPUs than processes.
        """
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        with _known_to_one_rank():
            rank, size, local_rank, local_size = (_read_number(name, default) for name, default in names.items())
            _check_launch(rank, size)
            gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if gpus and local_rank >= gpus:
                raise UserError(
                    f"{local_size} processes on a machine with {gpus} GPU: start them with --nproc_per_node {gpus}."
                )
        if not gpus:
            return cls(rank, size, local_rank, local_size)
        return cls(rank, size, local_rank, local_size, torch.device("cuda", local_rank))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that logs and saves."""
        return self.rank == 0

    def rows_over(self, parallel: str) -> int:
        """The number of processes that share the rows of a parameter, by --parallel. 1: each has all of them."""
        return {"ddp": 1, "fsdp": self.size, "hsdp": self.local_size}[parallel]

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Joins the process group (nccl on GPUs, else gloo) if there are several processes; leaves it at the end."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            store, size = self._meeting_place(), self.size
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=size, timeout=PATIENCE)
        try:
            with _known_to_one_rank():
                yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def _meeting_place(self) -> dist.Store:
        """The store through which the processes find each other.

        torchrun keeps one store over its restarts, with the addresses of processes that are dead: a process that reads
        them before they are replaced cannot connect (https://github.com/pytorch/pytorch/issues/135712). So each start
        on one machine has names of its own. Several machines do not count alike: see scripts/multi_gpu/.
        """
        store, _, _ = next(rendezvous("env://", self.rank, self.size, timeout=PATIENCE))
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if self.local_size == self.size else "0"
        return dist.PrefixStore(f"start {start}", store)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place. Every rank gets the same bits."""
        if self.size > 1:
            on_device = tensor.to(self.device)
            dist.all_reduce(on_device)
            tensor.copy_(on_device)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum(torch.tensor(float(flag))))

    def agree(self, numbers: Tensor) -> Tensor:
        """Whether all ranks pass the same number, element by element. int64 -> bool, on the CPU."""
        extremes = torch.stack([numbers, ~numbers]).to(self.device)  # the largest ~x is that of the smallest x
        if self.size > 1:
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        return (extremes[0] == ~extremes[1]).cpu()

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


@contextmanager
def _known_to_one_rank() -> Iterator[None]:
    """Marks a UserError as one that perhaps only this rank finds, and that it has to print itself."""
    try:
        yield
    except UserError as error:
        if error.on_one_rank is None:
            error.on_one_rank = True
        raise


_START = "Start several processes with torchrun, which sets all of these variables; for one process, unset them."


def _read_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment has {name}={text!r}, which is no number. {_START}")
    return int(text)


def _check_launch(rank: int, size: int) -> None:
    if size < 1 or rank >= size:
        raise UserError(f"the environment has RANK={rank} and WORLD_SIZE={size}. {_START}")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if size > 1 and not os.environ.get(name)]
    if missing:
        raise UserError(f"the environment has WORLD_SIZE={size}, but no {' and no '.join(missing)}. {_START}")
    tasks = os.environ.get("SLURM_NTASKS", "1") if "SLURM_STEP_ID" in os.environ else "1"
    if tasks != "1" and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"srun has started {tasks} tasks, and each would train alone. Start one torchrun on each node: "
            "srun --ntasks-per-node=1 torchrun --nnodes $SLURM_NNODES --nproc_per_node GPUS --rdzv_backend c10d "
            "--rdzv_endpoint HOST:29500 torchrun_main.py ...; or one task: srun --ntasks=1."
        )


def use_threads(world: World, *, num_threads: int | None) -> int:
    """Sets the CPU threads of this process and returns their number.

    num_threads: the number to set; None for OMP_NUM_THREADS, and without it for this process's share of the cores.
        torchrun sets OMP_NUM_THREADS to 1 for several processes; there, a 1 counts as not set.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    chosen = int(wanted) if wanted.isdecimal() and not (wanted == "1" and world.local_size > 1) else 0
    threads = num_threads or chosen or max(1, len(os.sched_getaffinity(0)) // world.local_size)
    torch.set_num_threads(threads)
    return threads


def make_deterministic(seed: int) -> None:
    """Makes the losses of a seed the same to the last bit in every run on the same machine."""
    torch.manual_seed(seed)
    # Not `warn_only`: attention kernels would then take it for a wish, and a GPU's losses differ from run to run.
    torch.use_deterministic_algorithms(True)
    # A read of uninitialized memory is a bug that tests should find; it is not worth a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
