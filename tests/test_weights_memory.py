"""Loading is frugal: beside the model there is never more than a little of the file in memory."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory a process had at most")
def test_loading_takes_less_than_a_third_more_memory_than_the_file(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("benchmark_loading", FOLDER / "loading.py")
    loading = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, loading)
    spec.loader.exec_module(loading)
    file = loading.write(tmp_path, loading.QUICK)
    size = file.stat().st_size
    assert size > 90e6
    assert 0.95 * size < loading.measure(loading.JXFER, file).nbytes < 1.3 * size
