"""The flags that XLA is started with on a CPU."""

import importlib.metadata
import importlib.util
import mmap
import os
from pathlib import Path

NO_YNN_FUSION = "--xla_cpu_experimental_ynn_fusion_type="
"""Leaves fusions to XLA's own code generator, which makes convolutions and reductions faster on a CPU."""

NO_FUSION_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
"""Has the code of fusions generated in an older way, which shortens compilation and may slow down what is compiled."""


def quick_to_compile() -> dict[str, bool] | None:
    """Returns the `compiler_options` for `jax.jit` of programs that compile about as long as they run, on a CPU.

    None where an accelerator is to be used, jaxlib does not know the flag, or the user says something of it.
    """
    name = NO_FUSION_EMITTERS.strip("-").split("=")[0]
    is_free = name not in os.environ.get("XLA_FLAGS", "")
    return {name: False} if is_free and _only_cpu() and is_known(NO_FUSION_EMITTERS) else None


def set_xla_flags() -> None:
    """Sets `XLA_FLAGS` for the CPU, unless it is set already or an accelerator is to be used.

    To be called before jax starts a backend. An unknown flag would abort the process, so that the flag is set only
    where the installed jaxlib knows it.
    """
    if not os.environ.get("XLA_FLAGS", "").strip() and _only_cpu() and is_known(NO_YNN_FUSION):
        os.environ["XLA_FLAGS"] = NO_YNN_FUSION


def _only_cpu() -> bool:
    # The library of an accelerator reads XLA_FLAGS too, and need not know what jaxlib knows.
    if platforms := os.environ.get("JAX_PLATFORMS", ""):
        return platforms == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins") and not importlib.util.find_spec("libtpu")


def is_known(flag: str) -> bool:
    """Whether the flag's name is in the library that reads it; to ask that library means to start a backend."""
    spec = importlib.util.find_spec("jaxlib")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    library = max(folder.glob("*.so"), key=lambda file: file.stat().st_size, default=None)
    if library is None:
        return False
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(flag.strip("-").split("=")[0].encode()) >= 0
