"""Reading in threads that end soon once nobody wants what they read, and with the process on a disk that hangs."""

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

from jxfer.data.stall import result

Item = TypeVar("Item")
Made = TypeVar("Made")

LEAVE_SECS = 5.0
"""How long threads may take to end before they are left where they are."""


def in_threads(make: Callable[[Item], Made], items: Sequence[Item], what: Callable[[Item], str]) -> Iterator[Made]:
    """Yields what is made of each item, in order; `what` names what of an item is waited for where it does not come.

    The threads of `concurrent.futures` would take all items to the end first, whatever has become of the consumer.
    """
    made: list[Future[Made]] = [Future() for _ in items]
    left, closing = iter(list(zip(items, made, strict=True))), threading.Event()

    def work() -> None:
        for item, future in left:
            if closing.is_set():
                return
            try:
                future.set_result(make(item))
            except BaseException as error:
                future.set_exception(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(os.cpu_count() or 1)]
    for thread in threads:
        thread.start()
    try:
        for item, future in zip(items, made, strict=True):
            yield result(future, functools.partial(what, item))
    finally:
        closing.set()
        deadline = time.monotonic() + LEAVE_SECS
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
