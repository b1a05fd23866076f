"""The commands about stored features: what is listed, removed and compared."""

import dataclasses
import os
import re

import jax
import numpy as np
import pytest
import runs

from jxfer import cli, data, equivalence, methods, store
from jxfer.chunks import Layout
from jxfer.config import MeshConfig

LAYOUT = Layout((("features", (6,), "float32"),))
FIELDS = {"data": "flowers", "model": "resnet18", "boundary": "head", "augment": None}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("JXFER_CACHE", str(tmp_path))


def put(*names: str, **fields) -> str:
    """Stores rows and returns their key."""
    opened = store.open_store({**FIELDS, **fields}, lambda: (LAYOUT, 1.0))
    opened.add(names, {"features": np.zeros((len(names), 6), np.float32)})
    return store.config_hash({**FIELDS, **fields})


def jxfer(capsys, *args: str) -> tuple[int, str, str]:
    status = cli.main(["features", *args])
    return status, *capsys.readouterr()


def test_the_list_says_what_is_stored_and_the_limit(capsys, monkeypatch):
    status, out, _ = jxfer(capsys, "list")
    assert status == 0
    assert out == f"no features are stored in {store.root()}\n"
    monkeypatch.setenv(store.LIMIT, "3")
    keys = put("a", "b", "c"), put("a#0", "b#0", "a#1", "b#1", augment={"flip": True})
    os.utime(store.root() / keys[0] / ".lock", (0, 2_000_000_000))
    status, out, _ = jxfer(capsys, "list")
    lines = [line.split() for line in out.splitlines() if "flowers" in line]
    assert [line[:6] for line in lines] == [
        [keys[0], "flowers", "resnet18", "head", "3", "–"],
        [keys[1], "flowers", "resnet18", "head", "2", "2"],
    ]
    assert re.search(r"2 key\(s\) in .*: \S+ of at most 3 GB \(JXFER_FEATURES_GB=3\)", out)


def test_keys_are_removed_by_their_beginning_or_all(capsys):
    first, second, third = put("a"), put("a", model="vgg"), put("a", model="vit")
    status, out, _ = jxfer(capsys, "rm", first[:10])
    assert (status, out) == (0, f"removed {first}: 0.1 MB\n")
    assert {known.key for known in store.list_keys()} == {second, third}
    assert jxfer(capsys, "rm", "--all")[0] == 0
    assert store.list_keys() == []


def test_mistakes_are_answered_in_a_line(capsys):
    status, _, error = jxfer(capsys, "rm", "0123")
    assert (status, error) == (2, f"jxfer: error: no key `0123`: no features are stored in {store.root()}\n")
    key = put("a")
    status, _, error = jxfer(capsys, "rm", "x" + key[1:])
    assert (status, error) == (2, f"jxfer: error: unknown key `x{key[1:]}`; nearest: `{key}`\n")
    for number in range(17):
        put("a", model=str(number))
    first = next(c for c in "0123456789abcdef" if sum(known.key[0] == c for known in store.list_keys()) > 1)
    assert f"`{first}` begins several keys" in jxfer(capsys, "rm", first)[2]
    opened = store.open_store(FIELDS, lambda: (LAYOUT, 1.0))
    status, _, error = jxfer(capsys, "rm", key)
    assert (status, error) == (2, f"jxfer: error: a run uses the features under `{key}`; wait for it to end\n")
    del opened


@pytest.fixture
def experiment(monkeypatch, tmp_path):
    runs.add_models(monkeypatch)
    mesh = runs.sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])
    monkeypatch.setattr("jxfer.equivalence.make_mesh", lambda config: mesh)
    return runs.with_methods(runs.write_data(tmp_path / "data"), methods.linear_probe, methods.fine_tuning)


def test_each_phase_is_compared_with_training_online(experiment):
    same, online = equivalence.compare(experiment, runs.QUIET)
    assert (same.boundary, same.ok, online.boundary, online.ok) == ("head", True, None, True)
    assert "the same, largest relative difference" in str(same)
    assert str(online) == "fine_tuning · tune: online: the first stage trains, so there is no frozen prefix to store"


def test_features_of_other_images_are_not_the_same(experiment, monkeypatch):
    probe = dataclasses.replace(experiment, methods=(methods.linear_probe,))

    def prepare(config, **kwargs):
        return data.Prepare(dataclasses.replace(config, mean=(0.1,)), **kwargs)

    monkeypatch.setattr("jxfer.features.Prepare", prepare)
    (wrong,) = equivalence.compare(probe, runs.QUIET)
    assert not wrong.ok
    assert "NOT THE SAME" in str(wrong)
    assert wrong.difference > 100 * wrong.limit


@pytest.mark.parametrize(("difference", "status"), [(0.0, 0), (1e-5, 0), (2e-5, 3), (float("nan"), 3)])
def test_a_difference_is_a_failure(difference, status, monkeypatch, capsys):
    found = equivalence.Comparison("probe", "train", "head", difference, 1e-5, "stored")
    monkeypatch.setattr("jxfer.equivalence.compare", lambda experiment, session: iter([found]))
    monkeypatch.setattr("jxfer.cli._experiment", lambda args: None)
    assert jxfer(capsys, "check", "trial")[0] == status
