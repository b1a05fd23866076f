"""The gate of stored features: training on them and training online end with the same outputs."""

import dataclasses
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jxfer import data
from jxfer.config import AugmentConfig, Experiment, Method
from jxfer.context import Context
from jxfer.evaluate import evaluate
from jxfer.known import resolve
from jxfer.loop import Session
from jxfer.phase import EVAL_BATCH_SIZE, Splits, store_features
from jxfer.plan import PlannedPhase, phase_steps, plan_phases, start_phase
from jxfer.sharding import make_mesh, num_batch_shards, share_of
from jxfer.source import read_source
from jxfer.state import place_state
from jxfer.task import Task, base_model, load_data, target_model, task_of
from jxfer.typing import Arrays

NUM_STEPS = 10

LIMITS = {"float32": 1e-5, "bfloat16": 3e-2}
"""Of the difference: some 100 units in the last place of float32 and 4 of bfloat16, in which XLA may keep more digits
where it fuses across the boundary."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far outputs differ between the two ways of training one phase."""

    method: str
    phase: str
    boundary: str | None
    """None where the phase trains online."""
    difference: float
    """The largest of any output, relative to the largest output."""
    limit: float
    why: str

    @property
    def ok(self) -> bool:
        """Whether they are the same, as far as the type that the model computes in allows."""
        return self.difference <= self.limit

    def __str__(self) -> str:
        name = f"{self.method} · {self.phase}"
        if self.boundary is None:
            return f"{name}: {self.why}"
        verdict = "the same" if self.ok else "NOT THE SAME"
        found = f"largest relative difference {self.difference:.1e}, limit {self.limit:.0e}"
        return f"{name}: features before `{self.boundary}`, {NUM_STEPS} steps: {verdict}, {found}"


def compare(experiment: Experiment, session: Session) -> Iterator[Comparison]:
    """Trains some steps of each phase that stores features both ways, and yields how the validation outputs differ.

    Each phase starts from the source's weights where these are published or of a run, else from random ones, whose
    numbers are as good here. Augmentation is off, since online it changes the images anew in each step.
    """
    experiment = resolve(experiment)
    target = dataclasses.replace(experiment.target, augment=AugmentConfig())
    experiment = dataclasses.replace(experiment, target=target, views=None, features="auto")
    task, arrays = task_of(experiment), _weights(experiment)
    drawn = data.draw(load_data(target), target, experiment.shots[0], 0)
    for method in experiment.methods:
        model = base_model(experiment.model, method, task, seed=0)
        model = target_model(model, method, task, source=arrays, seed=0)
        for planned in plan_phases(experiment, method, model):
            difference = 0.0
            steps = planned.stored and planned.phase.solver is None  # what is solved is compared in every run
            if steps:
                splits = Splits(drawn.train, drawn.validation)
                difference = _difference(_context(experiment, method, task, session), planned, model, splits)
            boundary = planned.boundary if steps else None
            limit = LIMITS[experiment.model.dtype]
            yield Comparison(method.name, planned.phase.name, boundary, difference, limit, planned.why)


def _weights(experiment: Experiment) -> Arrays | None:
    if experiment.source.weights is None:
        return None
    dataset = load_data(experiment.target)
    source = read_source(experiment, num_classes=len(dataset.class_names), input_shape=dataset.input_shape)
    return None if source.fresh else source.arrays


def _context(experiment: Experiment, method: Method, task: Task, session: Session) -> Context:
    return Context(
        experiment=experiment,
        method=method,
        variant="check",
        seed=0,
        num_classes=len(task.target_classes),
        directory=Path(tempfile.gettempdir()),
        mesh=make_mesh(experiment.mesh),
        session=session,
        log=lambda row: None,
        title=f"check {method.name}",
    )


def _difference(context: Context, planned: PlannedPhase, model: nnx.Module, splits: Splits) -> float:
    stored = _outputs(context, planned, model, splits)
    online = _outputs(context, dataclasses.replace(planned, stored=False), model, splits)
    return float(np.max(np.abs(stored - online)) / np.max(np.abs(online)))


def _outputs(context: Context, planned: PlannedPhase, model: nnx.Module, splits: Splits) -> np.ndarray:
    """Returns the outputs on validation [N K] after some steps."""
    experiment, method, mesh = context.experiment, context.method, context.mesh
    state, fixed = start_phase(experiment, method, planned, model, key=jax.random.key(0))
    state, fixed = place_state(state, fixed, mesh, experiment.mesh)
    splits, _ = store_features(context, planned, state, fixed, splits)
    train_step, eval_step = phase_steps(experiment, method, planned, context.num_classes)
    multiple = num_batch_shards(mesh) * experiment.train.num_microbatches
    share = share_of(mesh, experiment.train.batch_size, multiple=multiple)
    batches = data.batches(splits.train, batch_size=experiment.train.batch_size, seed=0, rows=share.rows)
    for batch in itertools.islice(batches, NUM_STEPS):
        state, _ = train_step(state, fixed, share.put(batch))
    return evaluate(eval_step, state, fixed, splits.validation, batch_size=EVAL_BATCH_SIZE, mesh=mesh)[1]
