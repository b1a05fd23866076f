"""What stored features save: ten epochs on them, extraction included, against ten epochs online.

    python benchmarks/features.py [--rounds N] [--quick]

About 5 minutes on 2 idle CPU cores. Both ways train the same head, or last stage and head, on the same images with the
same batches; neither looks at validation. Stored features begin with an empty store: they are computed, written, read
back and checked within the time measured. Programs are compiled before.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import tempfile
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx
from timing import Ratio, interleave, machine, ratio, table

from jxfer import data, models
from jxfer.config import Experiment, Method, ModelConfig, Phase, TrainConfig
from jxfer.cost import cost_of
from jxfer.features import Extractor
from jxfer.loop import Session
from jxfer.partition import FROZEN
from jxfer.phase import FEATURE_BATCH_SIZE
from jxfer.plan import PlannedPhase, phase_steps, plan_phases, prepare_images, start_phase
from jxfer.sharding import make_mesh, put_batch
from jxfer.state import Fixed, TrainState, place_state

NUM_CLASSES, EPOCHS = 10, 10


@dataclasses.dataclass(frozen=True)
class Setting:
    """A network, its images, and the stage before its head."""

    model: str
    input_shape: tuple[int, int, int]
    last_stage: str
    num_images: int
    rounds: int
    batch_size: int = 64


FULL = Setting("resnet18_32", (32, 32, 3), "layer4", num_images=512, rounds=2)
QUICK = Setting("convnet", (8, 8, 1), "layer2", num_images=128, rounds=1)


@dataclasses.dataclass(frozen=True)
class Way:
    """What one way to train takes for all epochs."""

    seconds: float
    flops: float
    time_ratio: Ratio
    """To online training of the same."""
    bytes: int
    """Of the stored features; 0 online."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One way to train: what moves, and from where."""

    setting: Setting
    model: nnx.Module
    images: data.ArraySplit
    moving: tuple[str, ...]
    features: str

    @functools.cached_property
    def experiment(self) -> Experiment:
        """Settings of all epochs."""
        steps = EPOCHS * self.setting.num_images // self.setting.batch_size
        # A rate so small that the noise is not fitted, which would turn gradients into denormals.
        train = TrainConfig(num_steps=steps, batch_size=self.setting.batch_size, learning_rate=1e-6, clip_norm=1.0)
        return Experiment("benchmark", model=ModelConfig(self.setting.model), train=train, features=self.features)

    @functools.cached_property
    def method(self) -> Method:
        """Trains `moving`."""
        rules = (*((f"{stage}/**", "moving") for stage in self.moving), ("**", FROZEN))
        return Method("benchmark", rules=rules, phases=(Phase("train", ("moving",)),))

    @functools.cached_property
    def planned(self) -> PlannedPhase:
        """The one phase."""
        return plan_phases(self.experiment, self.method, self.model)[0]

    def run(self) -> tuple[data.Split, float]:
        """Trains all epochs and returns what it trained on, and the FLOPs of making that."""
        mesh = make_mesh(self.experiment.mesh)
        state, fixed = self.start(mesh)
        split, flops = self.images, 0.0
        if self.planned.stored:
            split, flops = self.extract(state, fixed, mesh)
        train_step, _ = phase_steps(self.experiment, self.method, self.planned, NUM_CLASSES)
        batches = data.batches(split, batch_size=self.setting.batch_size, seed=0)
        for batch in itertools.islice(batches, self.experiment.train.num_steps):
            state, _ = train_step(state, fixed, put_batch(batch, mesh))
        jax.block_until_ready(state)
        return split, flops

    def start(self, mesh: jax.sharding.Mesh) -> tuple[TrainState, Fixed]:
        """Returns what moves and what does not before the first step."""
        started = start_phase(self.experiment, self.method, self.planned, self.model, key=jax.random.key(0))
        return place_state(*started, mesh, self.experiment.mesh)

    def extract(self, state: TrainState, fixed: Fixed, mesh: jax.sharding.Mesh) -> tuple[data.Split, float]:
        """Returns the features of all images, out of an empty store, and the FLOPs of computing them."""
        extractor = Extractor(
            experiment=self.experiment,
            dataset=data.Dataset("noise", "1", ("a",) * NUM_CLASSES, {}, self.setting.input_shape),
            boundary=str(self.planned.boundary),
            state=state,
            fixed=fixed,
            mesh=mesh,
            session=Session(lambda what, done, total: None, lambda: False),
            title="benchmark",
            batch_size=FEATURE_BATCH_SIZE,
        )
        prepare = prepare_images(self.experiment, NUM_CLASSES, train=False)
        with empty_store():
            split, row_flops, computed = extractor.split(extractor.fields(), prepare, self.images)
        return split, row_flops * computed

    def train_flops(self, split: data.Split) -> float:
        """Returns the FLOPs of all steps on a split."""
        mesh = make_mesh(self.experiment.mesh)
        state, fixed = self.start(mesh)
        train_step, _ = phase_steps(self.experiment, self.method, self.planned, NUM_CLASSES)
        batch = put_batch(next(data.batches(split, batch_size=self.setting.batch_size, seed=0)), mesh)
        return self.experiment.train.num_steps * cost_of(train_step, state, fixed, batch).step_flops


@contextlib.contextmanager
def empty_store() -> Iterator[None]:
    """Lends a cache of its own, which is gone afterwards."""
    before = os.environ.get("JXFER_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JXFER_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("JXFER_CACHE")
            if before is not None:
                os.environ["JXFER_CACHE"] = before


def main(arguments: list[str] | None = None) -> dict[str, Way]:
    """Measures, prints the table, and returns the results by way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="how often each way is timed")
    parser.add_argument("--quick", action="store_true", help="a small network, to see that it runs")
    options = parser.parse_args(arguments)
    setting = QUICK if options.quick else FULL
    setting = dataclasses.replace(setting, rounds=options.rounds or setting.rounds)
    rows, columns, _ = setting.input_shape
    print(f"\n{setting.model}, {setting.num_images} images of {rows}×{columns}, batch {setting.batch_size}, ", end="")
    print(f"{EPOCHS} epochs, {setting.rounds} rounds, median ratio (quartiles)\n{machine()}\n", flush=True)
    results = measure(setting)
    print(render(results))
    return results


def measure(setting: Setting) -> dict[str, Way]:
    """Times all ways in one interleaved run."""
    jobs = make_jobs(setting)
    used: dict[str, tuple[data.Split, float]] = {}

    def run(name: str) -> None:
        used[name] = jobs[name].run()

    seconds = interleave({name: functools.partial(run, name) for name in jobs}, rounds=setting.rounds)
    results = {}
    for name, (split, feature_flops) in used.items():
        online = name.replace("stored", "online")
        results[name] = Way(
            float(np.median(seconds[name])),
            jobs[name].train_flops(split) + feature_flops,
            ratio(seconds[name], seconds[online]),
            0 if name == online else sum(value.nbytes for value in split.arrays.values()),
        )
    return results


def make_jobs(setting: Setting) -> dict[str, Job]:
    """Returns both ways of training the head, and the last stage with it."""
    config = ModelConfig(setting.model)
    model = models.build(config, num_classes=NUM_CLASSES, input_shape=setting.input_shape, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    ids = np.array([f"noise/{index:06d}" for index in range(setting.num_images)])
    images = rng.integers(0, 256, (setting.num_images, *setting.input_shape)).astype(np.uint8)
    split = data.ArraySplit(ids, rng.integers(0, NUM_CLASSES, len(ids)).astype(np.int32), {"image": images})
    parts = {"head": ("head",), "last stage and head": (setting.last_stage, "head")}
    return {
        f"{part}, {way}": Job(setting, model, split, moving, features)
        for part, moving in parts.items()
        for way, features in (("online", "off"), ("stored", "auto"))
    }


def render(results: dict[str, Way]) -> str:
    """Returns the table."""
    header = ("what trains, on what", "seconds", "time / online", "TFLOP", "bytes stored")
    rows = [
        (name, f"{way.seconds:.2f}", way.time_ratio, f"{way.flops / 1e12:.4f}", f"{way.bytes:,}")
        for name, way in results.items()
    ]
    return table(header, rows)


if __name__ == "__main__":
    main()
