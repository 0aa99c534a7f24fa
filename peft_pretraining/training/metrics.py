"""Where a run's figures go: metrics.jsonl always, wandb where wanted, a progress bar on a terminal, else log lines.

metrics.jsonl holds one JSON object a line: `start`, one `update` each, `eval`, `subspaces`, `end`; where asked
for, `subspace_details`; rarely `resume`, `bad_update`, `bad_documents`, `rollback`. A run in an older folder appends;
the last line of an update counts.
"""

import argparse
import io
import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
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


def memory_bytes(device: torch.device) -> int:
    """The most memory this process has held so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _finite(value: Any) -> Any:
    """JSON has no NaN: a figure that is not finite becomes null, inside dicts and lists, too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


class Metrics:
    """The record of one run. Only the main process writes; elsewhere every method does nothing.

    save_dir: the folder of metrics.jsonl.  total: updates of the run.  wandb_mode: online | offline | disabled.
    """

    def __init__(
        self,
        save_dir: Path,
        *,
        enabled: bool,
        total: int,
        wandb_mode: str = "disabled",
        project: str = "qgalore",
        name: str = "",
        tags: str | None = None,
        wandb_id: str | None = None,
    ) -> None:
        self.enabled = enabled
        self.wandb_id = wandb_id
        self._last_line = -math.inf
        if not enabled:
            return
        self._file, self._pending = open_record(save_dir / "metrics.jsonl"), b""
        self._wandb = open_wandb(
            wandb_mode, save_dir=save_dir, project=project, name=name, tags=tags, wandb_id=wandb_id
        )
        self.wandb_id = self._wandb.id if self._wandb else wandb_id
        self._bar = tqdm(total=total, unit="update", dynamic_ncols=True, disable=None)

    def start(self, **fields: Any) -> None:
        """What the run is: args, versions, commit, device, parameter counts, groups."""
        self._write("start", fields)
        if self.enabled and self._wandb:
            self._wandb.config.update(_finite(fields))

    def update(self, **fields: Any) -> None:
        """One update: update, loss, lr, grad_norm, tokens_seen, tokens_per_second, memory_bytes."""
        self._write("update", fields)
        if not self.enabled:
            return
        rate = f"{fields['tokens_per_second']:,.0f}"
        self._bar.update(1)
        self._bar.set_postfix_str(f"loss {fields['loss']:.3f}, lr {fields['lr']:.2e}, {rate} tokens/s", refresh=False)
        last = fields["update"] == self._bar.total
        if self._bar.disable and (last or time.monotonic() - self._last_line > LOG_PERIOD):
            self._last_line = time.monotonic()
            logger.info(
                f"update {fields['update']}/{self._bar.total}  loss {fields['loss']:.4f}  lr {fields['lr']:.2e}  "
                f"{rate} tokens/s"
            )

    def resume(self, **fields: Any) -> None:
        """The run goes on: update (the last one that counts: lines of later ones are of work lost), checkpoint."""
        self._write("resume", fields)
        if self.enabled:
            self._bar.n = self._bar.last_print_n = fields["update"]

    def note(self, event: str, **fields: Any) -> None:
        """Something rare: `bad_update`, `bad_documents`, `rollback`."""
        self._write(event, fields)

    def evaluation(self, **fields: Any) -> None:
        """One evaluation: update, loss, perplexity, tokens."""
        self._write("eval", fields)
        if self.enabled:
            logger.info(
                f"update {fields['update']}: validation perplexity {fields['perplexity']:.2f} "
                f"(loss {fields['loss']:.4f} on {fields['tokens']:,} tokens)"
            )

    def subspaces(self, **fields: Any) -> None:
        """What became of each projected matrix's bases so far: update, matrices (see report.describe_refreshes)."""
        self._write("subspaces", fields)

    def details(self, **fields: Any) -> None:
        """What was measured of one matrix' subspace: update, name, and MeasuredProjector.figures."""
        self._write("subspace_details", fields)

    def end(self, **fields: Any) -> None:
        """The last line: updates, tokens_seen, perplexity, seconds."""
        self._write("end", fields)

    def close(self) -> None:
        """Flushes and closes all of it. May be called twice."""
        if self.enabled:
            self.enabled = False
            self._bar.close()
            self._file.close()
            if self._wandb:
                self._wandb.finish()

    def _write(self, event: str, fields: dict[str, Any]) -> None:
        if not self.enabled:
            return
        self._pending += json.dumps(_finite({"event": event, **fields}), allow_nan=False).encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:  # what is left comes with the next line
            logger.error(f"{self._file.name} could not be written ({error.strerror}): training goes on")
        if self._wandb and event in ("update", "eval"):
            prefix = "" if event == "update" else "eval/"
            self._wandb.log({prefix + key: value for key, value in fields.items() if key != "update"}, fields["update"])


def open_record(path: Path) -> io.FileIO:
    """metrics.jsonl, to append to. The half of a line that a killed run may have left is cut off."""
    if path.exists():
        with open(path, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    return open(path, "ab", buffering=0)  # so that it is known what has been written when a disk is full


def open_metrics(args: argparse.Namespace, *, save_dir: Path, enabled: bool, wandb_id: str | None = None) -> Metrics:
    """The record that the arguments ask for. wandb_id: of the wandb run that goes on."""
    return Metrics(
        save_dir,
        enabled=enabled,
        total=args.num_training_steps,
        wandb_mode=args.wandb_mode,
        project=args.project,
        name=args.name,
        tags=args.tags,
        wandb_id=wandb_id,
    )


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
