"""What lies on disk: rows under keys, damage, kills, two writers, eviction, and larger sets than memory."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from jxfer import store
from jxfer.chunks import SUFFIX, UNFINISHED, Layout, open_chunk, write_chunk
from jxfer.typing import InputError

FIELDS = {"data": "tiny", "model": "convnet", "boundary": "head", "weights": "a"}
LAYOUT = Layout((("features", (6,), "float32"), ("features/mask", (3,), "bool")))


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("JXFER_CACHE", str(tmp_path))


def rows(*numbers: int) -> dict[str, np.ndarray]:
    """Returns rows that say which they are."""
    values = np.array(numbers, np.float32)[:, None]
    return {"features": values + np.arange(6, dtype=np.float32) / 8, "features/mask": values % np.arange(2, 5) == 0}


def names(*numbers: int) -> list[str]:
    return [f"train/{number:05d}" for number in numbers]


def open_(fields=FIELDS, notes=None) -> store.Store:
    note = (lambda text: None) if notes is None else notes.append
    return store.open_store(fields, lambda: (LAYOUT, 7.0), note=note)


def files(suffix: str = SUFFIX):
    return sorted(store.root().rglob(f"*{suffix}"))


def assert_rows(opened: store.Store, *numbers: int) -> None:
    arrays, damaged = opened.read(names(*numbers))
    assert not damaged
    for name, expected in rows(*numbers).items():
        np.testing.assert_array_equal(arrays[name], expected)
        assert arrays[name].dtype == expected.dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool", "int32"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3, 4)])
def test_rows_come_back_as_they_were(dtype, shape):
    layout = Layout((("x", shape, dtype), ("y", (2,), "float16")))
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.integers(0, 2, (5, *shape)).astype(
            layout.decode(np.zeros((1, layout.row_bytes), np.uint8))["x"].dtype
        ),
        "y": rng.normal(size=(5, 2)).astype(np.float16),
    }
    encoded = layout.encode(arrays)
    assert encoded.shape == (5, layout.row_bytes)
    for name, value in layout.decode(encoded).items():
        np.testing.assert_array_equal(value, arrays[name])
        assert value.dtype == arrays[name].dtype
    assert Layout.of(arrays) == layout


def test_rows_are_found_by_name_whatever_file_they_are_in():
    opened = open_()
    assert opened.lacks(names(1, 2, 1)) == [0, 1]
    opened.add(names(1, 2, 3), rows(1, 2, 3))
    opened.add(names(9, 8), rows(9, 8))
    assert_rows(opened, 8, 2, 9, 1)
    again = open_()
    assert again.lacks(names(3, 4, 9)) == [1]
    assert_rows(again, 3, 8, 1, 2, 9, 3)
    assert again.row_flops == 7.0, "known without asking"


def test_two_keys_do_not_mix():
    open_().add(names(1), rows(1))
    other = open_({**FIELDS, "weights": "b"})
    assert other.lacks(names(1)) == [0]
    other.add(names(1), rows(5))
    assert_rows(open_(), 1)


def test_a_new_key_names_the_fields_that_differ_from_the_nearest():
    open_({**FIELDS, "weights": "b", "dtype": "bfloat16"})
    open_()
    notes = []
    open_(notes=notes)
    assert notes == [], "this one is known"
    open_({**FIELDS, "weights": "c"}, notes)
    (note,) = notes
    assert "weights was a, is c" in note
    assert "dtype" not in note
    open_({**FIELDS, "boundary": "layer2"}, notes)
    assert len(notes) == 1, "another boundary is no change"


@pytest.mark.parametrize("where", [0.3, 0.5, 0.8])
def test_a_flipped_byte_is_found_and_named_and_only_its_row_is_lost(where):
    wide = Layout((("features", (2048,), "float32"),))
    opened = store.open_store(FIELDS, lambda: (wide, 1.0))
    values = np.random.default_rng(0).normal(size=(50, 2048)).astype(np.float32)
    opened.add(names(*range(50)), {"features": values})
    (file,) = files()
    content = bytearray(file.read_bytes())
    content[int(where * 50 * 2048 * 4)] ^= 1
    file.write_bytes(content)
    open_chunk.cache_clear()
    notes = []
    opened = open_(notes=notes)
    arrays, damaged = opened.read(names(*range(50)))
    (bad,) = damaged
    assert f"'train/{bad:05d}' are damaged in '{file}'" in notes[0]
    assert opened.lacks(names(*range(50))) == [bad]
    good = np.arange(50) != bad
    np.testing.assert_array_equal(arrays["features"][good], values[good])
    opened.add(names(bad), {"features": values[[bad]]})
    again, damaged = open_().read(names(*range(50)))
    assert not damaged, "the newer row counts"
    np.testing.assert_array_equal(again["features"], values)


def test_a_row_under_anothers_name_is_damage(tmp_path):
    path = write_chunk(tmp_path, names(1, 2), LAYOUT.encode(rows(1, 2)))
    chunk = dataclasses.replace(open_chunk(path), names=tuple(names(2, 1)))
    assert not chunk.read(np.arange(2), LAYOUT.row_bytes)[1].any()


@pytest.mark.parametrize("length", [0, 100, 70_000])
def test_a_file_cut_short_is_named_and_removed(length):
    open_().add(names(1), rows(1))
    (file,) = files()
    file.write_bytes(file.read_bytes()[:length])
    open_chunk.cache_clear()
    notes = []
    assert open_(notes=notes).lacks(names(1)) == [0]
    assert str(file) in notes[0]
    assert not file.exists()


def test_a_damaged_record_of_a_key_is_written_anew():
    open_().add(names(1), rows(1))
    (record,) = files("key.json")
    record.write_text("{")
    assert [known.fields for known in store.list_keys()] == [{}]
    assert_rows(open_(), 1)
    assert [known.fields for known in store.list_keys()] == [FIELDS]


WRITER = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import test_store, jxfer.chunks
    from test_store import names, open_, rows
    opened = open_()
    {body}
"""


@pytest.fixture
def child():
    """Starts Python on code that may use `opened`, and ends what is still running at the end."""
    started = []

    def start(body: str) -> subprocess.Popen:
        code = textwrap.dedent(WRITER).format(tests=os.path.dirname(__file__), body=body)
        pipe = subprocess.PIPE
        started.append(subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_whole_files_outlive_a_kill_and_unfinished_ones_are_cleared(child):
    body = "opened.add(names(1), rows(1)); os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL);"
    assert child(body + "opened.add(names(2), rows(2))").wait() == -signal.SIGKILL
    assert len(files(UNFINISHED)) == 1
    opened = open_()
    assert opened.lacks(names(1, 2)) == [1]
    assert_rows(opened, 1)
    assert not files(UNFINISHED)


def test_two_processes_write_at_once_and_neither_loses_a_row(child):
    bodies = [f"[opened.add(names(i), rows(i)) for i in range({first}, {first} + 20)]" for first in (0, 10)]
    assert [process.wait() for process in [child(body) for body in bodies]] == [0, 0]
    assert_rows(open_(), *range(30))


def test_what_another_process_uses_is_neither_removed_nor_evicted(monkeypatch, child):
    using = child("opened.add(names(1), rows(1)); print('ready', flush=True); sys.stdin.read()")
    assert using.stdout.readline() == "ready\n"
    (known,) = store.list_keys()
    assert not store.remove(known.key)
    monkeypatch.setenv(store.LIMIT, "1e-9")
    with pytest.raises(InputError, match="raise it, or set features=off"):
        store.make_room(1)
    using.kill()
    using.wait()
    store.make_room(0)
    assert store.list_keys() == []


def test_the_least_recently_used_go_first(monkeypatch):
    for time, weights in enumerate("abc"):
        open_({**FIELDS, "weights": weights}).add(names(1), rows(1))
        os.utime(store.root() / store.config_hash({**FIELDS, "weights": weights}) / ".lock", (time, time))
        for path in (store.root() / store.config_hash({**FIELDS, "weights": weights})).glob("*"):
            os.utime(path, (time, time))
    sizes = {known.fields["weights"]: known.num_bytes for known in store.list_keys()}
    monkeypatch.setenv(store.LIMIT, str(sum(sizes.values()) / 1e9))
    store.make_room(0)
    assert len(store.list_keys()) == 3
    used = open_({**FIELDS, "weights": "a"})
    store.make_room(1)
    assert [known.fields["weights"] for known in store.list_keys()] == ["a", "c"]
    store.make_room(sizes["c"] + 1)
    assert [known.fields["weights"] for known in store.list_keys()] == ["a"], "in use, so it stays"
    assert_rows(used, 1)


@pytest.mark.parametrize("text", ["", "much", "-1", "nan"])
def test_a_limit_that_is_no_number_is_refused(monkeypatch, text):
    monkeypatch.setenv(store.LIMIT, text)
    with pytest.raises(InputError, match=f"{store.LIMIT} is a positive number"):
        store.limit_bytes()


def test_a_cache_that_cannot_be_written_says_what_to_do(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JXFER_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set JXFER_CACHE to a folder of yours, or features=off"):
        open_()
