"""What a training step costs each device: FLOPs, bytes over the network and memory, on 1 to 8 devices.

    python benchmarks/sharding.py [--model NAME] [--quick]

Nothing is timed: eight virtual devices of one CPU cannot be faster than one. The numbers are those of the compiled
program, at one global batch: operations and memory as XLA counts them on one device, and the bytes of its collectives,
each counted once at the size of its result. Beside them stands what the partition predicts: every layout sums up the
gradients of what trains, and FSDP gathers the sharded leaves, once for the forward pass and at most once more for the
backward pass. What comes on top are sums of metrics and batch statistics. The frozen part is replicated and needs no
network. Last, on paper, what a data-parallel fine-tuning of ViT-L could reach on 8, 64 and 256
chips.
"""

import argparse
import dataclasses
import functools
import os
import re
from collections.abc import Iterator

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import numpy as np
from flax import nnx
from timing import machine, table

from jxfer import models, optim
from jxfer.config import MeshConfig, ModelConfig, TrainConfig
from jxfer.cost import flops_of, predicted_flops
from jxfer.objectives import classification
from jxfer.partition import FROZEN, Partition, arrays_of, eval_graphdef
from jxfer.sharding import make_mesh, put_batch
from jxfer.state import init_state, place_state
from jxfer.step import make_train_step

NUM_CLASSES, BATCH_SIZE = 10, 64
DEVICES = (1, 2, 4, 8)
LAST_STAGES = {"resnet18_32": "layer4", "convnet": "layer2"}
SHAPES = {"resnet18_32": (32, 32, 3), "convnet": (8, 8, 1)}
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}

CHIP = "TPU v5e"
PEAK_FLOPS, LINK_BYTES = 197e12, 200e9
"""Of one v5e chip, as its vendor states them: 197 TFLOP/s in bfloat16, 1,600 Gbit/s between chips."""
UTILISATION = 0.4
"""Share of the peak that the matrix products of a ViT are taken to reach; an assumption, not a measurement."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What one step costs one device, and what its collectives were predicted to move."""

    way: str
    layout: str
    devices: int
    flops: float
    collectives: dict[str, int]
    """Kind -> bytes."""
    predicted: dict[str, int]
    state_bytes: int
    """Of the arguments that live on the device: parameters, optimizer state, its share of the batch."""
    temp_bytes: int


def main(arguments: list[str] | None = None) -> list[Row]:
    """Compiles, prints the tables, and returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="resnet18_32", help="the network")
    parser.add_argument("--quick", action="store_true", help="a small network on 1 and 8 devices, to see that it runs")
    options = parser.parse_args(arguments)
    model, devices = ("convnet", (1, 8)) if options.quick else (options.model, DEVICES)
    print(f"{model}, global batch {BATCH_SIZE}\n{machine()}\n", flush=True)
    rows = list(measure(model, devices))
    print(render(rows))
    print(f"\n{on_paper('vit_ti_16' if options.quick else 'vit_l_16')}")
    return rows


def measure(model: str, devices: tuple[int, ...]) -> Iterator[Row]:
    """Yields a row for each way to train, layout and number of devices."""
    last = LAST_STAGES[model]
    ways = {
        "full fine-tuning": (("**", "all"),),
        "last stage + head": (("head/**", "head"), (f"{last}/**", "last"), ("**", FROZEN)),
        "head": (("head/**", "head"), ("**", FROZEN)),
    }
    for way, rules in ways.items():
        for layout in ("data", "fsdp"):
            for count in devices:
                if layout == "data" or count == max(devices):
                    yield compile_step(model, way, rules, layout, count)


def compile_step(model: str, way: str, rules: tuple[tuple[str, str], ...], layout: str, count: int) -> Row:
    """Compiles one step on `count` devices and reads its costs off the program."""
    config = MeshConfig(fsdp=count) if layout == "fsdp" else MeshConfig()
    mesh = make_mesh(config, devices=jax.devices()[:count])
    network = build(model, SHAPES[model])
    partition = Partition.of(network, rules)
    tx = optim.optimizer(TrainConfig(), partition, num_steps=100)
    state, fixed = place_state(*init_state(network, partition, tx), mesh, config)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(BATCH_SIZE, *SHAPES[model])).astype(np.float32)
    label = rng.integers(0, NUM_CLASSES, BATCH_SIZE).astype(np.int32)
    batch = put_batch({"image": image, "label": label, "mask": np.ones(BATCH_SIZE, np.float32)}, mesh)
    compiled = make_train_step(classification()).lower(state, fixed, batch).compile()
    memory = compiled.memory_analysis()
    sharded = [value.nbytes for value in state.params.values() if not value.sharding.is_fully_replicated]
    replicated = [value.nbytes for value in state.params.values() if value.sharding.is_fully_replicated]
    predicted = {"all-reduce": sum(replicated) + sum(sharded), "all-gather": sum(sharded)} if count > 1 else {}
    return Row(
        way=way,
        layout=layout,
        devices=count,
        flops=flops_of(compiled),
        collectives=collective_bytes(compiled.as_text()),
        predicted=predicted,
        state_bytes=int(memory.argument_size_in_bytes),
        temp_bytes=int(memory.temp_size_in_bytes),
    )


def collective_bytes(program: str) -> dict[str, int]:
    """Returns the bytes of the results of a program's collectives, by kind."""
    found: dict[str, int] = {}
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for result, kind in re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", program):
        sizes = re.findall(r"(\w+)\[([\d,]*)\]", result)
        total = sum(ITEM_BYTES[dtype] * int(np.prod([int(n) for n in dims.split(",") if n])) for dtype, dims in sizes)
        found[kind] = found.get(kind, 0) + int(total)
    return found


def build(name: str, input_shape: tuple[int, int, int]) -> nnx.Module:
    """Builds the network with random weights."""
    return models.build(ModelConfig(name), num_classes=NUM_CLASSES, input_shape=input_shape, rngs=nnx.Rngs(0))


def on_paper(name: str) -> str:
    """Returns the arithmetic of data-parallel fine-tuning on many chips, as a table."""
    network = nnx.eval_shape(functools.partial(build, name, (224, 224, 3)))
    arrays = {path: jax.ShapeDtypeStruct(value.shape, value.dtype) for path, value in arrays_of(network).items()}
    num_params = sum(int(np.prod(value.shape)) for value in arrays.values())
    partition, graphdef = Partition.of(network, [("**", "all")]), eval_graphdef(network)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), np.dtype("float32"))
    forward = predicted_flops(lambda arrays, image: partition.assemble(graphdef, arrays)(image), arrays, image)
    per_image = 3 * forward
    global_batch = 4096
    rows = []
    for chips in (8, 64, 256):
        compute = per_image * global_batch / chips / (PEAK_FLOPS * UTILISATION)
        reduce = 2 * (chips - 1) / chips * 4 * num_params / LINK_BYTES
        alone, hidden = compute / (compute + reduce), compute / max(compute, reduce)
        rows.append(
            (
                chips,
                global_batch // chips,
                f"{1e3 * compute:.1f}",
                f"{1e3 * reduce:.1f}",
                f"{alone:.0%}",
                f"{hidden:.0%}",
            )
        )
    header = ("chips", "images per chip", "compute ms", "all-reduce ms", "efficiency", "if they overlap")
    return (
        f"On paper, not measured: {name} of {num_params / 1e6:.0f} million parameters at 224×224, global batch "
        f"{global_batch:,}, on {CHIP}.\nCompute: 3 × {forward / 1e9:.0f} GFLOP per image at {UTILISATION:.0%} of "
        f"{PEAK_FLOPS / 1e12:.0f} TFLOP/s. All-reduce: a ring moves 2 (n - 1) / n × 4 bytes per parameter at "
        f"{LINK_BYTES / 1e9:.0f} GB/s.\n\n{table(header, rows)}"
    )


def render(rows: list[Row]) -> str:
    """Returns the table of the compiled steps."""
    header = (
        "trains",
        "layout",
        "devices",
        "GFLOP / device",
        "all-reduce bytes",
        "predicted",
        "all-gather bytes",
        "predicted",
        "other collectives",
        "state MiB / device",
        "temporary MiB / device",
    )
    cells = []
    for row in rows:
        others = sum(size for kind, size in row.collectives.items() if kind not in ("all-reduce", "all-gather"))
        cells.append(
            (
                row.way,
                row.layout,
                row.devices,
                f"{row.flops / 1e9:.3f}",
                *(
                    f"{source.get(kind, 0):,}"
                    for kind in ("all-reduce", "all-gather")
                    for source in (row.collectives, row.predicted)
                ),
                f"{others:,}",
                f"{row.state_bytes / 2**20:.1f}",
                f"{row.temp_bytes / 2**20:.1f}",
            )
        )
    return table(header, cells)


if __name__ == "__main__":
    main()
