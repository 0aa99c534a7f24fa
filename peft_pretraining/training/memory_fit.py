"""What fits into how much memory, found by planning one command line after the other.

--fit MEMORY chooses the micro-batch and the fewest savings for a run, and a dry run says what would make it fit smaller
cards. Both try, in a stated order, what changes no result (SAVINGS), and then what does (CHANGES): the latter is only
proposed, or taken where --allow_changed names it.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from loguru import logger

from peft_pretraining.checkpoint.files import Checkpoint, complete_checkpoints, find_checkpoint
from peft_pretraining.checkpoint.weights import is_transformers_folder
from peft_pretraining.cli.args import with_flags
from peft_pretraining.distributed import World
from peft_pretraining.errors import UserError
from peft_pretraining.host_memory import free_host_memory
from peft_pretraining.model.build import meta_model
from peft_pretraining.model.config import read_config
from peft_pretraining.model.dtypes import resolve_dtype
from peft_pretraining.training.memory_plan import plan_memory
from peft_pretraining.training.plan import check_sharding
from qgalore.factory import OPTIMIZERS

GB = 10**9  # bytes
CARDS = (8, 12, 16, 24, 40, 80)  # memory of usual GPUs, in GB of 1e9 bytes; they have a little more
CONTEXT = 500 * 10**6  # bytes of a GPU's context and its libraries; on a CPU, of Python and torch
RESERVE = 0.05  # of the planned peak: what the plan may be off by, and what an allocator loses to holes
ENOUGH_TOKENS = 2048  # a micro-batch of fewer tokens leaves a GPU idle: savings are better

Flags = dict[str, Any]
T = TypeVar("T")

# What saves memory and changes no result, what costs least first.
SAVINGS: tuple[Flags, ...] = (
    {"activation_checkpointing": True},
    {"accumulate_on": "host"},
    {"offload_activations": True},
)


def changes(args: argparse.Namespace) -> Iterator[Flags]:
    """What saves memory and changes results, what costs least first (docs/memory.md)."""
    if f"{args.optimizer}_per_layer" in OPTIMIZERS:
        yield {"optimizer": f"{args.optimizer}_per_layer"}
        yield {"accumulate_on": "host"}
    yield {"proj_type": "auto"}
    yield {"proj_quant": True}
    yield {"weight_quant": True, "stochastic_round": True}
    if not read_config(args.model_config).tie_word_embeddings:
        yield {"embedding_weight_bits": 8}
    if args.int8_matmul is None:
        yield {"weight_bits": 4}
    yield {"moments_bits": 4}
    if args.rank > 1:
        yield {"rank": args.rank // 2}


def needed(peak: int) -> int:
    """The bytes of a card that a planned peak needs, with a margin: CONTEXT, and RESERVE of the peak."""
    return round(peak * (1 + RESERVE)) + CONTEXT


@dataclass(frozen=True)
class Fit:
    """A choice of flags and what it needs."""

    flags: Flags  # flags and values besides those given, the micro-batch last
    args: argparse.Namespace  # the command line with these
    peak: int  # planned, bytes

    def __str__(self) -> str:
        """The flags as they are typed."""
        return show(self.flags)


def show(flags: Flags) -> str:
    """Flags as they are typed."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in flags.items())


class Search:
    """Tries flags for one command line.

    args: a completed command line.
    dtype: dtype of the model's weights.
    device_type: `cuda` or `cpu`.
    seconds: of this process, after which a plan that is not known yet raises TimeoutError.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        *,
        dtype: torch.dtype,
        device_type: str,
        world_size: int = 1,
        seconds: float = math.inf,
    ) -> None:
        self.args, self.dtype, self.device_type, self.world_size = args, dtype, device_type, world_size
        self.end = time.process_time() + seconds
        self.found: Fit | None = None  # the last thing that fitted in this search
        self.least: Fit | None = None  # what needs the least of all that fitted in any

    def steps(self, offered: Sequence[Flags]) -> list[Flags]:
        """Those of the offered flags that say something new and have an effect, each on top of those before."""
        found: list[Flags] = []
        for flags in offered:
            so_far = vars(self.args) | _together(found)
            if all(so_far[name] == value for name, value in flags.items()):
                continue
            try:
                with_flags(self.args, _together([*found, flags]), world_size=self.world_size)
            except UserError:
                continue
            found.append(flags)
        return found

    def batches(self, *, at_most: int) -> list[int]:
        """Micro-batches that divide what one process does in an update, the smallest first."""
        share = self.args.total_batch_size // self.world_size
        return [size for size in range(1, min(share, at_most) + 1) if share % size == 0]

    def try_flags(self, flags: Flags) -> Fit | None:
        """The plan of the command line with these flags; None if they cannot be had together."""
        try:
            args = with_flags(self.args, flags, world_size=self.world_size)
            if args.parallel == "fsdp":
                check_sharding(args, model=meta_model(read_config(args.model_config)), ranks=self.world_size)
        except UserError:
            return None
        if time.process_time() > self.end:
            raise TimeoutError
        plan = plan_memory(args, dtype=self.dtype, device_type=self.device_type, ranks=self.world_size)
        return Fit(flags, args, plan.peak.bytes)

    def fewest(self, limit: int, *, steps: Sequence[Flags], batches: Sequence[int]) -> Fit | None:
        """The fewest steps, in their order, with which a micro-batch of ENOUGH_TOKENS fits, and the largest one that
        does; if there is none, the same with the smallest micro-batch; None if nothing fits.

        limit: bytes of the card.
        """
        self.found = None
        enough = next((size for size in batches if size * self.args.max_length >= ENOUGH_TOKENS), batches[-1])
        for least in dict.fromkeys([enough, batches[0]]):
            sizes = [size for size in batches if size >= least]
            if self._any(steps, sizes, limit):
                return self._largest(self._few(steps, sizes, limit), sizes, limit)
        return None

    def _fits(self, steps: Sequence[Flags], batch: int, limit: int) -> Fit | None:
        fit = self.try_flags(_together([*steps, {"batch_size": batch}]))
        if fit is None or needed(fit.peak) > limit:
            return None
        self.found = fit
        self.least = min(fit, self.least or fit, key=lambda each: each.peak)
        return fit

    def _any(self, steps: Sequence[Flags], sizes: Sequence[int], limit: int) -> Fit | None:
        """The largest or the smallest micro-batch, if it fits: more sequences need more, but a single micro-batch needs
        no sums.
        """
        return self._fits(steps, sizes[-1], limit) or self._fits(steps, sizes[0], limit)

    def _few(self, steps: Sequence[Flags], sizes: Sequence[int], limit: int) -> list[Flags]:
        """As many of the first steps as it takes, without those that a later one has made superfluous."""
        prefixes = [steps[:count] for count in range(len(steps), -1, -1)]
        few = _last(prefixes, lambda prefix: self._any(prefix, sizes, limit) is not None)
        chosen = list(few)
        for step in few[:-1]:
            fewer = [each for each in chosen if each is not step]
            if self._any(fewer, sizes, limit):
                chosen = fewer
        return chosen

    def _largest(self, steps: Sequence[Flags], sizes: Sequence[int], limit: int) -> Fit | None:
        """With the largest micro-batch that fits, where one does."""
        if fit := self._fits(steps, sizes[-1], limit):
            return fit
        return self._fits(steps, _last(sizes, lambda size: self._fits(steps, size, limit) is not None), limit)


def _last(candidates: Sequence[T], holds: Callable[[T], bool]) -> T:
    """The last one that it holds for, where it holds for the first one, and for none after one that it does not."""
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(candidates[middle]) else (low, middle - 1)
    return candidates[low]


def _together(steps: Sequence[Flags]) -> Flags:
    return {name: value for flags in steps for name, value in flags.items()}


def fit_memory(args: argparse.Namespace, *, world: World) -> argparse.Namespace:
    """The arguments with what --fit chooses; as they are without it. Logs the choice.

    A run that goes on with the same --fit keeps what the saved one chose.
    Raises UserError where nothing fits, with the least memory that would be enough.
    """
    if args.fit is None:
        return args
    given = set(args.__dict__.pop("given"))
    if args.eval_only:
        return args
    device_type, dtype = world.device.type, resolve_dtype(args.dtype, world.device)
    limit = _limit(args.fit, world)
    search = Search(args, dtype=dtype, device_type=device_type, world_size=world.size)
    may_change = {name for name in (args.allow_changed or "").split(",") if name}
    allowed = [flags for flags in changes(args) if flags.keys() <= may_change]
    offered = [flags for flags in [*SAVINGS, *allowed] if not flags.keys() & given]
    if saved := _saved_args(args):
        same = saved.get("fit") == args.fit
        names = [name for flags in (offered if same else allowed) for name in flags if name not in given]
        names += ["batch_size"] if same and "batch_size" not in given else []
        kept = {name: saved[name] for name in names if saved[name] != getattr(args, name)}
        if same and (fit := search.try_flags(kept)):
            logger.info(f"--fit: {str(fit) or 'no other flags'}, as the run that goes on has chosen")
            return fit.args
        search.args = args = with_flags(args, kept, world_size=world.size)
        offered = [flags for flags in offered if flags not in allowed]  # its state is of the kind that it has chosen
    logger.info("--fit: trying what fits; each plan of a 7B takes some seconds")
    steps = search.steps(offered)
    batches = [args.batch_size] if "batch_size" in given else search.batches(at_most=args.total_batch_size)
    fit = search.fewest(limit, steps=steps, batches=batches)
    if fit is None:
        raise UserError(_nothing_fits(search, args.fit, limit, steps=steps, batches=batches))
    logger.info(
        f"--fit {gigabytes(limit)}: {fit}. The planned peak is {gigabytes(fit.peak)}; with {RESERVE:.0%} of it and "
        f"{gigabytes(CONTEXT)} for the context that is {gigabytes(needed(fit.peak))}"
    )
    return fit.args


def _limit(fit: int | str, world: World) -> int:
    """Bytes that --fit names; auto: all of the smallest GPU of this machine, or the host memory that is free."""
    if isinstance(fit, int):
        return fit
    if world.device.type == "cuda":
        return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    free = free_host_memory()
    if free is None or world.size > 1:
        raise UserError("--fit auto needs a GPU, or one process whose free memory is known: say how much, as in 16GB.")
    return free


def _saved_args(args: argparse.Namespace) -> dict[str, Any] | None:
    """The arguments of the run that goes on; None for a new run."""
    folder = Path(args.save_dir) if args.resume and complete_checkpoints(Path(args.save_dir)) else None
    if folder is None and args.continue_from and not is_transformers_folder(args.continue_from):
        folder = Path(args.continue_from)
    return None if folder is None else Checkpoint.open(find_checkpoint(folder)).state["args"]


def _nothing_fits(search: Search, fit: int | str, limit: int, *, steps: Sequence[Flags], batches: Sequence[int]) -> str:
    """One line: what would be the least, and what else could be tried."""
    line = f"--fit {'auto, ' if fit == 'auto' else ''}{gigabytes(limit)}: nothing fits."
    tried = [search.try_flags(_together([*steps, {"batch_size": size}])) for size in (batches[0], batches[-1])]
    if possible := [each for each in tried if each is not None]:
        smallest = min(possible, key=lambda each: each.peak)
        line += f" The least, {smallest}, needs {gigabytes(needed(smallest.peak))}."
    more = search.steps([*steps, *changes(search.args)])
    other = search.fewest(limit, steps=more, batches=batches)
    if other is None:
        return f"{line} Take a smaller model; `python -m qgalore.memory {search.args.model_config}` compares methods."
    names = ",".join(name for name in other.flags if name not in ("batch_size", *_together(SAVINGS)))
    return f"{line} With other results it would: {other}. Give these flags, or let it choose: --allow_changed {names}."


def gigabytes(size: int) -> str:
    """Bytes in GB of 1e9 bytes, or in MB."""
    return f"{size / 1e9:.2f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB"
