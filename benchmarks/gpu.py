"""Fine-tuning on a GPU: images a second and the share of its peak, by batch size, and the same by timm in PyTorch.

    python benchmarks/gpu.py [--models A,B] [--batches 64,128] [--rounds N] [--quick]

ViT-B/16 and ResNet-50 at 224×224, all parameters train, by AdamW with clipping; they compute in bfloat16 and keep
parameters in float32. Images and labels are random and on the device, so that nothing but the step is measured. Every
measurement is a process of its own, which has the whole GPU: jxfer, timm eager and timm compiled take turns, and the
ratio is that of medians. A batch that does not fit says so. Operations are those that XLA counts of jxfer's step, for
all three; the peak is `jxfer.peak`'s.

It needs `pip install -e '.[cuda]'`, and for the comparison `timm`; without a GPU it refuses, but for `--quick`, which
runs tiny networks anywhere, to see that it runs. On a GPU run `partition.py` and `overhead.py` too, and the tests that
compute: `JAX_PLATFORMS=cuda,cpu pytest -n 0 tests/test_step.py tests/test_loop.py tests/test_models.py`. Nobody has run
this on a GPU yet.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from timing import machine, table

from jxfer.peak import peak_flops

NUM_CLASSES = 1000
WAYS = ("jxfer", "timm", "timm compiled")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A network under its two names, its images, and how much is measured of it."""

    model: str
    timm_model: str
    side: int = 224
    size: tuple[tuple[str, str], ...] = ()
    batches: tuple[int, ...] = (64, 128, 256, 512)
    steps_per_round: int = 10
    rounds: int = 5
    ways: tuple[str, ...] = WAYS
    dtype: str = "bfloat16"


FULL = (Setting("vit_b_16", "vit_base_patch16_224"), Setting("resnet50", "resnet50"))
_TINY = (("patch_size", "8"), ("hidden_dim", "16"), ("num_layers", "1"), ("num_heads", "2"), ("mlp_dim", "16"))
QUICK = (Setting("vit_ti_16", "vit_tiny_patch16_224", 16, _TINY, (2, 4), 1, 2, ("jxfer", "timm")),)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measures, prints a table per network, and returns what was measured, an object each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="these alone, of " + ", ".join(setting.model for setting in FULL))
    parser.add_argument("--batches", help="these sizes instead of " + ", ".join(map(str, FULL[0].batches)))
    parser.add_argument("--rounds", type=int, help="rounds of steps per process")
    parser.add_argument("--quick", action="store_true", help="tiny networks, on any device")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(answer(json.loads(options.measure))))
        return []
    about = ask({"way": "about"})
    if about.get("platform") != "gpu" and not options.quick:
        parser.error(f"no GPU: jax sees {about.get('kind', about)}; pip install -e '.[cuda]' where there is one")
    print(about["machine"], flush=True)
    found = []
    for setting in QUICK if options.quick else FULL:
        if options.models and setting.model not in options.models.split(","):
            continue
        batches = tuple(map(int, options.batches.split(","))) if options.batches else setting.batches
        setting = dataclasses.replace(setting, batches=batches, rounds=options.rounds or setting.rounds)
        measured = [each for batch in batches for each in measure(setting, batch)]
        print(f"\n{setting.model} at {setting.side}×{setting.side}, {setting.dtype}, {about['kind']}\n")
        print(render(measured, about["peak"]), flush=True)
        found += measured
    return found


def measure(setting: Setting, batch: int) -> list[dict[str, Any]]:
    """Measures all ways at one batch size twice, by turns, and returns each with the seconds of its steps."""
    results: dict[str, dict[str, Any]] = {}
    for _ in range(2):
        for way in setting.ways:
            if "error" in results.get(way, {}):
                continue
            got = ask({"way": way, "batch": batch, **dataclasses.asdict(setting)})
            earlier = results.get(way, {}).get("seconds", [])
            results[way] = {**got, "seconds": earlier + got.get("seconds", [])}
    return [{"model": setting.model, "way": way, "batch": batch, **result} for way, result in results.items()]


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Returns what a process of its own answers; what went wrong in it is its `error`."""
    command = [sys.executable, __file__, "--measure", json.dumps(request)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"status {process.returncode}"]
        return {"error": next(filter(_is_out_of_memory, lines), lines[-1])}
    return json.loads(process.stdout.splitlines()[-1])


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Measures, in the process that was asked."""
    if request["way"] == "about":
        import jax

        device = jax.devices()[0]
        kind, peak = device.device_kind, peak_flops([device], "bfloat16")
        return {"platform": device.platform, "kind": kind, "peak": peak, "machine": machine()}
    if request["way"] == "jxfer":
        return measure_jxfer(request)
    return measure_timm(request)


def measure_jxfer(request: dict[str, Any]) -> dict[str, Any]:
    """Times jxfer's step on one device."""
    import jax
    from flax import nnx

    from jxfer import models, optim
    from jxfer.config import MeshConfig, ModelConfig, TrainConfig
    from jxfer.cost import cost_of
    from jxfer.objectives import classification
    from jxfer.partition import Partition
    from jxfer.sharding import make_mesh, put_batch
    from jxfer.state import init_state, place_state
    from jxfer.step import make_train_step

    config = ModelConfig(request["model"], request["dtype"], tuple(map(tuple, request["size"])))
    shape = (request["side"], request["side"], 3)
    model = models.build(config, num_classes=NUM_CLASSES, input_shape=shape, rngs=nnx.Rngs(0))
    partition = Partition.of(model, [("**", "all")])
    train = TrainConfig(clip_norm=1.0, learning_rate=1e-5)
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    state, fixed = init_state(model, partition, optim.optimizer(train, partition, num_steps=100_000))
    hyperparams = {"learning_rate": train.learning_rate, "weight_decay": train.weight_decay}
    state = dataclasses.replace(state, opt_state=optim.set_hyperparams(state.opt_state, **hyperparams))
    state, fixed = place_state(state, fixed, mesh, MeshConfig())
    train_step = make_train_step(classification())
    image, label = make_data(request)
    batch = put_batch({"image": image, "label": label}, mesh)
    cost = cost_of(train_step, state, fixed, batch)

    def run(num_steps: int) -> None:
        nonlocal state
        for _ in range(num_steps):
            state, metrics = train_step(state, fixed, batch)
        jax.block_until_ready((state, metrics))

    seconds = time_steps(run, request)
    peak_bytes = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {"seconds": seconds, "step_flops": cost.step_flops, "peak_bytes": peak_bytes}


def measure_timm(request: dict[str, Any]) -> dict[str, Any]:
    """Times the same training by timm's network and PyTorch, as its guides write it."""
    try:
        import timm
        import torch
    except ImportError as error:
        return {"error": f"{error.name} is not installed"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    images = {"img_size": request["side"]} if "vit" in request["timm_model"] else {}
    model = timm.create_model(request["timm_model"], num_classes=NUM_CLASSES, **images)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=1e-4, fused=device == "cuda")
    forward = torch.compile(model) if request["way"] == "timm compiled" else model
    image, label = map(torch.from_numpy, make_data(request))
    image = image.permute(0, 3, 1, 2).to(device, memory_format=torch.channels_last)
    label = label.long().to(device)

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            with torch.autocast(device, dtype=getattr(torch, request["dtype"])):
                loss = torch.nn.functional.cross_entropy(forward(image), label)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = time_steps(run, request)
    peak_bytes = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {"seconds": seconds, "peak_bytes": peak_bytes, "torch": torch.__version__, "timm": timm.__version__}


def make_data(request: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns random images [B H W 3] float32 and labels [B] int32."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(request["batch"], request["side"], request["side"], 3)).astype(np.float32)
    return image, rng.integers(0, NUM_CLASSES, request["batch"]).astype(np.int32)


def time_steps(run: Callable[[int], None], request: dict[str, Any]) -> list[float]:
    """Returns the seconds per step of each round; what comes before compiles, tunes and warms up."""
    run(max(request["steps_per_round"] // 2, 1))
    seconds = []
    for _ in range(request["rounds"]):
        began = time.perf_counter()
        run(request["steps_per_round"])
        seconds.append((time.perf_counter() - began) / request["steps_per_round"])
    return seconds


def render(measured: list[dict[str, Any]], peak: float | None) -> str:
    """Returns the table of one network."""
    flops = {each["batch"]: each["step_flops"] for each in measured if "step_flops" in each}
    steps = {(each["way"], each["batch"]): np.median(each["seconds"]) for each in measured if "error" not in each}
    rows = []
    for each in measured:
        way, batch = each["way"], each["batch"]
        if "error" in each:
            why = "does not fit" if _is_out_of_memory(each["error"]) else each["error"][:60]
            rows.append((batch, way, why, "–", "–", "–", "–", "–"))
            continue
        secs, step_flops = steps[way, batch], flops.get(batch)
        ours = steps.get((WAYS[0], batch))
        rows.append(
            (
                batch,
                way,
                f"{secs * 1e3:.2f}",
                f"{batch / secs:.0f}",
                f"{secs / ours:.3f}" if ours else "–",
                f"{step_flops / batch / 1e9:.2f}" if step_flops else "–",
                f"{step_flops / secs / peak:.3f}" if step_flops and peak else "–",
                f"{each['peak_bytes'] / 2**30:.1f}" if each.get("peak_bytes") else "–",
            )
        )
    header = ("batch", "way", "ms / step", "images / s", "time / jxfer", "GFLOP / image", "MFU", "peak GiB")
    return table(header, rows)


def _is_out_of_memory(error: str) -> bool:
    return any(words in error.lower() for words in ("resource_exhausted", "out of memory", "outofmemory"))


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main()
