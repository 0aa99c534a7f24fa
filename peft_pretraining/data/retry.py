"""Streams that are opened again where they broke, from a file server or from the hub."""

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def retried(
    open_after: Callable[[int, T | None], Iterator[T]], *, wait_after: Callable[[Exception, int, int], float]
) -> Iterator[T]:
    """The items of a stream, each of them once, although the stream may break and be opened again.

    open_after: opens the stream behind the items that were yielded, given their number and the last one.
    wait_after: returns the seconds to wait after a failure, given the error, the number of failures since the last
        item, and the number of items. It raises if another try cannot help, or too many have failed.
    """
    given, failures = 0, 0
    last: T | None = None
    while True:
        try:
            for item in open_after(given, last):
                given, failures, last = given + 1, 0, item
                yield item
            return
        except Exception as error:
            failures += 1
            seconds = wait_after(error, failures, given)
        time.sleep(seconds)
