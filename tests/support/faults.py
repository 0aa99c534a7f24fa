"""The main script with something that goes wrong on one rank: `python tests/support/faults.py FAULT RANK UPDATE ...`.

FAULT names an entry of FAULTS, RANK the rank, UPDATE the update in which it happens; the script's own flags follow. A
fault happens in a job's first start only, not after torchrun has started the processes again.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

sys.path[0] = str(Path(__file__).parents[2])  # this folder has a tokenizers.py of its own

import torchrun_main  # noqa: E402
from peft_pretraining import distributed  # noqa: E402
from peft_pretraining.checkpoint import atomic_write, shared_file  # noqa: E402
from peft_pretraining.errors import UserError  # noqa: E402
from peft_pretraining.model import loss  # noqa: E402
from peft_pretraining.training import loop, plan, report  # noqa: E402

STEP, LOSS, FILL, WRITE = loop.train_step, loss.token_loss_sum, shared_file.SharedFile.fill, atomic_write._write_file


class Fault:
    """The update that a run is in, and whether it is the one with the fault."""

    update = 1
    wanted = 0
    over = False  # after a rollback, an update comes again

    def due(self) -> bool:
        return self.update == self.wanted and not self.over


now = Fault()


def die(*_: Any, **__: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def fail(*_: Any, **__: Any) -> NoReturn:
    raise KeyError("the fault of this test")


def bad_file(*_: Any, **__: Any) -> NoReturn:
    raise UserError("the fault of this test")


def no_space(*_: Any, **__: Any) -> NoReturn:
    raise OSError(28, "No space left on device")


def stop(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def freeze(*_: Any, **__: Any) -> None:
    """For longer than the other ranks wait, which is short here."""
    time.sleep(3600)


def in_loss(happens: Callable[[], Any], *, training: bool = True) -> None:
    """In a forward pass of the update, or of the evaluation after it."""
    import torch

    from peft_pretraining.training import evaluate

    def spoilt(model: Any, *batch: Any) -> Any:
        if now.due() and torch.is_grad_enabled() == training:
            happens()
        return LOSS(model, *batch)

    loss.token_loss_sum = evaluate.token_loss_sum = spoilt


def scaled_loss(factor: float) -> Callable[[], None]:
    def install() -> None:
        loss.token_loss_sum = lambda model, *batch: LOSS(model, *batch) * (factor if now.due() else 1.0)

    return install


def in_data(happens: Callable[[], Any]) -> None:
    def step(run: Any) -> None:
        if now.due():
            run.batches = (happens() for _ in range(1))
        STEP(run)

    loop.train_step = step


def in_save(happens: Callable[[], Any]) -> None:
    """While the tensors are written, after half of a file."""

    def fill(self: Any, path: Path) -> None:
        if now.due():
            path.open("r+b").write(b"half")
            happens()
        FILL(self, path)

    def write(path: Path, content: Any) -> Any:
        if now.due() and path.name == "optimizer.safetensors":
            path.write_bytes(b"half")
            happens()
        return WRITE(path, content)

    shared_file.SharedFile.fill, atomic_write._write_file = fill, write


def at_start(happens: Callable[[], Any]) -> None:
    plan.prepare_model = happens


FAULTS: dict[str, Callable[[], Any]] = {
    "error": lambda: in_loss(fail),
    "kill": lambda: in_loss(die),
    "term": lambda: in_loss(stop),
    "freeze": lambda: in_loss(freeze),
    "nan": scaled_loss(math.nan),
    "spike": scaled_loss(50.0),
    "data error": lambda: in_data(fail),
    "data user error": lambda: in_data(bad_file),
    "start error": lambda: at_start(fail),
    "start user error": lambda: at_start(bad_file),
    "save kill": lambda: in_save(die),
    "save full": lambda: in_save(no_space),
    "save error": lambda: in_save(fail),
    "evaluation error": lambda: in_loss(fail, training=False),
    "evaluation term": lambda: in_loss(stop, training=False),
    "report error": lambda: setattr(report, "evaluate", fail),
}


def main(fault: str, rank: str, update: str, *flags: str) -> int:
    step = loop.train_step
    if fault == "freeze":
        distributed.PATIENCE = timedelta(seconds=5)
    if os.environ["RANK"] == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        now.wanted = int(update)
        FAULTS[fault]()
        step = loop.train_step

    def counted(run: Any) -> None:
        now.update = run.state.update + 1
        step(run)
        now.over = run.state.health.rollbacks > 0

    loop.train_step = counted
    return torchrun_main.command_line(list(flags))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
