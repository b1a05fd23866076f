"""The launchers, their README, and local.sh: rehearsed with a fake jxfer, and once with the real one."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import ARGS, LAUNCH, ROOT, Fakes

LOCAL, SLURM = LAUNCH / "local.sh", LAUNCH / "slurm.sbatch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), SLURM])


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield Fakes(tmp_path, "jxfer")
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_whole_and_stop_at_errors(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert "\nset -euo pipefail\n" in script.read_text()
    assert os.access(script, os.X_OK)


def test_shellcheck_has_nothing_to_say():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", *SCRIPTS, ROOT / ".ci" / "run"], capture_output=True, text=True)
    assert checked.stdout == ""


def test_the_processes_of_a_run_get_the_same_arguments_and_find_each_other(fakes):
    done = fakes.run(LOCAL, "-n", "3", "--devices=2", "--", *ARGS)
    assert done.returncode == 0, done.stderr
    calls = fakes.of("jxfer")
    assert fakes.args_of("jxfer") == [ARGS] * 3
    assert sorted(call["env"].pop("JXFER_PROCESS_ID") for call in calls) == ["0", "1", "2"]
    environment = calls[0]["env"]
    assert all(call["env"] == environment for call in calls)
    host, port = environment.pop("JXFER_COORDINATOR").split(":")
    with socket.create_server((host, int(port))):
        pass  # it was free
    assert environment == {"JXFER_NUM_PROCESSES": "3", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}


def test_workers_are_each_on_their_own(fakes):
    done = fakes.run(LOCAL, "--workers", "3", "--", *ARGS)
    assert done.returncode == 0, done.stderr
    assert fakes.args_of("jxfer") == [ARGS] * 3
    assert [call["env"] for call in fakes.of("jxfer")] == [{"JXFER_NUM_PROCESSES": "1"}] * 3


def test_each_process_gets_gpus_of_its_own(fakes):
    done = fakes.run(LOCAL, "-w", "2", "-g", "2", "--", "run", CUDA_VISIBLE_DEVICES="7,5,3,1,0")
    assert done.returncode == 0, done.stderr
    assert sorted(call["env"]["CUDA_VISIBLE_DEVICES"] for call in fakes.of("jxfer")) == ["3,1", "7,5"]
    done = fakes.run(LOCAL, "-w", "3", "-g", "2", "--", "run", CUDA_VISIBLE_DEVICES="7,5,3,1,0")
    assert (done.returncode, done.stderr) == (2, "local.sh: error: 3 × 2 GPUs are more than the 5 there are\n")


def test_every_line_says_whose_it_is_on_the_stream_it_came_by(fakes):
    done = fakes.run(LOCAL, "--", "run")
    assert sorted(done.stdout.splitlines()) == ["[0] out of 0", "[1] out of 1"]
    assert sorted(done.stderr.splitlines()) == ["[0] err of 0", "[1] err of 1"]


@pytest.mark.parametrize("status", [1, 2, 3, 75])
def test_a_process_that_fails_ends_the_run_with_its_status(fakes, status):
    plan = {"0": {"seconds": 60}, "1": {"status": status, "seconds": 0.3}}
    done = fakes.run(LOCAL, "--grace", "2", "--", "run", plan=plan)
    assert done.returncode == status
    assert f"local.sh: process 1 ended with status {status}\n" in done.stderr
    assert fakes.signals_of("jxfer") == [signal.SIGTERM]


def test_what_does_not_end_in_time_is_killed(fakes):
    plan = {"0": {"seconds": 60, "stubborn": True}, "1": {"status": 3, "seconds": 0.3}}
    done = fakes.run(LOCAL, "--grace", "1", "--", "run", plan=plan)
    assert done.returncode == 3
    assert "killing what did not end within 1 s" in done.stderr


def test_workers_outlive_one_that_fails(fakes):
    plan = {"*": {"status": 3, "seconds": 0.5}}
    done = fakes.run(LOCAL, "-w", "2", "--", "ablate", plan=plan)
    assert done.returncode == 3
    assert not [call for call in fakes.of("jxfer") if "signal" in call]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("group", [False, True], ids=["kill", "ctrl-c"])
def test_a_signal_reaches_every_process_once(fakes, number, group):
    plan = {"*": {"seconds": 60}}
    done = fakes.signal(number, LOCAL, "-n", "2", "--", "run", plan=plan, after=2, group=group)
    assert done.returncode == 75, done.stderr
    expected = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
    assert fakes.signals_of("jxfer") == [expected, expected]
    assert "[1] out of 1" in done.stdout


def test_a_process_that_was_not_ready_for_the_signal_has_lost_nothing(fakes):
    plan = {"*": {"seconds": 60, "unprepared": True}}
    done = fakes.signal(signal.SIGTERM, LOCAL, "--", "run", plan=plan, after=2)
    assert done.returncode == 75, done.stderr


def test_a_dry_run_prints_commands_that_do_the_same(fakes):
    dry = fakes.run(LOCAL, "-n", "2", "-d", "4", "--port", "45678", "--dry-run", "--", *ARGS)
    assert not fakes.of("jxfer")
    subprocess.run(["bash", "-c", f"{dry.stdout}wait"], env=fakes.environment(), check=True, capture_output=True)
    calls = fakes.of("jxfer")
    assert fakes.args_of("jxfer") == [ARGS] * 2
    assert {call["env"]["JXFER_PROCESS_ID"] for call in calls} == {"0", "1"}
    assert {call["env"]["JXFER_COORDINATOR"] for call in calls} == {"127.0.0.1:45678"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no `--` before the arguments of jxfer"),
        (["--"], "no arguments of jxfer after `--`"),
        (["-n", "0", "--", "run"], "-n takes a whole number from 1, not `0`"),
        (["-n"], "-n takes a whole number from 1, not ``"),
        (["-n", "a[$(touch pwned)]", "--", "run"], "-n takes a whole number"),
        (["ablate", "x.py"], "unknown option `ablate`"),
        (["-d", "2", "-g", "1", "--", "run"], "give either them or --gpus"),
    ],
)
def test_bad_input_is_one_line_and_status_2(fakes, args, message):
    done = fakes.run(LOCAL, *args)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr


def shown_commands():
    """Returns the commands of the launchers that README files show, as words."""
    text = (LAUNCH / "README.md").read_text() + (ROOT / "README.md").read_text()
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    return [shlex.split(line) for line in blocks.splitlines() if re.match(r"\s*launch/\S+ ", line)]


def test_the_commands_that_the_readme_shows_are_understood(fakes):
    commands = shown_commands()
    assert {Path(script).name for script, *_ in commands} == {"local.sh", "tpu_vm.sh", "slurm.sbatch"}
    variables = {"JXFER_TPU_ZONE": "z", "JXFER_TPU_TYPE": "v6e-16", "JXFER_TPU_VERSION": "v"}
    variables |= {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
    for script, *words in commands:
        words = [word.replace("$i", "0") for word in words if word != "--dry-run"]
        words.insert("tpu_vm" in script, "--dry-run")
        done = fakes.run(ROOT / script, *words, **variables)
        assert done.returncode == 0, (script, words, done.stderr)
        assert done.stdout


EXPERIMENT = '''"""A rehearsal."""
from jxfer import methods
from jxfer.config import Experiment, SourceConfig, TrainConfig

train = TrainConfig(num_steps=4, batch_size=16, eval_every=2, log_every=2, checkpoint_every=2)
experiment = Experiment(
    name="rehearsal",
    source=SourceConfig(train=train),
    train=train,
    methods=(methods.scratch, methods.linear_probe),
    shots=(1,),
    seeds=1,
)
'''


@pytest.mark.slow
@pytest.mark.parametrize("mode", [("-n", "2", "-d", "2"), ("--workers", "2")], ids=["run", "workers"])
def test_the_real_command_goes_through_a_rehearsal(tmp_path, monkeypatch, mode):
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "bin" / "jxfer"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom jxfer.cli import main\nsys.exit(main())\n")
    program.chmod(0o755)
    (tmp_path / "rehearsal.py").write_text(EXPERIMENT)
    environment = {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "XLA_FLAGS": ""}
    environment["PYTHONPATH"] = str(ROOT)
    command = [LOCAL, *mode, "--", "ablate", "rehearsal.py", "--out", "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert sorted((row["method"], row["status"]) for row in rows) == [("linear_probe", "ok"), ("scratch", "ok")]
    assert (tmp_path / "out" / "report.html").exists()
