"""What training many heads as one population saves, against one after the other.

    python benchmarks/population.py [--rounds N] [--quick]

First whole runs, from the subset that is drawn to the row of results: a linear
probe with 64 learning rates on stored features of handwritten digits, as a population and one variant after the other.
Then the steps alone: 64 linear heads with 64 learning rates and decays train with AdamW on the same 512 features: as
one population; each in a loop of jxfer's own step; each in a loop written by hand that scans its steps inside one
program; and each in a loop of PyTorch, if it is installed. Batches lie on the device in all four. Then the steps of 8
low-rank updates of a vision transformer. Last the floating-point operations of 8 heads over an online backbone, against
one.
"""

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from timing import Ratio, interleave, machine, ratio, table

from jxfer import optim, plan
from jxfer.ablate import source_model
from jxfer.config import DataConfig, Experiment, ModelConfig, SearchConfig, SourceConfig, TrainConfig
from jxfer.cost import cost_of
from jxfer.known import resolve
from jxfer.loop import Session
from jxfer.methods import linear_probe, lora
from jxfer.objectives import classification
from jxfer.partition import Partition
from jxfer.planned import plan_phases
from jxfer.run import run
from jxfer.search import Job
from jxfer.state import init_population, init_state
from jxfer.step import make_population_step, make_train_step
from jxfer.task import Task, base_model, target_model
from jxfer.typing import Batch

NUM_FEATURES = 512
_ADAPTER_STEPS = 3
POPULATION, STEPS_BY_JXFER = "jxfer, one population", "jxfer, one after the other"
SCANS, TORCH = "by hand, one lax.scan after the other", "PyTorch, one after the other"
RUN_TOGETHER, RUN_APART = "run of one population", "run of one variant after the other"
ADAPTERS, ADAPTERS_APART = "steps of one population", "steps of one variant after the other"
LIMITS = {RUN_APART: 25.0, STEPS_BY_JXFER: 25.0, SCANS: 10.0}
"""How many times as long each must take at least."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """How many heads train for how many steps, and on what."""

    num_classes: int
    batch_size: int
    num_steps: int
    num_heads: int = 64


FULL = (Setting(10, 64, 200), Setting(10, 1024, 50), Setting(2, 256, 100))
QUICK = (Setting(3, 16, 3, num_heads=4),)


_VIT = (("patch_size", "4"), ("num_layers", "4"))
_SMALL_VIT = (("patch_size", "8"), ("num_layers", "1"), ("hidden_dim", "32"), ("num_heads", "2"), ("mlp_dim", "64"))


class Head(nnx.Module):
    """A linear head alone; what it sees are stored features."""

    def __init__(self, num_classes: int, rngs: nnx.Rngs):
        self.head = nnx.Linear(NUM_FEATURES, num_classes, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps features [B D] to logits [B K]."""
        return self.head(x)


def main(arguments: list[str] | None = None) -> dict[Setting, dict[str, Ratio]]:
    """Measures, prints the tables, and returns how many times as long each way takes as the population."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="how often each is measured")
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    options = parser.parse_args(arguments)
    print(machine(), flush=True)
    rounds = options.rounds or (1 if options.quick else 5)
    _compare_runs(*((4, 5, 1) if options.quick else (64, 200, 1)))
    ratios = {setting: _compare(setting, rounds) for setting in (QUICK if options.quick else FULL)}
    _compare_adapters(*((_SMALL_VIT, 2, 1) if options.quick else (_VIT, 8, rounds)))
    _print_flops("convnet" if options.quick else "resnet18_32")
    return ratios


def flops_of_heads(backbone: str, num_heads: int) -> tuple[float, float]:
    """Returns the floating-point operations of a step of one head over an online backbone, and of `num_heads`."""
    rates = tuple(10.0 ** -(1 + index / num_heads) for index in range(num_heads))
    model = ModelConfig(backbone)
    experiment = Experiment("heads", model=model, search=SearchConfig(learning_rate=rates), features="off")
    task = Task(tuple("abc"), tuple("abcdefghij"), (32, 32, 3))

    def build() -> nnx.Module:
        base = base_model(experiment.model, linear_probe, task, seed=0)
        return target_model(base, linear_probe, task, source=None, seed=0)

    network = nnx.eval_shape(build)
    (planned,) = plan_phases(experiment, linear_probe, network)
    one = plan.abstract_cost(experiment, linear_probe, planned, network, task)
    population, fixed = plan.abstract_population(plan.variants(experiment, linear_probe), planned, network)
    step, _ = plan.phase_steps(experiment, linear_probe, planned, len(task.target_classes), plan.POPULATION)
    several = cost_of(step, population, fixed, plan.abstract_batch(experiment, planned, network, task))
    return one.step_flops, several.step_flops


def _compare(setting: Setting, rounds: int) -> dict[str, Ratio]:
    rng = np.random.default_rng(0)
    rates = 10 ** rng.uniform(-4, -1, setting.num_heads)
    decays = 10 ** rng.uniform(-6, -2, setting.num_heads)
    centres = rng.normal(size=(setting.num_classes, NUM_FEATURES))
    shape = (setting.num_steps, setting.batch_size)
    labels = rng.integers(0, setting.num_classes, shape).astype(np.int32)
    features = (centres[labels] + 4 * rng.normal(size=(*shape, NUM_FEATURES))).astype(np.float32)
    ways = {
        POPULATION: _population(features, labels, rates, decays),
        STEPS_BY_JXFER: _one_by_one(features, labels, rates, decays),
        SCANS: _scans(features, labels, rates, decays),
    }
    if torch_way := _torch(features, labels, rates, decays):
        ways[TORCH] = torch_way
    kernels = {name: way() for name, way in ways.items()}
    for name, found in kernels.items():  # they must be doing the same
        apart = np.linalg.norm(found - kernels[POPULATION], axis=(1, 2)) / np.linalg.norm(found, axis=(1, 2))
        assert np.max(apart) < 0.01, f"{name} trains other heads: {np.max(apart):.1e} apart"
    seconds = interleave({name: functools.partial(_run, way) for name, way in ways.items()}, rounds=rounds)
    what = (
        f"{setting.num_heads} heads of {setting.num_classes} classes, {setting.num_steps} steps of {setting.batch_size}"
    )
    return _print_times(what, POPULATION, rounds, seconds)


def _compare_runs(num_variants: int, num_steps: int, rounds: int) -> dict[str, Ratio]:
    rates = tuple((10 ** np.random.default_rng(0).uniform(-4, -1, num_variants)).tolist())
    session = Session(progress=lambda *_: None, should_stop=lambda: False)
    train = TrainConfig(num_steps=num_steps)
    source = SourceConfig(data=DataConfig("tfds:jxfer_digits"), train=TrainConfig(num_steps=1))
    with tempfile.TemporaryDirectory() as folder:
        experiment = resolve(Experiment("heads", source=source, target=DataConfig("tfds:jxfer_digits"), train=train))
        weights = source_model(experiment, Path(folder), session)

        def way(population: int | None) -> Callable[[], None]:
            search = SearchConfig(learning_rate=rates, population=population)
            job = Job(dataclasses.replace(experiment, search=search), linear_probe, 20, 0)

            def train_all() -> None:
                with tempfile.TemporaryDirectory() as directory:
                    row = run(job, Path(directory) / "run", session, source=weights)
                assert row["status"] == "ok", row["error"]
                assert len(row["variants"]) == num_variants

            return train_all

        seconds = interleave({RUN_TOGETHER: way(None), RUN_APART: way(1)}, rounds=rounds)
    what = f"a linear probe with {num_variants} learning rates, {num_steps} steps of {train.batch_size}, whole runs"
    return _print_times(what, RUN_TOGETHER, rounds, seconds)


def _compare_adapters(size: tuple[tuple[str, str], ...], num_variants: int, rounds: int) -> dict[str, Ratio]:
    rates = tuple(10.0 ** -(2 + index / num_variants) for index in range(num_variants))
    model, train = ModelConfig("vit_ti_16", size=size), TrainConfig(batch_size=32)
    experiment = Experiment("adapters", model=model, train=train, search=SearchConfig(learning_rate=rates))
    task = Task(tuple("abc"), tuple("abcdefghij"), (32, 32, 3))
    network = target_model(base_model(model, lora, task, seed=0), lora, task, source=None, seed=0)
    (planned,) = plan_phases(experiment, lora, network)
    assert planned.apart is None, planned.apart
    rng, key = np.random.default_rng(0), jax.random.key(0)
    images = rng.integers(0, 256, (train.batch_size, *task.input_shape)).astype(np.uint8)
    batch = jax.device_put({"image": images, "label": np.arange(train.batch_size) % 10})
    searched = plan.variants(experiment, lora)
    one, _ = plan.phase_steps(experiment, lora, planned, 10)
    together, _ = plan.phase_steps(experiment, lora, planned, 10, plan.POPULATION)

    def population() -> list[jax.Array]:
        population, fixed = plan.start_population(searched, planned, [network] * num_variants, key=key)
        for _ in range(_ADAPTER_STEPS):
            population, metrics = together(population, fixed, batch)
        return list(jax.block_until_ready(metrics["loss"]))

    def apart() -> list[jax.Array]:
        losses = []
        for variant in searched:
            own = dataclasses.replace(experiment, train=variant.train)
            state, fixed = plan.start_phase(own, lora, planned, network, key=key)
            for _ in range(_ADAPTER_STEPS):
                state, metrics = one(state, fixed, batch)
            losses.append(metrics["loss"])
        return jax.block_until_ready(losses)

    np.testing.assert_allclose(population(), apart(), rtol=1e-3)  # they must be doing the same
    seconds = interleave({ADAPTERS: population, ADAPTERS_APART: apart}, rounds=rounds)
    what = f"{num_variants} low-rank updates of {model.name} {dict(size)} at 32×32, {_ADAPTER_STEPS} steps of 32"
    return _print_times(what, ADAPTERS, rounds, seconds)


def _print_times(what: str, first: str, rounds: int, seconds: dict[str, np.ndarray]) -> dict[str, Ratio]:
    ratios = {name: ratio(taken, seconds[first]) for name, taken in seconds.items()}
    rows = [
        (
            name,
            f"{1e3 * np.median(taken):.1f}",
            ratios[name],
            f"at least {LIMITS[name]:g}" if name in LIMITS else "",
        )
        for name, taken in seconds.items()
    ]
    print(f"\n{what}, {rounds} round(s), median ratio (quartiles)\n")
    print(table(("way to train", "ms", f"time / {first}", "limit"), rows), flush=True)
    return ratios


def _print_flops(backbone: str) -> None:
    one, eight = flops_of_heads(backbone, 8)
    print(f"\n8 linear heads over one {backbone} at 32×32, online: {eight / one:.4f} × the FLOPs of one (limit 1.1)")


Way = Callable[[], np.ndarray]
"""Trains all heads from the start and returns their kernels, [heads D K]."""


def _run(way: Way) -> None:
    way()


def _population(features: np.ndarray, labels: np.ndarray, rates: np.ndarray, decays: np.ndarray) -> Way:
    head, partition, tx = _head(len(features), int(labels.max()) + 1)
    step, batches = make_population_step(classification()), _batches(features, labels)

    def train() -> np.ndarray:
        population, fixed = init_population([head] * len(rates), partition, tx)
        opt_state = optim.set_hyperparams(population.state.opt_state, learning_rate=rates, weight_decay=decays)
        population = dataclasses.replace(population, state=dataclasses.replace(population.state, opt_state=opt_state))
        for batch in batches:
            population, _ = step(population, fixed, batch)
        return np.asarray(population.state.params["head/kernel"])

    return train


def _one_by_one(features: np.ndarray, labels: np.ndarray, rates: np.ndarray, decays: np.ndarray) -> Way:
    head, partition, tx = _head(len(features), int(labels.max()) + 1)
    step, batches = make_train_step(classification()), _batches(features, labels)

    def train_one(rate: float, decay: float) -> jax.Array:
        state, fixed = init_state(head, partition, tx)
        opt_state = optim.set_hyperparams(state.opt_state, learning_rate=rate, weight_decay=decay)
        state = dataclasses.replace(state, opt_state=opt_state)
        for batch in batches:
            state, _ = step(state, fixed, batch)
        return state.params["head/kernel"]

    return lambda: np.stack(jax.device_get([train_one(rate, decay) for rate, decay in zip(rates, decays, strict=True)]))


def _scans(features: np.ndarray, labels: np.ndarray, rates: np.ndarray, decays: np.ndarray) -> Way:
    """Plain jax and optax: all steps of a head in one program, which serves every head."""
    data, num_classes = jax.device_put((features, labels)), int(labels.max()) + 1

    def loss(params: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = batch[0] @ params["kernel"] + params["bias"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))

    @jax.jit
    def train_one(rate: jax.Array, decay: jax.Array, data: tuple[jax.Array, jax.Array]) -> jax.Array:
        schedule = optax.cosine_decay_schedule(rate, len(features))
        tx = optax.adamw(schedule, weight_decay=decay, mask={"kernel": True, "bias": False})
        params = {"kernel": jnp.zeros((NUM_FEATURES, num_classes)), "bias": jnp.zeros(num_classes)}

        def step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
            params, opt_state = carry
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        return jax.lax.scan(step, (params, tx.init(params)), data)[0][0]["kernel"]

    settings = [(jnp.float32(rate), jnp.float32(decay)) for rate, decay in zip(rates, decays, strict=True)]
    return lambda: np.stack(jax.device_get([train_one(rate, decay, data) for rate, decay in settings]))


def _torch(features: np.ndarray, labels: np.ndarray, rates: np.ndarray, decays: np.ndarray) -> Way | None:
    try:
        import torch
    except ImportError:
        return None
    data = [(torch.from_numpy(x), torch.from_numpy(y).long()) for x, y in zip(features, labels, strict=True)]

    def train_one(rate: float, decay: float) -> np.ndarray:
        linear = torch.nn.Linear(NUM_FEATURES, int(labels.max()) + 1)
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        groups = [{"params": [linear.weight], "weight_decay": decay}, {"params": [linear.bias], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(data))
        for x, y in data:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(linear(x), y).backward()
            optimizer.step()
            schedule.step()
        return linear.weight.detach().numpy().T

    return lambda: np.stack([train_one(rate, decay) for rate, decay in zip(rates, decays, strict=True)])


def _head(num_steps: int, num_classes: int) -> tuple[Head, Partition, optax.GradientTransformation]:
    head = Head(num_classes, nnx.Rngs(0))
    partition = Partition.of(head, [("**", "head")])
    return head, partition, optim.optimizer(TrainConfig(), partition, num_steps=num_steps)


def _batches(features: np.ndarray, labels: np.ndarray) -> list[Batch]:
    return [jax.device_put({"image": x, "label": y}) for x, y in zip(features, labels, strict=True)]


if __name__ == "__main__":
    main()
