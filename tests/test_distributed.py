"""Tests of jxfer/distributed.py and jxfer/peers.py: several processes train what one does, and end together."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
import pytest
import runs
from flax import nnx
from networks import make_batch
from processes import Ended

from jxfer import checkpoint, damage, distributed, sharding
from jxfer.checkpoint import Checkpoints
from jxfer.config import MeshConfig
from jxfer.distributed import Place, find_place
from jxfer.models.vit import ViT, ViTConfig
from jxfer.objectives import classification
from jxfer.partition import Partition, fingerprint
from jxfer.state import init_state, place_state
from jxfer.step import make_train_step
from jxfer.typing import InputError

EXPERIMENT = '''"""A small transformer, whose gradients have no kinks at which roundings would be amplified."""

from jxfer import methods
from jxfer.config import DataConfig, Experiment, ModelConfig, SourceConfig, TrainConfig

size = (("patch_size", "4"), ("hidden_dim", "16"), ("num_layers", "2"), ("num_heads", "2"), ("mlp_dim", "64"))
train = TrainConfig(
    num_steps=12, batch_size=12, optimizer="sgd", learning_rate=0.2, eval_every=4, log_every=2, checkpoint_every=2
)
experiment = Experiment(
    name="several",
    source=SourceConfig(DataConfig({source!r}), train),
    target=DataConfig({target!r}),
    model=ModelConfig("vit_ti_16", size=size),
    train=train,
    methods=(methods.scratch, methods.fine_tuning, methods.linear_probe, methods.logistic_probe),
    shots=(5,),
    seeds=1,
)
'''

RUN = "scratch-shots5-seed0"

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}


# Which process of how many.


@pytest.mark.parametrize(
    ("options", "environ", "place"),
    [
        ({}, {}, None),
        ({"coordinator": "host:1", "num_processes": "2", "process_id": "1"}, {}, Place(2, 1, "host:1")),
        (
            {},
            {"JXFER_COORDINATOR": "[::1]:1", "JXFER_NUM_PROCESSES": "2", "JXFER_PROCESS_ID": "0"},
            Place(2, 0, "[::1]:1"),
        ),
        ({"process_id": "1"}, {"JXFER_COORDINATOR": "host:1", "JXFER_NUM_PROCESSES": "2"}, Place(2, 1, "host:1")),
        ({"num_processes": "1"}, {}, None),
        ({"num_processes": "1"}, {"JXFER_COORDINATOR": "host:1", "JXFER_PROCESS_ID": "3"}, None),
        ({}, SLURM, Place(4, 3, "node03:61447")),
        ({}, SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, Place(4, 3, "node03:61447", (2, 3))),
        ({}, SLURM | {"CUDA_VISIBLE_DEVICES": "2,3", "SLURM_GPUS_PER_TASK": "2"}, Place(4, 3, "node03:61447")),
        (
            {},
            SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "3,1"},
            Place(4, 3, "node03:61447"),
        ),
        ({}, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({}, {name: value for name, value in SLURM.items() if not name.startswith("SLURM_STEP")}, None),
        ({"num_processes": "1"}, SLURM, None),
        ({}, SLURM | {"JXFER_NUM_PROCESSES": "1"}, None),
        ({"coordinator": "host:1", "num_processes": "2", "process_id": "1"}, SLURM, Place(2, 1, "host:1")),
    ],
    ids=[
        "nothing said",
        "options",
        "environment",
        "both",
        "alone",
        "alone whatever the environment says",
        "tasks of srun",
        "that share the GPUs of a node",
        "that have GPUs of their own",
        "one of which has a node for itself",
        "one task of a job array",
        "the script of sbatch itself",
        "independent tasks by an option",
        "independent tasks by the environment",
        "options in a task of srun",
    ],
)
def test_a_process_finds_its_place(monkeypatch, options, environ, place):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert find_place(options) == place


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"coordinator": "host:1"},
            r"--coordinator host:1 given, but no --num-processes .*NUM_PROCESSES\) and no --proc",
        ),
        ({"num_processes": "2", "process_id": "0"}, r"but no --coordinator \(or JXFER_COORDINATOR\)"),
        ({"num_processes": "1", "process_id": "1"}, "but no --coordinator"),
        ({"coordinator": "host:1", "num_processes": "2", "process_id": "2"}, "--process-id 2 is none of 2 processes"),
        ({"coordinator": "host", "num_processes": "2", "process_id": "0"}, "takes HOST:PORT of process 0, not `host`"),
        (
            {"coordinator": "host:1", "num_processes": "two", "process_id": "0"},
            "takes a whole number, 1 or more, not `t",
        ),
        (
            {"coordinator": "host:1", "num_processes": "0", "process_id": "0"},
            "takes a whole number, 1 or more, not `0`",
        ),
    ],
)
def test_settings_that_do_not_make_a_place_say_what_is_wrong(options, message):
    with pytest.raises(InputError, match=message):
        find_place(options)


class Cluster:
    """A cluster as jax's own detection describes one."""

    name, opt_in_only_method = "pod", False

    def __init__(self, count):
        self.get_process_count = lambda: count

    def is_env_present(self):
        return True

    def get_process_id(self):
        return 1

    def get_local_process_id(self):
        return None

    def get_coordinator_address(self, *, timeout_secs, override_coordinator_port):
        return f"worker-0:{override_coordinator_port or 8482}"


@pytest.mark.parametrize(("count", "place"), [(1, None), (4, Place(4, 1, "worker-0:8482"))])
def test_what_jax_knows_of_other_clusters_counts_and_one_host_waits_for_nobody(monkeypatch, count, place):
    from jax._src import clusters

    slurm = next(each for each in clusters.ClusterEnv._cluster_types if each.name == "slurm")
    monkeypatch.setattr(clusters.ClusterEnv, "_cluster_types", [slurm, Cluster(count)])
    assert find_place({}) == place


def test_a_cluster_that_does_not_answer_is_named_with_a_way_out(monkeypatch):
    from jax._src import clusters

    slurm = next(each for each in clusters.ClusterEnv._cluster_types if each.name == "slurm")
    broken = Cluster(2)
    broken.get_process_id = lambda: 1 // 0
    monkeypatch.setattr(clusters.ClusterEnv, "_cluster_types", [slurm, broken])
    with pytest.raises(InputError, match=r"does not say which process of how many .*--num-processes 1 to work"):
        find_place({})


def test_alone_a_process_talks_to_itself():
    assert (distributed.count(), distributed.index(), distributed.is_main()) == (1, 0, True)
    assert distributed.gather([1]) == [[1]]
    assert distributed.on_main(lambda: (1, 2)) == (1, 2)
    tree = {"a": jnp.ones(3)}
    assert distributed.everywhere(tree) is tree
    assert distributed.fetch(tree)["a"].tolist() == [1, 1, 1]
    distributed.barrier()


# Arrays and files of two processes.

MESHES = {
    "data": (MeshConfig(), [("**", "replicated")]),
    "fsdp": (MeshConfig(fsdp=8), [("**", "fsdp")]),
    "both": (MeshConfig(fsdp=2), [("**", "fsdp")]),
    "model": (MeshConfig(model=8), [("wide", "None,model"), ("**", "replicated")]),
}


def tensor(rule: str, **sizes: int) -> MeshConfig:
    rules = (("**", rule),)
    return MeshConfig(trainable=rules, frozen=rules, **sizes)


TENSOR = {"tensor": tensor("tensor", model=8), "tensor+fsdp": tensor("tensor+fsdp", model=4, fsdp=2)}

LIBRARY = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[2])
sys.path.insert(0, sys.argv[3])
from jxfer import distributed
distributed.start({})
import test_distributed
found = test_distributed.of_two_processes(folder)
(folder / f"{distributed.index()}.json").write_text(json.dumps(found))
"""


def make_state() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    arrays = {"wide": rng.normal(size=(16, 128)), "tall": rng.normal(size=(2048, 3)), "small": rng.normal(size=5)}
    params = {path: jnp.asarray(value, jnp.float32) for path, value in arrays.items()}
    return {"params": params, "step": jnp.int32(7), "key": jax.random.key(3)}


def placed(name: str, devices=None) -> tuple[Any, Any]:
    """Returns the mesh of a name and the state on it."""
    config, rules = MESHES[name]
    mesh, state = sharding.make_mesh(config, devices=devices), make_state()
    specs = sharding.param_specs(state["params"], rules, mesh)
    return mesh, sharding.place(state, sharding.state_shardings(state, specs, mesh))


def prints(state: Any) -> dict[str, str]:
    flat = {**state["params"], "step": state["step"], "key": state["key"]}
    return fingerprint(flat)


def trained(config: MeshConfig, devices=None) -> tuple[list[float], Any, Any]:
    """Returns the losses of three steps of a small transformer, the state after them, and the mesh."""
    mesh = sharding.make_mesh(config, devices=devices)
    model = ViT(ViTConfig(4, 32, 1, 8, 64), input_shape=(8, 8, 1), num_classes=5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    start = init_state(model, Partition.of(model, [("**", "all")]), optax.sgd(0.1, momentum=0.9))
    state, fixed = place_state(*start, mesh, config)
    train_step, own, losses = make_train_step(classification()), sharding.share_of(mesh, 8), []
    for seed in range(3):
        batch = own.put({name: np.asarray(value)[own.rows] for name, value in make_batch(8, seed=seed).items()})
        state, metrics = train_step(state, fixed, batch)
        losses.append(float(metrics["loss"]))
    return losses, state, mesh


def of_two_processes(folder: Path) -> dict[str, Any]:
    """What one of two processes with four devices each finds."""
    found: dict[str, Any] = {"prints": {}, "restored": {}, "shares": {}, "losses": {}, "split": {}}
    for name in MESHES:
        mesh, state = placed(name)
        found["prints"][name] = prints(state)
        with Checkpoints(folder / "one") as checkpoints:
            found["restored"][name] = prints(checkpoints.restore(state)[0])
        with Checkpoints(folder / f"two-{name}") as checkpoints:
            checkpoints.save(1, state, extra={"by": name})
            assert checkpoints.latest() == 1
        found["shares"][f"{name} usual"] = share(mesh)
        backwards = sharding.make_mesh(MESHES[name][0], devices=jax.devices()[::-1])
        found["shares"][f"{name} reversed"] = share(backwards)
    for name, config in TENSOR.items():
        found["losses"][name], moved, mesh = trained(config)
        with Checkpoints(folder / f"trained-{name}") as checkpoints:
            checkpoints.save(3, moved, extra={})
        together = {device.process_index for device in mesh.devices[0, 0]}
        shard = moved.params["blocks/0/mlp/up/kernel"].addressable_shards[0]
        found["split"][name] = [len(together), *shard.data.shape]
    checkpoint.save_arrays(folder / "weights", {**state["params"], "host": np.arange(3.0)}, metadata={"classes": []})
    found["gathered"] = distributed.gather(distributed.index())
    found["said"] = distributed.on_main(lambda: f"process {distributed.index()}")
    found["first"] = distributed.same({"x": np.float32([distributed.index()])})["x"].tolist()
    try:
        distributed.on_main(lambda: find_place({"coordinator": "here"}))
    except InputError as error:
        found["error"] = str(error)
    return found


def share(mesh: Any) -> dict[str, Any]:
    """Returns which rows of a batch of 13 this process reads, and what became of them on all devices."""
    own = sharding.share_of(mesh, 13)
    batch = own.put({"x": np.where(own.rows < 13, own.rows, 0), "mask": (own.rows < 13).astype(np.float32)})
    whole = sharding.share_of(mesh, 13, whole=True)
    every = distributed.fetch({**batch, "whole": whole.put({"x": whole.rows})["x"]})
    local = [shard.data.shape[0] for shard in batch["x"].addressable_shards]
    return {"rows": own.rows.tolist(), "local": local} | {name: value.tolist() for name, value in every.items()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """A folder with a checkpoint of this process and eight devices, and what two processes found, and left, there."""
    folder = tmp_path_factory.mktemp("pair")
    with Checkpoints(folder / "one") as checkpoints:
        checkpoints.save(1, placed("both")[1])
    for each in processes.run([str(folder), str(Path(__file__).parent)], devices=4, code=LIBRARY):
        assert each.status == 0, each.err
    return folder, [json.loads((folder / f"{index}.json").read_text()) for index in range(2)]


@pytest.mark.parametrize("name", MESHES)
def test_two_processes_restore_what_one_saved_whatever_their_mesh(pair, name):
    for found in pair[1]:
        assert found["restored"][name] == found["prints"][name] == prints(make_state())


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("name", MESHES)
def test_one_process_restores_what_two_saved_on_one_device_and_on_eight(pair, name, num_devices):
    mesh = "data" if num_devices == 1 else "both"
    with Checkpoints(pair[0] / f"two-{name}") as checkpoints:
        state, extra = checkpoints.restore(placed(mesh, jax.devices()[:num_devices])[1])
    assert prints(state) == prints(make_state())
    assert extra == {"by": name}


def test_the_weights_of_a_run_of_two_processes_are_whole(pair):
    arrays, _ = checkpoint.load_arrays(pair[0] / "weights")
    assert {path: value.tolist() for path, value in arrays.items()} == {
        **{path: np.asarray(value).tolist() for path, value in make_state()["params"].items()},
        "host": [0, 1, 2],
    }


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], Any, Any]:
    return trained(MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize(("name", "split"), [("tensor", [2, 32, 8]), ("tensor+fsdp", [1, 16, 16])])
def test_two_processes_train_a_transformer_that_the_model_axis_splits_as_one_device_does(pair, alone, name, split):
    losses, state, _ = alone
    for found in pair[1]:
        assert found["split"][name] == split, "over so many processes, and each device's part of a kernel"
        assert found["losses"][name] == pytest.approx(losses, rel=1e-5)
    with Checkpoints(pair[0] / f"trained-{name}") as checkpoints:
        restored, _ = checkpoints.restore(state)
    assert restored.params.keys() == state.params.keys()
    for path, value in state.params.items():
        np.testing.assert_allclose(restored.params[path], value, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", ["two-fsdp/1", "weights"])
def test_a_flipped_byte_of_what_two_processes_saved_is_named_whoever_wrote_the_file(pair, tmp_path, name, monkeypatch):
    saved = shutil.copytree(pair[0] / name, tmp_path / "copy")
    assert damage.damage_of(saved) is None
    for file in (file for file in damage.files_of(saved) if (saved / file).stat().st_size):
        content = (saved / file).read_bytes()
        middle = len(content) // 2
        (saved / file).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        assert damage.damage_of(saved) == f"'{file}' has other bytes than were written"
        (saved / file).write_bytes(content)
    parts = []
    for index in range(2):
        monkeypatch.setattr(distributed, "index", lambda index=index: index)
        parts.append(damage.checksums(saved).keys())
    assert not parts[0] & parts[1], "each reads what it has written"
    assert sorted(parts[0] | parts[1]) == damage.files_of(saved)
    assert parts[1] or name == "weights"


@pytest.mark.parametrize("order", ["usual", "reversed"])
@pytest.mark.parametrize("name", MESHES)
def test_each_process_reads_the_rows_that_its_devices_hold_and_together_they_are_the_batch(pair, name, order):
    shares = [found["shares"][f"{name} {order}"] for found in pair[1]]
    num_rows, parts = (13, 1) if name == "model" else (16, 8)
    batch = [row if row < 13 else 0 for row in range(num_rows)]
    halves = [list(range(num_rows))] * 2 if name == "model" else [list(range(8)), list(range(8, 16))]
    assert [each["rows"] for each in shares] == (halves if order == "usual" else halves[::-1])
    for each in shares:
        assert each["x"] == batch
        assert each["mask"] == [float(row < 13) for row in range(num_rows)]
        assert each["whole"] == list(range(num_rows))
        assert set(each["local"]) == {num_rows // parts}


def test_what_process_0_says_all_hear_its_errors_too(pair):
    for found in pair[1]:
        assert found["gathered"] == [0, 1]
        assert found["said"] == "process 0"
        assert found["first"] == [0.0]
        assert found["error"].startswith("--coordinator takes HOST:PORT of process 0, not `here`")


# The command line.


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> str:
    """The path of the experiment."""
    folder = tmp_path_factory.mktemp("experiment")
    source = runs.write_folder(folder / "source", runs.SOURCE_CLASSES)
    target = runs.write_folder(folder / "target", runs.TARGET_CLASSES)
    (folder / "several.py").write_text(EXPERIMENT.format(source=source, target=target))
    return str(folder / "several.py")


def scratch(experiment: str, out: Path, **settings) -> list[Ended]:
    return processes.run(["run", experiment, "--method", "scratch", "--out", str(out)], **settings)


def assert_done(ended: list[Ended]) -> None:
    for each in ended:
        assert each.status == 0, each.err


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory) -> Path:
    """The results of two processes that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    ended = scratch(experiment, out, devices=4)
    assert_done(ended)
    assert "after 12 steps" in ended[0].out
    assert "scratch" not in ended[1].out
    assert ended[1].err == "", "process 0 alone shows progress"
    return out


def finals(out: Path) -> dict[str, dict[str, np.ndarray]]:
    """Returns the weights of all finished runs."""
    folders = sorted(out.glob("**/checkpoints/final"))
    return {str(each.relative_to(out)): checkpoint.load_arrays(each)[0] for each in folders}


def logged(out: Path) -> dict[tuple[Any, ...], float]:
    """Returns every loss that was logged."""
    found = {}
    for file in sorted(out.glob("**/metrics.jsonl")):
        for row in map(json.loads, file.read_text().splitlines()):
            found[str(file.parent.relative_to(out)), row["phase"], row["variant"], row["split"], row["step"]] = row[
                "loss"
            ]
    return found


def assert_close(out: Path, expected: Path) -> None:
    """Asserts losses and weights equal but for the order of float32 sums, which a dozen steps carry on."""
    losses, weights = logged(out), finals(out)
    assert losses == pytest.approx(logged(expected), rel=1e-5)
    assert weights.keys() == finals(expected).keys() != set()
    for name, arrays in finals(expected).items():
        assert weights[name].keys() == arrays.keys()
        for path, value in arrays.items():
            np.testing.assert_allclose(weights[name][path], value, rtol=1e-5, atol=1e-6, err_msg=f"{name} {path}")


@pytest.mark.parametrize("num_devices", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_two_processes_train_what_one_does(experiment, whole, tmp_path, num_devices):
    assert_done(scratch(experiment, tmp_path, count=1, devices=num_devices))
    assert_close(whole, tmp_path)
    (row,), (expected,) = runs.rows_on_disk(whole), runs.rows_on_disk(tmp_path)
    assert row["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
    assert row["subset_hash"] == expected["subset_hash"]
    predictions = [np.load(each / "runs" / RUN / "predictions.npz") for each in (whole, tmp_path)]
    assert predictions[0]["ids"].tolist() == predictions[1]["ids"].tolist()
    np.testing.assert_allclose(predictions[0]["logits"], predictions[1]["logits"], atol=1e-5)


@pytest.fixture(scope="module")
def killed(experiment, tmp_path_factory) -> tuple[Path, list[Ended], float]:
    """What two processes leave of which one is killed, how they end, and how long the other one lives on."""
    out = tmp_path_factory.mktemp("killed")
    args = ["run", experiment, "--method", "scratch", "--out", str(out)]
    started = processes.start(args, event="kill:1:10")
    started[1].wait(timeout=240)
    since = time.monotonic()
    return out, processes.end(started), time.monotonic() - since


def test_a_killed_process_ends_the_job_with_a_word_of_which(killed):
    _, (survivor, victim), seconds = killed
    assert victim.status == -signal.SIGKILL
    assert survivor.status == 1
    assert f"process 1 of 2 is gone: no sign of life for {processes.LOST_SECS:.0f} s" in survivor.err
    assert "Traceback" not in survivor.err
    assert seconds < 60


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 1])
def test_the_restart_ends_as_if_nothing_had_happened_with_another_number_of_processes_too(
    experiment, killed, whole, tmp_path, count
):
    out = runs.copy_of(killed[0], tmp_path / "copy")
    steps = [int(path.parent.name) for path in out.glob("runs/*/checkpoints/*/0/*/manifest.json")]
    assert 0 < max(steps) < 12, "it was killed on the way"
    assert_done(scratch(experiment, out, count=count))
    assert_close(out, whole)


@pytest.mark.parametrize(
    ("event", "status", "message"),
    [
        ("raise:1:6", 1, "OSError: the disk is on fire"),
        pytest.param("refuse:1:6", 2, "this example cannot be read", marks=pytest.mark.slow),
        pytest.param("refuse:0:6", 2, "this example cannot be read", marks=pytest.mark.slow),
    ],
)
def test_an_error_in_one_process_ends_the_other_which_says_whose_it_was(experiment, tmp_path, event, status, message):
    ended = scratch(experiment, tmp_path, event=event, devices=1)
    assert [each.status for each in ended] == [status, status]
    culprit = int(event.split(":")[1])
    assert message in ended[culprit].err
    assert f"jxfer: process {culprit} of 2 failed: {message}" in ended[1 - culprit].err
    assert "Traceback" not in ended[1 - culprit].err


@pytest.mark.slow
def test_a_killed_process_0_takes_the_others_with_it_in_the_words_of_jax(experiment, tmp_path):
    victim, survivor = scratch(experiment, tmp_path, event="kill:0:6", devices=1)
    assert victim.status == -signal.SIGKILL
    assert survivor.status not in (0, 2, 75)
    assert "another task died" in survivor.err or "process 0 of 2 is gone" in survivor.err


@pytest.mark.parametrize("target", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_sigterm_to_one_process_stops_both_after_the_same_step(experiment, tmp_path, target):
    args = ["run", experiment, "--method", "scratch", "--train.num_steps", "100000", "--out", str(tmp_path)]
    started = processes.start(args, devices=1)
    metrics = tmp_path / "runs" / RUN / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and '"validation"' in metrics.read_text()):
        assert time.monotonic() < deadline
        assert started[0].poll() is None
        time.sleep(0.05)
    started[target].send_signal(signal.SIGTERM)
    sent = time.monotonic()
    ended = processes.end(started)
    assert time.monotonic() - sent < 30
    assert [each.status for each in ended] == [75, 75]
    assert "run the same command again to continue" in ended[0].err
    assert ended[1].err == ""
    step = int(ended[0].err.split("stopped after step ")[1].split()[0])
    assert (tmp_path / "runs" / RUN / "checkpoints" / "default" / "0" / str(step) / "manifest.json").exists()


def test_sigterm_to_one_process_while_plans_are_made_ends_both_at_once(experiment, tmp_path):
    ended = scratch(experiment, tmp_path, event="terminate:1:-1", devices=1)
    assert [each.status for each in ended] == [75, 75]
    assert "process 1 of 2 failed: stopped while plans were being made" in ended[0].err
    assert "Traceback" not in ended[0].err + ended[1].err
    assert not (tmp_path / "runs").exists()


def test_what_is_wrong_for_all_is_said_once(experiment, tmp_path):
    ended = processes.run(["run", experiment, "--method", "scrach", "--out", str(tmp_path)], devices=1)
    assert [each.status for each in ended] == [2, 2]
    assert ended[0].err.startswith("jxfer: error: unknown method `scrach`; nearest: `scratch`")
    assert ended[1].err == ""


START = """
import sys
from jxfer import distributed
distributed.START_SECS = int(sys.argv.pop(1))
from jxfer.cli import main
sys.exit(main())
"""


def start_one(process_id: int, port: int, secs: int = 2) -> subprocess.CompletedProcess:
    """Runs a command as one of two processes of which the other one never comes."""
    place = ["--coordinator", f"localhost:{port}", "--num-processes", "2", "--process-id", str(process_id)]
    command = [sys.executable, "-c", START, str(secs), "run", "experiment.py", "--method", "scratch", *place]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize(
    ("process_id", "message"),
    [
        (0, "jxfer: error: process 0 of 2 waited 2 s at localhost:{}, and not all others came"),
        (1, "jxfer: error: process 1 of 2 had no answer from process 0 at localhost:{} for 2 s (Connection refused)"),
    ],
)
def test_a_process_that_waits_in_vain_says_where_and_ends_with_2(process_id, message):
    port = processes.free_port()
    ended = start_one(process_id, port)
    assert ended.returncode == 2
    assert message.format(port) in ended.stderr


def test_a_port_that_is_taken_is_named():
    import socket

    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        ended = start_one(0, port)
    assert ended.returncode == 2
    assert f"process 0 cannot listen at localhost:{port}: Address already in use; choose another port" in ended.stderr


@pytest.mark.slow  # an ablation of all kinds of phases, four times
@pytest.mark.parametrize(
    ("mesh", "cache"),
    [
        ([], "cache"),
        (["--mesh.fsdp", "4"], "cache-of-{process}"),
        (["--mesh.model", "2", "--mesh.fsdp", "2", "--mesh.trainable", "**=tensor+fsdp"], "cache"),
    ],
    ids=["data", "fsdp, own caches", "tensor+fsdp"],
)
def test_an_ablation_of_two_processes_is_that_of_one(experiment, tmp_path, mesh, cache):
    search = ["--search.learning_rate", "0.2,0.3", "--methods", "fine_tuning,linear_probe,logistic_probe"]
    args = ["ablate", experiment, *mesh, *search]
    for name, settings in {"two": {"count": 2, "devices": 2}, "one": {"count": 1, "devices": 4}}.items():
        env = {"JXFER_CACHE": str(tmp_path / f"{name}-{cache}")}
        ended = processes.run([*args, "--out", str(tmp_path / name)], env=env, **settings)
        assert_done(ended)
        assert "Test accuracy in %" in ended[0].out
    rows, expected = ({row["method"]: row for row in runs.rows_on_disk(tmp_path / name)} for name in ("two", "one"))
    for method, row in expected.items():
        assert rows[method]["metrics"] == pytest.approx(row["metrics"], rel=1e-4), method
        assert rows[method]["features"]["computed"] == row["features"]["computed"], method
    shutil.rmtree(tmp_path / "two" / "runs" / "logistic_probe-shots5-seed0")  # a path of solutions is less exact
    shutil.rmtree(tmp_path / "one" / "runs" / "logistic_probe-shots5-seed0")
    assert_close(tmp_path / "two", tmp_path / "one")
    assert (tmp_path / "two" / "report.html").exists()
    stores = [sorted(folder.glob("features/*/*.array_record")) for folder in tmp_path.glob("two-*")]
    assert [len(files) for files in stores] == ([1] if cache == "cache" else [1, 1])
