"""Tests of jxfer/claims.py: one holder at a time, whoever races, hangs or dies; and the waiting that follows."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jxfer import claims
from jxfer.claims import Claim, Holder, LostClaim, claim_first
from jxfer.typing import InputError

LONG_AGO = 2 * claims.STALE_SECS


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "claims"


def claim(folder: Path, name: str = "run") -> Claim:
    """Claims what is free."""
    found = claim_first(folder, [name])
    assert isinstance(found, Claim), found
    return found


def holder_of(folder: Path, name: str = "run") -> Holder:
    """Returns who has what is not free."""
    found = claim_first(folder, [name])
    assert not isinstance(found, Claim)
    return found[name]


def file_of(folder: Path, name: str = "run") -> Path:
    """Returns the file that says who has a name: there is one whenever nobody is just claiming it."""
    (path,) = (path for path in folder.iterdir() if path.name.rpartition(".")[0] == name)
    return path


def age(folder: Path, secs: float = LONG_AGO) -> None:
    """Makes the claim of `run` as old as if it had not been touched for so long."""
    touched = file_of(folder).stat().st_mtime - secs
    os.utime(file_of(folder), (touched, touched))


def pretend(folder: Path, **fields: object) -> None:
    """Lets the claim of `run` say something else of its holder."""
    path = file_of(folder)
    before = path.stat()
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    os.utime(path, (before.st_atime, before.st_mtime))


def test_what_one_has_another_is_told_of_and_gets_once_it_is_free(folder):
    with claim(folder) as held:
        assert str(holder_of(folder)) == f"{os.uname().nodename}, pid {os.getpid()}"
        held.check()
        with claim(folder, "other"):
            assert set(claim_first(folder, ["run", "other"])) == {"run", "other"}
    with claim(folder) as again:
        assert again.left_by is None


def test_the_first_that_is_free_is_claimed_in_the_order_given(folder):
    names = ["c", "a", "b"]
    taken = []
    while isinstance(found := claim_first(folder, names), Claim):
        taken.append(found)
    assert [each.name for each in taken] == names
    assert list(found) == names
    taken[1].release()
    assert claim(folder, "a").name == "a"
    assert claim_first(folder, []) == {}


def test_names_with_dots_are_names(folder):
    names = ["x", "x.3", "x.3.1", "results.jsonl"]
    for name in reversed(names):
        assert claim(folder, name).name == name
    assert set(claim_first(folder, names)) == set(names)


def test_however_often_a_name_is_claimed_it_leaves_one_file(folder):
    for _ in range(5):
        claim(folder).release()
    assert [path.name for path in folder.iterdir()] == ["run.5"]


def test_a_claim_that_nobody_touches_is_taken_over_and_its_holder_notices(folder):
    first = claim(folder)
    age(folder, claims.STALE_SECS - 5)
    assert holder_of(folder).pid == os.getpid()
    age(folder)
    with claim(folder) as second:
        assert second.left_by.pid == os.getpid()
        first.raise_if_lost()  # it has not looked yet
        with pytest.raises(LostClaim, match=rf"pid {os.getpid()} has taken over run, as nothing was heard"):
            first.check()
        with pytest.raises(LostClaim):
            first.raise_if_lost()
        first.release()  # of what it has no longer: nothing happens
        second.check()
        assert holder_of(folder)
    with pytest.raises(LostClaim):
        first.check()


def test_a_claim_is_touched_while_it_is_held(folder, monkeypatch):
    monkeypatch.setattr(claims, "BEAT_SECS", 0.02)
    with claim(folder):
        age(folder)
        deadline = time.monotonic() + 10
        while time.time() - file_of(folder).stat().st_mtime > 5:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert holder_of(folder)


def test_the_clock_of_this_machine_does_not_matter(folder, monkeypatch):
    with claim(folder):
        for ahead in (-1e6, 1e6):
            monkeypatch.setattr(time, "time", lambda ahead=ahead: 2e9 + ahead)
            assert holder_of(folder)


def test_what_a_process_of_this_machine_left_that_is_no_more_is_free_at_once(folder):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    claim(folder)
    pretend(folder, pid=ended.pid)
    with claim(folder) as second:
        assert second.left_by.pid == ended.pid


def test_a_process_id_that_another_process_has_by_now_tells_nothing_of_the_holder(folder):
    claim(folder)
    pretend(folder, started="1")
    claim(folder)


def test_a_killed_process_whose_parent_has_not_looked_yet_is_dead(folder):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    claim(folder)
    pretend(folder, pid=child.pid, started=claims._started(child.pid))
    assert holder_of(folder).pid == child.pid
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    claim(folder)
    child.communicate()


@pytest.mark.parametrize("machine", ["another", ""])
def test_a_process_id_of_another_machine_says_nothing_here(folder, machine):
    claim(folder)
    pretend(folder, machine=machine, host="elsewhere", pid=2**22 + 1)
    assert str(holder_of(folder)) == f"elsewhere, pid {2**22 + 1}"
    age(folder)
    claim(folder)


def test_a_claim_that_is_being_written_is_somebodys(folder):
    claim(folder)
    file_of(folder).write_text("")
    assert str(holder_of(folder)) == "another worker"
    age(folder)
    claim(folder)


def test_who_looked_long_ago_gets_nothing(folder):
    claim(folder).release()  # generation 1: free, as the slow one saw it
    with claim(folder) as held:  # 2
        assert claims._create(folder, "run", 2, None) is None
    with claim(folder) as held:  # 3, and 2 is gone
        assert claims._create(folder, "run", 2, None) is None
        held.check()
        assert file_of(folder).name == "run.3"


@pytest.mark.parametrize("state", ["new", "released", "stale", "dead"])
def test_of_many_that_see_a_name_free_at_the_same_time_one_gets_it(folder, monkeypatch, state):
    folder.mkdir()
    if state != "new":
        before = claim(folder)
        if state == "released":
            before.release()
        elif state == "stale":
            age(folder)
        else:
            pretend(folder, started="1")
    all_have_looked = threading.Barrier(8)
    create = claims._create

    def create_late(*args: object) -> Claim | None:
        if threading.current_thread() not in late:
            late.add(threading.current_thread())
            all_have_looked.wait(20)
        return create(*args)

    late: set[threading.Thread] = set()
    monkeypatch.setattr(claims, "_create", create_late)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: claim_first(folder, ["run"]), range(8)))
    winners = [each for each in found if isinstance(each, Claim)]
    assert len(winners) == 1
    winners[0].check()
    assert file_of(folder).name == f"run.{1 if state == 'new' else 2}"


def test_threads_share_names_without_any_twice(folder):
    folder.mkdir()
    names = [f"run{index}" for index in range(40)]

    def take_all(_: int) -> list[str]:
        taken = []
        while isinstance(found := claim_first(folder, names), Claim):
            taken.append(found.name)
        return taken

    with ThreadPoolExecutor(8) as pool:
        taken = [name for part in pool.map(take_all, range(8)) for name in part]
    assert sorted(taken) == sorted(names)


def test_one_at_a_time_has_a_name_however_long_each_operation_on_files_takes(folder, monkeypatch):
    folder.mkdir()
    rng = random.Random(0)

    def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: object, **kwargs: object) -> Any:
            time.sleep(max(0, rng.uniform(-0.006, 0.003)))
            return function(*args, **kwargs)

        return slow

    for where, name in ((claims, "_entries"), (claims, "_look"), (os, "open"), (os, "utime"), (Path, "unlink")):
        monkeypatch.setattr(where, name, slowly(getattr(where, name)))
    until, inside, most = time.monotonic() + 3, [], []

    def work(_: int) -> int:
        had = 0
        while time.monotonic() < until:
            if isinstance(found := claim_first(folder, ["run"]), Claim):
                inside.append(found)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.remove(found)
                found.release()
                had += 1
        return had

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) > 20
    assert set(most) == {1}


def test_alone_is_alone_among_threads(folder):
    folder.mkdir()
    counter = folder.parent / "counter"
    counter.write_text("0")

    def count(_: int) -> None:
        for _ in range(10):
            with claims.alone(folder, "counter"):
                value = int(counter.read_text())
                time.sleep(0.001)
                counter.write_text(str(value + 1))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(count, range(6)))
    assert counter.read_text() == "60"


CHILD = """
import json, sys, time
from pathlib import Path
from jxfer import claims

what, folder, *names = sys.argv[1:]
folder = Path(folder)
print("ready", flush=True)
sys.stdin.readline()
if what == "take all":
    taken = []
    while isinstance(found := claims.claim_first(folder, names), claims.Claim):
        taken.append(found)
    print(json.dumps([each.name for each in taken]), flush=True)
    sys.stdin.readline()  # what a process has is free as soon as it ends
if what == "count":
    counter = folder.parent / "counter"
    for _ in range(20):
        with claims.alone(folder, "counter"):
            value = int(counter.read_text())
            time.sleep(0.002)
            counter.write_text(str(value + 1))
if what == "hold":
    claims.BEAT_SECS, claims.STALE_SECS = 0.05, 1.0
    held = claims.claim_first(folder, names)
    print("held", flush=True)
    try:
        while True:
            held.check()
            time.sleep(0.01)
    except claims.LostClaim as lost:
        print(lost, flush=True)
"""


class Children:
    """Processes that do one thing each; `tell` lets them all go on."""

    def __init__(self, count: int, what: str, folder: Path, *names: str):
        root = str(Path(__file__).parents[1])
        args = [sys.executable, "-c", CHILD, what, str(folder), *names]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.processes = [subprocess.Popen(args, env={**os.environ, "PYTHONPATH": root}, **pipes) for _ in range(count)]
        assert self.lines() == ["ready"] * count

    def tell(self) -> None:
        for process in self.processes:
            process.stdin.write("\n")
            process.stdin.flush()

    def lines(self) -> list[str]:
        return [process.stdout.readline().strip() for process in self.processes]

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if sys.exc_info()[0]:
                process.kill()
            process.communicate(timeout=60)


def test_processes_share_names_without_any_twice_and_what_they_had_is_free_once_they_are_killed(folder):
    folder.mkdir()
    names = [f"run{index}" for index in range(60)]
    with Children(6, "take all", folder, *names) as children:
        children.tell()
        taken = [json.loads(line) for line in children.lines()]
        assert sorted(name for part in taken for name in part) == sorted(names)
        assert set(claim_first(folder, names)) == set(names)
        for process in children.processes:
            process.kill()
    for name in names:
        assert claim(folder, name).left_by.pid in {process.pid for process in children.processes}


def test_alone_is_alone_among_processes(folder):
    folder.mkdir()
    (folder.parent / "counter").write_text("0")
    with Children(4, "count", folder) as children:
        children.tell()
    assert (folder.parent / "counter").read_text() == "80"


def test_a_process_that_hangs_loses_its_claim_and_notices_when_it_goes_on(folder, monkeypatch):
    folder.mkdir()
    monkeypatch.setattr(claims, "BEAT_SECS", 0.05)
    monkeypatch.setattr(claims, "STALE_SECS", 1.0)
    with Children(1, "hold", folder, "run") as children:
        (process,) = children.processes
        children.tell()
        assert children.lines() == ["held"]
        time.sleep(2)
        assert holder_of(folder).pid == process.pid, "kept by its heart beat"
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 30
        while isinstance(found := claim_first(folder, ["run"]), dict):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with found:
            assert found.left_by.pid == process.pid
            process.send_signal(signal.SIGCONT)
            (line,) = children.lines()
            assert f"pid {os.getpid()} has taken over run" in line
            found.check()


def test_who_is_at_work_is_known_until_it_ends(folder):
    folder.mkdir()
    assert claims.workers(folder) == []
    with claims.at_work(folder), claims.at_work(folder):
        assert [each.pid for each in claims.workers(folder)] == [os.getpid()] * 2
    assert claims.workers(folder) == []
    assert list(folder.iterdir()) == []


def test_a_worker_that_was_killed_is_not_at_work(folder):
    folder.mkdir()
    with claims.at_work(folder):
        (path,) = folder.iterdir()
        path.write_text(json.dumps({**json.loads(path.read_text()), "started": "1"}))
        assert claims.workers(folder) == []
        assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_or_is_gone_is_one_line(folder):
    with pytest.raises(InputError, match=r"cannot write to .*No such file"):
        claim_first(folder / "deeper", ["run"])
    (folder.parent / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        claim_first(folder.parent / "file", ["run"])
    held = claim(folder)
    file_of(folder).unlink()
    folder.rmdir()
    with pytest.raises(InputError, match=r"cannot write to .*it is gone"):
        held.check()


OPERATIONS = st.lists(st.tuples(st.sampled_from(["claim", "release", "age", "die", "check"]), st.integers(0, 3)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS)
def test_at_any_time_one_claim_at_most_passes_its_check(tmp_path_factory, operations):
    folder = tmp_path_factory.mktemp("claims")
    given_out: list[Claim] = []
    holder: Claim | None = None
    free = True
    for what, which in operations:
        if what == "claim":
            found = claim_first(folder, ["run"])
            assert isinstance(found, Claim) == free
            if isinstance(found, Claim):
                given_out.append(found)
                holder, free = found, False
        elif what in ("age", "die") and holder is not None:
            age(folder) if what == "age" else pretend(folder, started="1")
            free = True
        elif what == "release" and given_out:
            released = given_out[which % len(given_out)]
            released.release()
            if released is holder:
                holder, free = None, True
        elif what == "check" and holder is not None:
            holder.check()  # by which one that was merely late has its claim again
            free = json.loads(file_of(folder).read_text())["started"] == "1"
        passing = [each for each in given_out if each is not holder and passes(each)]
        assert passing == []
    for each in given_out:
        each.release()


def passes(held: Claim) -> bool:
    try:
        held.check()
    except LostClaim:
        return False
    return True
