"""Functions and runs of the main script on two ranks, for tests.

Starting a process that imports torch takes seconds, so the two processes stay for the whole session.
"""

import atexit
import contextlib
import io
import os
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD_SIZE = 2
PATIENCE = 300  # seconds


def run_distributed(function: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls function(*args) on both ranks of a gloo group; returns what each rank returned, in their order.

    function: at the top level of a module, so that another process finds it. It returns tensors and plain containers.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = _call(_in_a_group, f"file://{folder}/store", function, args)
    return [torch.load(io.BytesIO(result), weights_only=True) for result in results]


def run_on_two_ranks(flags: list[str]) -> subprocess.CompletedProcess[str]:
    """The main script on two ranks, as torchrun starts it. Returns the status of rank 0 and the errors of both."""
    port = _free_port()
    (status, first), (other, second) = _call(_script, flags, port)
    return subprocess.CompletedProcess(flags, status or other, "", first + second)


@contextlib.contextmanager
def watched(events: list[int]) -> Iterator[None]:
    """Notes the elements of each all-reduce."""
    original = dist.all_reduce

    def noting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        events.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = noting
    try:
        yield
    finally:
        dist.all_reduce = original


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _in_a_group(rank: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE)
    try:
        result = io.BytesIO()
        torch.save(function(*args), result)
        return result.getvalue()
    finally:
        dist.destroy_process_group()


def _script(rank: int, flags: list[str], port: int) -> tuple[int, str]:
    import torchrun_main

    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD_SIZE, "LOCAL_WORLD_SIZE": WORLD_SIZE}
    ours |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in ours.items()}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            status = torchrun_main.command_line(flags)
    finally:
        for name in ours:
            del os.environ[name]
    return status, errors.getvalue()


class _Ranks:
    """Two processes that wait for work."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        pairs = [context.Pipe() for _ in range(WORLD_SIZE)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [context.Process(target=_serve, args=(rank, theirs)) for rank, (_, theirs) in enumerate(pairs)]
        for process in self.processes:
            process.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


_ranks: _Ranks | None = None


def _call(function: Callable[..., Any], *args: Any) -> list[Any]:
    """What function(rank, *args) returns on each rank. An exception on one ends both."""
    global _ranks
    _ranks = _ranks or _Ranks()
    for pipe in _ranks.pipes:
        pipe.send((function, args))
    answers: dict[Any, Any] = {}
    while len(answers) < WORLD_SIZE:
        ready = wait([pipe for pipe in _ranks.pipes if pipe not in answers], timeout=PATIENCE)
        for pipe in ready:
            done, answers[pipe] = pipe.recv()
        if not ready or not done:
            _ranks.stop()
            _ranks = None
            raise RuntimeError(f"a rank has failed:\n{answers[pipe]}" if ready else f"no answer in {PATIENCE} s")
    return [answers[pipe] for pipe in _ranks.pipes]


def _serve(rank: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        function, args = pipe.recv()
        torch.manual_seed(0)
        try:
            pipe.send((True, function(rank, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
