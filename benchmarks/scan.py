"""What scanning equal blocks saves: the time to compile a ViT's gradients and training steps, list against scan.

    python benchmarks/scan.py [--rounds N] [--quick]

About 20 minutes on 2 CPU cores that also do other work. Each time begins with tracing, with empty caches. Scanning
shrinks the network's part of the program and not the optimizer's, which has every block's parameters in both forms.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from timing import Ratio, interleave, machine, ratio, table

from jxfer import optim
from jxfer.config import TrainConfig
from jxfer.models.vit import CONFIGS, ViT
from jxfer.objectives import classification
from jxfer.partition import FROZEN, Partition
from jxfer.state import init_state
from jxfer.step import make_train_step

MODEL = "vit_ti_16"
IMAGE_SHAPE = (64, 64, 3)
NUM_CLASSES = 10
BATCH_SIZE = 8
LAST_BLOCKS = 2
GRADIENTS = "gradients of everything"
STEPS = ("step, everything", f"step, last {LAST_BLOCKS} blocks and head")
PROGRAMS = (GRADIENTS, *STEPS)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Depths to compile, and how often."""

    depths: tuple[int, ...]
    rounds: int


FULL = Setting((12, 24), rounds=3)
QUICK = Setting((4,), rounds=1)


@dataclasses.dataclass(frozen=True)
class Result:
    """Seconds to compile one depth both ways, and the operations of both programs before XLA's optimisations."""

    listed_secs: float
    scanned_secs: float
    ratio: Ratio
    listed_operations: int
    scanned_operations: int


def main(arguments: list[str] | None = None) -> dict[tuple[int, str], Result]:
    """Measures, prints a table, and returns the results by depth and program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="rounds per depth")
    parser.add_argument("--quick", action="store_true", help="four blocks and one round, to see that it runs")
    options = parser.parse_args(arguments)
    setting = QUICK if options.quick else FULL
    rounds = options.rounds or setting.rounds
    print(f"\n{MODEL} at {IMAGE_SHAPE[0]}×{IMAGE_SHAPE[1]}, {rounds} rounds, median ratio (quartiles)")
    print(f"{machine()}\n", flush=True)
    results = {(depth, name): measure(depth, name, rounds) for depth in setting.depths for name in PROGRAMS}
    print(render(results))
    return results


def measure(depth: int, name: str, rounds: int) -> Result:
    """Times compilation both ways in one interleaved run."""
    programs = {scan: make_program(depth, name, scan=scan) for scan in (False, True)}
    calls = {str(scan): functools.partial(compile_anew, lower) for scan, lower in programs.items()}
    seconds = interleave(calls, rounds=rounds)
    operations = {scan: num_operations(lower()) for scan, lower in programs.items()}
    medians = {scan: float(np.median(seconds[str(scan)])) for scan in (False, True)}
    return Result(
        medians[False],
        medians[True],
        ratio(seconds["False"], seconds["True"]),
        operations[False],
        operations[True],
    )


def make_program(depth: int, name: str, *, scan: bool) -> Callable[[], Any]:
    """Returns what traces and lowers one of the programs."""
    size = dataclasses.replace(CONFIGS[MODEL], num_layers=depth, scan=scan)
    settings = {"input_shape": IMAGE_SHAPE, "num_classes": NUM_CLASSES, "dtype": jnp.float32}
    model = nnx.jit(lambda: ViT(size, **settings, rngs=nnx.Rngs(0)))()
    image = jnp.zeros((BATCH_SIZE, *IMAGE_SHAPE))
    if name == GRADIENTS:
        graphdef, params = nnx.split(model)
        return lambda: jax.jit(jax.grad(lambda params: nnx.merge(graphdef, params)(image).sum())).lower(params)
    partition = Partition.of(model, rules(depth, name))
    state, fixed = init_state(model, partition, optim.optimizer(TrainConfig(clip_norm=1.0), partition, num_steps=100))
    batch = {"image": image, "label": jnp.zeros(BATCH_SIZE, jnp.int32)}
    return lambda: make_train_step(classification()).lower(state, fixed, batch)


def rules(depth: int, name: str) -> tuple[tuple[str, str], ...]:
    """Returns the rules of a training step."""
    if name == STEPS[0]:
        return (("**", "all"),)
    last = tuple((f"blocks/{index}/**", "last") for index in range(depth - LAST_BLOCKS, depth))
    return (*last, ("head/**", "last"), ("**", FROZEN))


def compile_anew(lower: Callable[[], Any]) -> None:
    """Traces, lowers and compiles with empty caches."""
    jax.clear_caches()
    lower().compile()


def num_operations(lowered: Any) -> int:
    """Returns the operations of a program that is not optimised yet."""
    return sum(" = " in line for line in lowered.as_text().splitlines())


def render(results: dict[tuple[int, str], Result]) -> str:
    """Returns the table."""
    header = ("blocks", "program", "list, s", "scan, s", "list / scan", "operations, list", "operations, scan")
    rows = [
        (
            depth,
            name,
            f"{result.listed_secs:.2f}",
            f"{result.scanned_secs:.2f}",
            result.ratio,
            f"{result.listed_operations:,}",
            f"{result.scanned_operations:,}",
        )
        for (depth, name), result in results.items()
    ]
    return table(header, rows)


if __name__ == "__main__":
    main()
