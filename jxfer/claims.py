"""Claims: which worker does what in a folder that several share, on one machine or on many over a file system.

A claim is a file `NAME.GENERATION`, and the highest generation of a name decides: whoever created that, exclusively,
holds the claim while the file is fresh. Taking over is creating the next generation, so of two workers that find a
claim stale at once one fails, and nothing is ever removed that another might just have made. A holder that was taken
over finds its own file gone. The last generation of a name stays, holding `{}` once it is free, because a name that
began again at 1 could be held twice.

What remains: a worker that is suspended (a closed lid, SIGSTOP, a file server that hangs) between a `check` and the
write that this allows, and for longer than `STALE_SECS`, still makes that write when it wakes.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import platform
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from jxfer.typing import InputError

BEAT_SECS = 10.0
"""How often a holder touches its claim."""

STALE_SECS = 60.0
"""A claim that was not touched for so long is free, by the clock that stamps the files there."""

_WORKER, _PROBE, _FREE = "worker-", ".now-", "{}"
_GONE = (errno.ENOENT, errno.ESTALE)


class LostClaim(Exception):  # noqa: N818 - what a worker that was away finds, not an error
    """Another worker has taken a claim over; what it covers is that worker's from now on."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a claim."""

    host: str
    pid: int
    machine: str
    """Equal for two processes exactly if a process id means the same to both; empty where that is not known."""
    started: str
    """When the process started, as its machine counts; empty where that is not known."""
    token: str
    """Of this claim alone."""

    def __str__(self) -> str:
        return f"{self.host}, pid {self.pid}" if self.pid else "another worker"

    @property
    def is_dead(self) -> bool:
        """Whether the process is known to have ended, which only its own machine can tell."""
        if not self.machine or self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # the id belongs to another user's process now, or always did
        started = _started(self.pid)
        return started is not None and started != self.started


_UNKNOWN = Holder(host="", pid=0, machine="", started="", token="")


class Claim:
    """A claim that this process holds: touched by a thread until it is released, at the end of its `with` block."""

    def __init__(self, path: Path, token: str, left_by: Holder | None):
        self.name = path.name.rpartition(".")[0]
        self.left_by = left_by
        """Who held it before and never released it."""
        self._path, self._token = path, token
        self._lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"claim of {self.name}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Touches the claim; to be called right before a write that only its holder may do.

        Raises:
          LostClaim: another worker has taken it over.
          InputError: the folder cannot be reached.
        """
        with _reaching(self._path.parent):
            self._touch()
        self.raise_if_lost()

    def raise_if_lost(self) -> None:
        """Raises LostClaim if the loss has been noticed already, which costs nothing to ask."""
        if self._lost:
            raise LostClaim(
                f"{_newest_holder(self._path.parent, self.name)} has taken over {self.name}, as nothing was heard of "
                f"this process for {STALE_SECS:g} s"
            )

    def release(self) -> None:
        """Lets others have the claim at once."""
        self._end()
        with contextlib.suppress(OSError):  # otherwise it goes stale
            if self._is_own():
                with self._path.open("r+") as file:
                    file.write(_FREE)
                    file.truncate()

    def remove(self) -> None:
        """Releases a claim whose name is never used again."""
        self._end()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def __enter__(self) -> "Claim":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._lost and not self._ended.wait(BEAT_SECS):
            with contextlib.suppress(OSError):  # out of reach for now, or for so long that others take over
                self._touch()

    def _end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _touch(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._is_own():
                os.utime(self._path)
                return
        if not self._path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "it is gone")
        self._lost = True

    def _is_own(self) -> bool:
        """Opens the file, because a network file system may answer anything less from its memory."""
        try:
            return self._token in self._path.read_text()
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise


class Followed:
    """The claim of a worker's first process, to the others of the same job: they neither hold nor lose it."""

    left_by = None

    def check(self) -> None:
        """Does nothing."""

    def raise_if_lost(self) -> None:
        """Does nothing."""

    def __enter__(self) -> "Followed":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def claim_first(folder: Path, names: Sequence[str]) -> Claim | dict[str, Holder]:
    """Claims the first of some names that nobody holds, or returns who holds each of them.

    A claim is free where it was released, where its holder ran on this machine and is no more, and where it was not
    touched for `STALE_SECS`.

    Args:
      folder: of the claims; made where it is not there.
      names: such as files may have.

    Raises:
      InputError: the folder cannot be written to.
    """
    with _reaching(folder):
        folder.mkdir(exist_ok=True)
        while True:
            now, newest, held = _now(folder), _newest(folder), {}
            for name in names:
                generation = newest.get(name, 0)
                holder, left_by = _look(folder / f"{name}.{generation}", now) if generation else (None, None)
                if holder is not None:
                    held[name] = holder
                elif claim := _create(folder, name, generation + 1, left_by):
                    return claim
                else:  # somebody was faster; look again, but not all at the same time
                    time.sleep(random.uniform(0, 0.01))
                    break
            else:
                return held


@contextlib.contextmanager
def alone(folder: Path, name: str, *, waiting: Callable[[Holder], None] = lambda holder: None) -> Iterator[Claim]:
    """Waits for a claim and holds it.

    Args:
      folder: of the claims; made where it is not there.
      name: of the claim.
      waiting: called now and then with who has it meanwhile; may raise.

    Raises:
      InputError: the folder cannot be written to.
    """
    pause = 0.01
    while isinstance(found := claim_first(folder, [name]), dict):
        waiting(found[name])
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, 0.5)
    with found:
        yield found


@contextlib.contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Shows others, in `workers`, that this process is at work.

    Raises:
      InputError: the folder cannot be written to.
    """
    claim = claim_first(folder, [f"{_WORKER}{uuid.uuid4().hex[:12]}"])
    assert isinstance(claim, Claim), "nobody else has this name"
    try:
        yield
    finally:
        claim.remove()


def workers(folder: Path) -> list[Holder]:
    """Returns the processes that are at work in a folder, this one among them.

    Raises:
      InputError: the folder cannot be written to.
    """
    found = []
    with _reaching(folder):
        folder.mkdir(exist_ok=True)
        now = _now(folder)
        _clear_probes(folder, now)
        for name, generation in _newest(folder).items():
            if name.startswith(_WORKER):
                path = folder / f"{name}.{generation}"
                holder, _ = _look(path, now)
                if holder is None:
                    path.unlink(missing_ok=True)  # left by a process that was killed; the name is never used again
                else:
                    found.append(holder)
    return found


def _create(folder: Path, name: str, generation: int, left_by: Holder | None) -> Claim | None:
    """Claims a name by its next generation; returns None where somebody else has."""
    path = folder / f"{name}.{generation}"
    holder = Holder(platform.node(), os.getpid(), _machine(), _started(os.getpid()) or "", uuid.uuid4().hex)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return None
    try:
        with open(descriptor, "w") as file:
            json.dump(dataclasses.asdict(holder), file)
    except OSError:  # a full disk, which should not keep others waiting for us
        path.unlink(missing_ok=True)
        raise
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)  # what an exclusive creation over NFS leaves there may be no time
    generations = [each for other, each in _entries(folder) if other == name]
    if max(generations, default=0) > generation:  # we looked long ago, and this generation has come and gone since
        path.unlink(missing_ok=True)
        return None
    for each in generations:
        if each < generation:
            (folder / f"{name}.{each}").unlink(missing_ok=True)  # from which a holder that was away learns of it
    return Claim(path, holder.token, left_by)


def _look(path: Path, now: float) -> tuple[Holder | None, Holder | None]:
    """Returns who holds a claim, or else who left it without releasing it."""
    try:
        with path.open() as file:  # opening it fetches its times too, from a network file system
            text, touched = file.read(), os.fstat(file.fileno()).st_mtime
        if text == _FREE:
            return None, None
        holder = Holder(**json.loads(text))
    except (ValueError, TypeError):
        holder = _UNKNOWN  # being written, or by a process that was killed while it did
    except OSError as error:
        if error.errno in _GONE:
            return _UNKNOWN, None  # replaced since the folder was read
        raise
    if now - touched <= STALE_SECS and not holder.is_dead:
        return holder, None
    return None, holder


def _newest_holder(folder: Path, name: str) -> Holder:
    with contextlib.suppress(OSError):
        holder, left_by = _look(folder / f"{name}.{_newest(folder).get(name)}", now=0.0)
        return holder or left_by or _UNKNOWN
    return _UNKNOWN


def _newest(folder: Path) -> dict[str, int]:
    """Returns the highest generation of every name."""
    newest: dict[str, int] = {}
    for name, generation in _entries(folder):
        newest[name] = max(generation, newest.get(name, 0))
    return newest


def _entries(folder: Path) -> list[tuple[str, int]]:
    parts = [name.rpartition(".") for name in os.listdir(folder)]
    return [(name, int(generation)) for name, _, generation in parts if name and generation.isdecimal()]


def _now(folder: Path) -> float:
    """Returns the time by the clock that stamps the files of a folder, which need not be this machine's.

    Making a file also has a network file system forget what it remembers of the folder.
    """
    probe = folder / f"{_PROBE}{uuid.uuid4().hex}"
    with probe.open("w") as file:
        now = os.fstat(file.fileno()).st_mtime
    probe.unlink()
    return now


def _clear_probes(folder: Path, now: float) -> None:
    """Removes what processes left that were killed while they asked for the time."""
    for probe in folder.glob(f"{_PROBE}*"):
        with contextlib.suppress(FileNotFoundError):
            if now - probe.stat().st_mtime > STALE_SECS:
                probe.unlink(missing_ok=True)


@functools.cache
def _machine() -> str:
    """Names this boot of this machine, and the space of its process ids, which containers have of their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        known = os.name == "posix" and sys.platform != "linux"
        return f"{platform.node()} {uuid.getnode():x}" if known else ""


def _started(pid: int) -> str | None:
    """Returns when a process started, in ticks since the boot; empty where it has ended, None where it is not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # a name may hold blanks
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]


@contextlib.contextmanager
def _reaching(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"cannot write to '{folder}': {error.strerror}"
        raise InputError(f"{problem}; make it writable, or choose another") from error
