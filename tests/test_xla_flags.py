"""XLA's flags: set where they help, never over the user's own, never unknown ones."""

import os
import subprocess
import sys

import jax
import pytest

from jxfer import xla_flags
from jxfer.xla_flags import NO_FUSION_EMITTERS, NO_YNN_FUSION, quick_to_compile, set_xla_flags


@pytest.fixture
def flags_without(monkeypatch):
    """The environment of a CPU without flags; what a test sets goes away with it."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return monkeypatch


def test_flags_are_set_where_the_library_knows_them(flags_without):
    known = xla_flags.is_known(NO_YNN_FUSION)
    set_xla_flags()
    assert os.environ["XLA_FLAGS"] == (NO_YNN_FUSION if known else "")
    assert not xla_flags.is_known("--xla_cpu_no_such_flag_of_anybody=1")
    assert xla_flags.is_known("--xla_force_host_platform_device_count=8")


def test_flags_of_the_user_stay(flags_without):
    flags_without.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    set_xla_flags()
    assert os.environ["XLA_FLAGS"] == "--xla_force_host_platform_device_count=2"


@pytest.mark.parametrize("platforms", ["tpu", "cuda,cpu"])
def test_an_accelerator_gets_no_flags_of_a_cpu(flags_without, platforms):
    flags_without.setenv("JAX_PLATFORMS", platforms)
    set_xla_flags()
    assert os.environ["XLA_FLAGS"] == ""
    assert quick_to_compile() is None


@pytest.mark.skipif(not xla_flags.is_known(NO_FUSION_EMITTERS), reason="this XLA has no such flag")
def test_a_program_compiles_with_options_unless_the_user_gives_them(flags_without):
    options = quick_to_compile()
    assert options == {"xla_cpu_use_fusion_emitters": False}
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2, "a name that XLA takes"
    flags_without.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=true")
    assert quick_to_compile() is None


def test_an_unknown_flag_is_not_set(flags_without):
    flags_without.setattr(xla_flags, "NO_YNN_FUSION", "--xla_cpu_no_such_flag_of_anybody=1")
    set_xla_flags()
    assert os.environ["XLA_FLAGS"] == ""


def test_xla_starts_with_the_flags_and_computes():
    code = (
        "from jxfer.session import prepare_jax; prepare_jax(); import os, jax.numpy as jnp;"
        "print(os.environ['XLA_FLAGS'], float(jnp.ones(3).sum()))"
    )
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    expected = NO_YNN_FUSION if xla_flags.is_known(NO_YNN_FUSION) else ""
    assert done.stdout.split("\n")[0].strip() == f"{expected} 3.0".strip()
