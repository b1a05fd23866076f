"""What every test shares: eight virtual CPU devices, shapes checked at run time, and the folder of real data."""

import os
import signal

# A shell starts what runs in its background with ctrl-c ignored, and so would every command that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Read by XLA when jax starts its backend, so set before anything imports jax.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

install_import_hook("jxfer", "beartype.beartype")

from jxfer import programs  # noqa: E402 (after the hook, which would not see it)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets and weights; tests that need it skip where it is absent."""
    root = Path(os.environ.get("JXFER_TEST_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()
    if not root.is_dir():
        pytest.skip(f"no real data at {root}; set JXFER_TEST_DATA")
    return root


@pytest.fixture(autouse=True, scope="session")
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps data prepared by tests out of the user's cache directory."""
    os.environ["JXFER_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs() -> Iterator[None]:
    """Lets go of what a file's tests have compiled: a process of a thousand tests would run out of memory maps."""
    yield
    programs.make_room()


@pytest.fixture(autouse=True)
def _room_after_slow_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    """Likewise, because the slow tests of a file alone may be too many."""
    yield
    if request.node.get_closest_marker("slow"):
        programs.make_room()


@pytest.fixture(autouse=True)
def _compilation_cache_as_before() -> Iterator[None]:
    """Ends the writing of compiled programs to disk that a command begins: it has crashed in long test processes."""
    before = jax.config.jax_compilation_cache_dir
    yield
    if jax.config.jax_compilation_cache_dir != before:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


@pytest.fixture(autouse=True, scope="session")
def quick_compiles() -> None:
    """Trades the speed of compiled programs for that of compiling them, here and in child processes.

    Tests make many programs and run each a few times; results keep their laws, only XLA's choices change. With
    `JXFER_TEST_OPTIMIZED` set they are compiled as users compile them, which CI does where bits matter most.
    """
    if os.environ.get("JXFER_TEST_OPTIMIZED"):
        return
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws every figure of a report and writes an empty picture of it, for tests of what else is on the page."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", _save_nothing)


def _save_nothing(figure: Any, file: BinaryIO, **settings: Any) -> None:
    file.write(b'<svg viewBox="0 0 1 1"></svg>' if settings["format"] == "svg" else b"")
