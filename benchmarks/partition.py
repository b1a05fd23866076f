"""What freezing saves: step time, FLOPs and optimizer state of five ways to train, as multiples of the forward pass.

    python benchmarks/partition.py [--rounds N] [--quick]

Last, on a CPU, what the flag gains that jxfer starts XLA with: two processes, one with it and one without, take turns.
About 10 minutes on 2 CPU cores that also do other work. Every training step clips its gradients and reports their norm.
Frozen layers normalise by their stored statistics, also where everything is differentiated and then masked, so that
differentiation is all that differs.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from children import child, serve
from flax import nnx
from timing import Ratio, interleave, machine, ratio, table

from jxfer import models, optim
from jxfer.config import ModelConfig, TrainConfig
from jxfer.cost import cost_of, flops_of
from jxfer.objectives import classification
from jxfer.partition import FROZEN, Partition, arrays_of, eval_graphdef
from jxfer.state import init_state
from jxfer.step import make_train_step
from jxfer.typing import Arrays, Batch, Metrics
from jxfer.xla_flags import NO_YNN_FUSION, is_known

# A rate so small that thousands of steps on one batch do not fit it, which would turn gradients into denormals.
TRAIN = TrainConfig(clip_norm=1.0, learning_rate=1e-6)
HEAD = (("head/**", "head"), ("**", FROZEN))
NUM_CLASSES = 10
FORWARD, FULL_TUNING = "forward only", "full fine-tuning"
NO_FLAG = "--xla_force_host_platform_device_count=1"
"""Changes nothing, but where flags are set jxfer sets none."""
FLAG_ROUNDS = 9


@dataclasses.dataclass(frozen=True)
class Setting:
    """A network, its batches, and how many steps of each way make a round."""

    model: str
    input_shape: tuple[int, int, int]
    last_stage: str
    steps_per_round: int
    rounds: int
    batch_size: int = 64


FULL = (
    Setting("resnet18_32", (32, 32, 3), "layer4", steps_per_round=1, rounds=24),
    Setting("convnet", (8, 8, 1), "layer2", steps_per_round=50, rounds=60),
)
QUICK = (Setting("convnet", (8, 8, 1), "layer2", steps_per_round=2, rounds=2),)


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to train: `step()` dispatches one step and returns an array to wait for."""

    step: Callable[[], jax.Array]
    flops: float
    optimizer_bytes: int


@dataclasses.dataclass(frozen=True)
class Result:
    """What one way costs, and its ratios to the forward pass."""

    milliseconds: float
    time_ratio: Ratio
    flops: float
    flops_ratio: float
    optimizer_bytes: int


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Result]]:
    """Measures, prints a table per network, and returns the results by network and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="rounds per network")
    parser.add_argument("--quick", action="store_true", help="the small network and two rounds, to see that it runs")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    if options.serve:
        serve(flagged_calls(settings[0]))
        return {}
    results = {}
    for setting in settings:
        setting = dataclasses.replace(setting, rounds=options.rounds or setting.rounds)
        print(f"\n{title(setting)}\n{machine()}\n", flush=True)
        results[setting.model] = measure(setting)
        print(render(results[setting.model]))
    optimizer_bytes, head_bytes = probe_bytes("resnet50", (224, 224, 3), num_classes=1000)
    print(
        f"\nLinear probe on ResNet-50: {optimizer_bytes:,} bytes of optimizer state, head {head_bytes:,} bytes:", end=""
    )
    print(f" its two AdamW moments and {optimizer_bytes - 2 * head_bytes} bytes of counters and settings.")
    if jax.default_backend() == "cpu" and is_known(NO_YNN_FUSION):
        gains = flag_gains(["--quick"] * options.quick, rounds=options.rounds or (2 if options.quick else FLAG_ROUNDS))
        print(f"\n{render_gains(settings[0], gains)}")
    return results


def flag_gains(options: list[str], *, rounds: int) -> dict[str, tuple[float, float, Ratio]]:
    """Returns, for some ways, the seconds of a round with XLA's flag and without, and how many times as long without.

    The processes are kept and take turns, so that what else the machine does meets both alike.
    """
    arguments = [__file__, "--serve", *options]
    with child(arguments, XLA_FLAGS=NO_YNN_FUSION) as with_flag, child(arguments, XLA_FLAGS=NO_FLAG) as without:
        calls = {
            (way, call): functools.partial(call, way) for way in (FORWARD, FULL_TUNING) for call in (with_flag, without)
        }
        seconds = interleave(calls, rounds=rounds)
    medians = {key: float(np.median(taken)) for key, taken in seconds.items()}
    return {
        way: (
            medians[way, with_flag],
            medians[way, without],
            ratio(seconds[way, without], seconds[way, with_flag]),
        )
        for way in (FORWARD, FULL_TUNING)
    }


def flagged_calls(setting: Setting) -> dict[str, Callable[[], None]]:
    """Returns what a process measures under its flags, a round each."""
    batch = make_batch(setting)
    ways = {FORWARD: forward_way(setting, batch), FULL_TUNING: jxfer_way(setting, batch, (("**", "all"),))}
    return {name: functools.partial(repeat, way.step, setting.steps_per_round) for name, way in ways.items()}


def render_gains(setting: Setting, gains: dict[str, tuple[float, float, Ratio]]) -> str:
    """Returns the table of what the flag gains."""
    rows = [
        (way, *(f"{secs / setting.steps_per_round * 1e3:.2f}" for secs in (with_flag, without)), gained)
        for way, (with_flag, without, gained) in gains.items()
    ]
    header = (f"step of {setting.model}", "ms with the flag", "ms without", "without / with")
    return f"XLA_FLAGS={NO_YNN_FUSION}\n\n{table(header, rows)}"


def measure(setting: Setting) -> dict[str, Result]:
    """Times all ways in one interleaved run and returns what each costs."""
    ways = make_ways(setting)
    seconds = interleave(
        {name: functools.partial(repeat, way.step, setting.steps_per_round) for name, way in ways.items()},
        rounds=setting.rounds,
    )
    return {
        name: Result(
            float(np.median(seconds[name])) / setting.steps_per_round * 1e3,
            ratio(seconds[name], seconds[FORWARD]),
            way.flops,
            way.flops / ways[FORWARD].flops,
            way.optimizer_bytes,
        )
        for name, way in ways.items()
    }


def make_ways(setting: Setting) -> dict[str, Way]:
    """Returns the five ways, each with parameters of its own, on one batch that stays on the device."""
    last = ((f"{setting.last_stage}/**", "last"), *HEAD)
    batch = make_batch(setting)
    return {
        FULL_TUNING: jxfer_way(setting, batch, (("**", "all"),)),
        "differentiate everything, then mask": masked_way(setting, batch),
        "jxfer, last stage + head": jxfer_way(setting, batch, last),
        "jxfer, frozen backbone": jxfer_way(setting, batch, HEAD),
        FORWARD: forward_way(setting, batch),
    }


def jxfer_way(setting: Setting, batch: Batch, rules: tuple[tuple[str, str], ...]) -> Way:
    """Returns jxfer's step under these rules."""
    model = build(setting)
    partition = Partition.of(model, rules)
    tx = optim.optimizer(TRAIN, partition, num_steps=100_000)
    state, fixed = init_state(model, partition, tx)
    settings = {"learning_rate": TRAIN.learning_rate, "weight_decay": TRAIN.weight_decay}
    state = dataclasses.replace(state, opt_state=optim.set_hyperparams(state.opt_state, **settings))
    train_step = make_train_step(classification())
    cost = cost_of(train_step, state, fixed, batch)

    def step() -> jax.Array:
        nonlocal state
        state, metrics = train_step(state, fixed, batch)
        return metrics["grad_norm"]

    return Way(step, cost.step_flops, cost.optimizer_bytes)


def masked_way(setting: Setting, batch: Batch) -> Way:
    """Returns the common recipe: gradients of everything, their norm logged and clipped, frozen updates set to zero."""
    model = build(setting)
    partition = Partition.of(model, HEAD)
    graphdef, statistics = partition.train_graphdef(model), arrays_of(model)
    params = {path: statistics.pop(path) for path in partition.labels}
    freeze = optax.masked(optax.set_to_zero(), partition.mask(FROZEN))
    tx = optax.chain(optax.clip_by_global_norm(TRAIN.clip_norm), optax.adamw(TRAIN.learning_rate), freeze)
    opt_state = tx.init(params)

    def masked_step(params: Arrays, opt_state: Any, statistics: Arrays, batch: Batch) -> tuple[Arrays, Any, Metrics]:
        def loss_fn(params: Arrays) -> jax.Array:
            logits = partition.assemble(graphdef, {**params, **statistics})(batch["image"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return optax.apply_updates(params, updates), opt_state, metrics

    train_step = jax.jit(masked_step, donate_argnums=(0, 1))
    flops = flops_of(train_step.lower(params, opt_state, statistics, batch).compile())

    def step() -> jax.Array:
        nonlocal params, opt_state
        params, opt_state, metrics = train_step(params, opt_state, statistics, batch)
        return metrics["grad_norm"]

    return Way(step, flops, sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state)))


def forward_way(setting: Setting, batch: Batch) -> Way:
    """Returns the forward pass in inference mode, from images to logits."""
    model = build(setting)
    partition, graphdef, arrays = Partition.of(model, HEAD), eval_graphdef(model), arrays_of(model)
    forward = jax.jit(lambda arrays, image: partition.assemble(graphdef, arrays)(image))
    flops = flops_of(forward.lower(arrays, batch["image"]).compile())
    return Way(lambda: forward(arrays, batch["image"]), flops, 0)


def repeat(step: Callable[[], jax.Array], num_steps: int) -> None:
    """Runs steps and waits for the last one."""
    for _ in range(num_steps):
        last = step()
    last.block_until_ready()


def build(setting: Setting) -> nnx.Module:
    """Builds the network with random weights."""
    config = ModelConfig(setting.model)
    return models.build(config, num_classes=NUM_CLASSES, input_shape=setting.input_shape, rngs=nnx.Rngs(0))


def make_batch(setting: Setting) -> Batch:
    """Returns random images and labels on the device."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(setting.batch_size, *setting.input_shape)).astype(np.float32)
    return {"image": jnp.asarray(image), "label": jnp.asarray(rng.integers(0, NUM_CLASSES, setting.batch_size))}


def probe_bytes(name: str, input_shape: tuple[int, int, int], *, num_classes: int) -> tuple[int, int]:
    """Returns the bytes of a linear probe's optimizer state and of its head, from shapes alone."""

    def abstract() -> nnx.Module:
        return models.build(ModelConfig(name), num_classes=num_classes, input_shape=input_shape, rngs=nnx.Rngs(0))

    partition = Partition.of(nnx.eval_shape(abstract), HEAD)
    head = {leaf.path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in partition.trainable}
    opt_state = jax.eval_shape(optim.optimizer(TRAIN, partition, num_steps=1).init, head)
    return _num_bytes(opt_state), _num_bytes(head)


def title(setting: Setting) -> str:
    """Returns what is measured, in one line."""
    rows, columns, _ = setting.input_shape
    what = f"{setting.model} at {rows}×{columns}, batch {setting.batch_size}"
    return f"{what}: {setting.rounds} rounds of {setting.steps_per_round} step(s), median ratio (quartiles)"


def render(results: dict[str, Result]) -> str:
    """Returns the table of one network."""
    header = ("way to train", "ms / step", "time / forward", "GFLOP / step", "FLOPs / forward", "optimizer bytes")
    rows = [
        (
            name,
            f"{result.milliseconds:.2f}",
            result.time_ratio,
            f"{result.flops / 1e9:.3f}",
            f"{result.flops_ratio:.3f}",
            f"{result.optimizer_bytes:,}",
        )
        for name, result in results.items()
    ]
    return table(header, rows)


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
