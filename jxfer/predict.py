"""What a finished run says of new inputs: files and folders of images, sounds or texts, one by one."""

import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jxfer import data
from jxfer.partition import arrays_of, eval_graphdef
from jxfer.source import FinishedRun
from jxfer.step import from_input
from jxfer.typing import InputError

BATCH_SIZE = 64

MOST_COLUMNS = 32
"""Of a class's name in a table; longer names push their row to the right."""

STANDARD_INPUT = "-"
"""The operand that stands for texts on standard input, one a line."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model takes one input for; `error` says why it could not be read, and the rest is then empty."""

    input: str
    label: str | None = None
    probabilities: dict[str, float] = dataclasses.field(default_factory=dict)
    """Class -> probability, the largest first."""
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the line that `jxfer predict --json` prints."""
        if self.error is not None:
            return {"input": self.input, "error": self.error}
        return {"input": self.input, "label": self.label, "probabilities": self.probabilities}


def predict(run: FinishedRun, inputs: Sequence[str]) -> Iterator[Prediction]:
    """Returns an iterator of a prediction for each file, those of folders in the order of their names, made in batches.

    Args:
      run: the finished run.
      inputs: files and folders; for a model of texts also `-`, standard input with one text a line.

    Raises:
      InputError: `-` for a model that reads no texts.
    """
    sources = [source for name in inputs for source in _sources(name, run)]
    logits_of = classifier(run)
    batches = (sources[start : start + BATCH_SIZE] for start in range(0, len(sources), BATCH_SIZE))
    return itertools.chain.from_iterable(_predict_batch(run, batch, logits_of) for batch in batches)


def print_table(predictions: Iterable[Prediction], classes: Sequence[str]) -> int:
    """Prints a row for each prediction, on stderr why an input has none, and returns how many have none."""
    done = failed = 0
    for prediction in predictions:
        if prediction.error is not None:
            failed += 1
            print(f"{prediction.input}: cannot be read: {prediction.error}", file=sys.stderr)
            continue
        if done == 0:
            print(_line(("class", "share", "next", "input"), classes))
        done += 1
        print(_row(prediction, classes))
    return failed


def print_json(predictions: Iterable[Prediction], classes: Sequence[str]) -> int:
    """Prints a JSON object for each input and returns how many could not be read."""
    del classes
    failed = 0
    for prediction in predictions:
        print(json.dumps(prediction.to_json()), flush=True)
        failed += prediction.error is not None
    return failed


def classifier(run: FinishedRun) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from examples as a data set holds them, [B ...], to logits [B K]; jitted, preparation too."""
    model = run.build()
    graphdef, arrays = eval_graphdef(model), arrays_of(model)
    keys = [keys for keys, _ in nnx.to_flat_state(nnx.state(model))]
    prepare = data.Prepare(config=run.data, num_classes=len(run.classes), train=False)

    @jax.jit
    def logits(arrays: dict[str, jax.Array], examples: jax.Array) -> jax.Array:
        state = nnx.from_flat_state([(key, arrays["/".join(map(str, key))]) for key in keys])
        batch = prepare(jax.random.key(0), {run.input: examples})
        return from_input(nnx.merge(graphdef, state), batch)

    return lambda examples: np.asarray(logits(arrays, jnp.asarray(examples)))


@dataclasses.dataclass(frozen=True)
class _Source:
    """One input: its name, and how it is read as an example of the run's data set."""

    name: str
    read: Callable[[], np.ndarray]


def _sources(name: str, run: FinishedRun) -> list[_Source]:
    if name == STANDARD_INPUT and run.input == "text":
        lines = [line.rstrip("\n") for line in sys.stdin]
        return [_Source(line, functools.partial(_encode, line, run)) for line in lines]
    path = Path(name).expanduser()
    if name == STANDARD_INPUT and not path.exists():
        raise InputError(f"`-` reads texts, and `{run.model.name}` reads {run.input}; give files or folders")
    if not path.exists():
        hint = "; texts are read from files, or with `-` from standard input" if run.input == "text" else ""
        return [_Source(name, functools.partial(_refuse, f"no such file or folder{hint}"))]
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _visible_file(file, path))
    if not files:
        return [_Source(name, functools.partial(_refuse, "the folder has no files"))]
    return [_Source(str(file), functools.partial(_read, file, run)) for file in files]


def _row(prediction: Prediction, classes: Sequence[str]) -> str:
    first, *others = [(name, f"{share:.1%}") for name, share in prediction.probabilities.items()]
    return _line((*first, " ".join(others[0]) if others else "", prediction.input), classes)


def _line(cells: tuple[str, str, str, str], classes: Sequence[str]) -> str:
    width = min(MOST_COLUMNS, max(map(len, ("class", *classes))))
    label, share, following, name = cells
    return f"{label:{width}}  {share:>6}  {following:{width + len(' 50.0%')}}  {name}"


def _refuse(why: str) -> np.ndarray:
    raise InputError(why)


def _visible_file(file: Path, root: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)


def _encode(text: str, run: FinishedRun) -> np.ndarray:
    return data.encode_texts([text], run.data)[0]


def _read(file: Path, run: FinishedRun) -> np.ndarray:
    return data.read_file(file, run.data, kind=run.input, input_shape=run.input_shape)


def _predict_batch(
    run: FinishedRun, sources: Sequence[_Source], logits_of: Callable[[np.ndarray], np.ndarray]
) -> Iterator[Prediction]:
    examples: list[np.ndarray] = []
    errors: dict[int, str] = {}
    for index, source in enumerate(sources):
        try:
            examples.append(source.read())
        except (OSError, InputError) as error:
            errors[index] = " ".join(str(error).split())
    rows = iter(_probabilities(run, examples, logits_of))
    for index, source in enumerate(sources):
        if index in errors:
            yield Prediction(source.name, error=errors[index])
            continue
        row = next(rows)
        ranked = {run.classes[k]: float(row[k]) for k in np.argsort(-row, kind="stable")}
        yield Prediction(source.name, next(iter(ranked)), ranked)


def _probabilities(
    run: FinishedRun, examples: list[np.ndarray], logits_of: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Returns softmax probabilities [B K] in float64; the batch is filled up, so that one program serves all."""
    if not examples:
        return np.zeros((0, len(run.classes)))
    filled = np.stack([*examples, *[examples[0]] * (BATCH_SIZE - len(examples))])
    logits = logits_of(filled)[: len(examples)].astype(np.float64)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)
