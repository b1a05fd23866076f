"""tpu_vm.sh and tpu_worker.sh with a fake gcloud, whose TPU VM is two folders and whose ssh is a real shell."""

import re
import shlex
import shutil
import signal
import subprocess
import time

import pytest
from fakes import ARGS, HOSTILE, LAUNCH, Fakes

TPU = LAUNCH / "tpu_vm.sh"
WHERE = ("--zone", "us-east5-b", "--project=mine", "--poll", "0")
WHAT = (*WHERE, "--type", "v6e-8", "--version", "v2-alpha-tpuv6e")
PYTHONS = ("python3.13", "python3.12", "python3.11", "python3")


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fakes = Fakes(tmp_path, "jxfer", "gcloud", *PYTHONS)
    yield fakes
    for call in fakes.of("jxfer"):  # none outlives its test
        subprocess.run(["kill", "-KILL", str(call["pid"])], capture_output=True)
    assert not list(tmp_path.rglob("pwned"))


def verbs(fakes):
    """Returns what gcloud was asked for, without looking at states: `create queued-resources`, `ssh all start`…"""
    asked = []
    for _, _, kind, verb, _, *rest in fakes.args_of("gcloud"):
        if verb == "ssh":
            options = dict(word[2:].split("=", 1) for word in rest if "=" in word)
            words = shlex.split(options["command"])
            inner = words[1] if words[0].endswith("tpu_worker.sh") else words[0]
            asked.append(f"ssh {options['worker']} {inner}")
        elif verb != "describe":
            asked.append(f"{verb} {kind}")
    return asked


def existing(fakes, queue="ACTIVE", node="READY", installed=True):
    """Makes a TPU VM that is there already, with this checkout's launchers on it and a fake installation."""
    (fakes.calls / "queue").write_text(queue)
    (fakes.calls / "node").write_text(node)
    for worker in "01":
        home = fakes.calls / f"home{worker}"
        shutil.copytree(LAUNCH, home / "jxfer" / "launch")
        if installed:
            (home / ".jxfer-vm" / "venv" / "bin").mkdir(parents=True)
            (home / ".jxfer-vm" / "venv" / "bin" / "jxfer").symlink_to(fakes.programs / "jxfer")


INSTALLED = ["scp tpu-vm", "ssh all sh", "ssh all install"]


def test_from_nothing_to_a_finished_run_and_back(fakes):
    created = fakes.run(TPU, "create", "--spot", "--create-flag=--network=a b", *WHAT)
    assert created.returncode == 0, created.stderr
    assert created.stderr.splitlines() == [
        "tpu_vm.sh: the request for jxfer is WAITING_FOR_RESOURCES",
        "tpu_vm.sh: the request for jxfer is PROVISIONING",
        "tpu_vm.sh: the request for jxfer is ACTIVE",
    ]
    place = ("--zone=us-east5-b", "--project=mine")
    kind = ("--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e", "--spot", "--network=a b")
    assert fakes.args_of("gcloud")[0] == (
        *("compute", "tpus", "queued-resources", "create", "jxfer", "--node-id=jxfer", *place, *kind),
    )
    installed = fakes.run(TPU, "install", *WHERE)
    assert installed.returncode == 0, installed.stderr
    run = fakes.run(TPU, "run", *WHERE, "--env", "JXFER_CACHE=/a b/$(touch pwned)", "--", *ARGS)
    assert run.returncode == 0, run.stderr
    assert "out of None" in run.stdout
    assert [call["env"] for call in fakes.of("jxfer")] == [{"JXFER_CACHE": "/a b/$(touch pwned)"}] * 2
    assert fakes.args_of("jxfer") == [ARGS, ARGS]
    assert [call["cwd"] for call in fakes.of("jxfer")] == [
        str(fakes.calls / f"home{worker}" / "jxfer") for worker in "01"
    ]
    assert "ended with status 0" in fakes.run(TPU, "status", *WHERE).stdout
    deleted = fakes.run(TPU, "delete", *WHERE, "--quiet")
    assert deleted.returncode == 0, deleted.stderr
    assert fakes.args_of("gcloud")[-1] == (
        *("compute", "tpus", "queued-resources", "delete", "jxfer", *place, "--force", "--quiet"),
    )
    assert fakes.run(TPU, "status", *WHERE).stdout.splitlines() == [
        "queued resource jxfer: ABSENT",
        "TPU VM jxfer: ABSENT",
    ]
    assert verbs(fakes) == [
        *("create queued-resources", *INSTALLED),
        *("ssh all start", "ssh 0 follow", "ssh all status", "delete queued-resources"),
    ]


def test_the_checkout_is_installed_as_git_lists_it(fakes):
    existing(fakes, installed=False)
    assert fakes.run(TPU, "install", *WHERE).returncode == 0
    listed = subprocess.run(["git", "ls-files"], cwd=LAUNCH.parent, capture_output=True, text=True, check=True).stdout
    for worker in "01":
        checkout = fakes.calls / f"home{worker}" / "jxfer"
        assert all((checkout / file).is_file() for file in listed.splitlines() if (LAUNCH.parent / file).exists())
        assert not (checkout / ".git").exists()
    pip = [call for call in fakes.of("python") if call["args"][:2] == ["-m", "pip"]]
    assert [call["args"] for call in pip] == [["-m", "pip", "install", "--quiet", ".[tpu]"]] * 2
    assert {call["cwd"] for call in pip} == {str(fakes.calls / f"home{worker}" / "jxfer") for worker in "01"}


def test_a_repository_is_installed_at_a_commit(fakes, tmp_path):
    existing(fakes, installed=False)
    for worker in "01":
        shutil.rmtree(fakes.calls / f"home{worker}" / "jxfer")
    origin = tmp_path / "a repository"
    (origin / "launch").mkdir(parents=True)
    shutil.copy(LAUNCH / "tpu_worker.sh", origin / "launch")

    def git(*words):
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        return subprocess.run(["git", *identity, *words], cwd=origin, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    first = git("rev-parse", "HEAD").strip()
    git("tag", "v1")
    git("commit", "-qm", "two", "--allow-empty")
    for _ in range(2):  # also again
        done = fakes.run(TPU, "install", *WHERE, f"--git={origin}", "--ref=v1")
        assert done.returncode == 0, done.stderr
    for worker in "01":
        head = fakes.calls / f"home{worker}" / "jxfer" / ".git" / "HEAD"
        assert head.read_text().strip() == first
    done = fakes.run(TPU, "install", *WHERE, f"--git={origin}", "--ref=--upload-pack=touch pwned;")
    assert done.returncode != 0


def test_where_python_is_too_old_uv_brings_one(fakes):
    existing(fakes, installed=False)
    assert fakes.run(TPU, "install", *WHERE, OLD_PYTHON="1").returncode == 0
    home = fakes.calls / "home0"
    assert fakes.args_of("uv")[0] == (
        *("venv", "--quiet", "--seed", "--python", "3.12", str(home / ".jxfer-vm" / "venv")),
    )
    assert (home / ".jxfer-vm" / "venv" / "bin" / "jxfer").exists()


@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_words_cross_the_remote_shell_unchanged(fakes, shell):
    if not shutil.which(shell):
        pytest.skip(f"no {shell}")
    existing(fakes)
    done = fakes.run(TPU, "exec", *WHERE, "--", "printf", "%s\\0", *HOSTILE, REMOTE_SHELL=shell)
    assert done.stdout.split("\0")[:-1] == [*HOSTILE, *HOSTILE]


@pytest.mark.parametrize("status", [0, 2, 3, 75])
def test_a_run_ends_with_the_status_of_jxfer(fakes, status):
    existing(fakes)
    plan = {"*": {"status": status}}
    assert fakes.run(TPU, "run", *WHERE, "--", "ablate", plan=plan).returncode == status
    assert fakes.run(TPU, "logs", *WHERE, "--worker=1").returncode == status


def test_a_run_outlives_the_connection_and_is_stopped_on_request(fakes):
    existing(fakes)
    plan = {"*": {"seconds": 60}}
    done = fakes.signal(signal.SIGINT, TPU, "run", *WHERE, "--", "ablate", after=2, group=True, plan=plan)
    assert done.returncode != 0
    status = fakes.run(TPU, "status", *WHERE)
    assert len(re.findall(": running", status.stdout)) == 2
    again = fakes.run(TPU, "run", *WHERE, "--", "ablate")
    assert (again.returncode, "a run is under way" in again.stderr) == (1, True)
    stopped = fakes.run(TPU, "stop", *WHERE)
    assert len(re.findall("with status 75", stopped.stdout)) == 2
    assert fakes.signals_of("jxfer") == [signal.SIGTERM] * 2
    assert fakes.run(TPU, "logs", *WHERE).returncode == 75


def test_detached_it_returns_at_once(fakes):
    existing(fakes)
    begin = time.monotonic()
    assert fakes.run(TPU, "run", *WHERE, "--detach", "--", "ablate", plan={"*": {"seconds": 60}}).returncode == 0
    assert time.monotonic() - begin < 30
    assert verbs(fakes) == ["ssh all start"]


BEGUN = ["ssh all installed", *INSTALLED, "ssh all running", "ssh all start", "ssh 0 follow"]


@pytest.mark.parametrize(
    ("queue", "node", "expected"),
    [
        ("ACTIVE", "READY", []),
        ("SUSPENDED", "PREEMPTED", ["delete queued-resources", "create queued-resources"]),
        ("ACTIVE", "PREEMPTED", ["delete queued-resources", "create queued-resources"]),
        ("FAILED", None, ["delete queued-resources", "create queued-resources"]),
        ("WAITING_FOR_RESOURCES\nACTIVE", "CREATING\nREADY", []),
        (None, None, ["create queued-resources"]),
    ],
)
def test_resume_does_what_is_missing(fakes, queue, node, expected):
    existing(fakes, queue or "", node or "", installed=False)
    for name, state in (("queue", queue), ("node", node)):
        if state is None:
            (fakes.calls / name).unlink()
    done = fakes.run(TPU, "resume", *WHAT, "--spot", "--", *ARGS)
    assert done.returncode == 0, done.stderr
    assert verbs(fakes) == [*expected, *BEGUN]
    assert fakes.args_of("jxfer") == [ARGS, ARGS]


def test_resume_without_a_queue(fakes):
    existing(fakes, node="PREEMPTED")
    (fakes.calls / "queue").unlink()
    done = fakes.run(TPU, "resume", *WHAT, "--no-queue", "--spot", "--detach", "--", "ablate")
    assert done.returncode == 0, done.stderr
    assert verbs(fakes) == ["delete tpu-vm", "create tpu-vm", *BEGUN[:-1]]
    create = next(args for args in fakes.args_of("gcloud") if args[3] == "create")
    assert create[5:] == (
        *("--zone=us-east5-b", "--project=mine", "--accelerator-type=v6e-8", "--version=v2-alpha-tpuv6e", "--spot"),
    )


def test_resume_comes_back_to_what_runs(fakes):
    existing(fakes)
    plan = {"*": {"seconds": 2}}
    assert fakes.run(TPU, "run", *WHERE, "--detach", "--", "ablate", plan=plan).returncode == 0
    assert fakes.run(TPU, "resume", *WHAT, "--", "ablate").returncode == 0
    assert verbs(fakes)[1:] == ["ssh all installed", "ssh all running", "ssh 0 follow"]
    assert len(fakes.of("jxfer")) == 2


def test_until_done_a_preemption_starts_it_again(fakes):
    existing(fakes, node="READY\nPREEMPTED")
    done = fakes.run(TPU, "resume", *WHAT, "--until-done", "--", "ablate", plan={"*": {"status": 75}})
    assert done.returncode == 75  # the new TPU VM is READY: somebody stopped the run
    assert "left with status 75, and jxfer is PREEMPTED: again" in done.stderr
    assert verbs(fakes) == [
        *("ssh all installed", "ssh all running", "ssh all start", "ssh 0 follow"),
        *("delete queued-resources", "create queued-resources", *BEGUN, "ssh all running"),
    ]


def test_other_errors_of_gcloud_are_not_taken_for_absence(fakes):
    (fakes.programs / "gcloud").write_text("#!/bin/sh\necho 'ERROR: you have no account' >&2\nexit 1\n")
    done = fakes.run(TPU, "resume", *WHAT, "--", "ablate")
    assert (done.returncode, done.stderr) == (2, "tpu_vm.sh: error: ERROR: you have no account\n")


@pytest.mark.parametrize("command", ["create", "install", "run", "logs", "status", "stop", "resume", "exec", "delete"])
def test_a_dry_run_does_nothing_and_prints_what_a_shell_reads_back(fakes, command):
    words = ARGS if command in ("run", "resume", "exec") else ()
    dry = fakes.run(TPU, command, *WHAT, "--dry-run", "--", *words)
    assert dry.returncode == 0, dry.stderr
    assert not fakes.of("gcloud")
    (fakes.programs / "gcloud").write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    read = subprocess.run(
        ["bash", "-c", dry.stdout], env=fakes.environment(), capture_output=True, text=True, check=True
    )
    assert read.stdout.startswith("compute\0tpus\0")
    if command in ("run", "resume"):
        commands = re.findall(r"--command=(.*?)\0", read.stdout, re.DOTALL)
        start = next(words for words in map(shlex.split, commands) if words[1] == "start")
        assert start == ["jxfer/launch/tpu_worker.sh", "start", "--", *ARGS]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "unknown command ``"),
        (["creat"], "unknown command `creat`"),
        (["create"], "no zone; give --zone ZONE, or set JXFER_TPU_ZONE"),
        (["create", "--zone", "z"], "no type or version of the TPU VM"),
        (["status", "--zone", "z", "--name", "--help"], "--name takes lower-case letters"),
        (["status", "--zone"], "--zone needs a value"),
        (["run", "--zone", "z", "--env", "$(touch pwned)=1", "--", "x"], "--env takes NAME=VALUE"),
        (["run", "--zone", "z"], "nothing to run"),
        (["delete", "--zone", "z", "--", "x"], "`delete` takes nothing after `--`"),
        (["run", "--zone", "z", "ablate"], "unknown option `ablate`"),
    ],
)
def test_bad_input_is_one_line_and_status_2(fakes, args, message):
    done = fakes.run(TPU, *args)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr


def test_where_and_what_may_come_from_the_environment(fakes):
    variables = {"ZONE": "z", "TYPE": "t", "VERSION": "v", "NAME": "mine", "PROJECT": "p"}
    done = fakes.run(TPU, "create", "--dry-run", **{f"JXFER_TPU_{key}": value for key, value in variables.items()})
    assert "create mine --node-id=mine --zone=z --project=p --accelerator-type=t --runtime-version=v\n" in done.stdout
