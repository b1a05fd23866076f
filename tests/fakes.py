"""Programs to put on the PATH in place of jxfer, srun, scontrol and gcloud: they record what reached them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"

HOSTILE = (
    "a b",
    "it's",
    'say "x"',
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "*",
    "two\nlines",
    "\\",
    "",
    "~",
    "#",
)
"""Arguments that must arrive as they are, and that leave a file `pwned` behind where a shell got to see them."""

ARGS = ("ablate", "experiments/x.py", "--out", *HOSTILE)

_OURS = ("JXFER_", "JAX_", "CUDA_", "SLURM_", "SRUN_")

_RECORD = """
import json, os, pathlib, signal, subprocess, sys, time
calls = pathlib.Path(os.environ["FAKES"])
name = pathlib.Path(sys.argv[0]).name

def record(**fields):
    ours = ("JXFER_", "JAX_", "CUDA_", "SRUN_")
    environment = {key: value for key, value in os.environ.items() if key.startswith(ours)}
    call = {"args": sys.argv[1:], "env": environment, "cwd": os.getcwd(), "pid": os.getpid(), **fields}
    with open(calls / f"{name}.{os.getpid()}", "a") as file:
        file.write(json.dumps(call) + "\\n")
"""

_JXFER = """
plans = json.loads(os.environ.get("PLAN", "{}"))
plan = plans.get(os.environ.get("JXFER_PROCESS_ID"), plans.get("*", {}))

def stop(number, frame):
    record(signal=number)
    if not plan.get("stubborn"):
        time.sleep(0.2)  # as saving takes a while
        sys.exit(75)

if not plan.get("unprepared"):
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
print("out of", os.environ.get("JXFER_PROCESS_ID"), flush=True)
print("err of", os.environ.get("JXFER_PROCESS_ID"), file=sys.stderr, flush=True)
record()
end = time.monotonic() + plan.get("seconds", 0)
while time.monotonic() < end:
    time.sleep(0.02)
sys.exit(plan.get("status", 0))
"""

_SRUN = """
record()
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
sys.exit(subprocess.call(words))
"""

_GCLOUD = """
# A TPU VM of two workers, each a home directory; its state lies in files, a line for each time that it is asked for.
record()
words = sys.argv[1:]
options = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
kind, verb, target = words[2:5]

def set_state(queue, node):
    for file, lines in (("queue", queue), ("node", node)):
        (calls / file).write_text("\\n".join(lines)) if lines else (calls / file).unlink(missing_ok=True)

if verb == "create":
    queue = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"] if kind == "queued-resources" else []
    set_state(queue, ["READY"])
    for worker in "01":
        home = calls / f"home{worker}"
        home.rename(calls / f"old{worker}.{os.getpid()}") if home.exists() else None
        home.mkdir()
elif verb == "delete":
    set_state([], [])
elif verb == "describe":
    file = calls / ("queue" if kind == "queued-resources" else "node")
    if not file.exists():
        sys.exit("ERROR: (gcloud) NOT_FOUND: no " + target)
    print("Updates are available", file=sys.stderr)
    now, *later = file.read_text().splitlines()
    file.write_text("\\n".join(later or [now]))
    print(now)
else:
    workers = "01" if options["worker"] == "all" else options["worker"]
    statuses = []
    for worker in workers:
        home = calls / f"home{worker}"
        if verb == "scp":
            statuses.append(subprocess.call(["cp", target, home / words[5].split(":")[1]]))
        else:
            shell = os.environ.get("REMOTE_SHELL", "bash")
            environment = {**os.environ, "HOME": str(home)}
            statuses.append(subprocess.call([shell, "-c", options["command"]], cwd=home, env=environment))
    sys.exit(next((status for status in statuses if status), 0))
"""

_PYTHON = """
# What builds a virtual environment: it makes one whose Python records and whose jxfer is the fake.
record()
words = sys.argv[1:]
if words[0] == "-c":
    sys.exit(int(os.environ.get("OLD_PYTHON", "0")))
if words[:2] == ["-m", "venv"] or "venv" in words:
    folder = pathlib.Path(words[-1]) / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(sys.argv[0])
elif "--target" in words:
    folder = pathlib.Path(words[words.index("--target") + 1]) / "bin"
    folder.mkdir(parents=True)
    (folder / "uv").symlink_to(sys.argv[0])
elif name == "python":
    jxfer = pathlib.Path(sys.argv[0]).with_name("jxfer")
    jxfer.unlink(missing_ok=True)
    jxfer.symlink_to(calls.parent / "bin" / "jxfer")
"""

_PROGRAMS = {
    "jxfer": _JXFER,
    "srun": _SRUN,
    "scontrol": "record()",
    "gcloud": _GCLOUD,
    **dict.fromkeys(("python3.13", "python3.12", "python3.11", "python3"), _PYTHON),
}


class Fakes:
    """A folder of fake programs, launchers that find them on their PATH, and what was called of them."""

    def __init__(self, folder: Path, *names: str):
        self.calls = folder / "calls"
        self.calls.mkdir()
        self.programs = folder / "bin"
        self.programs.mkdir()
        for name in names:
            program = self.programs / name
            program.write_text(f"#!{sys.executable} -SE\n{_RECORD}{_PROGRAMS[name]}")
            program.chmod(0o755)

    def environment(self, plan: dict | None = None, **variables: str) -> dict[str, str]:
        """Returns the environment of a launcher.

        Args:
          plan: what the processes of jxfer do, by process id or `*` for all: `status`, `seconds`, `stubborn` (ignores
            signals), `unprepared` (has no handlers for them).
        """
        kept = {key: value for key, value in os.environ.items() if not key.startswith(_OURS)}
        path = f"{self.programs}{os.pathsep}{os.environ['PATH']}"
        return kept | {"PATH": path, "FAKES": str(self.calls), "PLAN": json.dumps(plan or {})} | variables

    def run(self, script: Path, *args: str, **environment) -> subprocess.CompletedProcess:
        command, environment = [script, *args], self.environment(**environment)
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    def signal(self, number: int, script: Path, *args: str, after: int, group: bool = False, **environment):
        """Signals a launcher after so many starts of jxfer, as `kill` does or, to its `group`, as ctrl-c does."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = self.environment(**environment)
        with subprocess.Popen([script, *args], env=environment, start_new_session=True, **pipes) as process:
            deadline = time.monotonic() + 20
            while len(self.of("jxfer")) < after:
                assert time.monotonic() < deadline, process.poll()
                time.sleep(0.02)
            (os.killpg if group else os.kill)(process.pid, number)
            out, err = process.communicate(timeout=20)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def of(self, name: str) -> list[dict]:
        """Returns the calls of a program in the order in which they began, and signals that reached it."""
        files = sorted(self.calls.glob(f"{name}.*"), key=lambda file: file.stat().st_ctime_ns)
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def args_of(self, name: str) -> list[tuple[str, ...]]:
        return [tuple(call["args"]) for call in self.of(name) if "signal" not in call]

    def signals_of(self, name: str) -> list[int]:
        return [call["signal"] for call in self.of(name) if "signal" in call]
