"""One phase of one variant: place the state, resume, loop, keep the best on validation, audit."""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jxfer import distributed
from jxfer.checkpoint import Checkpoints
from jxfer.config import Experiment
from jxfer.context import Context, batch_name, checkpoint_folder, device_batches, first_batch, log_row
from jxfer.cost import Cost
from jxfer.data import Split
from jxfer.evaluate import evaluate
from jxfer.features import Extraction, Extractor, stored_splits
from jxfer.loop import Hook, Window, check_finite, train
from jxfer.objectives import classification
from jxfer.partition import FROZEN, Audit, Partition, fingerprint
from jxfer.plan import PlannedPhase, cost_of_phase, phase_steps, prepare_images, start_phase
from jxfer.sharding import make_mesh, spanning
from jxfer.state import Fixed, TrainState, init_state, place_state
from jxfer.step import EvalStep, TrainStep, make_eval_step
from jxfer.task import load_data
from jxfer.typing import Arrays, AuditError, NonFiniteError, Proceed, always

EVAL_BATCH_SIZE = 256
FEATURE_BATCH_SIZE = 64
"""One size whatever a run trains with, so that rows which runs share have the same bits. On a CPU convolutions take a
fifth longer per image in batches of 256."""

MAX_SKIPPED, MAX_ROLLBACKS = 10, 3
"""How many steps in a row may be skipped, and how often a phase may go back, before the run has failed."""

_NO_OPTIMIZER = optax.identity()
"""One for all, since a program is compiled anew for what is not the same transform."""


@dataclasses.dataclass(frozen=True)
class Splits:
    """What training may look at."""

    train: Split
    validation: Split


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
    num_skipped: int = 0
    """Of its steps, how many were skipped because they were not finite."""
    num_rollbacks: int = 0
    """How often it went back to a checkpoint or its start; `train_flops` has the steps taken in vain too."""


def run_phase(context: Context, planned: PlannedPhase, model: nnx.Module, splits: Splits, *, index: int) -> PhaseResult:
    """Trains one phase from `model`, or from its newest checkpoint.

    Raises:
      NonFiniteError: from the loop or from validation, or too often where `train.non_finite` lets it go on.
      AuditError: something frozen changed or something trainable never moved.
      InterruptedRun: after saving, once the session should stop.
    """
    experiment, method, mesh = context.experiment, context.method, context.mesh
    key = jax.random.fold_in(jax.random.key(context.seed), index)

    def start() -> tuple[TrainState, Fixed]:
        return place_state(*start_phase(experiment, method, planned, model, key=key), mesh, experiment.mesh)

    state, fixed = start()
    before = fingerprint(all_arrays(state, fixed))
    splits, features = store_features(context, planned, state, fixed, splits)
    train_step, eval_step = phase_steps(experiment, method, planned, context.num_classes)
    batch = first_batch(context, planned, device_batches(context, planned, splits.train, index, start=0))
    cost = cost_of_phase(experiment, method, planned, context.num_classes, state, fixed, batch)
    checkpoint_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    folder = checkpoint_folder(context.directory, context.variant, index)
    with _Keeper(context, planned, fixed, eval_step, splits.validation, folder) as keeper:
        try:
            state = _train(context, planned, keeper, state, fixed, train_step, splits.train, index, start, cost)
        except NonFiniteError as error:
            error.flops = (error.step + keeper.num_retaken) * cost.step_flops
            raise
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
        (planned.num_steps + keeper.num_retaken) * cost.step_flops,
        features,
        num_skipped=int(state.skipped["total"]) if state.skipped else 0,
        num_rollbacks=keeper.num_rollbacks,
    )


def _train(
    context: Context,
    planned: PlannedPhase,
    keeper: "_Keeper",
    state: TrainState,
    fixed: Fixed,
    train_step: TrainStep,
    split: Split,
    index: int,
    start: Callable[[], tuple[TrainState, Fixed]],
    cost: Cost,
) -> TrainState:
    """Returns the state after all steps, from the newest checkpoint on, however often it is rolled back on the way."""
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    state = keeper.resume(state)
    while True:
        batches = device_batches(context, planned, split, index, start=int(state.step), order=keeper.num_rollbacks)
        try:
            with context.traced(planned, start=int(state.step)) as tracing:
                return train(
                    train_step,
                    state,
                    fixed,
                    batches,
                    num_steps=planned.num_steps,
                    log_every=context.experiment.train.log_every,
                    on_window=functools.partial(_log_window, context, planned, cost),
                    hooks=(*keeper.hooks(), *tracing),
                    on_stop=keeper.stop,
                    should_stop=context.session.should_stop,
                    check=functools.partial(_check_step, planned),
                    what=functools.partial(batch_name, context, planned),
                )
        except NonFiniteError as error:
            if context.experiment.train.non_finite != "rollback":
                raise
            why, reached = str(error), error.step  # the error itself keeps what it is about on the devices
        state = keeper.roll_back(why, reached, template, start)


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
        self.num_rollbacks, self.num_retaken = 0, 0
        self._context, self._planned, self._fixed = context, planned, fixed
        self._eval_step, self._validation, self._directory = eval_step, validation, directory
        self._saved_step, self._looked = 0, 0

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
        checked = train_config.non_finite == "rollback"  # so that whatever is saved can be gone back to
        hooks = [Hook(1, self._show), Hook(train_config.eval_every, self.evaluate, checked)]
        if train_config.checkpoint_every is not None:
            hooks.append(Hook(train_config.checkpoint_every, self.save, checked))
        return tuple(hooks)

    def evaluate(self, step: int, state: TrainState) -> None:
        metrics, _ = evaluate(
            self._eval_step,
            state,
            self._fixed,
            self._validation,
            batch_size=EVAL_BATCH_SIZE,
            mesh=self._context.mesh,
            proceed=self._proceed,
        )
        self._looked = step
        check_finite(step, metrics)
        self._context.log(log_row(self._context, self._planned, step, "validation") | metrics)
        if not self.best_metrics or rank(metrics) > rank(self.best_metrics):
            self.best_step, self.best_metrics = step, metrics
            # Copied, because the loop donates the state to the next step.
            self.best_arrays = {path: jnp.copy(value) for path, value in self._worth_keeping(state).items()}
            if self._context.experiment.train.checkpoint_every is not None:
                self.save(step, state)

    def save(self, step: int, state: TrainState, *, passing: bool = False) -> None:
        if step == self._saved_step:
            return
        self._saved_step = step
        # The newest best has the highest score, so that it stays on disk together with the newest checkpoints.
        score = {"best": float(step) if step == self.best_step else -1.0}
        extra = {
            "best_step": self.best_step,
            "best_metrics": self.best_metrics,
            "looked": self._looked,
            "num_rollbacks": self.num_rollbacks,
            "num_retaken": self.num_retaken,
        }
        guard = self._context.session.guard
        self._checkpoints.save(step, state, metrics=score, extra=extra, passing=passing, guard=guard)

    def stop(self, step: int, state: TrainState) -> None:
        """Saves the state, and before it the best one, which no checkpoint has where none were asked for."""
        if self.best_step not in (0, step, *self._checkpoints.steps()):
            self._save_best()
        self.save(step, state, passing=True)

    def resume(self, state: TrainState) -> TrainState:
        """Returns the newest saved state, with the best so far remembered, or the given one where nothing is saved."""
        newest = self._checkpoints.latest()
        self._saved_step = newest or 0
        self.best_step, self.best_metrics, self.best_arrays = 0, {}, {}
        if newest is None:
            return state
        resumed, extra = self._checkpoints.restore(state, step=newest)
        self.num_rollbacks, self.num_retaken = extra.get("num_rollbacks", 0), extra.get("num_retaken", 0)
        if extra["best_step"]:
            self.best_step, self.best_metrics = extra["best_step"], extra["best_metrics"]
            self.best_arrays = self._restore_best(state)
        self._looked = extra.get("looked", newest)
        if self._looked != newest and is_due(newest, self._context.experiment.train.eval_every, self._planned):
            self.evaluate(newest, resumed)  # it was stopped in this look
            if self.best_step == newest:
                self._save_best()  # its checkpoint does not say so, and will go
        return resumed

    def roll_back(
        self, why: str, reached: int, template: TrainState, start: Callable[[], tuple[TrainState, Fixed]]
    ) -> TrainState:
        """Returns the state to go on from in another order of the data, or raises NonFiniteError after too many tries.

        It is that of the last checkpoint which a run that nobody stopped has too, so that both end alike. A run that is
        killed before its next checkpoint comes to the same error again, and back here; only checkpoints count.
        """
        if self.num_rollbacks == MAX_ROLLBACKS:
            tries = f"after {MAX_ROLLBACKS} rollbacks, each to another order of the data"
            raise NonFiniteError(f"{why} ({tries})", step=reached)
        count, retaken = self.num_rollbacks + 1, self.num_retaken
        if self._checkpoints.go_back() is None:
            distributed.on_main(lambda: shutil.rmtree(self._best_folder, ignore_errors=True))
            template, _ = start()
        state, step = self.resume(template), self._saved_step
        self.num_rollbacks, self.num_retaken = count, retaken + reached - step
        # The first step that is taken again: the row stays if the run is resumed from this or a later one.
        row = log_row(self._context, self._planned, step + 1, "train")
        self._context.log(row | {"rollbacks": count, "why": why})
        place = f"step {step}" if step else "the phase's start"
        self._context.session.note(
            f"{self._context.title} · {self._planned.phase.name}: {why}; back to {place} and on with the data in "
            f"another order ({count} of {MAX_ROLLBACKS} rollbacks)"
        )
        return state

    def _proceed(self) -> None:
        if self._context.experiment.train.non_finite != "rollback":  # which needs the checkpoints it had undisturbed
            self._context.session.proceed(f"looking at the validation split of {self._context.title}")

    def _save_best(self) -> None:
        with self._open_best() as best:
            if self.best_step not in best.steps():  # never rewrite the one that an earlier stop relies on
                best.save(self.best_step, self.best_arrays, guard=self._context.session.guard)

    def _restore_best(self, state: TrainState) -> Arrays:
        if self.best_step in self._checkpoints.steps():
            return self._worth_keeping(self._checkpoints.restore(state, step=self.best_step)[0])
        with self._open_best() as best:
            return best.restore(self._worth_keeping(state), step=self.best_step)[0]

    def _open_best(self) -> Checkpoints:
        # Two, because until the state is on disk too, the newest state there goes with the best one before.
        return Checkpoints(self._best_folder, keep_last=2, keep_best=False)

    @property
    def _best_folder(self) -> Path:
        return self._directory.with_name(f"{self._directory.name}-best")

    def _worth_keeping(self, state: TrainState) -> Arrays:
        """Returns what later phases and the finished model take over; random keys start each phase anew."""
        kept = {leaf.path for leaf in self._planned.partition.leaves if leaf.moves and leaf.kind != "random"}
        moving = {**state.params, **state.ema, **state.variables}
        return {path: value for path, value in moving.items() if path in kept}

    def _show(self, step: int, state: TrainState) -> None:
        del state
        what = f"{self._context.title} · {self._planned.phase.name}"
        self._context.session.progress(what, step, self._planned.num_steps)


def is_due(step: int, every: int, planned: PlannedPhase) -> bool:
    """Tells whether something that is done every so many steps, and after the last one, is done after this one."""
    return step % every == 0 or step == planned.num_steps


def evaluate_model(
    experiment: Experiment, num_classes: int, model: nnx.Module, split: Split, *, proceed: Proceed = always
) -> tuple[dict[str, float], np.ndarray]:
    """Evaluates a whole model on the inputs of a split, however it was trained; returns metrics and outputs [N K]."""
    partition = Partition.of(model, [("**", FROZEN)])
    mesh = make_mesh(experiment.mesh)
    state, fixed = init_state(model, partition, _NO_OPTIMIZER)
    state, fixed = spanning((state, fixed), mesh)
    prepare = prepare_images(experiment, num_classes, train=False)
    eval_step = make_eval_step(classification(), prepare=prepare)
    return evaluate(eval_step, state, fixed, split, batch_size=EVAL_BATCH_SIZE, mesh=mesh, proceed=proceed)


def rank(metrics: dict[str, float]) -> tuple[float, float]:
    """Returns what model selection maximises: accuracy, and at equal accuracy the lower loss."""
    return metrics["accuracy"], -metrics["loss"]


def all_arrays(state: TrainState, fixed: Fixed) -> Arrays:
    """Returns all parameters and variables of a phase, without any average."""
    return {**state.params, **state.variables, **fixed.params, **fixed.variables}


def _log_window(context: Context, planned: PlannedPhase, cost: Cost, window: Window) -> None:
    row = log_row(context, planned, window.step, "train")
    skipped = {} if window.num_skipped is None else {"skipped_steps": window.num_skipped}
    context.log(row | window.metrics | window.speed(cost.step_flops, peak=context.peak) | skipped)


def _check_step(planned: PlannedPhase, step: int, metrics: Mapping[str, Any]) -> None:
    """Raises NonFiniteError where a step is not finite, or the last of so many that were skipped that none will be."""
    check_finite(step, metrics)
    in_a_row = int(metrics.get("skipped", 0))
    if in_a_row >= min(MAX_SKIPPED, planned.num_steps):
        raise NonFiniteError(
            f"loss or gradients were not finite in {in_a_row} steps in a row, up to step {step}, and all were skipped; "
            "try a lower learning rate or clip_norm, or look for what is wrong with the data",
            step=step,
        )
