"""C4 streamed from the Hugging Face hub: who reads which shard, and how a stream survives a bad connection.

``datasets`` splits an iterable dataset by DataLoader worker on its own, which divides the data twice when it is already
divided by reader. So each reader opens its shards one by one, through ``IterableDataset.iter``, which knows nothing of
workers. Shuffling happens in our own buffer, downstream of the connection: a buffer inside the stream would be lost
with it, and the documents in it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from loguru import logger

from peft_pretraining.errors import UserError
from peft_pretraining.records import shuffled

if TYPE_CHECKING:
    from datasets import IterableDataset

T = TypeVar("T")

HUB_DATASET, HUB_CONFIG = "allenai/c4", "en"
BATCH = 256  # documents converted from Arrow at a time

PROBES, PROBE_SECONDS = 2, 5.0  # is the hub there at all: ten seconds at worst
TRIES = 10  # in a row without a new document; the waits between them sum up to four minutes
LONGEST_WAIT = 60.0  # seconds, unless the server asks for more
LONGEST_RETRY_AFTER = 600.0
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


class HubDocuments:
    """One split of C4, English, streamed. Train order: shards shuffled by (seed, epoch), then a shuffle buffer."""

    def __init__(self, *, split: Literal["train", "validation"], seed: int) -> None:
        self.name = f"{HUB_DATASET} {HUB_CONFIG}, {split}, streamed from the hub"
        self.split = split
        self.seed = seed
        self._dataset: IterableDataset | None = None

    def check(self) -> None:
        """Finds the dataset's files, so that workers inherit them. Raises UserError within seconds without a hub."""
        probe_hub()
        self._open()

    def read(self, *, epoch: int, reader: int, readers: int) -> Iterator[str]:
        """See DocumentSource.read. Broken connections are retried and resumed at the document where they broke."""
        shuffle = self.split == "train"
        rng = random.Random(f"hub {self.seed} {epoch}")
        shards = list(range(self._open().num_shards))
        if shuffle:
            rng.shuffle(shards)
        share = (reader + epoch) % readers
        if readers <= len(shards):
            texts = self._shards(shards[share::readers])
        else:  # too few shards to go round: every reader walks all of them
            texts = islice(self._shards(shards), share, None, readers)
        return shuffled(texts, rng=rng, size=len) if shuffle else texts

    def _shards(self, shards: list[int]) -> Iterator[str]:
        for shard in shards:
            yield from resilient(partial(self._shard, shard), name=f"{self.name}, shard {shard}")

    def _shard(self, shard: int) -> Iterator[str]:
        dataset = self._open()
        for batch in dataset.shard(num_shards=dataset.num_shards, index=shard).iter(batch_size=BATCH):
            yield from batch["text"]

    def _open(self) -> IterableDataset:
        limit_inner_retries()  # in every process that reads: a worker may have inherited the dataset, but not this
        if self._dataset is None:
            self._dataset = next(resilient(lambda: iter([load_stream(self.split)]), name=self.name))
        return self._dataset


def load_stream(split: str) -> IterableDataset:
    """The split as ``datasets`` streams it, one shard per file."""
    import datasets

    dataset = datasets.load_dataset(HUB_DATASET, HUB_CONFIG, split=split, streaming=True)
    return dataset.select_columns(["text"])


def limit_inner_retries() -> None:
    """Leaves patience to ``resilient``: the retries of ``datasets`` sleep for up to 20 minutes, seen in no log of ours.

    The hub client below them keeps its own: five for each block of a file, resumed at the byte.
    """
    import datasets

    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    for kind in ("READ", "OPEN", "READ_SERVER_UNAVAILABLE", "READ_RATE_LIMIT"):
        setattr(datasets.config, f"STREAMING_{kind}_RETRY_INTERVAL", 0)


def probe_hub() -> None:
    """Asks the hub for the dataset. Raises UserError where ``datasets`` is missing or nobody answers in seconds."""
    try:
        import datasets  # noqa: F401
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError(f"--dataset c4 needs the datasets package (pip install datasets); {OFFLINE_WAYS}.") from error
    failure: Exception | None = None
    for _ in range(PROBES):
        try:
            HfApi().dataset_info(HUB_DATASET, timeout=PROBE_SECONDS)
            return
        except Exception as error:
            if not is_transient(error):
                raise
            if http_status(error) is not None:
                return  # it answers, if only "too busy": loading is patient
            failure = error
    raise UserError(f"the Hugging Face hub cannot be reached ({_brief(failure)}); {OFFLINE_WAYS}.") from failure


def resilient(open_stream: Callable[[], Iterator[T]], *, name: str) -> Iterator[T]:
    """The items of a stream that always gives the same ones, reopened and resumed where the network broke it.

    Raises UserError after TRIES failures without a new item; errors that are no network's fault pass unchanged.
    """
    delivered = failures = 0
    while True:
        try:
            for item in islice(open_stream(), delivered, None):
                delivered += 1
                failures = 0
                yield item
            return
        except Exception as error:
            if not is_transient(error):
                raise
            failures += 1
            if failures == TRIES:
                raise UserError(
                    f"{name}: gave up after {TRIES} tries ({_brief(error)}). Resume later; {OFFLINE_WAYS}."
                ) from error
            wait = seconds_to_wait(error, failures)
            broken = f"{name}: broke after document {delivered} ({_brief(error)})"
            logger.warning(f"{broken}. Try {failures + 1} of {TRIES} in {wait:.0f} s.")
        time.sleep(wait)


def seconds_to_wait(error: BaseException, failures: int) -> float:
    """Doubling from one second, spread by a quarter so that readers do not come back all at once; or what was asked."""
    patience = min(2.0 ** (failures - 1), LONGEST_WAIT) * random.SystemRandom().uniform(0.75, 1.25)
    return max(patience, min(_retry_after(error), LONGEST_RETRY_AFTER))


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
    """The HTTP status behind an error, None where no server has answered."""
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
