"""What a training step costs each device: FLOPs, bytes over the network and memory, on 1 to 8 devices.

    python benchmarks/sharding.py [--model NAME] [--quick]

Nothing is timed: eight virtual devices of one CPU cannot be faster than one. The numbers are those of the compiled
program, at one global batch: operations and memory as XLA counts them on one device, and the bytes of its collectives,
each counted once at the size of its result. Beside them stands what is predicted.

A convolutional network under data parallelism and FSDP: operations are divided by the devices. Every layout sums up
the gradients of what trains, and FSDP gathers the sharded leaves, once. What comes on top are sums of metrics and batch
statistics. The frozen part is replicated and needs no network.

A transformer under tensor parallelism, alone (`--mesh.trainable "**=tensor"`, as many parts as devices), with FSDP in
pairs (`"**=tensor+fsdp"`), and under FSDP alone. Operations are divided by the devices, but for those of norms,
residuals, embedding, head and optimizer, which every part does. Each block sums up its activations, [B T D], twice in
the forward pass, and each block with a backward pass twice more; gradients need no sum over the parts, only over those
that see other examples. In the backward pass queries, keys and values each add to the gradient of what they share: a
compiler that does not add these up before it sums over the parts makes three sums of one, which stands beside it as
`q, k, v apart`.

Last, on paper, what a data-parallel fine-tuning of ViT-L could reach on 8, 64 and 256 chips.
"""

import argparse
import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Mapping

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from timing import machine, table

from jxfer import models, optim
from jxfer.config import MeshConfig, ModelConfig, TrainConfig
from jxfer.cost import flops_of, predicted_flops
from jxfer.objectives import classification
from jxfer.partition import FROZEN, Partition, arrays_of, eval_graphdef
from jxfer.sharding import make_mesh, num_batch_shards, put_batch
from jxfer.state import init_state, place_state
from jxfer.step import make_train_step

NUM_CLASSES, BATCH_SIZE = 10, 64
DEVICES = (1, 2, 4, 8)
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}

CHIP = "TPU v5e"
PEAK_FLOPS, LINK_BYTES = 197e12, 200e9
"""Of one v5e chip, as its vendor states them: 197 TFLOP/s in bfloat16, 1,600 Gbit/s between chips."""
UTILISATION = 0.4
"""Share of the peak that the matrix products of a ViT are taken to reach; an assumption, not a measurement."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and its images, the layouts it is compiled in, and its last stage before the head."""

    config: ModelConfig
    input_shape: tuple[int, int, int]
    last_stage: str
    layouts: tuple[str, ...]
    """The first over all numbers of devices, the others over the most."""


CONVOLUTIONS, BLOCKS = ("data", "fsdp"), ("tensor", "tensor+fsdp", "fsdp")
_WIDE = (("patch_size", "4"), ("num_heads", "8"))
_TINY = (("patch_size", "4"), ("hidden_dim", "64"), ("num_layers", "2"), ("num_heads", "8"), ("mlp_dim", "256"))

FULL = (
    Network(ModelConfig("resnet18_32"), (32, 32, 3), "layer4", CONVOLUTIONS),
    Network(ModelConfig("vit_s_16", size=_WIDE), (32, 32, 3), "blocks/11", BLOCKS),
)
QUICK = (
    Network(ModelConfig("convnet"), (8, 8, 1), "layer2", CONVOLUTIONS),
    Network(ModelConfig("vit_ti_16", size=_TINY), (16, 16, 1), "blocks/1", BLOCKS),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """What one step costs one device, and what it was predicted to."""

    model: str
    way: str
    layout: str
    devices: int
    flops: float
    predicted_flops: float
    collectives: dict[str, int]
    """Kind -> bytes."""
    predicted: dict[str, int]
    apart: int
    """Bytes that are summed up beyond the predicted ones where those of queries, keys and values are not merged."""
    state_bytes: int
    """Of the arguments that live on the device: parameters, optimizer state, its share of the batch."""
    temp_bytes: int


def main(arguments: list[str] | None = None) -> list[Row]:
    """Compiles, prints the tables, and returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[each.config.name for each in FULL + QUICK], help="this network alone")
    parser.add_argument("--quick", action="store_true", help="small networks on 1 and 8 devices, to see that it runs")
    options = parser.parse_args(arguments)
    print(machine())
    rows = []
    for network in QUICK if options.quick else FULL:
        if options.model in (None, network.config.name):
            size = "".join(f", {name} {value}" for name, value in network.config.size)
            print(f"\n{network.config.name}{size}, global batch {BATCH_SIZE}\n", flush=True)
            found = list(measure(network, (1, 8) if options.quick else DEVICES))
            print(render(found), flush=True)
            rows += found
    print(f"\n{on_paper('vit_ti_16' if options.quick else 'vit_l_16')}")
    return rows


def measure(network: Network, devices: tuple[int, ...]) -> Iterator[Row]:
    """Yields a row for each way to train, layout and number of devices, of which the first is one device."""
    ways = {
        "full fine-tuning": (("**", "all"),),
        "last stage + head": (("head/**", "head"), (f"{network.last_stage}/**", "last"), ("**", FROZEN)),
        "head": (("head/**", "head"), ("**", FROZEN)),
    }
    for way, rules in ways.items():
        alone = 0.0
        for layout in network.layouts:
            for count in devices:
                if layout == network.layouts[0] or count == max(devices):
                    row = compile_step(network, way, rules, layout, count, alone)
                    alone = alone or row.flops
                    yield row


def mesh_config(layout: str, count: int) -> MeshConfig:
    """Returns the settings of a layout over some devices."""
    if layout in ("data", "fsdp"):
        return MeshConfig(fsdp=count) if layout == "fsdp" else MeshConfig()
    fsdp = 2 if layout == "tensor+fsdp" else 1
    return MeshConfig(fsdp=fsdp, model=count // fsdp, trainable=(("**", layout),), frozen=(("**", "tensor"),))


def compile_step(
    network: Network, way: str, rules: tuple[tuple[str, str], ...], layout: str, count: int, alone: float
) -> Row:
    """Compiles one step on `count` devices and reads its costs off the program.

    `alone` are the operations of one device, 0 where this is it.
    """
    config = mesh_config(layout, count)
    mesh = make_mesh(config, devices=jax.devices()[:count])
    model = build(network.config, network.input_shape)
    partition = Partition.of(model, rules)
    tx = optim.optimizer(TrainConfig(), partition, num_steps=100)
    state, fixed = place_state(*init_state(model, partition, tx), mesh, config)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(BATCH_SIZE, *network.input_shape)).astype(np.float32)
    label = rng.integers(0, NUM_CLASSES, BATCH_SIZE).astype(np.int32)
    batch = put_batch({"image": image, "label": label, "mask": np.ones(BATCH_SIZE, np.float32)}, mesh)
    compiled = make_train_step(classification()).lower(state, fixed, batch).compile()
    memory = compiled.memory_analysis()
    flops = flops_of(compiled)
    forward, backward = activations_of(network, state.params, mesh) if config.model > 1 else (0, 0)
    return Row(
        model=network.config.name,
        way=way,
        layout=layout,
        devices=count,
        flops=flops,
        predicted_flops=(alone or flops) / count,
        collectives=collective_bytes(compiled.as_text()),
        predicted=predicted_bytes(state.params, mesh, forward + backward),
        apart=backward,
        state_bytes=int(memory.argument_size_in_bytes),
        temp_bytes=int(memory.temp_size_in_bytes),
    )


def predicted_bytes(params: Mapping[str, jax.Array], mesh: Mesh, activations: int) -> dict[str, int]:
    """Returns the bytes that one device gets from collectives: gradients and activations summed up, leaves gathered.

    Args:
      params: what trains, placed.
      mesh: it is placed on.
      activations: bytes that are summed up beside the gradients.
    """
    parts, several = mesh.shape["model"], num_batch_shards(mesh) > 1
    axes = {path: str(value.sharding.spec) for path, value in params.items()}
    # Of what the `model` axis splits, a device has its part and exchanges no more than that.
    own = {path: value.nbytes // (parts if "'model'" in axes[path] else 1) for path, value in params.items()}
    found = {
        "all-reduce": (sum(own.values()) if several else 0) + activations,
        "all-gather": sum(size for path, size in own.items() if "'fsdp'" in axes[path]),
    }
    return {kind: size for kind, size in found.items() if size}


def activations_of(network: Network, params: Mapping[str, jax.Array], mesh: Mesh) -> tuple[int, int]:
    """Returns the bytes of activations that a transformer's blocks sum up on one device, forward and backward.

    Twice [B T D] in each block; `params` are what trains, and blocks without any have no backward pass.
    """
    size = models.size_of(network.config)
    side = network.input_shape[0] // size.patch_size
    one = 4 * BATCH_SIZE // num_batch_shards(mesh) * (side * side + size.num_prefix) * size.hidden_dim
    trained = sum(any(path.startswith(f"blocks/{index}/") for path in params) for index in range(size.num_layers))
    return 2 * one * size.num_layers, 2 * one * trained


def collective_bytes(program: str) -> dict[str, int]:
    """Returns the bytes of the results of a program's collectives, by kind."""
    found: dict[str, int] = {}
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for result, kind in re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", program):
        sizes = re.findall(r"(\w+)\[([\d,]*)\]", result)
        total = sum(ITEM_BYTES[dtype] * int(np.prod([int(n) for n in dims.split(",") if n])) for dtype, dims in sizes)
        found[kind] = found.get(kind, 0) + int(total)
    return found


def build(config: ModelConfig, input_shape: tuple[int, int, int]) -> nnx.Module:
    """Builds a network with random weights."""
    return models.build(config, num_classes=NUM_CLASSES, input_shape=input_shape, rngs=nnx.Rngs(0))


def on_paper(name: str) -> str:
    """Returns the arithmetic of data-parallel fine-tuning on many chips, as a table."""
    network = nnx.eval_shape(functools.partial(build, ModelConfig(name), (224, 224, 3)))
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
    """Returns the table of the compiled steps of one network."""
    tensor = any(row.apart for row in rows)
    header = (
        "trains",
        "layout",
        "devices",
        "GFLOP / device",
        "predicted",
        "all-reduce bytes",
        "predicted",
        *(["q, k, v apart"] * tensor),
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
                f"{row.predicted_flops / 1e9:.3f}",
                *(f"{source.get('all-reduce', 0):,}" for source in (row.collectives, row.predicted)),
                *([f"{row.predicted.get('all-reduce', 0) + row.apart:,}"] * tensor),
                *(f"{source.get('all-gather', 0):,}" for source in (row.collectives, row.predicted)),
                f"{others:,}",
                f"{row.state_bytes / 2**20:.1f}",
                f"{row.temp_bytes / 2**20:.1f}",
            )
        )
    return table(header, cells)


if __name__ == "__main__":
    main()
