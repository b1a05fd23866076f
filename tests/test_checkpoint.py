"""Tests of jxfer/checkpoint.py: what is saved comes back whole, on any device count, and nothing half-written does."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jxfer import checkpoint, sharding
from jxfer.checkpoint import Checkpoints
from jxfer.config import MeshConfig
from jxfer.damage import read_manifest, set_aside
from jxfer.typing import InputError

TX = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.partition(
        {"head": optax.inject_hyperparams(optax.adamw)(1e-3), "top": optax.sgd(1e-2, momentum=0.9)},
        lambda params: {path: "head" if path.startswith("head") else "top" for path in params},
    ),
)

SAVER = """
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
from jxfer.checkpoint import Checkpoints

def state_at(step):
    arrays = {f"layer{i}/kernel": jnp.full((32, 32), step * 100.0 + i) for i in range(12)}
    return {"step": jnp.int32(step), "params": arrays, "key": jax.random.key(step)}

if __name__ == "__main__":
    with Checkpoints(Path(sys.argv[1])) as checkpoints:
        step = (checkpoints.latest() or 0) + 1
        while True:
            checkpoints.save(step, state_at(step), extra={"position": step})
            step += 1
"""


def make_state(seed: int = 0) -> dict[str, Any]:
    """Returns a state of all that a run keeps: twelve layers, Optax state, step, typed key, average, numbers."""
    rng = np.random.default_rng(seed)
    params = {f"layer{i}/kernel": jnp.asarray(rng.normal(size=(32, 64)), jnp.float32) for i in range(12)}
    params["head/kernel"] = jnp.asarray(rng.normal(size=(64, 8)), jnp.bfloat16)
    return {
        "step": jnp.int32(seed),
        "params": params,
        "opt_state": TX.init(params),
        "ema": {},
        "key": jax.random.key(seed),
        "none": None,
    }


def assert_equal(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.array_equal(np.asarray(a), np.asarray(b))


def place_on(num_devices: int, state: Any) -> Any:
    mesh = sharding.make_mesh(MeshConfig(fsdp=num_devices), devices=jax.devices()[:num_devices])
    specs = sharding.param_specs(state["params"], [("**", "fsdp")], mesh)
    return sharding.place(state, sharding.state_shardings(state, specs, mesh))


def save(directory: Path, steps: dict[int, float | None], **options: Any) -> Checkpoints:
    """Saves a small state at each step, with that accuracy."""
    with Checkpoints(directory, **options) as checkpoints:
        for step, accuracy in steps.items():
            metrics = {} if accuracy is None else {"accuracy": accuracy}
            checkpoints.save(step, {"w": jnp.full((4,), step)}, metrics=metrics)
    return checkpoints


def test_a_whole_state_comes_back_bit_for_bit_with_its_extra(tmp_path):
    state = make_state(3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, metrics={"accuracy": np.float64(0.5)}, extra={"position": 17, "phase": "probe"})
    restored, extra = Checkpoints(tmp_path).restore(make_state(0))
    assert_equal(restored, state)
    assert extra == {"position": 17, "phase": "probe"}


def test_what_is_saved_is_what_was_given_whatever_becomes_of_it_afterwards(tmp_path):
    best = {"steps": [2, 2]}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, make_state(), extra=best)
        best["steps"][0] = 4  # before the background thread has written anything
        assert checkpoints.restore(make_state())[1] == {"steps": [2, 2]}


@pytest.mark.parametrize("last_call", [1, 2])
def test_a_save_that_is_no_longer_allowed_neither_counts_nor_removes_others(tmp_path, last_call):
    calls = []

    def guard() -> None:
        calls.append(None)
        if len(calls) == last_call:
            raise RuntimeError("another's by now")

    save(tmp_path, {1: None, 2: None})
    with pytest.raises(RuntimeError, match="another's by now"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, {"w": jnp.zeros(4)}, guard=guard)
    assert Checkpoints(tmp_path).steps() == [1, 2]
    assert (tmp_path / "3").exists() == (last_call == 2)


def test_twelve_layers_come_back_in_their_places(tmp_path):
    layers = {"layers": [jnp.full((2,), float(i)) for i in range(12)]}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, layers)
    restored, _ = checkpoints.restore(layers)
    assert [float(layer[0]) for layer in restored["layers"]] == list(range(12))


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8), (8, 2)])
def test_a_state_saved_on_some_devices_is_restored_on_others(tmp_path, before, after):
    state = make_state(5)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, place_on(before, state))
    template = place_on(after, make_state(0))
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), template)
    for given in (template, abstract):
        restored, _ = checkpoints.restore(given)
        assert_equal(restored, state)
        assert jax.tree.map(lambda a: a.sharding, restored) == jax.tree.map(lambda a: a.sharding, template)
    assert restored["params"]["layer1/kernel"].addressable_shards[0].data.shape == (32, 64 // after)


def test_donating_the_state_right_after_save_is_safe(tmp_path):
    overwrite = jax.jit(lambda params: {path: leaf * 0 - 1 for path, leaf in params.items()}, donate_argnums=0)
    with Checkpoints(tmp_path, keep_last=10) as checkpoints:
        for step in range(1, 6):
            params = {f"w{i}": jnp.full((256, 256), float(step)) for i in range(8)}
            checkpoints.save(step, params)
            for _ in range(3):
                params = overwrite(params)
    for step in range(1, 6):
        restored, _ = checkpoints.restore(params, step=step)
        assert all((np.asarray(leaf) == step).all() for leaf in restored.values())


def test_numbers_numpy_and_empty_arrays_come_back_as_they_were(tmp_path):
    state = {"int": 3, "numpy": np.float32(2.5), "host": np.arange(3), "empty": jnp.zeros((0, 3)), "flag": True}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    template = {"int": 0, "numpy": np.float32(0), "host": np.zeros(3, int), "empty": jnp.ones((0, 3)), "flag": False}
    restored, _ = checkpoints.restore(template)
    assert {name: type(leaf) for name, leaf in restored.items()} == {name: type(leaf) for name, leaf in state.items()}
    assert (restored["int"], restored["numpy"], restored["flag"]) == (3, 2.5, True)
    assert restored["host"].tolist() == [0, 1, 2]
    assert restored["empty"].shape == (0, 3)


def test_a_relative_directory_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert save(Path("run/checkpoints"), {1: None}).latest() == 1
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == 1


def test_the_newest_and_the_best_stay(tmp_path):
    checkpoints = save(tmp_path, {1: 0.1, 2: 0.9, 3: 0.9, 4: 0.2, 5: None, 6: float("nan")})
    assert checkpoints.steps() == [2, 5, 6]
    assert (checkpoints.best(), checkpoints.latest()) == (2, 6)
    assert {entry.name for entry in tmp_path.iterdir()} == {"2", "5", "6"}


def test_without_the_best_only_the_newest_stay(tmp_path):
    checkpoints = save(tmp_path, {1: 0.9, 2: 0.1, 3: 0.2}, keep_last=1, keep_best=False)
    assert checkpoints.steps() == [3]


def test_saving_a_step_again_replaces_it(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for value in (1.0, 2.0):
            checkpoints.save(7, {"w": jnp.full((4,), value)})
    restored, _ = checkpoints.restore({"w": jnp.zeros((4,))})
    assert restored["w"].tolist() == [2.0] * 4


def test_an_empty_or_absent_directory_has_no_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path / "absent")
    assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == ([], None, None)
    with pytest.raises(InputError, match=r"no whole checkpoint in .*absent; steps there: none"):
        checkpoints.restore({"w": jnp.zeros(4)})
    assert not (tmp_path / "absent").exists()


def data_files(directory: Path) -> list[Path]:
    return [file for file in directory.rglob("*") if file.is_file()]


def test_a_checkpoint_with_any_file_missing_or_cut_short_is_not_whole(tmp_path):
    save(tmp_path / "good", {1: None, 2: None})
    names = [str(file.relative_to(tmp_path / "good")) for file in data_files(tmp_path / "good" / "2")]
    assert len(names) >= 5
    for name in names:
        for damage in ("missing", "cut"):
            shutil.copytree(tmp_path / "good", tmp_path / "bad")
            file = tmp_path / "bad" / name
            if damage == "missing":
                file.unlink()
            else:
                file.write_bytes(file.read_bytes()[:-1])
            empty = damage == "cut" and (tmp_path / "good" / name).stat().st_size == 0
            assert Checkpoints(tmp_path / "bad").latest() == (2 if empty else 1), (name, damage)
            shutil.rmtree(tmp_path / "bad")


def test_whatever_byte_of_a_manifest_is_flipped_it_is_named_or_says_what_it_said(tmp_path):
    folder = tmp_path / "checkpoints" / "default" / "0"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"w": jnp.zeros(4)}, metrics={"accuracy": 0.5}, extra={"best_step": 0})
    file, expected = folder / "2" / "manifest.json", read_manifest(folder / "2")
    content, notes = file.read_bytes(), []
    for position in range(len(content)):
        file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        set_aside(tmp_path, notes.append)
        if file.exists():
            assert expected.items() <= read_manifest(folder / "2").items(), "the name of its checksum"
        else:
            assert f"{folder / '2'}' is damaged: 'manifest.json' has other bytes" in notes.pop()
            assert Checkpoints(folder).latest() == 1
    assert notes == []


def test_leftovers_of_a_killed_save_are_ignored_and_cleared_by_the_next(tmp_path):
    save(tmp_path, {1: None, 2: None})
    (tmp_path / "2" / "manifest.json").unlink()
    for name in ("3.orbax-checkpoint-tmp", "4"):
        shutil.copytree(tmp_path / "2", tmp_path / name)
    assert Checkpoints(tmp_path).steps() == [1]
    with pytest.raises(InputError, match=r"no whole checkpoint at step 4 .*; steps there: 1"):
        Checkpoints(tmp_path).restore({"w": jnp.zeros(4, int)}, step=4)
    for step in (2, 3, 4):
        checkpoints = save(tmp_path, {step: None}, keep_last=5)
    assert checkpoints.steps() == [1, 2, 3, 4]
    assert {entry.name for entry in tmp_path.iterdir()} == {"1", "2", "3", "4"}


def test_damage_that_leaves_the_size_alone_is_one_line_when_reading(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.arange(1000.0)})
    for file in data_files(tmp_path / "1"):
        if "/d/" in str(file) or "ocdbt" in file.name:
            file.write_bytes(bytes(255 - byte for byte in file.read_bytes()))
    with pytest.raises(InputError, match="checkpoint at step 1 cannot be read") as error:
        checkpoints.restore({"w": jnp.zeros(1000)})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"params": {"head/kernel": jnp.zeros((4, 2)), "neck/bias": jnp.zeros(2)}},
            r"has no `params/neck/bias`; nearest: `params/",
        ),
        ({"params": {}}, r"has `params/head/kernel`, for which there is no place"),
        (
            {"params": {"head/kernel": jnp.zeros((4, 3))}},
            r"`params/head/kernel` is \(4, 2\) float32, but \(4, 3\) float32 is needed",
        ),
        ({"params": {"head/kernel": jnp.zeros((4, 2), jnp.bfloat16)}}, r"float32, but \(4, 2\) bfloat16 is needed"),
    ],
)
def test_a_template_that_differs_is_refused_with_the_path(tmp_path, change, message):
    state = {"params": {"head/kernel": jnp.zeros((4, 2))}, "step": jnp.int32(40)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(40, state)
    with pytest.raises(InputError, match="checkpoint at step 40.*" + message):
        checkpoints.restore({**state, **change})


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        Checkpoints(tmp_path / "file" / "checkpoints") as checkpoints,
        pytest.raises(InputError, match="cannot write to"),
    ):
        checkpoints.save(1, {"w": jnp.zeros(4)})
    with pytest.raises(InputError, match="cannot write to"):
        checkpoint.save_arrays(tmp_path / "file" / "weights", {"w": jnp.zeros(4)}, metadata={})


def test_weights_come_back_on_the_host_with_their_metadata_and_hash(tmp_path):
    arrays = {
        "head/kernel": jnp.arange(8.0).reshape(4, 2),
        "norm/scale": jnp.ones(3, jnp.bfloat16),
        "none": jnp.zeros((0, 2)),
    }
    checkpoint.save_arrays(tmp_path / "weights", arrays, metadata={"classes": ["a", "b"]})
    loaded, metadata = checkpoint.load_arrays(tmp_path / "weights")
    assert metadata == {"classes": ["a", "b"]}
    assert all(isinstance(array, np.ndarray) for array in loaded.values())
    assert_equal(loaded, arrays)
    assert checkpoint.weights_hash(loaded) == checkpoint.weights_hash(arrays)


def test_the_hash_of_weights_depends_on_paths_shapes_types_and_bytes_but_not_on_order():
    arrays = {"a": np.arange(4.0), "b": np.ones((2, 2), np.float32)}
    variants = [
        arrays,
        {"a": arrays["a"], "c": arrays["b"]},
        {"a": arrays["a"].reshape(2, 2), "b": arrays["b"]},
        {"a": arrays["a"].view(np.int64), "b": arrays["b"]},
        {"a": arrays["a"] + 1, "b": arrays["b"]},
    ]
    assert len({checkpoint.weights_hash(variant) for variant in variants}) == len(variants)
    assert checkpoint.weights_hash(dict(reversed(arrays.items()))) == checkpoint.weights_hash(arrays)
    assert len(checkpoint.weights_hash(arrays)) == 16


def test_weights_that_are_absent_or_half_written_are_one_line(tmp_path):
    with pytest.raises(InputError, match="no whole weights in"):
        checkpoint.load_arrays(tmp_path / "weights")
    checkpoint.save_arrays(tmp_path / "weights", {"w": np.ones(3)}, metadata={})
    (tmp_path / "weights" / "manifest.json").unlink()
    with pytest.raises(InputError, match="no whole weights in"):
        checkpoint.load_arrays(tmp_path / "weights")


def test_after_sigkill_at_three_random_moments_the_newest_checkpoint_is_whole(tmp_path):
    script = tmp_path / "saver.py"
    script.write_text(SAVER)
    directory = tmp_path / "checkpoints"
    moments = random.Random(0)
    newest = 0
    for _ in range(3):
        kill_while_saving(script, directory, seconds=moments.uniform(0.1, 1.0))
        checkpoints = Checkpoints(directory)
        step = checkpoints.latest()
        assert step is not None
        assert step >= newest
        newest = step
        arrays = {f"layer{i}/kernel": jnp.full((32, 32), step * 100.0 + i) for i in range(12)}
        expected = {"step": jnp.int32(step), "params": arrays, "key": jax.random.key(step)}
        restored, extra = checkpoints.restore(
            jax.tree.map(jnp.zeros_like, {**expected, "key": 0}) | {"key": expected["key"]}
        )
        assert_equal(restored, expected)
        assert extra == {"position": step}
    assert newest > 3


def kill_while_saving(script: Path, directory: Path, *, seconds: float) -> None:
    """Starts the saving process, lets it save at least once, and kills it some seconds later."""
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[1]), "XLA_FLAGS": ""}
    before = Checkpoints(directory).latest() or 0
    with subprocess.Popen([sys.executable, script, directory], env=environment) as process:
        deadline = time.monotonic() + 60
        while (Checkpoints(directory).latest() or 0) <= before and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_what_other_arrays_of_a_failed_save_write_later_is_removed_too(tmp_path):
    half = tmp_path / "4.orbax-checkpoint-tmp"
    late = threading.Timer(0.07, lambda: (half / "d").mkdir(parents=True))

    class Response:
        def result(self) -> None:
            half.mkdir()
            late.start()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        checkpoint._await_write(Response(), tmp_path / "4")
    late.join()
    assert not list(tmp_path.iterdir())
