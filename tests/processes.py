"""Several processes that run jxfer as one job, each with its own virtual CPU devices, and what may happen to them."""

import dataclasses
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

LOST_SECS, GRACE_SECS, BEAT_SECS = 5.0, 2.0, 0.2
"""In place of those of `jxfer.peers`, so that tests need not wait as long."""

CHILD = f"""
import os, signal, sys
from jxfer import ablate, distributed, peers
from jxfer.data import pipeline
from jxfer.typing import InputError

what, who, when = sys.argv.pop(1).split(":")
peers.LOST_SECS, peers.GRACE_SECS, peers.BEAT_SECS = {LOST_SECS}, {GRACE_SECS}, {BEAT_SECS}
whole = pipeline._BatchSource.__getitem__

def disturbed(source, batch):
    if batch == int(when) and distributed.index() == int(who):
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "raise":
            raise OSError("the disk is on fire")
        if what == "refuse":
            raise InputError("this example cannot be read")
    return whole(source, batch)

def plan(*args):
    if what == "terminate" and distributed.index() == int(who):
        os.kill(os.getpid(), signal.SIGTERM)
    return whole_plan(*args)

pipeline._BatchSource.__getitem__ = disturbed
whole_plan, ablate.plan_method = ablate.plan_method, plan
from jxfer.cli import main
sys.exit(main())
"""
"""The command line with something that happens in one process when it reads one batch, `what:process:batch`, or
`terminate` when it begins to plan."""

NOTHING = "nothing:0:-1"


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int
    out: str
    err: str


def start(
    args: Sequence[str],
    *,
    count: int = 2,
    devices: int = 2,
    event: str = NOTHING,
    code: str = CHILD,
    env: Mapping[str, str] | None = None,
) -> list[subprocess.Popen]:
    """Starts `jxfer ARGS` in several processes that meet at a free port; `{process}` in `env` stands for the number."""
    shared = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        **(env or {}),
    }
    port = free_port()
    settings = [{"JXFER_NUM_PROCESSES": "1"}] if count == 1 else [_settings(count, i, port) for i in range(count)]
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, event, *args],
            env={name: value.replace("{process}", str(process)) for name, value in {**shared, **own}.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process, own in enumerate(settings)
    ]


def end(processes: Sequence[subprocess.Popen], *, within_secs: float = 240.0) -> list[Ended]:
    """Waits until all have ended, which they must do in time."""
    deadline = time.monotonic() + within_secs
    ended = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
            ended.append(Ended(process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return ended


def run(args: Sequence[str], **settings) -> list[Ended]:
    """Starts `jxfer ARGS` in several processes and waits for them."""
    return end(start(args, **settings))


def free_port() -> int:
    """Returns a port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def _settings(count: int, process: int, port: int) -> dict[str, str]:
    return {
        "JXFER_COORDINATOR": f"localhost:{port}",
        "JXFER_NUM_PROCESSES": str(count),
        "JXFER_PROCESS_ID": str(process),
    }
