"""Peaks by the names that jax gives to devices, and the share of them that the log states."""

import types

import pytest

from jxfer.loop import Window
from jxfer.peak import describe_peak, peak_flops


def devices(kind: str, count: int = 1):
    return [types.SimpleNamespace(device_kind=kind)] * count


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float32"),
    [
        ("TPU v2", 22.5, 22.5),
        ("TPU v3", 61.5, 61.5),
        ("TPU v4", 275, 275),
        ("TPU v4 lite", None, None),
        ("TPU v5 lite", 197, 197),
        ("TPU v5e", 197, 197),
        ("TPU v5", 459, 459),
        ("TPU v5p", 459, 459),
        ("TPU v6 lite", 918, 918),
        ("TPU7x", 2307 / 2, 2307 / 2),
        ("Tesla V100-SXM2-16GB", None, 15.7),
        ("Tesla V100-PCIE-32GB", None, 14),
        ("Tesla T4", None, 8.1),
        ("NVIDIA A100-SXM4-40GB", 312, 156),
        ("NVIDIA A100 80GB PCIe", 312, 156),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA L4", 121, 60),
        ("NVIDIA L40S", 362, 183),
        ("NVIDIA H100 80GB HBM3", 989, 494),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA H100 NVL", 835, 417),
        ("NVIDIA GH200 480GB", 989, 494),
        ("NVIDIA H200", 989, 494),
        ("NVIDIA B200", 2250, 1125),
        ("NVIDIA GB200", 2500, 1250),
        ("cpu", None, None),
        ("NVIDIA GeForce RTX 4090", None, None),
    ],
)
def test_the_peak_of_a_device_is_what_its_maker_states(kind, bfloat16, float32):
    for dtype, tflops in (("bfloat16", bfloat16), ("float32", float32)):
        assert peak_flops(devices(kind, 4), dtype) == (tflops and pytest.approx(4e12 * tflops))


def test_of_devices_of_which_one_is_not_known_nothing_is():
    assert peak_flops([*devices("NVIDIA L4"), *devices("cpu")], "bfloat16") is None


def test_the_peak_is_stated_in_words():
    assert describe_peak(devices("TPU v5 lite", 8)) == "TFLOP/s: 8 × 197 in bfloat16, 8 × 197 in float32"
    assert describe_peak(devices("Tesla T4")) == "TFLOP/s: 1 × 8.1 in float32"
    assert describe_peak(devices("cpu")) == "none stated for cpu"


def test_the_log_states_the_share_of_the_peak_where_there_is_one():
    window = Window(50, {}, examples_per_sec=640.0, steps_per_sec=10.0, input_wait=0.25)
    said = {"examples_per_sec": 640.0, "input_wait": 0.25}
    assert window.speed(3e12, peak=peak_flops(devices("cpu"), "float32")) == said
    # 30 of 2 × 60 TFLOP/s
    assert window.speed(3e12, peak=peak_flops(devices("NVIDIA L4", 2), "float32")) == said | {"mfu": 0.25}
