"""Streams that are opened again where they broke: what a file server and the hub have in common."""

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def retried(
    open_after: Callable[[int, T | None], Iterator[T]], *, wait_after: Callable[[Exception, int, int], float]
) -> Iterator[T]:
    """The items of a stream that gives the same ones each time it is opened, each of them once.

    open_after: opens the stream behind the items that have been given; called with their number and the last of them.
    wait_after: says how many seconds to wait after a failure; called with the error, the number of failures since the
        last new item, and the number of items given. It raises where trying again cannot help or has failed too often.
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
