"""An iterator run ahead in a thread, so that batches are read and on the devices before a step asks for them."""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from jxfer.data.stall import Wait, leave_reads

Item = TypeVar("Item")

ITEMS_AHEAD = 2
"""Batches that wait on the devices, besides the one that is being made."""

POLL_SECS = 0.001
"""How exactly it is known when the device ran out of work while the host waited for a batch."""

GIVE_UP_SECS = 5.0
"""How long a wait is before it may be given up: what is only slow comes, and the step after it is a better place."""

_CLOSE_SECS = 10.0
"""How long closing waits for a read that is under way; a read that hangs must not keep the process from ending."""


class GaveUp(Exception):  # noqa: N818 - an ending, not an error
    """Whoever waited for an item was asked to stop."""


class Ahead(Generic[Item]):
    """The items of an iterator, in its order, made by a thread of their own; leaving the `with` block ends the thread.

    What the iterator raises is raised in the place of the item that it did not give. An item that does not come for
    long is said on stderr (`jxfer.data.stall`), and waited for.
    """

    def __init__(
        self,
        items: Iterator[Item],
        *,
        num_ahead: int = ITEMS_AHEAD,
        what: Callable[[int], str] = lambda taken: f"item {taken}",
    ) -> None:
        """Starts the thread.

        Args:
          items: is only used by the thread, and left where it stands when this is closed.
          num_ahead: the most items that wait.
          what: names an item by the number of those before it.
        """
        self._what, self._taken = what, 0
        self._made: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=num_ahead)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._make, args=(items,), name="jxfer-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        return self.take()[0]

    def take(
        self, busy: Callable[[], bool] = lambda: False, *, give_up: Callable[[], bool] = lambda: False
    ) -> tuple[Item, float]:
        """Returns the next item, and for how many seconds it was waited for while `busy()` was false.

        Raises:
          GaveUp: `give_up()` was true when the item had not come for `GIVE_UP_SECS`.
        """
        self._taken += 1
        try:
            return _opened(self._made.get_nowait()), 0.0
        except queue.Empty:
            pass
        idle_since, wait = math.inf, Wait(lambda: self._what(self._taken - 1))
        latest = time.monotonic() + GIVE_UP_SECS
        while True:
            if idle_since == math.inf and not busy():
                idle_since = time.perf_counter()
            try:
                made = self._made.get(timeout=POLL_SECS)
            except queue.Empty:
                wait.look()
                if time.monotonic() >= latest and give_up():
                    raise GaveUp from None
                continue
            wait.end()
            return _opened(made), max(time.perf_counter() - idle_since, 0.0)

    def close(self) -> None:
        """Ends the thread after what it is making now; what was made and not taken is dropped."""
        self._closing.set()
        deadline = time.monotonic() + _CLOSE_SECS
        while self._thread.is_alive() and time.monotonic() < deadline:
            while not self._made.empty():
                self._made.get_nowait()
            self._thread.join(timeout=POLL_SECS)
        if self._thread.is_alive():
            leave_reads()

    def __enter__(self) -> "Ahead[Item]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self, items: Iterator[Item]) -> None:
        try:
            while not self._closing.is_set():
                self._made.put((next(items), None))
        except BaseException as error:  # StopIteration too: whoever takes items learns of the end in the same way
            if not self._closing.is_set():
                self._made.put((None, error))


def _opened(made: tuple[Any, BaseException | None]) -> Any:
    item, error = made
    if error is not None:
        raise error
    return item
