"""A run's record: events with names and fields, handed to sinks that write, draw, print or upload them.

    start             what the run is: args, versions, commit, device, parameter counts, groups
    update            update, loss, lr, grad_norm, tokens_seen, tokens_per_second, memory_bytes
    eval              update, loss, perplexity, tokens
    scores            in place of eval, for classifiers: update, epoch, splits: for each its loss and metrics
    subspaces         update, matrices: for each projected matrix, the history of its bases so far
    subspace_details  update, name, and the figures that were measured of one matrix's subspace
    memory            update, when (third update or first refresh), planned (bytes by kind), planned_peak,
                      measured_peak (null on a CPU)
    resume            update (the last one that counts: lines of later updates are of lost work), checkpoint
    bad_update        update, loss, parameters
    bad_documents     update, skipped, total
    too_long          update; dialogues so far that were longer than a sequence: shortened, left_out
    rollback          update, loss, to
    end               updates, tokens_seen, perplexity, seconds, kept_bytes, refreshes

metrics.jsonl holds one JSON object a line, one for each event. A run in an older folder appends; the last line of an
update counts. To send figures elsewhere, write another Sink and add it in open_record.
"""

import argparse
import io
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from loguru import logger
from tqdm import tqdm

from peft_pretraining.training.report_sink import report_sinks

LOG_PERIOD = 10.0  # seconds between log lines of updates, if there is no terminal for a progress bar


def set_up_log(*, is_main: bool) -> None:
    """Sends log lines to stderr, above the progress bar. Ranks other than the main one log only warnings."""
    logger.remove()
    logger.add(
        lambda message: tqdm.write(message, file=sys.stderr, end=""),
        format="<green>{time:HH:mm:ss}</green> | <level>{level: <7}</level> | {message}",
        level="INFO" if is_main else "WARNING",
        colorize=shows_colors(sys.stderr),
    )


def shows_colors(stream: TextIO) -> bool:
    """Whether text for this stream may have colors: on a terminal, unless NO_COLOR is set (https://no-color.org).

    FORCE_COLOR wins over the lack of a terminal, not over NO_COLOR.
    """
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and os.environ.get("TERM") != "dumb")


class Sink(Protocol):
    """Takes the events of a run. A sink passes over names that it does not know, and leaves `fields` as it is."""

    def event(self, name: str, fields: dict[str, Any]) -> None:
        """Takes one event."""

    def close(self) -> None:
        """Writes what is left. No event comes after it."""


class Record:
    """The record of one run. Only the main process has sinks; on other ranks every event is dropped."""

    def __init__(self, *sinks: Sink, wandb_id: str | None = None) -> None:
        self.sinks = sinks
        self.wandb_id = wandb_id  # of the wandb run; a checkpoint remembers it, so that a resumed run continues it

    def event(self, name: str, /, **fields: Any) -> None:
        """Hands an event to each sink, in their order. A field may also be called "name"."""
        for sink in self.sinks:
            sink.event(name, fields)

    def close(self) -> None:
        """Closes all sinks, the last one first. It may be called twice."""
        sinks, self.sinks = self.sinks, ()
        for sink in reversed(sinks):
            sink.close()


class JsonlSink(Sink):
    """metrics.jsonl: one line for each event, on the disk when `event` returns unless the disk is full."""

    def __init__(self, path: Path) -> None:
        if path.exists():  # a killed run may have left half a line
            with open(path, "rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        # Unbuffered, so that it is known what has been written when a disk is full.
        self._file: io.FileIO = open(path, "ab", buffering=0)
        self._pending = b""

    def event(self, name: str, fields: dict[str, Any]) -> None:
        """Appends a line. What does not fit on a full disk is written with the next line."""
        self._pending += json.dumps(finite({"event": name, **fields}), allow_nan=False).encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            logger.error(f"{self._file.name} could not be written ({error.strerror}): training goes on")

    def close(self) -> None:
        self._file.close()


class WandbSink(Sink):
    """A wandb run: the start event is its configuration, updates and evaluations are its curves.

    The horizontal axis is the update, not wandb's own step, which only grows: after a rollback or a resume, it would
    throw away the updates that are done again, and keep the undone ones.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        run.define_metric("update")
        run.define_metric("*", step_metric="update")

    def event(self, name: str, fields: dict[str, Any]) -> None:
        if name == "start":
            self._run.config.update(finite(fields))
        elif name in ("update", "eval"):
            prefix = "" if name == "update" else "eval/"
            values = {prefix + key: value for key, value in fields.items() if key != "update"}
            self._run.log({**values, "update": fields["update"]})

    def close(self) -> None:
        self._run.finish()


class TensorBoardSink(Sink):
    """Curves of updates and evaluations, for `tensorboard --logdir FOLDER`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def event(self, name: str, fields: dict[str, Any]) -> None:
        for key, value in fields.items() if name in ("update", "eval") else ():
            self._writer.add_scalar(f"{name}/{key}", value, fields["update"])

    def close(self) -> None:
        self._writer.close()


class BarSink(Sink):
    """A progress bar over the `total` updates of the run, if there is a terminal to draw it on."""

    def __init__(self, *, total: int) -> None:
        self._bar = tqdm(total=total, unit="update", dynamic_ncols=True, disable=None)
        self.visible = not self._bar.disable

    def event(self, name: str, fields: dict[str, Any]) -> None:
        if name == "resume":
            self._bar.n = self._bar.last_print_n = fields["update"]
        elif name == "update":
            rate = f"{fields['tokens_per_second']:,.0f}"
            self._bar.update(1)
            shown = f"loss {fields['loss']:.3f}, lr {fields['lr']:.2e}, {rate} tokens/s"
            self._bar.set_postfix_str(shown, refresh=False)

    def close(self) -> None:
        self._bar.close()


class LogSink(Sink):
    """Log lines of evaluations and, where no bar is drawn, of an update now and then.

    total: number of updates of the run.
    updates: whether to print lines of updates.
    """

    def __init__(self, *, total: int, updates: bool) -> None:
        self.total, self.updates = total, updates
        self._last_line = -math.inf

    def event(self, name: str, fields: dict[str, Any]) -> None:
        if name == "eval":
            logger.info(
                f"update {fields['update']}: validation perplexity {fields['perplexity']:.2f} "
                f"(loss {fields['loss']:.4f} on {fields['tokens']:,} tokens)"
            )
        elif name == "update" and self.updates:
            now = time.monotonic()
            if fields["update"] == self.total or now - self._last_line > LOG_PERIOD:
                self._last_line = now
                logger.info(
                    f"update {fields['update']}/{self.total}  loss {fields['loss']:.4f}  lr {fields['lr']:.2e}  "
                    f"{fields['tokens_per_second']:,.0f} tokens/s"
                )

    def close(self) -> None:
        """See Sink."""


def open_record(
    args: argparse.Namespace, *, save_dir: Path, wandb_id: str | None = None, last: Sequence[Sink] = ()
) -> Record:
    """The record that the arguments ask for, on the main process.

    save_dir: the folder of metrics.jsonl.
    wandb_id: the id of the wandb run to continue, if there is one.
    last: further sinks, which come after those of the arguments.
    """
    lines = JsonlSink(save_dir / "metrics.jsonl")
    wandb = _open_wandb(args, save_dir=save_dir, wandb_id=wandb_id)
    bar = BarSink(total=args.num_training_steps)
    log = LogSink(total=args.num_training_steps, updates=not bar.visible)
    boards = [TensorBoardSink(save_dir / "tensorboard")] if args.tensorboard else []
    pages = report_sinks(save_dir=save_dir, wanted=not args.no_report)
    if wandb is None:
        return Record(lines, *boards, *pages, bar, log, *last, wandb_id=wandb_id)
    return Record(lines, *boards, *pages, WandbSink(wandb), bar, log, *last, wandb_id=wandb.id)


def finite(value: Any) -> Any:
    """The value with None for every float that is not finite, also inside dicts and lists: JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _open_wandb(args: argparse.Namespace, *, save_dir: Path, wandb_id: str | None) -> Any:
    """The wandb run, or None. Training goes on whatever is wrong with wandb or the account.

    --wandb_mode online falls back to offline if there is no account; with `disabled`, wandb is not even imported.
    """
    if args.wandb_mode == "disabled":
        return None
    try:
        import wandb

        mode = args.wandb_mode
        if mode == "online" and not wandb.api.api_key:
            logger.warning(f"no wandb account found: recording under {save_dir}/wandb. Upload it later: wandb sync DIR")
            mode = "offline"
        return wandb.init(
            project=args.project,
            name=args.name,
            tags=args.tags.split(",") if args.tags else None,
            mode=mode,
            dir=save_dir,
            id=wandb_id,
            resume="allow" if wandb_id else None,
            settings=wandb.Settings(init_timeout=60, silent=True),
        )
    except Exception as error:  # wandb raises its own errors, requests' and OSError: none of them may stop a run
        logger.warning(f"wandb is not used: {error}")
        return None
