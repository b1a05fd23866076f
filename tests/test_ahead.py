"""Items made ahead: in order, bounded, with their errors, and no thread left behind."""

import itertools
import threading
import time

import pytest

from jxfer.data import ahead
from jxfer.data.ahead import Ahead
from jxfer.typing import InputError


def threads() -> int:
    return sum(thread.name == "jxfer-ahead" for thread in threading.enumerate())


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_items_come_in_their_order_and_end_once():
    with Ahead(iter(range(100))) as items:
        assert list(items) == list(range(100))
    assert threads() == 0


def test_no_more_items_are_made_than_asked_for():
    made: list[int] = []
    with Ahead((made.append(k) or k for k in itertools.count()), num_ahead=3) as items:
        assert next(items) == 0
        wait_until(lambda: len(made) == 5)  # one taken, three that wait, one in the hands of the thread
        time.sleep(0.02)
        assert len(made) == 5


def fail(at: int, error: BaseException):
    for k in itertools.count():
        if k == at:
            raise error
        yield k


@pytest.mark.parametrize("error", [InputError("row 7 is damaged"), OSError(28, "No space left"), RuntimeError("x")])
def test_an_error_comes_in_the_place_of_its_item_as_it_was_raised(error):
    with Ahead(fail(3, error)) as items:
        assert list(itertools.islice(items, 3)) == [0, 1, 2]
        with pytest.raises(type(error)) as raised:
            next(items)
    assert raised.value is error
    assert raised.traceback[-1].name == "fail", "the traceback leads to where it began"


def test_closing_ends_the_thread_wherever_it_is():
    for taken in range(4):
        with Ahead(itertools.count()) as items:
            assert list(itertools.islice(items, taken)) == list(range(taken))
    with pytest.raises(ZeroDivisionError), Ahead(itertools.count()):
        raise ZeroDivisionError
    assert threads() == 0


def test_a_read_that_hangs_does_not_keep_closing_for_ever(monkeypatch):
    monkeypatch.setattr(ahead, "_CLOSE_SECS", 0.05)
    release = threading.Event()
    with Ahead(iter(release.wait, None)) as items:
        pass
    assert items._thread.is_alive()
    assert items._thread.daemon, "it does not keep the process from ending"
    release.set()
    items._thread.join(5)
    assert threads() == 0


def test_a_wait_counts_from_when_the_device_has_nothing_to_do():
    def slow():
        for k in range(3):
            time.sleep(0.1)
            yield k

    asked: list[float] = []

    def busy_for_a_while() -> bool:
        asked.append(time.perf_counter())
        return asked[-1] - asked[0] < 0.06

    with Ahead(slow(), num_ahead=1) as items:
        _, idle = items.take(lambda: False)
        _, busy = items.take(lambda: True)
        _, partly = items.take(busy_for_a_while)
    assert idle > 0.05
    assert busy == 0
    assert 0 < partly < 0.09


def test_an_item_that_is_there_was_not_waited_for():
    with Ahead(iter("ab")) as items:
        wait_until(lambda: items._made.full())
        assert items.take(lambda: False) == ("a", 0.0)
