"""The launchers for schedulers: slurm.sbatch with fake programs, and what the YAML files promise."""

import re
import shlex
import signal
import socket
import subprocess
import time
import venv

import pytest
import yaml
from fakes import ARGS, LAUNCH, Fakes

SLURM = LAUNCH / "slurm.sbatch"


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield Fakes(tmp_path, "jxfer", "srun", "scontrol")
    assert not list(tmp_path.rglob("pwned"))


def slurm(fakes, *args, **options):
    return fakes.run(SLURM, *args, SLURM_JOB_ID="41", **options)


def test_a_job_is_one_run_over_its_tasks(fakes):
    done = slurm(fakes, "--", *ARGS, SLURM_CPUS_PER_TASK="6")
    assert done.returncode == 0, done.stderr
    assert fakes.args_of("srun") == [("--label", "--kill-on-bad-exit=0", "--wait=60", "jxfer", *ARGS)]
    assert fakes.args_of("jxfer") == [ARGS]
    assert fakes.of("jxfer")[0]["env"] == {"SRUN_CPUS_PER_TASK": "6"}
    assert not fakes.of("scontrol")


ARRAY = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "7"}


def test_a_job_of_an_array_is_a_worker(fakes):
    assert slurm(fakes, "--", *ARGS, **ARRAY).returncode == 0
    assert fakes.args_of("srun") == [("--nodes=1", "--ntasks=1", "jxfer", *ARGS)]
    assert fakes.of("jxfer")[0]["env"] == {"JXFER_NUM_PROCESSES": "1"}


@pytest.mark.parametrize(("variables", "job"), [({}, "41"), (ARRAY, "40_7")])
@pytest.mark.parametrize("status", [0, 2, 3, 75, 143])
def test_a_job_that_was_stopped_goes_back_to_the_queue(fakes, variables, job, status):
    done = slurm(fakes, "--", "ablate", plan={"*": {"status": status}}, **variables)
    assert done.returncode == status
    assert fakes.args_of("scontrol") == ([("requeue", job)] if status in (75, 143) else [])


def test_a_job_that_was_cancelled_does_not(fakes):
    plan = {"*": {"seconds": 60}}
    done = fakes.signal(signal.SIGTERM, SLURM, "--", "x", after=1, group=True, plan=plan, SLURM_JOB_ID="1")
    assert fakes.signals_of("jxfer") == [signal.SIGTERM]
    assert done.returncode != 0
    assert not fakes.of("scontrol")


def test_the_directives_ask_for_a_signal_in_time_and_for_the_queue():
    head, _, _ = SLURM.read_text().partition("\nset -euo pipefail\n")  # sbatch reads up to the first command
    directives = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", head, re.MULTILINE)
    assert ("signal", "TERM@120") in directives
    assert ("requeue", "") in directives
    assert ("open-mode", "append") in directives
    assert len(directives) == SLURM.read_text().count("#SBATCH")


def test_slurm_is_rehearsed_without_slurm(fakes):
    dry = fakes.run(SLURM, "--dry-run", "--", *ARGS)
    commands = "\n".join(line for line in dry.stdout.splitlines() if "requeue" not in line)
    assert "scontrol requeue" in dry.stdout
    subprocess.run(["bash", "-c", commands], env=fakes.environment(), check=True, capture_output=True)
    assert fakes.args_of("jxfer") == [ARGS, ARGS]
    done = fakes.run(SLURM, "--", *ARGS)
    assert (done.returncode, "submit it with sbatch" in done.stderr) == (2, True)


def job_sets():
    documents = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    return {each["metadata"]["labels"]["shape"]: each for each in documents}


def pods(shape):
    """Returns of a JobSet: the spec of its one job, its container, and the container's literal environment."""
    (replicated,) = job_sets()[shape]["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return job, container, {item["name"]: item.get("value") for item in container["env"]}


@pytest.mark.parametrize("shape", ["gpu-nodes", "tpu-slice", "workers"])
def test_pods_run_jxfer_without_a_shell_and_have_time_to_save(shape):
    assert job_sets().keys() == {"gpu-nodes", "tpu-slice", "workers"}
    assert job_sets()[shape]["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    job, container, environment = pods(shape)
    assert (container["command"], container["args"][0]) == (["jxfer"], "ablate")
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 60
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    out = container["args"][container["args"].index("--out") + 1]
    assert {out.split("/")[1], environment["JXFER_CACHE"].split("/")[1]} == {"shared"}
    assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]


@pytest.mark.parametrize("shape", ["gpu-nodes", "tpu-slice", "workers"])
def test_pods_end_and_return_by_their_exit_status(shape):
    job, container, _ = pods(shape)
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # else podFailurePolicy is refused
    actions = {}
    for rule in job["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == container["name"]
            actions |= dict.fromkeys(rule["onExitCodes"]["values"], rule["action"])
        else:
            assert rule == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert actions == {75: "Ignore", 2: "FailJob", 3: "FailIndex" if shape == "workers" else "FailJob"}
    if shape == "workers":
        assert job["backoffLimitPerIndex"] > 0  # what FailIndex asks for
    else:
        policy = job_sets()[shape]["spec"]["failurePolicy"]
        assert (job["backoffLimit"], policy["maxRestarts"] > 0) == (0, True)
        assert (policy["rules"][0]["action"], policy["rules"][0]["onJobFailureReasons"]) == (
            "FailJobSet",
            ["PodFailurePolicy"],
        )


def test_pods_find_each_other_or_know_that_they_are_alone():
    job, container, environment = pods("gpu-nodes")
    assert job_sets()["gpu-nodes"]["spec"]["coordinator"] == {"replicatedJob": "run"}
    assert job_sets()["tpu-slice"]["spec"]["coordinator"] == {"replicatedJob": "run"}
    assert list(environment).index("COORDINATOR_HOST") < list(environment).index("JXFER_COORDINATOR")
    assert environment["JXFER_COORDINATOR"] == f"$(COORDINATOR_HOST):{container['ports'][0]['containerPort']}"
    assert environment["JXFER_NUM_PROCESSES"] == str(job["completions"])
    references = {
        item["name"]: item["valueFrom"]["fieldRef"]["fieldPath"] for item in container["env"] if "valueFrom" in item
    }
    assert "jobset.sigs.k8s.io/coordinator" in references["COORDINATOR_HOST"]
    assert "batch.kubernetes.io/job-completion-index" in references["JXFER_PROCESS_ID"]
    assert not {name for name in pods("tpu-slice")[2] if "PROCESS" in name or "COORDINATOR" in name}
    assert pods("workers")[2]["JXFER_NUM_PROCESSES"] == "1"


@pytest.mark.parametrize("shape", ["gpu-nodes", "tpu-slice"])
def test_pods_of_a_run_wait_until_all_have_a_machine(shape, monkeypatch):
    job, _, _ = pods(shape)
    (waiting,) = job["template"]["spec"]["initContainers"]
    num_pods = next(item["value"] for item in waiting["env"] if item["name"] == "NUM_PODS")
    assert int(num_pods) == job["completions"]
    asked, python, _, program = [], *waiting["command"]

    def resolve(name):
        asked.append(name)
        if len(asked) == 2:
            raise OSError("not yet")

    monkeypatch.setattr(socket, "gethostbyname", resolve)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("COORDINATOR_HOST", "jxfer-gpu-run-0-0.jxfer-gpu.space")
    monkeypatch.setenv("NUM_PODS", "2")
    exec(program, {})
    names = [f"jxfer-gpu-run-0-{index}.jxfer-gpu.space" for index in (0, 1, 1)]
    assert (python, asked) == ("python", names)


def test_a_managed_job_returns_when_it_was_stopped():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert task["file_mounts"]["/bucket"] == {"source": "${BUCKET}", "mode": "MOUNT_CACHED"}
    subprocess.run(["bash", "-n", "-c", task["setup"]], check=True)


@pytest.mark.parametrize(
    ("nodes", "extra", "expected"),
    [
        ("1", "cuda", {}),
        ("2", "tpu", {}),
        (
            "2",
            "cuda",
            {"JXFER_COORDINATOR": "10.0.0.1:8476", "JXFER_NUM_PROCESSES": "2", "JXFER_PROCESS_ID": "1"},
        ),
    ],
)
def test_a_managed_job_hands_on_its_arguments_unexecuted(fakes, tmp_path, nodes, extra, expected):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    venv.create(tmp_path / "jxfer-venv", symlinks=True)
    (tmp_path / "jxfer-venv" / "bin" / "jxfer").symlink_to(fakes.programs / "jxfer")
    variables = {"SKYPILOT_NUM_NODES": nodes, "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    variables |= {"JXFER_EXTRA": extra, "JXFER_ARGS": shlex.join(ARGS), "HOME": str(tmp_path)}
    environment = fakes.environment(plan={"1": {"status": 75}}, **variables)
    done = subprocess.run(["bash", "-c", task["run"]], env=environment, capture_output=True)
    assert fakes.args_of("jxfer") == [ARGS]
    environment = fakes.of("jxfer")[0]["env"]
    assert {key: environment[key] for key in environment if key not in ("JXFER_EXTRA", "JXFER_ARGS")} == expected
    assert done.returncode == (75 if expected else 0)
