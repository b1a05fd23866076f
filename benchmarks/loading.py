"""What loading a checkpoint costs in host memory: its peak over the bytes of the file, in processes of their own.

    python benchmarks/loading.py [--rounds N] [--quick]

About 2 minutes on 2 CPU cores. The file is a ViT-B/16 in float32 safetensors under timm's names. On a CPU the model
itself lives in host memory, so that 1 is the least there can be. What the process had after loading a small file, with
jax started and the code imported, does not count.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from timing import Ratio, machine, ratio, table

from jxfer.models.vit import CONFIGS, ViT, ViTConfig
from jxfer.weights.files import open_tensors
from jxfer.weights.load import load, load_into, weights_of
from jxfer.weights.names.vit import NAMINGS
from jxfer.weights.save import export_tensors, write_safetensors

JXFER = "jxfer"
WHOLE = "load_file, then a copy of each leaf"
FILLED = "a random model, then load_file into it"
TIMM = next(naming for naming in NAMINGS if naming.name == "timm")

FULL = CONFIGS["vit_b_16"]
QUICK = dataclasses.replace(FULL, num_layers=3)
SMALL = ViTConfig(16, 8, 1, 1, 8)
"""For what happens once in a process."""


@dataclasses.dataclass(frozen=True)
class Peak:
    """What one process needed for one load."""

    nbytes: int
    seconds: float


def main(arguments: list[str] | None = None) -> dict[str, Ratio]:
    """Measures, prints a table, and returns the peak memory over the file's bytes by way of loading."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="three blocks instead of twelve, once")
    options = parser.parse_args(arguments)
    rounds = 1 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder), QUICK if options.quick else FULL)
        size = file.stat().st_size
        peaks = {way: [measure(way, file) for _ in range(rounds)] for way in WAYS}
    ratios = {way: ratio(np.array([peak.nbytes for peak in each]), np.array(size)) for way, each in peaks.items()}
    print(machine())
    print(f"\nA file of {size:,} bytes, {rounds} process(es) each, median (quartiles)\n")
    header = ("way to load", "peak memory / file", "seconds")
    rows = [(way, ratios[way], f"{np.median([peak.seconds for peak in each]):.2f}") for way, each in peaks.items()]
    print(table(header, rows))
    return ratios


def write(folder: Path, size: ViTConfig) -> Path:
    """Writes a published model of a size beside a small one; returns its file."""
    for name, each in (("model", size), ("small", SMALL)):
        expected = weights_of(nnx.eval_shape(builder(each)))
        rng = np.random.default_rng(0)
        arrays = {path: rng.random(value.shape, np.float32) for path, value in expected.items()}
        write_safetensors(folder / f"{name}.safetensors", export_tensors(arrays, TIMM, each), {"format": "pt"})
    (folder / "size.json").write_text(json.dumps({"num_layers": size.num_layers}))
    return folder / "model.safetensors"


def measure(way: str, file: Path) -> Peak:
    """Loads a file in a new process."""
    command = [sys.executable, __file__, "--in-this-process", way, str(file)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Peak(**json.loads(done.stdout))


def measure_here(way: str, file: Path) -> Peak:
    """Loads a file in this process; Linux keeps the highest memory that a process has had."""
    num_layers = json.loads(file.with_name("size.json").read_text())["num_layers"]
    WAYS[way](file.with_name("small.safetensors"), SMALL)
    before = memory("VmRSS")
    started = time.perf_counter()
    model = WAYS[way](file, dataclasses.replace(FULL, num_layers=num_layers))
    jax.block_until_ready(weights_of(model))
    return Peak(memory("VmHWM") - before, time.perf_counter() - started)


def memory(field: str) -> int:
    """Returns the bytes that Linux counts for this process: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def builder(size: ViTConfig) -> Callable[[], ViT]:
    return lambda: ViT(size, input_shape=(224, 224, 3), num_classes=1000, dtype=jnp.float32, rngs=nnx.Rngs(0))


def load_jxfer(file: Path, size: ViTConfig) -> nnx.Module:
    return load(builder(size), open_tensors([file]), (TIMM,), size, what="file")[0]


def load_whole(file: Path, size: ViTConfig) -> nnx.Module:
    model = nnx.eval_shape(builder(size))
    nnx.update(model, nnx.from_flat_state([(tuple(_keys(path)), a) for path, a in read_whole(file, size).items()]))
    return model


def load_filled(file: Path, size: ViTConfig) -> nnx.Module:
    model = builder(size)()
    load_into(model, read_whole(file, size), what="file")
    return model


def read_whole(file: Path, size: ViTConfig) -> dict[str, Any]:
    """Returns every leaf as a copy of its part of the file, all of which is in memory."""
    from safetensors.numpy import load_file

    arrays = {}
    rules = TIMM.rules(size)
    for name, tensor in load_file(file).items():
        rule, ours = next((rule, found) for rule in rules if (found := rule.ours_of(name)))
        for path, part in zip(ours, np.split(tensor, len(ours)), strict=True):
            arrays[path] = jnp.array(rule.layout.to_ours(part))
    return arrays


def _keys(path: str) -> list[Any]:
    return [int(key) if key.isdigit() else key for key in path.split("/")]


WAYS: dict[str, Callable[[Path, ViTConfig], nnx.Module]] = {
    JXFER: load_jxfer,
    WHOLE: load_whole,
    FILLED: load_filled,
}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-this-process"]:
        print(json.dumps(dataclasses.asdict(measure_here(sys.argv[2], Path(sys.argv[3])))))
    else:
        main()
