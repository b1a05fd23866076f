"""One phase of one variant: place the state, resume, loop, keep the best on validation, audit."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jxfer import data
from jxfer.checkpoint import Checkpoints
from jxfer.config import Experiment, Method
from jxfer.cost import Cost
from jxfer.data import Split
from jxfer.evaluate import evaluate
from jxfer.features import Extraction, Extractor, stored_splits
from jxfer.logs import LogRow, Row
from jxfer.loop import Hook, Session, Window, check_finite, train
from jxfer.objectives import classification
from jxfer.partition import FROZEN, Audit, Partition, fingerprint
from jxfer.peak import peak_flops
from jxfer.plan import PlannedPhase, cost_of_phase, phase_steps, prepare_images, start_phase
from jxfer.sharding import make_mesh, num_batch_shards, share_of, spanning
from jxfer.state import Fixed, TrainState, init_state, place_state
from jxfer.step import EvalStep, make_eval_step
from jxfer.task import load_data
from jxfer.typing import Arrays, AuditError, Batch, InputError

EVAL_BATCH_SIZE = 256
FEATURE_BATCH_SIZE = 64
"""One size whatever a run trains with, so that rows which runs share have the same bits. On a CPU convolutions take a
fifth longer per image in batches of 256."""

_NO_OPTIMIZER = optax.identity()
"""One for all, since a program is compiled anew for what is not the same transform."""


@dataclasses.dataclass(frozen=True)
class Splits:
    """What training may look at."""

    train: Split
    validation: Split


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


@dataclasses.dataclass(frozen=True)
class PhaseResult:
    """A phase after training: what moved, at its best on validation, and what it took."""

    name: str
    arrays: Arrays
    """Path -> value of the parameters and statistics that moved."""
    trainable: tuple[str, ...]
    validation_metrics: dict[str, float]
    best_step: int
    num_steps: int
    audit: Audit
    cost: Cost
    checkpoint_bytes: int
    train_flops: float
    """Of all steps; validation is not counted, for any method."""
    features: Extraction
    path: tuple[dict[str, Any], ...] = ()
    """Of a solver: the name of every setting and how it did on validation."""
    stages: tuple[dict[str, Any], ...] = ()
    """How well a head on each stage's features alone does, where such heads were found."""


def run_phase(context: Context, planned: PlannedPhase, model: nnx.Module, splits: Splits, *, index: int) -> PhaseResult:
    """Trains one phase from `model`, or from its newest checkpoint.

    Raises:
      NonFiniteError: from the loop or from validation.
      AuditError: something frozen changed or something trainable never moved.
      InterruptedRun: after saving, once the session should stop.
    """
    experiment, method, mesh = context.experiment, context.method, context.mesh
    key = jax.random.fold_in(jax.random.key(context.seed), index)
    state, fixed = start_phase(experiment, method, planned, model, key=key)
    state, fixed = place_state(state, fixed, mesh, experiment.mesh)
    before = fingerprint(all_arrays(state, fixed))
    splits, features = store_features(context, planned, state, fixed, splits)
    train_step, eval_step = phase_steps(experiment, method, planned, context.num_classes)
    batch = next(device_batches(context, planned, splits.train, index, start=0))
    cost = cost_of_phase(experiment, method, planned, context.num_classes, state, fixed, batch)
    checkpoint_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    folder = checkpoint_folder(context.directory, context.variant, index)
    with _Keeper(context, planned, fixed, eval_step, splits.validation, folder) as keeper:
        state = keeper.resume(state)
        state = train(
            train_step,
            state,
            fixed,
            device_batches(context, planned, splits.train, index, start=int(state.step)),
            num_steps=planned.num_steps,
            log_every=experiment.train.log_every,
            on_window=functools.partial(_log_window, context, planned, cost),
            hooks=keeper.hooks(),
            on_stop=keeper.stop,
            should_stop=context.session.should_stop,
        )
    audit = planned.partition.audit(before, fingerprint(all_arrays(state, fixed)), fixed.definition.train_graphdef)
    if not audit.ok:
        raise AuditError(f"audit of phase `{planned.phase.name}`: {audit}", audit.to_json())
    return PhaseResult(
        planned.phase.name,
        keeper.best_arrays,
        tuple(leaf.path for leaf in planned.partition.trainable),
        keeper.best_metrics,
        keeper.best_step,
        planned.num_steps,
        audit,
        cost,
        checkpoint_bytes,
        planned.num_steps * cost.step_flops,
        features,
    )


def store_features(
    context: Context, planned: PlannedPhase, state: TrainState, fixed: Fixed, splits: Splits
) -> tuple[Splits, Extraction]:
    """Returns the splits with stored features where the phase trains on them, and what computing these takes."""
    if not planned.stored or planned.boundary is None:
        return splits, Extraction()
    extractor = Extractor(
        experiment=context.experiment,
        dataset=load_data(context.experiment.target),
        boundary=planned.boundary,
        state=state,
        fixed=fixed,
        mesh=context.mesh,
        session=context.session,
        title=context.title,
        batch_size=FEATURE_BATCH_SIZE,
    )
    train, validation, took = stored_splits(extractor, splits.train, splits.validation, num_steps=planned.num_steps)
    return Splits(train, validation), took


class _Keeper:
    """Looks at the validation split, remembers the best state, and saves what resuming needs."""

    def __init__(
        self,
        context: Context,
        planned: PlannedPhase,
        fixed: Fixed,
        eval_step: EvalStep,
        validation: Split,
        directory: Path,
    ):
        self.best_step = 0
        self.best_metrics: dict[str, float] = {}
        self.best_arrays: Arrays = {}
        self._context, self._planned, self._fixed = context, planned, fixed
        self._eval_step, self._validation, self._directory = eval_step, validation, directory
        self._saved_step = 0

    def __enter__(self) -> "_Keeper":
        return self

    def __exit__(self, *_: object) -> None:
        if "_checkpoints" in self.__dict__:
            self._checkpoints.close()

    @functools.cached_property
    def _checkpoints(self) -> Checkpoints:
        keep_last = self._context.experiment.train.keep_checkpoints
        return Checkpoints(self._directory, keep_last=keep_last, best_metric="best")

    def hooks(self) -> tuple[Hook, ...]:
        train_config = self._context.experiment.train
        hooks = [Hook(1, self._show), Hook(train_config.eval_every, self.evaluate)]
        if train_config.checkpoint_every is not None:
            hooks.append(Hook(train_config.checkpoint_every, self.save))
        return tuple(hooks)

    def evaluate(self, step: int, state: TrainState) -> None:
        metrics, _ = evaluate(
            self._eval_step,
            state,
            self._fixed,
            self._validation,
            batch_size=EVAL_BATCH_SIZE,
            mesh=self._context.mesh,
        )
        check_finite(step, metrics)
        self._context.log(log_row(self._context, self._planned, step, "validation") | metrics)
        if not self.best_metrics or rank(metrics) > rank(self.best_metrics):
            self.best_step, self.best_metrics = step, metrics
            # Copied, because the loop donates the state to the next step.
            self.best_arrays = {path: jnp.copy(value) for path, value in self._worth_keeping(state).items()}
            if self._context.experiment.train.checkpoint_every is not None:
                self.save(step, state)

    def save(self, step: int, state: TrainState) -> None:
        if step == self._saved_step:
            return
        self._saved_step = step
        # The newest best has the highest score, so that it stays on disk together with the newest checkpoints.
        score = {"best": float(step) if step == self.best_step else -1.0}
        extra = {"best_step": self.best_step, "best_metrics": self.best_metrics}
        self._checkpoints.save(step, state, metrics=score, extra=extra, guard=self._context.session.guard)

    def stop(self, step: int, state: TrainState) -> None:
        """Saves the state, and before it the best one, which no checkpoint has where none were asked for."""
        if self.best_step not in (0, step, *self._checkpoints.steps()):
            with self._open_best() as best:
                if self.best_step not in best.steps():  # never rewrite the one that an earlier stop relies on
                    best.save(self.best_step, self.best_arrays, guard=self._context.session.guard)
        self.save(step, state)

    def resume(self, state: TrainState) -> TrainState:
        """Returns the newest saved state, with the best so far remembered, or the given one where nothing is saved."""
        if (newest := self._checkpoints.latest()) is None:
            return state
        resumed, extra = self._checkpoints.restore(state, step=newest)
        if extra["best_step"]:
            self.best_step, self.best_metrics = extra["best_step"], extra["best_metrics"]
            self.best_arrays = self._restore_best(state)
        self._saved_step = newest
        return resumed

    def _restore_best(self, state: TrainState) -> Arrays:
        if self.best_step in self._checkpoints.steps():
            return self._worth_keeping(self._checkpoints.restore(state, step=self.best_step)[0])
        with self._open_best() as best:
            return best.restore(self._worth_keeping(state), step=self.best_step)[0]

    def _open_best(self) -> Checkpoints:
        # Two, because until the state is on disk too, the newest state there goes with the best one before.
        return Checkpoints(self._directory.with_name(f"{self._directory.name}-best"), keep_last=2, keep_best=False)

    def _worth_keeping(self, state: TrainState) -> Arrays:
        """Returns what later phases and the finished model take over; random keys start each phase anew."""
        kept = {leaf.path for leaf in self._planned.partition.leaves if leaf.moves and leaf.kind != "random"}
        moving = {**state.params, **state.ema, **state.variables}
        return {path: value for path, value in moving.items() if path in kept}

    def _show(self, step: int, state: TrainState) -> None:
        del state
        what = f"{self._context.title} · {self._planned.phase.name}"
        self._context.session.progress(what, step, self._planned.num_steps)


def evaluate_model(
    experiment: Experiment, num_classes: int, model: nnx.Module, split: Split
) -> tuple[dict[str, float], np.ndarray]:
    """Evaluates a whole model on the inputs of a split, however it was trained; returns metrics and outputs [N K]."""
    partition = Partition.of(model, [("**", FROZEN)])
    mesh = make_mesh(experiment.mesh)
    state, fixed = init_state(model, partition, _NO_OPTIMIZER)
    state, fixed = spanning((state, fixed), mesh)
    prepare = prepare_images(experiment, num_classes, train=False)
    eval_step = make_eval_step(classification(), prepare=prepare)
    return evaluate(eval_step, state, fixed, split, batch_size=EVAL_BATCH_SIZE, mesh=mesh)


def checkpoint_folder(directory: Path, variant: str, index: int) -> Path:
    """Returns where a phase of a run keeps what it resumes from; a population has a name among the variants."""
    return directory / "checkpoints" / variant / str(index)


def rank(metrics: dict[str, float]) -> tuple[float, float]:
    """Returns what model selection maximises: accuracy, and at equal accuracy the lower loss."""
    return metrics["accuracy"], -metrics["loss"]


def all_arrays(state: TrainState, fixed: Fixed) -> Arrays:
    """Returns all parameters and variables of a phase, without any average."""
    return {**state.params, **state.variables, **fixed.params, **fixed.variables}


def device_batches(
    context: Context, planned: PlannedPhase, split: Split, index: int, *, start: int, whole: bool = False
) -> Iterator[Batch]:
    """Yields the batches of a phase from step `start` on, the same for all variants of a run.

    `whole`: each device gets the whole batch, not its part.
    """
    train_config = context.experiment.train
    multiple = num_batch_shards(context.mesh) * train_config.num_microbatches
    _check_padding(train_config.batch_size, multiple, planned)
    seed = int.from_bytes(hashlib.blake2b(f"{context.seed}/{index}".encode(), digest_size=4).digest())
    share = share_of(context.mesh, train_config.batch_size, multiple=multiple, whole=whole)
    for batch in data.batches(split, batch_size=train_config.batch_size, seed=seed, start=start, rows=share.rows):
        yield share.put(batch)


def _check_padding(batch_size: int, multiple: int, planned: PlannedPhase) -> None:
    """Refuses to pad where padded rows would count: losses mask them, batch statistics cannot."""
    moving = [leaf.path for leaf in planned.partition.leaves if leaf.kind == "statistic" and leaf.moves]
    if batch_size % multiple and moving:
        near = batch_size // multiple * multiple or multiple
        raise InputError(
            f"train.batch_size {batch_size} is no multiple of {multiple} (devices × microbatches): padded rows would "
            f"enter the moving statistics such as `{moving[0]}`; use {near} or {near + multiple}"
        )


def log_row(context: Context, planned: PlannedPhase, step: int, split: str) -> Row:
    """Returns what every row of the log says."""
    return {"step": step, "phase": planned.phase.name, "variant": context.variant, "split": split}


def _log_window(context: Context, planned: PlannedPhase, cost: Cost, window: Window) -> None:
    row = log_row(context, planned, window.step, "train")
    context.log(row | window.metrics | window.speed(cost.step_flops, peak=context.peak))
