"""The floating-point operations per second that a kind of device can do at most, as its maker states them."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from jxfer.config import DType

# The kind of a device -> TFLOP/s of one jax device in bfloat16 and in float32; the first pattern found counts. Dense,
# without the factor of two for sparse matrices. float32 is what jax makes of it unless told otherwise: TF32 on NVIDIA
# GPUs from Ampere on, products of bfloat16 on TPUs. None: there is no such unit, or what there is of it is not stated.
# TPUs: Google Cloud's page of each version (cloud.google.com/tpu/docs/v2 … v6e, tpu7x), which state per chip v2 45, v3
# 123, v4 275, v5e 197, v5p 459, v6e 918, TPU7x 2307. Of v2, v3 and TPU7x jax makes two devices per chip.
# GPUs: NVIDIA's data sheets of the V100, T4, A100, L4, L40S, H100, GH200, H200, HGX B200 and GB200 NVL72.
_TFLOPS: tuple[tuple[str, float | None, float | None], ...] = (
    (r"TPU v2", 22.5, 22.5),
    (r"TPU v3", 61.5, 61.5),
    (r"TPU v4$", 275.0, 275.0),
    (r"TPU v5( lite|e)", 197.0, 197.0),
    (r"TPU v5p?$", 459.0, 459.0),
    (r"TPU v6( lite|e)", 918.0, 918.0),
    (r"TPU7x", 1153.5, 1153.5),
    (r"\bMIG\b", None, None),  # a slice of a GPU
    (r"\bV100-SXM", None, 15.7),
    (r"\bV100-PCIE", None, 14.0),
    (r"\bT4\b", None, 8.1),
    (r"\bA100\b", 312.0, 156.0),
    (r"\bL4\b", 121.0, 60.0),
    (r"\bL40S\b", 362.0, 183.0),
    (r"\bH100 PCIe", 756.0, 378.0),
    (r"\bH[12]00 NVL", 835.0, 417.0),
    (r"\bG?H[12]00\b", 989.0, 494.0),
    (r"\bGB200\b", 2500.0, 1250.0),
    (r"\bB200\b", 2250.0, 1125.0),
)


def peak_flops(devices: Iterable[Any], dtype: DType) -> float | None:
    """Returns the stated FLOP/s of all devices together, computing in `dtype`; None where one has none stated."""
    stated = [_stated(device.device_kind, dtype) for device in devices]
    known = [tflops for tflops in stated if tflops is not None]
    return 1e12 * sum(known) if known and len(known) == len(stated) else None


def describe_peak(devices: Sequence[Any]) -> str:
    """Returns in words what a share of the peak is a share of."""
    kind, count = devices[0].device_kind, len(devices)
    dtypes: tuple[DType, ...] = ("bfloat16", "float32")
    known = [f"{count} × {tflops:g} in {dtype}" for dtype in dtypes if (tflops := _stated(kind, dtype)) is not None]
    return f"TFLOP/s: {', '.join(known)}" if known else f"none stated for {kind}"


def _stated(kind: str, dtype: DType) -> float | None:
    for pattern, bfloat16, float32 in _TFLOPS:
        if re.search(pattern, kind):
            return bfloat16 if dtype == "bfloat16" else float32
    return None
