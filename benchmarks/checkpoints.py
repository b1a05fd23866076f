"""What checkpoints cost: training time with a save every 50 steps against none, and a delta's bytes against a whole's.

    python benchmarks/checkpoints.py [--rounds N] [--quick]

Both loops fine-tune all of the same network on the same batch, take turns, and end when the last save is on disk, so
that one save in four has no step to hide behind. The batch is small, so that the saves of 134 MB come often,
several times as often as at the usual 64 images: about as many bytes a second as a large network on a GPU saves, which
has ten times the state and steps of a fraction of a second. About 12 minutes on 2 idle CPU cores.

The delta is that of a linear probe on ResNet-50 with 10 classes: what it saves is what differs from the weights it
began with.
"""

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from timing import Ratio, interleave, machine, ratio, table

from jxfer import models, optim
from jxfer.checkpoint import Checkpoints, save_arrays
from jxfer.config import ModelConfig, TrainConfig
from jxfer.loop import Hook, train
from jxfer.objectives import classification
from jxfer.partition import Partition, arrays_of
from jxfer.source import Source, delta
from jxfer.state import init_state
from jxfer.step import make_train_step
from jxfer.typing import Batch

NUM_CLASSES = 10
PLAIN, SAVING = "no checkpoints", "a checkpoint every 50 steps"
TIME_LIMIT, DELTA_LIMIT = 1.05, 0.01


@dataclasses.dataclass(frozen=True)
class Setting:
    """A network, how often its state is saved, and the network whose linear probe is saved as a delta."""

    model: str
    input_shape: tuple[int, int, int]
    num_steps: int
    every: int
    rounds: int
    probe: str
    probe_shape: tuple[int, int, int]
    batch_size: int = 64


FULL = Setting("resnet18_32", (32, 32, 3), 200, 50, 5, "resnet50", (224, 224, 3), batch_size=8)
QUICK = Setting("convnet", (8, 8, 1), 4, 2, 1, "resnet20", (32, 32, 3))


def main(arguments: list[str] | None = None) -> tuple[Ratio, float]:
    """Measures, prints, and returns time with checkpoints over time without, and delta bytes over whole bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="how often each is measured")
    parser.add_argument("--quick", action="store_true", help="a small network, to see that it runs")
    options = parser.parse_args(arguments)
    setting = QUICK if options.quick else FULL
    rounds = options.rounds or setting.rounds
    print(f"{setting.model}, {setting.num_steps} steps of {setting.batch_size}, {rounds} round(s)\n{machine()}\n")
    with tempfile.TemporaryDirectory() as folder:
        ways = {PLAIN: _way(setting, None), SAVING: _way(setting, Path(folder))}
        seconds = interleave(ways, rounds=rounds)
        state_bytes = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    ratios = {name: ratio(taken, seconds[PLAIN]) for name, taken in seconds.items()}
    rows = [
        (name, f"{np.median(taken):.2f}", f"{np.median(taken) / setting.num_steps * 1e3:.1f}", ratios[name])
        for name, taken in seconds.items()
    ]
    print(table(("loop", "seconds", "ms / step", f"time / {PLAIN} (limit {TIME_LIMIT})"), rows))
    print(f"bytes of the checkpoints that stay: {state_bytes:,}\n")
    whole, part = probe_bytes(setting)
    print(f"linear probe on {setting.probe}: whole {whole:,} bytes, delta {part:,} bytes, {part / whole:.4f}", end="")
    print(f" of it (limit {DELTA_LIMIT})")
    return ratios[SAVING], part / whole


def probe_bytes(setting: Setting) -> tuple[int, int]:
    """Returns the bytes on disk of a linear probe's weights, saved whole and as a delta."""
    before = arrays_of(_build(setting.probe, setting.probe_shape))
    after = {path: value + 1 if path.startswith("head/") else value for path, value in before.items()}
    source = Source(before, tuple("abcdefghij"), "hash")
    sizes = []
    for arrays in (after, delta(after, source)[0]):
        with tempfile.TemporaryDirectory() as folder:
            save_arrays(Path(folder) / "final", arrays, metadata={"paths": list(after)})
            sizes.append(sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()))
    return sizes[0], sizes[1]


def _way(setting: Setting, directory: Path | None) -> Callable[[], None]:
    network = _build(setting.model, setting.input_shape)
    partition = Partition.of(network, [("**", "all")])
    tx = optim.optimizer(TrainConfig(), partition, num_steps=setting.num_steps)
    step, batch = make_train_step(classification()), _batch(setting)

    def run() -> None:
        state, fixed = init_state(network, partition, tx)
        settings = {"learning_rate": 1e-6, "weight_decay": 0.0}
        state = dataclasses.replace(state, opt_state=optim.set_hyperparams(state.opt_state, **settings))
        loop = functools.partial(
            train,
            step,
            state,
            fixed,
            iter(lambda: batch, None),
            num_steps=setting.num_steps,
            log_every=25,
            on_window=lambda window: None,
        )
        if directory is None:
            loop()
            return
        with Checkpoints(directory, keep_best=False) as checkpoints:
            loop(hooks=(Hook(setting.every, checkpoints.save),))

    return run


def _build(name: str, input_shape: tuple[int, int, int]) -> nnx.Module:
    return models.build(ModelConfig(name), num_classes=NUM_CLASSES, input_shape=input_shape, rngs=nnx.Rngs(0))


def _batch(setting: Setting) -> Batch:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(setting.batch_size, *setting.input_shape)).astype(np.float32)
    label = rng.integers(0, NUM_CLASSES, setting.batch_size).astype(np.int32)
    return jax.device_put({"image": jnp.asarray(image), "label": jnp.asarray(label)})


if __name__ == "__main__":
    main()
