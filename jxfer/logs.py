"""What a run writes while it trains: `metrics.jsonl`, TensorBoard events and, if asked, Weights & Biases."""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jxfer import distributed
from jxfer.typing import InputError

Row = dict[str, Any]
"""`step`, `phase`, `variant`, `split`, and the metrics by name."""

LogRow = Callable[[Row], None]

_FLUSH_SECS = 30.0
"""How late TensorBoard sees a row at most, while there are new ones."""


@contextlib.contextmanager
def open_logs(directory: Path, *, name: str, config: Any, wandb: bool) -> Iterator[LogRow]:
    """Opens the logs of a run and yields the function that writes one row to all of them.

    Of several processes, process 0 alone writes.

    Args:
      directory: of the run; `metrics.jsonl` continues what is there.
      name: of the run, for Weights & Biases.
      config: JSON-ready, for Weights & Biases.
      wandb: whether to log there too.

    Raises:
      InputError: Weights & Biases is asked for and not installed.
    """
    if not distributed.is_main():
        yield lambda row: None
        return
    with contextlib.ExitStack() as stack:
        sinks = [_jsonl(directory, stack), _tensorboard(directory, stack)]
        if wandb:
            sinks.append(_wandb(name, config, stack))

        def log(row: Row) -> None:
            for sink in sinks:
                sink(row)

        yield log


def rewind(directory: Path, *, keep: Callable[[Row], bool]) -> None:
    """Drops the rows of `metrics.jsonl` that a resumed run is about to write again, and a torn last line."""
    path = directory / "metrics.jsonl"
    if not distributed.is_main() or not path.exists():
        return
    kept = [row for row in map(_parse, path.read_text().splitlines()) if row is not None and keep(row)]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    temporary.replace(path)


def _parse(line: str) -> Row | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _numbers(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, float)}


def _tag(row: Row) -> str:
    return "/".join(filter(None, (row.get("variant"), row["phase"], row["split"])))


def _jsonl(directory: Path, stack: contextlib.ExitStack) -> LogRow:
    file = stack.enter_context((directory / "metrics.jsonl").open("a"))

    def log(row: Row) -> None:
        file.write(json.dumps(row) + "\n")
        file.flush()

    return log


def _tensorboard(directory: Path, stack: contextlib.ExitStack) -> LogRow:
    # Not through `SummaryWriter`: the thread that it hands rows to ends on a full disk, and then it waits forever.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.summary import scalar

    writer = EventsWriter(str(directory / "events"))
    stack.callback(writer.close)
    flushed = time.monotonic()

    @functools.cache
    def tag(name: str) -> str:
        return str(scalar(name, 0.0).value[0].tag)  # with what TensorBoard's tags cannot have replaced

    def log(row: Row) -> None:
        nonlocal flushed
        prefix = _tag(row)
        values = [Summary.Value(tag=tag(f"{prefix}/{name}"), simple_value=x) for name, x in _numbers(row).items()]
        if values:
            writer.write_event(Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values)))
        if time.monotonic() - flushed >= _FLUSH_SECS:
            writer.flush()
            flushed = time.monotonic()

    return log


def _wandb(name: str, config: Any, stack: contextlib.ExitStack) -> LogRow:
    try:
        import wandb
    except ImportError as error:
        raise InputError("wandb=True needs Weights & Biases: pip install wandb") from error
    session = wandb.init(project="jxfer", name=name, config=config, reinit="finish_previous")
    stack.callback(session.finish)

    def log(row: Row) -> None:
        session.log({f"{_tag(row)}/{key}": value for key, value in _numbers(row).items()} | {"step": row["step"]})

    return log
