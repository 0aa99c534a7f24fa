"""The hub stream: every document once however it is split, nothing lost to a bad connection, advice without a hub."""

import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest
from support.runs import ROOT

from peft_pretraining.data import hub as hub_stream
from peft_pretraining.data import retry
from peft_pretraining.data.hub import HubDocuments, is_transient, resilient, seconds_to_wait
from peft_pretraining.data.position import Position
from peft_pretraining.errors import UserError

datasets = pytest.importorskip("datasets")

DOCUMENTS = 7  # in each shard


def shard_rows(shards: list[int]) -> Iterator[dict[str, str]]:
    for shard in shards:
        for i in range(DOCUMENTS):
            yield {"text": f"shard {shard} document {i}"}


def fake_stream(split: str, *, shards: int) -> "datasets.IterableDataset":
    """A real IterableDataset of so many shards, in place of C4's."""
    return datasets.IterableDataset.from_generator(shard_rows, gen_kwargs={"shards": list(range(shards))})


def everything(shards: int) -> list[str]:
    return [row["text"] for row in shard_rows(list(range(shards)))]


def open_fake(monkeypatch: pytest.MonkeyPatch, *, shards: int, split: str = "train", seed: int = 0) -> HubDocuments:
    monkeypatch.setattr(hub_stream, "load_stream", partial(fake_stream, shards=shards))
    monkeypatch.setattr(hub_stream, "probe_hub", lambda: None)
    source = HubDocuments(split=split, seed=seed)  # type: ignore[arg-type]
    source.check()
    return source


def read(source: HubDocuments, *, epoch: int, reader: int = 0, readers: int = 1) -> list[str]:
    items = source.read(epoch=epoch, readers=readers, starts={reader: Position()})
    return [item.text for item in items]  # type: ignore[union-attr]


class Response:
    def __init__(self, status_code: int, headers: dict[str, str] | None = None) -> None:
        self.status_code = status_code
        self.headers = headers or {}


class HTTPError(Exception):
    def __init__(self, status: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(f"{status} for url: https://...")
        self.response = Response(status, headers)


# Who reads what


@pytest.mark.parametrize("shards", [1, 4, 6])
@pytest.mark.parametrize("readers", [1, 2, 3, 8])
def test_readers_divide_every_epoch(monkeypatch: pytest.MonkeyPatch, shards: int, readers: int) -> None:
    """Shards that go round, that do not go round evenly, and too few of them."""
    source = open_fake(monkeypatch, shards=shards)
    for epoch in range(2):
        shares = [read(source, epoch=epoch, reader=reader, readers=readers) for reader in range(readers)]
        assert Counter(sum(shares, [])) == Counter(everything(shards))


def test_train_is_reshuffled_and_validation_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    train = open_fake(monkeypatch, shards=5)
    orders = [read(train, epoch=epoch) for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    other_seed = open_fake(monkeypatch, shards=5, seed=1)
    assert read(other_seed, epoch=0) != orders[0]
    validation = open_fake(monkeypatch, shards=5, split="validation")
    assert read(validation, epoch=0) == everything(5)


def test_source_is_picklable(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_fake(monkeypatch, shards=3)
    copy = pickle.loads(pickle.dumps(source))
    assert read(copy, epoch=1, reader=0, readers=2) == read(source, epoch=1, reader=0, readers=2)
    assert copy.name == "allenai/c4 en, train, streamed from the hub"


# Bad connections


def test_broken_stream_gives_the_same_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each third document drops the connection, or is answered 429, before it arrives; the next try gets past it."""
    healthy = open_fake(monkeypatch, shards=4)
    wanted = [read(healthy, epoch=0, reader=reader, readers=2) for reader in range(2)]
    seen: set[str] = set()
    waits: list[int] = []

    def flaky_rows(shards: list[int]) -> Iterator[dict[str, str]]:
        for i, row in enumerate(shard_rows(shards)):
            if i % 3 == 2 and row["text"] not in seen:
                seen.add(row["text"])
                raise HTTPError(429) if i % 2 else ConnectionResetError("Connection reset by peer")
            yield row

    def no_wait(error: BaseException, failures: int) -> float:
        waits.append(failures)
        return 0.0

    monkeypatch.setattr(hub_stream, "seconds_to_wait", no_wait)
    monkeypatch.setattr(hub_stream, "BATCH", 1)
    flaky = HubDocuments(split="train", seed=0)
    flaky._dataset = datasets.IterableDataset.from_generator(flaky_rows, gen_kwargs={"shards": list(range(4))})
    documents = list(flaky.read(epoch=0, readers=2, starts={1: Position()}))
    assert [document.text for document in documents] == wanted[1]  # type: ignore[union-attr]
    for stop in (1, DOCUMENTS, DOCUMENTS + 3):  # resumed in the middle of a shard, on as bad a connection
        seen.clear()
        start = documents[stop - 1].position.after()  # type: ignore[union-attr]
        rest = flaky.read(epoch=0, readers=2, starts={1: start})
        assert [document.text for document in rest] == wanted[1][stop:]  # type: ignore[union-attr]
    seen.clear()
    waits.clear()
    assert [read(flaky, epoch=0, reader=reader, readers=2) for reader in range(2)] == wanted
    assert waits == [1] * 4 * (DOCUMENTS // 3)  # a document that arrives ends a row of failures


def test_dead_stream_is_given_up_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    warnings: list[str] = []
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    handler = hub_stream.logger.add(lambda message: warnings.append(str(message)), level="WARNING", format="{message}")

    def dead() -> Iterator[str]:
        opened.append(1)
        yield "first"
        raise HTTPError(503)

    stream = resilient(dead, name="C4")
    assert next(stream) == "first"
    with pytest.raises(UserError, match="C4: gave up after 10 tries .HTTP 503.. Resume later; --dataset PATH"):
        next(stream)
    hub_stream.logger.remove(handler)
    assert len(opened) == hub_stream.TRIES == len(warnings) + 1
    assert warnings[2].startswith("C4: broke after document 1 (HTTP 503). Try 4 of 10 in ")


def test_other_errors_pass_at_once() -> None:
    def faulty() -> Iterator[str]:
        yield "first"
        raise KeyError("text")

    stream = resilient(faulty, name="C4")
    assert next(stream) == "first"
    with pytest.raises(KeyError):
        next(stream)


def test_which_errors_are_transient() -> None:
    import httpx

    def chained(error: Exception, cause: Exception) -> Exception:
        error.__cause__ = cause
        return error

    assert all(is_transient(HTTPError(status)) for status in (408, 429, 500, 502, 503, 504))
    assert not any(is_transient(HTTPError(status)) for status in (400, 401, 403, 404, 416))
    assert is_transient(TimeoutError()) and is_transient(ConnectionError("Server Disconnected"))
    assert is_transient(httpx.ReadTimeout("slow")) and is_transient(httpx.RemoteProtocolError("cut"))
    assert is_transient(chained(RuntimeError(), HTTPError(429)))
    assert not is_transient(chained(ConnectionError("Server Disconnected"), HTTPError(404)))
    assert not is_transient(ValueError()) and not is_transient(FileNotFoundError())


def test_waits_double_and_honour_retry_after() -> None:
    for failures, seconds in ((1, 1), (2, 2), (5, 16), (9, 60)):
        assert 0.75 * seconds <= seconds_to_wait(TimeoutError(), failures) <= 1.25 * seconds
    assert seconds_to_wait(HTTPError(429, {"Retry-After": "90"}), 1) == 90
    assert seconds_to_wait(HTTPError(429, {"Retry-After": "99999"}), 1) == hub_stream.MAX_RETRY_AFTER
    assert seconds_to_wait(HTTPError(503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}), 1) <= 1.25


# No hub


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_unreachable_hub_fails_in_seconds_with_advice(environment: dict[str, str]) -> None:
    script = """
import time
from peft_pretraining.data.sources import open_documents
from peft_pretraining.errors import UserError
source = open_documents("c4", split="train", seed=0)
start = time.monotonic()
try:
    source.check()
except UserError as error:
    print(time.monotonic() - start)
    print(error)
"""
    start = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment, "HF_HUB_DOWNLOAD_TIMEOUT": "1"},
    )
    seconds, message = run.stdout.splitlines()
    assert float(seconds) < 15 and time.monotonic() - start < 30
    assert message.startswith("the Hugging Face hub cannot be reached (")
    assert "--dataset PATH" in message and "--dataset pydocs" in message
    assert "Traceback" not in run.stderr
