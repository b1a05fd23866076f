"""Programs are let go before memory maps run out, and what is computed afterwards is what would have been."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import runs

from jxfer import ablate, methods, programs
from jxfer.loop import Session

LIMIT = Path("/proc/sys/vm/max_map_count")

pytestmark = pytest.mark.skipif(not LIMIT.exists(), reason="memory maps are counted by Linux only")


def num_maps() -> int:
    return Path("/proc/self/maps").read_bytes().count(b"\n")


def limit_maps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: int) -> None:
    file = tmp_path / "max_map_count"
    file.write_text(f"{limit}\n")
    monkeypatch.setattr(programs, "_MAX_MAPS", file)


def test_programs_stay_until_half_of_the_maps_are_taken_and_go_then(monkeypatch, tmp_path):
    functions = [jax.jit(lambda x, i=i: jnp.tanh(x @ x + i).sum()) for i in range(20)]
    x = jnp.ones((8, 8))
    before = num_maps()
    first = [function(x) for function in functions]
    limit_maps(monkeypatch, tmp_path, 2 * num_maps() + 100)
    assert not programs.make_room()
    assert num_maps() >= before + 2 * len(functions), "each program takes maps, or the limit is nothing to care for"
    limit_maps(monkeypatch, tmp_path, 2 * num_maps() - 100)
    assert programs.make_room()
    assert num_maps() <= before
    assert [function(x) for function in functions] == first


def test_no_limit_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(programs, "_MAX_MAPS", tmp_path / "none")
    assert not programs.make_room()


def test_an_ablation_whose_programs_go_before_each_run_ends_with_the_same_results(monkeypatch, tmp_path):
    runs.add_models(monkeypatch)
    runs.use_devices(monkeypatch, 1)
    experiment = runs.with_methods(runs.write_data(tmp_path), methods.linear_probe, seeds=2)
    experiment = runs.with_train(experiment, num_steps=2, eval_every=1)
    session = Session(lambda what, done, total: None, lambda: False)
    undisturbed = ablate.ablate(experiment, tmp_path / "undisturbed", session, command="test")
    limit_maps(monkeypatch, tmp_path, 1)
    let_go = []
    clear_caches = jax.clear_caches
    monkeypatch.setattr(jax, "clear_caches", lambda: let_go.append(clear_caches()))
    rows = ablate.ablate(experiment, tmp_path / "let-go", session, command="test")
    assert len(let_go) == len(rows) == 2
    assert [runs.timeless(row) for row in rows] == [runs.timeless(row) for row in undisturbed]
