"""One phase whose head a solver finds: features once, every setting of the path, the best on validation, audit."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jxfer import data, distributed
from jxfer.config import Method
from jxfer.context import Context
from jxfer.cost import Cost
from jxfer.data import ArraySplit, Split
from jxfer.evaluate import evaluate
from jxfer.extract import Prefix, make_feature_step
from jxfer.features import Extraction
from jxfer.models.stages import FEATURES
from jxfer.objectives import classification, means
from jxfer.partition import fingerprint
from jxfer.phase import (
    EVAL_BATCH_SIZE,
    FEATURE_BATCH_SIZE,
    PhaseResult,
    Splits,
    all_arrays,
    rank,
    store_features,
)
from jxfer.plan import PlannedPhase, phase_steps, prepare_images, start_phase
from jxfer.sharding import put
from jxfer.solvers.heads import Heads
from jxfer.solvers.logistic import LogisticPath
from jxfer.state import Fixed, TrainState, place_state
from jxfer.typing import AuditError, ConvergenceError, InputError, Proceed

TOLERANCES = {"cpu": 1e-4}
"""Between the solver's logits and those of the network with its head in, relative to the largest: float32 sums."""

READ_ROWS = 2**16
"""Of features, between two looks at whether to stop: half a gigabyte of rows of 2048."""

LOOSE = 2e-2
"""The same where products have factors of few bits: in bfloat16, and on accelerators."""


def solve_phase(context: Context, planned: PlannedPhase, model: Any, splits: Splits, *, index: int) -> PhaseResult:
    """Finds the head of `model` at every setting of the phase's solver and returns the best on validation.

    Raises:
      ConvergenceError: no setting converged.
      InterruptedRun: once the session should stop; stored features stay, the path is solved anew.
      AuditError: something frozen changed, the head did not move, or the network with its new head says something
        else than the solver.
    """
    experiment = dataclasses.replace(context.experiment, views=None)  # a solver sees each example once, as it is
    context = dataclasses.replace(context, experiment=experiment)
    key = jax.random.fold_in(jax.random.key(context.seed), index)
    state, fixed = start_phase(experiment, context.method, planned, model, key=key)
    state, fixed = place_state(state, fixed, context.mesh, experiment.mesh)
    before = fingerprint(all_arrays(state, fixed))
    splits, took, feature_flops = _features(context, planned, state, fixed, splits)
    proceed = functools.partial(context.session.proceed, f"solving {context.title} · {planned.phase.name}")
    train, validation = (_arrays(split, proceed) for split in (splits.train, splits.validation))
    heads = planned.phase.solver.fit(*train, context.num_classes, proceed=proceed)
    measured = _measure(heads, *validation, proceed)
    # All processes solve, and what the first one found counts: in its last bits another's may differ.
    path = tuple(distributed.on_main(lambda: measured))
    best = _choose(context, planned, heads, path)
    stages, stage_flops = _probe_stages(getattr(model, "taps", ()), train, validation, context.num_classes, proceed)
    head = distributed.same(heads.arrays(best))
    state = _with_head(state, {f"head/{name}": value for name, value in head.items()})
    _, eval_step = phase_steps(experiment, context.method, planned, context.num_classes)
    metrics, outputs = evaluate(
        eval_step, state, fixed, splits.validation, batch_size=EVAL_BATCH_SIZE, mesh=context.mesh, proceed=proceed
    )
    _check_same(planned, outputs, heads.logits(validation[0], best), experiment.model.dtype)
    audit = planned.partition.audit(before, fingerprint(all_arrays(state, fixed)), fixed.definition.train_graphdef)
    if not audit.ok:
        raise AuditError(f"audit of phase `{planned.phase.name}`: {audit}", audit.to_json())
    flops, size = planned.phase.solver.cost(*train[0].shape, context.num_classes)
    return PhaseResult(
        name=planned.phase.name,
        arrays={leaf.path: all_arrays(state, fixed)[leaf.path] for leaf in planned.partition.leaves if _solved(leaf)},
        trainable=tuple(leaf.path for leaf in planned.partition.trainable),
        validation_metrics=metrics,
        best_step=best + 1,
        num_steps=0,
        audit=audit,
        cost=Cost(flops, size, 0),
        checkpoint_bytes=0,
        train_flops=heads.flops + stage_flops + feature_flops,
        features=took,
        path=path,
        stages=stages,
    )


def record(method: Method, phases: Sequence[PhaseResult]) -> dict[str, Any]:
    """Returns what the row of a run has of its solved heads: the path as variants where nothing else was searched."""
    fields: dict[str, Any] = {}
    if method.phases and all(phase.solver is not None for phase in method.phases):
        fields |= {"variant": phases[-1].path[phases[-1].best_step - 1]["variant"], "variants": list(phases[-1].path)}
    if stages := [stage for phase in phases for stage in phase.stages]:
        fields["stages"] = stages
    return fields


def _features(
    context: Context, planned: PlannedPhase, state: TrainState, fixed: Fixed, splits: Splits
) -> tuple[Splits, Extraction, float]:
    """Returns features, what storing them took, and the operations of computing them where they are not stored."""
    if context.experiment.features != "off":
        return *store_features(context, planned, state, fixed, splits), 0.0
    prepare = prepare_images(context.experiment, context.num_classes, train=False)
    step = make_feature_step(prepare, stop="head")
    prefix = Prefix(step, state, fixed, context.mesh, FEATURE_BATCH_SIZE)
    flops = prefix.describe(splits.train)[1] * len(splits.train)
    proceed = functools.partial(context.session.proceed, f"computing features of {context.title}")
    train, validation = (_compute(prefix, split, proceed) for split in (splits.train, splits.validation))
    return Splits(train, validation), Extraction(), flops


def _compute(prefix: Prefix, split: Split, proceed: Proceed) -> ArraySplit:
    rows = []
    for batch in data.eval_batches(split, batch_size=prefix.batch_size, rows=prefix.share.rows):
        proceed()
        rows.append(np.asarray(prefix(batch)[FEATURES])[: prefix.batch_size])
    return ArraySplit(split.ids, split.labels, {FEATURES: np.concatenate(rows)[: len(split)]})


def _arrays(split: Split, proceed: Proceed) -> tuple[jax.Array, jax.Array]:
    """Returns all features [N D] float32 and labels [N] of a split, read in parts that take no longer than seconds."""
    features = np.empty((len(split), *split.read(np.zeros(1, int))[FEATURES].shape[1:]), np.float32)
    for start in range(0, len(split), READ_ROWS):
        proceed()
        rows = np.arange(start, min(start + READ_ROWS, len(split)))
        features[rows] = split.read(rows)[FEATURES]
    return jnp.asarray(features), jnp.asarray(split.labels, jnp.int32)


def _measure(heads: Heads, features: jax.Array, labels: jax.Array, proceed: Proceed) -> tuple[dict[str, Any], ...]:
    """Returns name and validation metrics of every setting, and an error for those that are not solved."""
    batch = {"label": labels, "mask": jnp.ones(len(labels))}
    sums = jax.jit(lambda logits, batch: classification().metrics(logits, batch))
    rows = []
    for index, name in enumerate(heads.names):
        proceed()
        row: dict[str, Any] = {"variant": name}
        row["validation_metrics"] = means([jax.device_get(sums(heads.logits(features, index), batch))])
        if not heads.converged[index]:
            row["error"] = f"not converged: the norm of the scaled gradient is {heads.gradient_norms[index]:.1e}"
        rows.append(row)
    return tuple(rows)


def _choose(context: Context, planned: PlannedPhase, heads: Heads, path: Sequence[dict[str, Any]]) -> int:
    """Logs a row per setting and returns the position of the best one among those that are solved."""
    for position, (row, norm) in enumerate(zip(path, heads.gradient_norms, strict=True), start=1):
        place = {"step": position, "phase": planned.phase.name, "variant": context.variant, "split": "validation"}
        context.log({**place, "setting": row["variant"], **row["validation_metrics"], "solver_gradient_norm": norm})
    solved = [index for index, row in enumerate(path) if "error" not in row]
    if not solved:
        raise ConvergenceError(
            f"phase `{planned.phase.name}`: no setting of {planned.phase.solver} is solved; the "
            f"first: {path[0]['error']}; raise max_iterations, or the smallest strengths"
        )
    return max(solved, key=lambda index: rank(path[index]["validation_metrics"]))


def _probe_stages(
    taps: Sequence[tuple[str, int]],
    train: tuple[Any, Any],
    validation: tuple[Any, Any],
    num_classes: int,
    proceed: Proceed,
) -> tuple[tuple[dict[str, Any], ...], float]:
    """Returns how well a head on each stage alone does, and the operations of finding these heads."""
    rows, flops, start = [], 0.0, 0
    for stage, width in taps:
        part = slice(start, start + width)
        heads = LogisticPath().fit(train[0][:, part], train[1], num_classes, proceed=proceed)
        path = [row for row in _measure(heads, validation[0][:, part], validation[1], proceed) if "error" not in row]
        if path:
            best = max(path, key=lambda row: rank(row["validation_metrics"]))
            rows.append({"stage": stage, "setting": best["variant"], "validation_metrics": best["validation_metrics"]})
        flops, start = flops + heads.flops, start + width
    return tuple(rows), flops


def _solved(leaf: Any) -> bool:
    return leaf.moves and leaf.kind != "random"


def _with_head(state: TrainState, head: dict[str, Any]) -> TrainState:
    """Returns the state with the solver's arrays, where those before lay."""
    known = {**state.params, **state.variables}
    if head.keys() != {path for path in known if path in head} or not set(state.params) <= set(head):
        raise InputError(f"the solver finds {', '.join(head)}, the head has {', '.join(known)}; choose another surgery")
    placed = {path: put(value.astype(known[path].dtype), known[path].sharding) for path, value in head.items()}
    for path, value in placed.items():
        if value.shape != known[path].shape:
            raise InputError(f"the solver's `{path}` is {value.shape}, the head's {known[path].shape}; see the surgery")
    params = {path: placed[path] for path in state.params}
    variables = {path: placed.get(path, value) for path, value in state.variables.items()}
    return dataclasses.replace(state, params=params, variables=variables, ema=dict(params) if state.ema else {})


def _check_same(planned: PlannedPhase, outputs: np.ndarray, expected: Any, dtype: str) -> None:
    """Holds the network with the head in it to what the solver said."""
    tolerance = TOLERANCES.get(jax.default_backend(), LOOSE) if dtype == "float32" else LOOSE
    expected = np.asarray(expected)
    apart, largest = np.max(np.abs(outputs - expected)), max(1.0, float(np.max(np.abs(expected))))
    if not apart <= tolerance * largest:
        total = len(planned.partition.trainable)
        message = f"phase `{planned.phase.name}`: the logits with the solved head in place are {apart:.1e} off"
        raise AuditError(message, {"frozen_unchanged": True, "trainable_moved": total, "trainable_total": total})
