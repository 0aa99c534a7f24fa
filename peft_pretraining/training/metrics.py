"""A run's record: events with names and fields, handed to sinks that write, draw, print or upload them.

    start             what the run is: args, versions, commit, device, parameter counts, groups
    update            update, loss, lr, grad_norm, tokens_seen, tokens_per_second, memory_bytes
    eval              update, loss, perplexity, tokens
    subspaces         update, matrices: what became of each projected matrix's bases so far
    subspace_details  update, name, and what was measured of one matrix' subspace
    resume            update (the last one that counts: lines of later ones are of work lost), checkpoint
    bad_update        update, loss, parameters
    bad_documents     update, skipped, total
    rollback          update, loss, to
    end               updates, tokens_seen, perplexity, seconds, kept_bytes, refreshes

metrics.jsonl holds one JSON object a line, an event each. A run in an older folder appends; the last line of an update
counts. Another place for figures is another class with `event` and `close`, and a line in open_record.
"""

import argparse
import io
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from loguru import logger
from tqdm import tqdm

LOG_PERIOD = 10.0  # seconds between log lines of updates, where there is no terminal to draw a bar on


def set_up_log(*, is_main: bool) -> None:
    """Log lines on stderr, above the progress bar; from other ranks only warnings."""
    logger.remove()
    logger.add(
        lambda message: tqdm.write(message, file=sys.stderr, end=""),
        format="<green>{time:HH:mm:ss}</green> | <level>{level: <7}</level> | {message}",
        level="INFO" if is_main else "WARNING",
        colorize=sys.stderr.isatty(),
    )


class Sink(Protocol):
    """A place where events go."""

    def event(self, name: str, fields: dict[str, Any]) -> None:
        """Takes one event, and passes over a name that it does not know. `fields` stays as it is."""

    def close(self) -> None:
        """Writes what is left; no event comes after it."""


class Record:
    """The record of one run. Only the main process has sinks; elsewhere every event is dropped.

    wandb_id: the wandb run, which a checkpoint remembers so that a resumed run goes on in it; None without wandb.
    """

    def __init__(self, *sinks: Sink, wandb_id: str | None = None) -> None:
        self.sinks = sinks
        self.wandb_id = wandb_id

    def event(self, name: str, /, **fields: Any) -> None:
        """Hands an event to each sink, in their order. A field may be called "name", too."""
        for sink in self.sinks:
            sink.event(name, fields)

    def close(self) -> None:
        """Closes all sinks, the last one first. May be called twice."""
        sinks, self.sinks = self.sinks, ()
        for sink in reversed(sinks):
            sink.close()


class JsonlSink:
    """metrics.jsonl: every event, a line each, on the disk when `event` returns unless the disk is full."""

    def __init__(self, path: Path) -> None:
        if path.exists():
            _cut_half_a_line(path)
        # Unbuffered, so that it is known what has been written when a disk is full.
        self._file: io.FileIO = open(path, "ab", buffering=0)
        self._pending = b""

    def event(self, name: str, fields: dict[str, Any]) -> None:
        """Appends a line. What a full disk does not take comes with the next line."""
        self._pending += json.dumps(finite({"event": name, **fields}), allow_nan=False).encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            logger.error(f"{self._file.name} could not be written ({error.strerror}): training goes on")

    def close(self) -> None:
        """See Sink."""
        self._file.close()


class WandbSink:
    """A wandb run: what the run is as its configuration, updates and evaluations as its curves."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def event(self, name: str, fields: dict[str, Any]) -> None:
        """See Sink."""
        if name == "start":
            self._run.config.update(finite(fields))
        elif name in ("update", "eval"):
            prefix = "" if name == "update" else "eval/"
            self._run.log({prefix + key: value for key, value in fields.items() if key != "update"}, fields["update"])

    def close(self) -> None:
        """See Sink."""
        self._run.finish()


class TensorBoardSink:
    """Curves of updates and evaluations, for `tensorboard --logdir FOLDER`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))
        self.close = self._writer.close

    def event(self, name: str, fields: dict[str, Any]) -> None:
        """See Sink."""
        for key, value in fields.items() if name in ("update", "eval") else ():
            self._writer.add_scalar(f"{name}/{key}", value, fields["update"])


class BarSink:
    """A progress bar on a terminal, nothing elsewhere.

    total: updates of the run.
    """

    def __init__(self, *, total: int) -> None:
        self._bar = tqdm(total=total, unit="update", dynamic_ncols=True, disable=None)

    @property
    def visible(self) -> bool:
        """Whether there is a terminal to draw on."""
        return not self._bar.disable

    def event(self, name: str, fields: dict[str, Any]) -> None:
        """See Sink."""
        if name == "resume":
            self._bar.n = self._bar.last_print_n = fields["update"]
        elif name == "update":
            rate = f"{fields['tokens_per_second']:,.0f}"
            self._bar.update(1)
            shown = f"loss {fields['loss']:.3f}, lr {fields['lr']:.2e}, {rate} tokens/s"
            self._bar.set_postfix_str(shown, refresh=False)

    def close(self) -> None:
        """See Sink."""
        self._bar.close()


class LogSink:
    """Log lines of evaluations and, where no bar is drawn, of an update now and then.

    total: updates of the run.
    updates: whether to print lines of updates.
    """

    def __init__(self, *, total: int, updates: bool) -> None:
        self.total, self.updates = total, updates
        self._last_line = -math.inf

    def event(self, name: str, fields: dict[str, Any]) -> None:
        """See Sink."""
        if name == "eval":
            logger.info(
                f"update {fields['update']}: validation perplexity {fields['perplexity']:.2f} "
                f"(loss {fields['loss']:.4f} on {fields['tokens']:,} tokens)"
            )
        elif name == "update" and self.updates and self._is_due(fields["update"]):
            self._last_line = time.monotonic()
            logger.info(
                f"update {fields['update']}/{self.total}  loss {fields['loss']:.4f}  lr {fields['lr']:.2e}  "
                f"{fields['tokens_per_second']:,.0f} tokens/s"
            )

    def _is_due(self, update: int) -> bool:
        return update == self.total or time.monotonic() - self._last_line > LOG_PERIOD

    def close(self) -> None:
        """See Sink."""


def open_record(args: argparse.Namespace, *, save_dir: Path, wandb_id: str | None = None) -> Record:
    """The record that the arguments ask for, on the main process.

    save_dir: the folder of metrics.jsonl.
    wandb_id: the wandb run that goes on, if there is one.
    """
    lines = JsonlSink(save_dir / "metrics.jsonl")
    wandb = open_wandb(
        args.wandb_mode, save_dir=save_dir, project=args.project, name=args.name, tags=args.tags, wandb_id=wandb_id
    )
    bar = BarSink(total=args.num_training_steps)
    log = LogSink(total=args.num_training_steps, updates=not bar.visible)
    boards = [TensorBoardSink(save_dir / "tensorboard")] if args.tensorboard else []
    if wandb is None:
        return Record(lines, *boards, bar, log, wandb_id=wandb_id)
    return Record(lines, *boards, WandbSink(wandb), bar, log, wandb_id=wandb.id)


def finite(value: Any) -> Any:
    """JSON has no NaN: a figure that is not finite becomes None, inside dicts and lists, too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _cut_half_a_line(path: Path) -> None:
    """Cuts off the half of a line that a killed run may have left."""
    with open(path, "rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def open_wandb(
    mode: str, *, save_dir: Path, project: str, name: str, tags: str | None, wandb_id: str | None = None
) -> Any:
    """The wandb run, or None. Whatever is wrong with wandb or the account, training goes on.

    mode: online (offline where there is no account) | offline | disabled (wandb is not even imported).
    """
    if mode == "disabled":
        return None
    try:
        import wandb

        if mode == "online" and not wandb.api.api_key:
            logger.warning(f"no wandb account found: recording under {save_dir}/wandb. Upload it later: wandb sync DIR")
            mode = "offline"
        return wandb.init(
            project=project,
            name=name,
            tags=tags.split(",") if tags else None,
            mode=mode,  # type: ignore[arg-type]
            dir=save_dir,
            id=wandb_id,
            resume="allow" if wandb_id else None,
            settings=wandb.Settings(init_timeout=60, silent=True),
        )
    except Exception as error:  # wandb raises its own, requests', and OS errors: none may stop a run
        logger.warning(f"wandb is not used: {error}")
        return None
