"""What kept compiled programs gain: a whole command of one training step, with an empty cache and with a filled one.

    python benchmarks/startup.py [--rounds N] [--quick]

About 5 minutes on 2 idle CPU cores. Each round runs `jxfer run` twice into new directories, from the start of Python to
the row of results: planning, the step, a look at validation, the test split. Before the first of the two the compiled
programs are removed; data are prepared before and stay.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from timing import Ratio, machine, ratio, table

from jxfer import data
from jxfer.config import DataConfig

EMPTY, FILLED = "empty cache", "filled cache"

EXPERIMENT = '''"""One step, from random weights, on digits."""

from jxfer import methods
from jxfer.config import Experiment, TrainConfig

train = TrainConfig(num_steps=1, batch_size=16)
experiment = Experiment(name="startup", train=train, methods=(methods.scratch,), shots=(5,), seeds=1)
'''

FULL, QUICK = ("convnet", "resnet18_32", "vit_ti_16"), ("convnet",)

SIZES = {"vit_ti_16": "patch_size=4"}
"""For images of 8×8."""


def main(arguments: list[str] | None = None) -> dict[str, Ratio]:
    """Measures, prints a table, and returns by network the time with a filled cache over that with an empty one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="how often each is measured")
    parser.add_argument("--quick", action="store_true", help="one round of one network, to see that it runs")
    options = parser.parse_args(arguments)
    rounds = options.rounds or (1 if options.quick else 3)
    print(f"{rounds} round(s), median seconds, median ratio (quartiles)\n{machine()}\n", flush=True)
    ratios, rows = {}, []
    for model in QUICK if options.quick else FULL:
        seconds = measure(model, rounds)
        ratios[model] = ratio(seconds[FILLED], seconds[EMPTY])
        rows.append((model, *(f"{np.median(seconds[name]):.1f}" for name in (EMPTY, FILLED)), ratios[model]))
    print(table(("network", EMPTY, FILLED, "filled / empty"), rows))
    return ratios


def measure(model: str, rounds: int) -> dict[str, np.ndarray]:
    """Returns the seconds of each command in each round."""
    seconds = {EMPTY: np.zeros(rounds), FILLED: np.zeros(rounds)}
    before = os.environ.get("JXFER_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JXFER_CACHE"] = folder
        try:
            data.load_dataset(DataConfig())  # prepares the digits
        finally:
            os.environ.pop("JXFER_CACHE") if before is None else os.environ.update(JXFER_CACHE=before)
        experiment = Path(folder) / "startup.py"
        experiment.write_text(EXPERIMENT)
        for index in range(rounds):
            shutil.rmtree(Path(folder) / "xla", ignore_errors=True)
            for name in (EMPTY, FILLED):
                seconds[name][index] = run(model, experiment, Path(folder))
    return seconds


def run(model: str, experiment: Path, cache: Path) -> float:
    """Returns the seconds that a command takes."""
    program = [sys.executable, "-c", "import sys; from jxfer.cli import main; sys.exit(main())"]
    command = [*program, "run", str(experiment), "--method", "scratch", "--model.name", model]
    if model in SIZES:
        command += ["--model.size", SIZES[model]]
    kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        subprocess.run(
            [*command, "--out", out], env=kept | {"JXFER_CACHE": str(cache)}, check=True, capture_output=True, text=True
        )
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
