"""What every phase of a variant shares: its settings and session, its place in the log, its batches on the devices."""

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import jax

from jxfer import data
from jxfer.config import Experiment, Method
from jxfer.data import Split
from jxfer.data.ahead import Ahead
from jxfer.logs import LogRow, Row
from jxfer.loop import Hook, Session
from jxfer.peak import peak_flops
from jxfer.planned import PlannedPhase
from jxfer.sharding import num_batch_shards, share_of
from jxfer.trace import traced
from jxfer.typing import Batch, InputError


@dataclasses.dataclass(frozen=True)
class Context:
    """What every phase of a variant shares."""

    experiment: Experiment
    """With the variant's settings in `train`."""
    method: Method
    variant: str
    seed: int
    num_classes: int
    directory: Path
    """Of the run."""
    mesh: jax.sharding.Mesh
    session: Session
    log: LogRow
    title: str
    """Names the run in progress bars."""

    @property
    def peak(self) -> float | None:
        """FLOP/s of all devices together, where they are stated."""
        return peak_flops(self.mesh.devices.flat, self.experiment.model.dtype)

    def traced(self, planned: PlannedPhase, *, start: int) -> contextlib.AbstractContextManager[tuple[Hook, ...]]:
        """Lends the hooks that trace some steps of a phase from step `start` on, where that is asked for."""
        directory = self.directory / "profile" / planned.phase.name
        return traced(self.session, directory, start=start, num_steps=planned.num_steps)


def checkpoint_folder(directory: Path, variant: str, index: int) -> Path:
    """Returns where a phase of a run keeps what it resumes from; a population has a name among the variants."""
    return directory / "checkpoints" / variant / str(index)


def log_row(context: Context, planned: PlannedPhase, step: int, split: str) -> Row:
    """Returns what every row of the log says."""
    return {"step": step, "phase": planned.phase.name, "variant": context.variant, "split": split}


def device_batches(
    context: Context,
    planned: PlannedPhase,
    split: Split,
    index: int,
    *,
    start: int,
    order: int = 0,
    whole: bool = False,
) -> Iterator[Batch]:
    """Yields the batches of a phase from step `start` on, the same for all variants of a run.

    Args:
      context: of the run.
      planned: the phase.
      split: what it trains on.
      index: of the phase.
      start: the number of batches before.
      order: numbers the orders in which the examples may come.
      whole: whether each device gets the whole batch, not its part.
    """
    train_config = context.experiment.train
    multiple = num_batch_shards(context.mesh) * train_config.num_microbatches
    _check_padding(train_config.batch_size, multiple, planned)
    seed = order_seed(context.seed, index, order)
    share = share_of(context.mesh, train_config.batch_size, multiple=multiple, whole=whole)
    for batch in data.batches(split, batch_size=train_config.batch_size, seed=seed, start=start, rows=share.rows):
        yield share.put(batch)


def first_batch(context: Context, planned: PlannedPhase, batches: Iterator[Batch]) -> Batch:
    """Returns the first batch of a phase, with which its step is compiled."""
    with Ahead(itertools.islice(batches, 1), what=lambda _: batch_name(context, planned, 1)) as ahead:
        return next(ahead)


def batch_name(context: Context, planned: PlannedPhase, step: int) -> str:
    """Returns what the batch of a step is called where it does not come."""
    name = context.experiment.target.name
    return f"the batch of '{name}' for step {step} of {context.title} · {planned.phase.name}"


def order_seed(seed: int, index: int, order: int = 0) -> int:
    """Returns the seed of the permutations of a phase of a run, of which it begins with order 0."""
    place = f"{seed}/{index}/{order}" if order else f"{seed}/{index}"
    return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=4).digest())


def _check_padding(batch_size: int, multiple: int, planned: PlannedPhase) -> None:
    """Refuses to pad where padded rows would count: losses mask them, batch statistics cannot."""
    moving = [leaf.path for leaf in planned.partition.leaves if leaf.kind == "statistic" and leaf.moves]
    if batch_size % multiple and moving:
        near = batch_size // multiple * multiple or multiple
        raise InputError(
            f"train.batch_size {batch_size} is no multiple of {multiple} (devices × microbatches): padded rows would "
            f"enter the moving statistics such as `{moving[0]}`; use {near} or {near + multiple}"
        )
