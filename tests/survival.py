"""An ablation in processes to which something happens at named moments, and what must hold of the files they leave.

All are forked from one process that has imported jxfer and started nothing, so that a start costs little.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import runs

from jxfer import checkpoint, chunks

KINDS = ("train", "evaluate", "save", "final", "extract", "solve", "append", "torn", "claims", "records", "time")
"""Where a process can be: steps, looks at validation or test, saves of checkpoints and of finished weights, storing
features, parts of a solver's path, appending to the results (`torn`: half a line), claims, the small files; `time`
counts milliseconds."""


CHILD = """
import contextlib, errno, json, os, resource, signal, subprocess, sys, threading, time
from collections import Counter
from pathlib import Path

import array_record.python.array_record_module, tensorboardX
from orbax.checkpoint import v1
from jxfer import ablate, cli, directory, evaluate, extract, report, search, session
from jxfer.solvers.logistic import LogisticPath

OUT, seen = "", Counter()
extract.CHUNK_SECS = 0.0

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def fill():
    with contextlib.suppress(OSError), open(FILLER, "wb", buffering=0) as file:
        while file.write(bytes(1 << 16)) == 1 << 16:
            pass
    with contextlib.suppress(OSError), open(FILLER, "ab", buffering=0) as file:
        while file.write(bytes(1)):
            pass

def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

def terminate():
    os.kill(os.getpid(), signal.SIGTERM)

def vanish():
    os.rename(OUT, AWAY)

def pass_by(kind):
    seen[kind] += 1
    if kind == what and seen[kind] == count:
        globals()[how]()

def watch_files(event, args):
    if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.utime", "shutil.rmtree"):
        return
    path = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes)) else ""
    if event == "open" and (args[1] or "r").startswith("r") and not (args[2] or 0) & os.O_CREAT:
        return
    if path in (FILLER, AWAY):
        return
    if "/features/" in path:
        pass_by("extract")
    elif OUT and path.startswith(OUT):
        inside = path.removeprefix(OUT)
        known = {"/checkpoints/final": "final", "/checkpoints/": "save", "results.jsonl": "append", "claims": "claims"}
        pass_by(next((kind for part, kind in known.items() if part in inside), "records"))

def progress(what, done, total):
    if "shots" in what and "features" not in what:
        pass_by("train")

def watched_batches(*args, **kwargs):
    for batch in whole_batches(*args, **kwargs):
        pass_by("evaluate")
        yield batch

def solve_part(*args):
    pass_by("solve")
    return whole_part(*args)

def begin(kind, function):
    def watched(*args, **kwargs):
        try:
            pass_by(kind)
        except Exception:
            raise ValueError("taken for an error of what was read")
        return function(*args, **kwargs)
    return watched

def append(out, row):
    if what == "torn" and seen["torn"] + 1 == count:
        with (out / "results.jsonl").open("a") as file:
            file.write(json.dumps(row)[:200])
    pass_by("torn")
    whole_append(out, row)

whole_batches, evaluate.eval_batches = evaluate.eval_batches, watched_batches
whole_part, LogisticPath._solve_part = LogisticPath._solve_part, solve_part
whole_append, ablate.append_result = ablate.append_result, append
ablate.resolve, ablate.load_data = begin("check", ablate.resolve), begin("open", ablate.load_data)
ablate.plan_method, search.set_aside = begin("plan", ablate.plan_method), begin("look", search.set_aside)
session.progress = lambda: contextlib.nullcontext(progress)
def document(material):
    pass_by("report")
    return "page"

report.document, report._pngs = document, lambda page: []
report.markdown = report.latex = report.html = lambda page: page * (1 << 16)
report.paper_tables = lambda material: "table"
cli.print_table = report.summary_table = lambda *args: None

def run(args, out, cache):
    os.environ["JXFER_CACHE"] = cache
    global OUT, FILLER, AWAY
    OUT, FILLER, AWAY = out, out + ".filler", out + ".away"
    if what == "time":
        threading.Timer(count / 1000, kill).start()
    sys.addaudithook(watch_files)
    return cli.main(args)

for line in sys.stdin:
    args, out, cache, what, count, how = json.loads(line)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(out + ".filler")
    if os.path.exists(out + ".away"):
        os.rename(out + ".away", out)
    if how == "readonly":
        subprocess.run(["mount", "-o", "remount,ro", os.path.dirname(out)], check=True)
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(writing, 2)
        os.dup2(writing, 1)
        status = 1
        try:
            status = run(args, out, cache)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading) as pipe:
        text = pipe.read()
    if how == "readonly":
        subprocess.run(["mount", "-o", "remount,rw", os.path.dirname(out)], check=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text]), flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Starter:
    """Starts `jxfer ablate` with a file, one process at a time."""

    process: subprocess.Popen
    file: Path
    has_own_disk: bool
    """Whether the processes see a file system that this one does not."""

    def sees(self, path: Path) -> Path:
        """Returns where this process finds what those started know as `path`, on disks of their own too."""
        return Path(f"/proc/{self.process.pid}/root{path}")

    def start(
        self, out: Path, cache: Path, what: str = "nothing", count: int = 0, *, how: str = "kill"
    ) -> tuple[int, str]:
        """Returns status and words of a process, to which something happens at the `count`th moment of a kind.

        It is one of: `kill` or `terminate` the process; `fill` the disk of `out`, or `limit` what may be written; let
        `out` `vanish`; or the disk is `readonly` from the beginning. The next start finds the disk as it should be.
        """
        args = ["ablate", str(self.file), "--out", str(out)]
        self.process.stdin.write(json.dumps([args, str(out), str(cache), what, count, how]) + "\n")
        self.process.stdin.flush()
        return tuple(json.loads(self.process.stdout.readline()))

    def outlives(self, out: Path, cache: Path, what: str = "nothing", count: int = 0) -> bool:
        """Tells whether a process ends well, or is killed before it does."""
        status, words = self.start(out, cache, what, count)
        assert status in (0, -signal.SIGKILL), words
        return status == 0


@contextlib.contextmanager
def starter(file: Path, xla: Path, within: Sequence[str] = ()) -> Iterator[Starter]:
    """Lends what starts processes that share compiled programs in `xla`, by a command that all run within."""
    own = {"JAX_COMPILATION_CACHE_DIR": str(xla), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    own |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "PYTHONPATH": str(Path(__file__).parents[1])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "XLA_FLAGS": "", **own}
    with subprocess.Popen([*within, sys.executable, "-c", CHILD], env=environment, **pipes) as process:
        yield Starter(process, file, bool(within))
        process.stdin.close()


def assert_whole(*folders: Path) -> None:
    """Asserts that every file that killed processes left can be read, and that none of theirs lies about."""
    for path in [path for folder in folders for path in folder.rglob("*")]:
        assert not {".tmp", ".unfinished"} & set(path.suffixes), path
        assert not path.name.startswith(".now-"), path
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".jsonl":
            assert all(map(json.loads, path.read_text().splitlines())), path
        if path.suffix == chunks.SUFFIX:
            chunk = chunks.open_chunk(path)
            row_bytes = len(chunk.reader.read([0])[0]) - 4  # and a checksum
            assert chunk.read(np.arange(len(chunk.names)), row_bytes)[1].all(), path
        if path.name == "final" and path.parent.name == "checkpoints":
            assert [each.name for each in path.parent.glob("final*")] == ["final"]
            _load(path)
        if path.name.isdigit() and path.parents[1].name == "checkpoints":
            steps = checkpoint.Checkpoints(path).steps()
            assert len(list(path.iterdir())) <= len(steps) + 1, "the next save would have removed more"
            for step in steps:
                _load(path / str(step))


def assert_same(out: Path, expected: Path) -> None:
    """Asserts the results of an undisturbed ablation: rows, weights and predictions."""
    rows, others = (list(map(runs.timeless, runs.rows_on_disk(each))) for each in (out, expected))
    assert [row["seed"] for row in rows] == [row["seed"] for row in others]
    for row, other in zip(rows, others, strict=True):
        assert {name: (row[name], other[name]) for name in other if row[name] != other[name]} == {}
    for final in expected.glob("**/checkpoints/final"):
        arrays, others = (checkpoint.load_arrays(each / final.relative_to(expected))[0] for each in (out, expected))
        assert {path: value.tobytes() for path, value in arrays.items()} == {
            path: value.tobytes() for path, value in others.items()
        }
    for file in expected.glob("**/predictions.npz"):
        with np.load(out / file.relative_to(expected)) as arrays, np.load(file) as others:
            assert all(np.array_equal(arrays[name], others[name]) for name in others)


def _load(directory: Path) -> None:
    saved, key = checkpoint._read_manifest(directory)["arrays"], jax.random.key(0).dtype
    template = {
        path: jax.ShapeDtypeStruct(array["shape"], key if "key" in array["dtype"] else jnp.dtype(array["dtype"]))
        for path, array in saved.items()
    }
    checkpoint._read(directory, saved, template, what=str(directory))
