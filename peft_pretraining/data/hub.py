"""C4 streamed from the Hugging Face hub: the shards of each reader, and streams that survive a bad connection.

`datasets` splits an iterable dataset by DataLoader worker on its own, which divides the data twice when it is already
divided by reader. So each reader opens its shards one by one, through `IterableDataset.iter`, which knows nothing of
workers. Shuffling happens in our own blocks, downstream of the connection: a buffer inside the stream would be lost
with it, and the documents in it. A shard is a part of the epoch, so a reader opens only its own.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from loguru import logger

from peft_pretraining.data.order import OrderedDocuments
from peft_pretraining.data.retry import retried
from peft_pretraining.errors import UserError
from peft_pretraining.progress import LongWait

if TYPE_CHECKING:
    from datasets import IterableDataset

T = TypeVar("T")

HUB_DATASET, HUB_CONFIG = "allenai/c4", "en"
READERS = 8  # virtual readers: each has a connection of its own, and some 50 MB
BATCH = 256  # documents converted from Arrow at a time

PROBES, PROBE_SECONDS = 2, 5.0  # is the hub there at all: ten seconds at worst
TRIES = 10  # in a row without a new document; the waits between them sum up to four minutes
MAX_WAIT = 60.0  # seconds, unless the server asks for more
MAX_RETRY_AFTER = 600.0
NETWORK_MODULES = {
    "httpx",
    "httpx2",
    "httpcore",
    "httpcore2",
    "requests",
    "urllib3",
    "aiohttp",
    "http",
    "ssl",
    "socket",
}
OFFLINE_WAYS = "--dataset PATH (a folder of C4 shards, or your own text) or --dataset pydocs work without a network"


class HubRecord(NamedTuple):
    """One row of a shard, which arrives decoded."""

    raw: Any
    shard: str
    line: int  # 1-based row

    @property
    def size(self) -> int:
        return len(self.raw) if isinstance(self.raw, str) else 0

    def text(self) -> str:
        """The document. Raises UserError if the row holds none."""
        if not isinstance(self.raw, str):
            raise UserError(f'{self.shard} row {self.line}: "text" is not a string but {str(self.raw)[:40]!r}.')
        return self.raw


class HubDocuments(OrderedDocuments[int]):
    """One split of C4, English, streamed. Train order: shards shuffled by (seed, epoch), then blocks within a shard."""

    readers = READERS

    def __init__(self, *, split: Literal["train", "validation"], seed: int) -> None:
        super().__init__(seed=seed, shuffle=split == "train")
        self.name = f"{HUB_DATASET} {HUB_CONFIG}, {split}, streamed from the hub"
        self.split = split
        self.revision: str | None = None
        self._dataset: IterableDataset | None = None

    def check(self) -> None:
        """Finds the dataset's files, so that workers inherit them. Raises UserError within seconds without a hub."""
        with LongWait(f"finding the files of {self.name}"):
            self.revision = probe_hub()
            self._open()

    def fingerprint(self) -> dict[str, str]:
        """The dataset's revision, known after check()."""
        return {HUB_DATASET: self.revision} if self.revision else {}

    def parts(self, epoch: int) -> list[list[int]]:
        """See OrderedDocuments.parts: each shard is one."""
        shards = list(range(self._open().num_shards))
        if self.shuffle:
            random.Random(f"hub {self.seed} {epoch}").shuffle(shards)
        return [[shard] for shard in shards]

    def records(self, file: int, *, line: int) -> Iterator[HubRecord]:
        """See OrderedDocuments.records. A broken connection is retried and resumed at the row where it broke."""
        name = f"{self.name}, shard {file}"
        rows = resilient(partial(self._shard, file), name=name, first=line - 1)
        return (HubRecord(raw, name, row) for row, raw in enumerate(rows, start=line))

    def _shard(self, shard: int) -> Iterator[Any]:
        dataset = self._open()
        for batch in dataset.shard(num_shards=dataset.num_shards, index=shard).iter(batch_size=BATCH):
            yield from batch["text"]

    def _open(self) -> IterableDataset:
        limit_inner_retries()  # in every process that reads: a worker may have inherited the dataset, but not this
        if self._dataset is None:
            self._dataset = next(resilient(lambda: iter([load_stream(self.split)]), name=self.name))
        return self._dataset


def load_stream(split: str) -> IterableDataset:
    """The split as `datasets` streams it, one shard per file."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    dataset = datasets.load_dataset(HUB_DATASET, HUB_CONFIG, split=split, streaming=True)
    return dataset.select_columns(["text"])


def limit_inner_retries() -> None:
    """Turns off the retries of `datasets`, which sleep for up to 20 minutes without a log line; `resilient` retries.

    The hub client below them keeps its own: five for each block of a file, resumed at the byte.
    """
    import datasets

    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    for kind in ("READ", "OPEN", "READ_SERVER_UNAVAILABLE", "READ_RATE_LIMIT"):
        setattr(datasets.config, f"STREAMING_{kind}_RETRY_INTERVAL", 0)


def probe_hub() -> str | None:
    """Asks the hub for the dataset and returns its revision, or None if the hub is too busy to say.

    Raises UserError if `datasets` is missing or there is no answer within seconds.
    """
    try:
        import datasets  # noqa: F401
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError(f"--dataset c4 needs the datasets package (pip install datasets); {OFFLINE_WAYS}.") from error
    failure: Exception | None = None
    for _ in range(PROBES):
        try:
            return HfApi().dataset_info(HUB_DATASET, timeout=PROBE_SECONDS).sha
        except Exception as error:
            if not is_transient(error):
                raise
            if http_status(error) is not None:
                return None  # it answers, if only "too busy": loading is patient
            failure = error
    raise UserError(f"the Hugging Face hub cannot be reached ({_brief(failure)}); {OFFLINE_WAYS}.") from failure


def resilient(open_stream: Callable[[], Iterator[T]], *, name: str, first: int = 0) -> Iterator[T]:
    """The items of a stream, which is opened again and resumed where the network broke it.

    first: 0-based item to begin with.
    Raises UserError after TRIES failures without a new item; errors that are no network's fault pass unchanged.
    """

    def open_after(given: int, last: T | None) -> Iterator[T]:
        return islice(open_stream(), first + given, None)

    def wait_after(error: Exception, failures: int, given: int) -> float:
        if not is_transient(error):
            raise error
        if failures == TRIES:
            advice = f"Resume later; {OFFLINE_WAYS}."
            raise UserError(f"{name}: gave up after {TRIES} tries ({_brief(error)}). {advice}") from error
        wait = seconds_to_wait(error, failures)
        broken = f"{name}: broke after document {first + given} ({_brief(error)})"
        logger.warning(f"{broken}. Try {failures + 1} of {TRIES} in {wait:.0f} s.")
        return wait

    return retried(open_after, wait_after=wait_after)


def seconds_to_wait(error: BaseException, failures: int) -> float:
    """The wait before a try: doubled each time from one second and spread by a quarter, or what the server asks for."""
    patience = min(2.0 ** (failures - 1), MAX_WAIT) * random.SystemRandom().uniform(0.75, 1.25)
    return max(patience, min(_retry_after(error), MAX_RETRY_AFTER))


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: dropped connections, timeouts, cut-off files, HTTP 408, 429 and 5xx."""
    status = http_status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return any(
        isinstance(cause, ConnectionError | TimeoutError | EOFError)
        or type(cause).__module__.split(".")[0] in NETWORK_MODULES
        for cause in _causes(error)
    )


def http_status(error: BaseException) -> int | None:
    """The HTTP status behind an error, None if no server has answered."""
    response = _response(error)
    return None if response is None else int(response.status_code)


def _retry_after(error: BaseException) -> float:
    response = _response(error)
    asked = "" if response is None else str(getattr(response, "headers", {}).get("Retry-After", ""))
    return float(asked) if asked.isdigit() else 0.0


def _response(error: BaseException) -> Any:
    responses = (getattr(cause, "response", None) for cause in _causes(error))
    return next((response for response in responses if hasattr(response, "status_code")), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _brief(error: BaseException | None) -> str:
    status = http_status(error) if error is not None else None
    text = (str(error).splitlines() or [""])[0][:120]
    return f"HTTP {status}" if status is not None else f"{type(error).__name__}: {text}"
