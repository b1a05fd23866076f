"""What jxfer's loop costs: the whole of it against the same training written by hand, and against `nnx.jit`.

    python benchmarks/overhead.py [--rounds N] [--quick]

About 5 minutes on 2 idle CPU cores. All three train every parameter of the same network on the
same uint8 images with AdamW, a cosine schedule, clipping, and loss, accuracy and gradient norm looked at every 25
steps. jxfer's is what a run does between two looks at validation: the shuffled stream, padding, placement on a mesh,
normalisation, the step, the windows of metrics with their check for NaN, and a progress hook.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from timing import Ratio, interleave, machine, ratio, table

from jxfer import data, loop, models, optim
from jxfer.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from jxfer.cost import cost_of, flops_of
from jxfer.objectives import classification
from jxfer.partition import Partition
from jxfer.sharding import make_mesh, num_batch_shards, pad_batch, put_batch
from jxfer.state import init_state, place_state
from jxfer.step import make_train_step
from jxfer.typing import Batch

TRAIN = TrainConfig(clip_norm=1.0, learning_rate=1e-3, log_every=25)
NUM_STEPS = 100_000
"""Over which the schedule runs; more than any benchmark trains."""
NUM_CLASSES = 10
BY_HAND = "by hand: jit, donated arrays"

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A network, its data, and how many steps of each loop make a round."""

    model: str
    input_shape: tuple[int, int, int]
    steps_per_round: int
    rounds: int
    batch_size: int = 64
    num_examples: int = 4096


FULL = (
    Setting("convnet", (8, 8, 1), steps_per_round=200, rounds=40),
    Setting("resnet20", (16, 16, 3), steps_per_round=50, rounds=24),
)
QUICK = (Setting("convnet", (8, 8, 1), steps_per_round=5, rounds=2),)


@dataclasses.dataclass(frozen=True)
class Loop:
    """One way to write the loop: `run(num_steps)` goes on from where it was and waits for the last step."""

    run: Callable[[int], None]
    step_flops: float


@dataclasses.dataclass(frozen=True)
class Result:
    """What a step of one loop costs, and its ratio to the loop written by hand."""

    milliseconds: float
    time_ratio: Ratio
    step_flops: float


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Result]]:
    """Measures, prints a table per network, and returns the results by network and loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="rounds per network")
    parser.add_argument("--quick", action="store_true", help="the small network and two rounds, to see that it runs")
    options = parser.parse_args(arguments)
    results = {}
    for setting in QUICK if options.quick else FULL:
        setting = dataclasses.replace(setting, rounds=options.rounds or setting.rounds)
        print(f"\n{title(setting)}\n{machine()}\n", flush=True)
        results[setting.model] = measure(setting)
        print(render(results[setting.model]))
    return results


def measure(setting: Setting) -> dict[str, Result]:
    """Times the loops in blocks of steps, interleaved, and returns what each costs."""
    images, labels = make_data(setting)
    loops = {
        "jxfer": jxfer_loop(setting, images, labels),
        BY_HAND: plain_loop(setting, images, labels),
        "nnx.jit + nnx.Optimizer": nnx_loop(setting, images, labels),
    }
    seconds = interleave(
        {name: functools.partial(loop.run, setting.steps_per_round) for name, loop in loops.items()},
        rounds=setting.rounds,
    )
    return {
        name: Result(
            float(np.median(seconds[name])) / setting.steps_per_round * 1e3,
            ratio(seconds[name], seconds[BY_HAND]),
            loop.step_flops,
        )
        for name, loop in loops.items()
    }


def jxfer_loop(setting: Setting, images: np.ndarray, labels: np.ndarray) -> Loop:
    """Returns jxfer's loop on one device, put together as a run does it."""
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    model = build(setting)
    partition = Partition.of(model, (("**", "all"),))
    state, fixed = init_state(model, partition, optim.optimizer(TRAIN, partition, num_steps=NUM_STEPS))
    settings = {"learning_rate": TRAIN.learning_rate, "weight_decay": TRAIN.weight_decay}
    state = dataclasses.replace(state, opt_state=optim.set_hyperparams(state.opt_state, **settings))
    state, fixed = place_state(state, fixed, mesh, MeshConfig())
    prepare = data.Prepare(config=DataConfig(), num_classes=NUM_CLASSES, train=True)
    train_step = make_train_step(classification(), prepare=prepare)
    batches = device_batches(setting, images, labels, mesh)
    cost = cost_of(train_step, state, fixed, next(batches))
    windows: list[loop.Window] = []
    progress: list[int] = []

    def run(num_steps: int) -> None:
        nonlocal state
        state = loop.train(
            train_step,
            state,
            fixed,
            batches,
            num_steps=int(state.step) + num_steps,
            log_every=TRAIN.log_every,
            on_window=windows.append,
            hooks=(loop.Hook(1, lambda step, state: progress.append(step)),),
        )
        jax.block_until_ready(state)

    return Loop(run, cost.step_flops)


def device_batches(
    setting: Setting, images: np.ndarray, labels: np.ndarray, mesh: jax.sharding.Mesh
) -> Iterator[Batch]:
    """Yields batches of jxfer's stream on the device."""
    ids = np.array([f"train/{index:07d}" for index in range(len(labels))])
    split = data.ArraySplit(ids, labels, {"image": images})
    for batch in data.batches(split, batch_size=setting.batch_size, seed=0):
        yield put_batch(pad_batch(batch, multiple=num_batch_shards(mesh)), mesh)


def plain_loop(setting: Setting, images: np.ndarray, labels: np.ndarray) -> Loop:
    """Returns the loop that one would write by hand: a jitted function of plain dicts, and little else."""
    model = build(setting)
    graphdef, not_params = nnx.graphdef(model), nnx.Not(nnx.Param)
    params, statistics = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, not_params))
    tx = make_tx()
    opt_state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def train_step(
        params: Any, statistics: Any, opt_state: Any, image: jax.Array, label: jax.Array
    ) -> tuple[Any, Any, Any, Metrics]:
        def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            model = nnx.merge(graphdef, params, statistics)
            logits = model(normalise(image))
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
            return loss, (logits, nnx.to_pure_dict(nnx.state(model, not_params)))

        (loss, (logits, statistics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), statistics, opt_state, metrics_of(loss, logits, label, grads)

    batches = shuffled(images, labels, setting.batch_size)
    flops = flops_of(train_step.lower(params, statistics, opt_state, *next(batches)).compile())

    def run(num_steps: int) -> None:
        nonlocal params, statistics, opt_state
        pending = []
        for step in range(1, num_steps + 1):
            params, statistics, opt_state, metrics = train_step(params, statistics, opt_state, *next(batches))
            pending.append(metrics)
            if step % TRAIN.log_every == 0 or step == num_steps:
                log(pending)
        jax.block_until_ready(params)

    return Loop(run, flops)


def nnx_loop(setting: Setting, images: np.ndarray, labels: np.ndarray) -> Loop:
    """Returns the loop of the NNX guides: `nnx.jit` over a module and an `nnx.Optimizer`, both updated in place."""
    model = build(setting)
    optimizer = nnx.Optimizer(model, make_tx(), wrt=nnx.Param)

    @nnx.jit
    def train_step(model: nnx.Module, optimizer: nnx.Optimizer, image: Any, label: Any) -> Metrics:
        def loss_fn(model: nnx.Module) -> tuple[jax.Array, jax.Array]:
            logits = model(normalise(image))
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), logits

        (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads)
        return metrics_of(loss, logits, label, grads)

    batches = shuffled(images, labels, setting.batch_size)
    flops = flops_of(train_step.lower(model, optimizer, *next(batches)).compile().compiled)

    def run(num_steps: int) -> None:
        pending = []
        for step in range(1, num_steps + 1):
            pending.append(train_step(model, optimizer, *next(batches)))
            if step % TRAIN.log_every == 0 or step == num_steps:
                log(pending)
        jax.block_until_ready(nnx.state(model))

    return Loop(run, flops)


def make_tx() -> optax.GradientTransformation:
    """Returns the optimizer of the two loops that are not jxfer's."""
    rate = optax.cosine_decay_schedule(TRAIN.learning_rate, NUM_STEPS)
    return optax.chain(optax.clip_by_global_norm(TRAIN.clip_norm), optax.adamw(rate, weight_decay=TRAIN.weight_decay))


def normalise(image: jax.Array) -> jax.Array:
    """Maps uint8 pixels to [-1, 1]."""
    return (image.astype(jnp.float32) / 255 - 0.5) / 0.5


def metrics_of(loss: jax.Array, logits: jax.Array, label: jax.Array, grads: Any) -> Metrics:
    """Returns what all loops report of a step."""
    accuracy = jnp.mean(jnp.argmax(logits, -1) == label)
    return {"loss": loss, "accuracy": accuracy, "grad_norm": optax.tree.norm(grads)}


def log(pending: list[Metrics]) -> dict[str, float]:
    """Fetches metrics, empties the list and returns their means."""
    rows = jax.device_get(pending)
    pending.clear()
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def shuffled(images: np.ndarray, labels: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields batches of one permutation after the other, dropping what is left of each."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(labels))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            yield images[rows], labels[rows]


def make_data(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Returns random images and labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (setting.num_examples, *setting.input_shape), dtype=np.uint8)
    return images, rng.integers(0, NUM_CLASSES, setting.num_examples).astype(np.int32)


def build(setting: Setting) -> nnx.Module:
    """Builds the network with random weights."""
    config = ModelConfig(setting.model)
    return models.build(config, num_classes=NUM_CLASSES, input_shape=setting.input_shape, rngs=nnx.Rngs(0))


def title(setting: Setting) -> str:
    """Returns what is measured, in one line."""
    rows, columns, _ = setting.input_shape
    what = f"{setting.model} at {rows}×{columns}, batch {setting.batch_size}"
    return f"{what}: {setting.rounds} rounds of {setting.steps_per_round} step(s), median ratio (quartiles)"


def render(results: dict[str, Result]) -> str:
    """Returns the table of one network."""
    header = ("loop", "ms / step", "time / by hand", "GFLOP / step")
    rows = [
        (name, f"{result.milliseconds:.2f}", result.time_ratio, f"{result.step_flops / 1e9:.4f}")
        for name, result in results.items()
    ]
    return table(header, rows)


if __name__ == "__main__":
    main()
