"""One phase of many variants as one program: what moves is stacked, the frozen part and the batches are shared."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jxfer import distributed
from jxfer.checkpoint import Checkpoints, newest_step
from jxfer.context import Context, batch_name, checkpoint_folder, device_batches, first_batch, log_row
from jxfer.cost import Cost, cost_of
from jxfer.data import Split
from jxfer.evaluate import evaluate
from jxfer.loop import Hook, Window, check_finite, train
from jxfer.partition import Audit, fingerprint
from jxfer.phase import EVAL_BATCH_SIZE, PhaseResult, Splits, is_due, rank, store_features
from jxfer.plan import POPULATION, PlannedPhase, phase_steps, start_population
from jxfer.state import Fixed, Population, member, pick, place_population
from jxfer.step import EvalStep
from jxfer.typing import Arrays, AuditError, NonFiniteError
from jxfer.variants import Variant

_MEMBERS = "variants.json"


def run_population(
    contexts: Sequence[Context],
    planned: PlannedPhase,
    models: Sequence[nnx.Module],
    splits: Splits,
    *,
    index: int,
    cost: Cost,
) -> list[PhaseResult | NonFiniteError]:
    """Trains one phase of several variants together, each as `run_phase` would, or from their newest checkpoint.

    Args:
      contexts: of the variants, which differ in their numbers alone.
      planned: the phase.
      models: what each variant starts from; they agree in what is frozen.
      splits: shared.
      index: of the phase.
      cost: of one step of one variant.

    Returns:
      for each variant its result, or why it has none.

    Raises:
      NonFiniteError: no variant is left.
      AuditError: something frozen changed or something trainable never moved.
      InterruptedRun: after saving, once the session should stop.
    """
    context, num_variants = contexts[0], len(contexts)
    population, fixed, spread = _start(contexts, planned, models, index)
    frozen, start = fingerprint({**fixed.params, **fixed.variables}), distributed.fetch(population.state.params)
    splits, features = store_features(context, planned, member(population, 0), fixed, splits)
    train_step, eval_step = phase_steps(context.experiment, context.method, planned, context.num_classes, POPULATION)
    batches = functools.partial(device_batches, context, planned, splits.train, index, whole=spread)
    together = cost_of(train_step, population, fixed, first_batch(context, planned, batches(start=0)))
    with _Keeper(contexts, planned, population, fixed, eval_step, splits.validation, index) as keeper:
        population = keeper.resume(population)
        with context.traced(planned, start=int(population.step)) as tracing:
            try:
                population = train(
                    train_step,
                    population,
                    fixed,
                    batches(start=int(population.step)),
                    num_steps=planned.num_steps,
                    log_every=context.experiment.train.log_every,
                    on_window=functools.partial(keeper.log_window, together),
                    hooks=(*keeper.hooks(), *tracing),
                    on_stop=keeper.stop,
                    should_stop=context.session.should_stop,
                    check=keeper.check,
                    what=functools.partial(batch_name, context, planned),
                )
            except NonFiniteError as error:
                error.flops = error.step * together.step_flops
                raise
    left = [variant for variant in range(num_variants) if variant not in keeper.failures]
    audit = _audit(planned, frozen, start, population, fixed, left)
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(population)) // population.alive.shape[0]
    return [
        keeper.failures[variant]
        if variant in keeper.failures
        else PhaseResult(
            planned.phase.name,
            pick(keeper.best_arrays, variant),
            tuple(leaf.path for leaf in planned.partition.trainable),
            keeper.best_metrics[variant],
            keeper.best_steps[variant],
            planned.num_steps,
            audit,
            cost,
            state_bytes,
            planned.num_steps * together.step_flops / len(left),
            # Computed once for all.
            features if variant == left[0] else dataclasses.replace(features, computed=0),
        )
        for variant in range(num_variants)
    ]


def newest_checkpoint(directory: Path, *, variant: str, index: int) -> int:
    """Returns the step from which a variant's phase will resume, alone or in its population; 0 where none is saved."""
    populations = [file.parent.name for file in (directory / "checkpoints").glob(f"*/{_MEMBERS}")]
    names = [name for name in populations if _may_be_in(_members_file(directory, name), variant)]
    return max(newest_step(checkpoint_folder(directory, name, index)) or 0 for name in (variant, *names))


class _Keeper:
    """Looks at validation, remembers the best of each variant and who failed, and saves what resuming needs."""

    def __init__(
        self,
        contexts: Sequence[Context],
        planned: PlannedPhase,
        population: Population,
        fixed: Fixed,
        eval_step: EvalStep,
        validation: Split,
        index: int,
    ):
        self.failures: dict[int, NonFiniteError] = {}
        self.best_steps = [0] * len(contexts)
        self.best_metrics: list[dict[str, float]] = [{} for _ in contexts]
        self._kept = {leaf.path for leaf in planned.partition.leaves if leaf.moves and leaf.kind != "random"}
        self.best_arrays = jax.tree.map(jnp.copy, self._worth_keeping(population))
        self._contexts, self._planned, self._fixed = contexts, planned, fixed
        self._eval_step, self._validation = eval_step, validation
        self._name = _population_name([context.variant for context in contexts])
        self._directory = checkpoint_folder(contexts[0].directory, self._name, index)
        self._saved_step, self._looked = 0, 0

    def __enter__(self) -> "_Keeper":
        return self

    def __exit__(self, *_: object) -> None:
        if "_checkpoints" in self.__dict__:
            self._checkpoints.close()

    @functools.cached_property
    def _checkpoints(self) -> Checkpoints:
        keep_last = self._contexts[0].experiment.train.keep_checkpoints
        return Checkpoints(self._directory, keep_last=keep_last, keep_best=False)

    def hooks(self) -> tuple[Hook, ...]:
        config = self._contexts[0].experiment.train
        hooks = [Hook(1, self._show), Hook(config.eval_every, self.evaluate)]
        if config.checkpoint_every is not None:
            hooks.append(Hook(config.checkpoint_every, self.stop))
        return tuple(hooks)

    def check(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Notes which variants failed, and raises once all have."""
        finite = np.all([np.isfinite(value) for value in metrics.values()], axis=0)
        for variant in np.flatnonzero(~finite[: len(self._contexts)]):
            if int(variant) not in self.failures:
                self._fail(int(variant), step, {name: value[variant] for name, value in metrics.items()})

    def evaluate(self, step: int, population: Population) -> None:
        mesh, split = self._contexts[0].mesh, self._validation
        metrics, _ = evaluate(
            self._eval_step,
            population,
            self._fixed,
            split,
            batch_size=EVAL_BATCH_SIZE,
            mesh=mesh,
            proceed=self._proceed,
        )
        self._looked = step
        self.check(step, metrics)
        better = np.zeros(population.alive.shape[0], bool)
        for variant, context in enumerate(self._contexts):
            own = {name: float(value[variant]) for name, value in metrics.items()}
            if variant in self.failures:
                continue
            context.log(log_row(context, self._planned, step, "validation") | own)
            best = self.best_metrics[variant]
            if not best or rank(own) > rank(best):
                better[variant] = True
                self.best_steps[variant], self.best_metrics[variant] = step, own
        self.best_arrays = _choose(better, self._worth_keeping(population), self.best_arrays)

    def log_window(self, cost: Cost, window: Window) -> None:
        speed = window.speed(cost.step_flops, peak=self._contexts[0].peak)
        for variant, context in enumerate(self._contexts):
            if variant not in self.failures:
                own = {name: float(value[variant]) for name, value in window.metrics.items()}
                context.log(log_row(context, self._planned, window.step, "train") | own | speed)

    def stop(self, step: int, population: Population) -> None:
        """Saves the population with the best of each variant."""
        if step == self._saved_step:
            return
        self._saved_step = step
        guard = self._contexts[0].session.guard
        guard()
        distributed.on_main(self._write_members)
        failures = {str(variant): str(error) for variant, error in self.failures.items()}
        extra = {
            "best_steps": self.best_steps,
            "best_metrics": self.best_metrics,
            "failures": failures,
            "looked": self._looked,
        }
        self._checkpoints.save(step, self._saved(population), extra=extra, guard=guard)

    def resume(self, population: Population) -> Population:
        """Returns the newest saved population, with the best so far remembered, or the given one."""
        if (newest := self._checkpoints.latest()) is None:
            return population
        saved, extra = self._checkpoints.restore(self._saved(population), step=newest)
        self.best_steps, self.best_metrics = extra["best_steps"], extra["best_metrics"]
        self.failures = {int(variant): NonFiniteError(text) for variant, text in extra["failures"].items()}
        self.best_arrays, self._saved_step = saved["best"], newest
        self._looked = extra.get("looked", newest)
        if self._looked != newest and is_due(newest, self._contexts[0].experiment.train.eval_every, self._planned):
            self.evaluate(newest, saved["population"])  # it was stopped in this look
        return saved["population"]

    def _proceed(self) -> None:
        context = self._contexts[0]
        context.session.proceed(f"looking at the validation split of {context.title}")

    def _saved(self, population: Population) -> dict[str, Any]:
        return {"population": population, "best": self.best_arrays}

    def _fail(self, variant: int, step: int, metrics: dict[str, Any]) -> None:
        try:
            check_finite(step, metrics)
        except NonFiniteError as error:
            self.failures[variant] = error
            if len(self.failures) == len(self._contexts):
                raise

    def _worth_keeping(self, population: Population) -> Arrays:
        state = population.state
        moving = {**state.params, **state.ema, **state.variables}
        return {path: value for path, value in moving.items() if path in self._kept}

    def _write_members(self) -> None:
        file = _members_file(self._contexts[0].directory, self._name)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps([context.variant for context in self._contexts]))
        temporary.replace(file)

    def _show(self, step: int, population: Population) -> None:
        del population
        context = self._contexts[0]
        what = f"{context.title} · {self._planned.phase.name} · {len(self._contexts)} variants"
        context.session.progress(what, step, self._planned.num_steps)


def _start(
    contexts: Sequence[Context], planned: PlannedPhase, models: Sequence[nnx.Module], index: int
) -> tuple[Population, Fixed, bool]:
    """Returns population and fixed part on the mesh, and whether its variants are divided over the devices."""
    context = contexts[0]
    num_shards = context.mesh.shape["data"]
    # On stored features the head is most of the work; online the backbone is, which wants its batch divided instead.
    spread = planned.stored and num_shards > 1
    population, fixed = start_population(
        [Variant(each.variant, each.experiment.train, each.method) for each in contexts],
        planned,
        models,
        key=jax.random.fold_in(jax.random.key(context.seed), index),
        multiple=num_shards if spread else 1,
    )
    population, fixed = place_population(population, fixed, context.mesh, context.experiment.mesh, spread=spread)
    return population, fixed, spread


@jax.jit
def _choose(better: jax.Array, new: Arrays, old: Arrays) -> Arrays:
    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(better.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, new, old)


def _audit(
    planned: PlannedPhase,
    frozen: dict[str, str],
    start: Arrays,
    population: Population,
    fixed: Fixed,
    left: Sequence[int],
) -> Audit:
    """Compares the frozen part bit by bit, and each trainable leaf in every variant that is left."""
    end = distributed.fetch(population.state.params)
    moved = {path: all(np.any(start[path][variant] != end[path][variant]) for variant in left) for path in start}
    partition = planned.partition
    digests = {leaf.path: "" for leaf in partition.leaves if leaf.moves}
    before = digests | frozen
    after = digests | {path: "moved" for path, did in moved.items() if did}
    after |= fingerprint({**fixed.params, **fixed.variables})
    audit = partition.audit(before, after, fixed.definition.train_graphdef)
    if not audit.ok:
        raise AuditError(f"audit of phase `{planned.phase.name}`: {audit}", audit.to_json())
    return audit


def _population_name(variants: Sequence[str]) -> str:
    digest = hashlib.blake2b("\n".join(variants).encode(), digest_size=4).hexdigest()
    return f"population-{digest}"


def _may_be_in(members: Path, variant: str) -> bool:
    try:
        return variant in json.loads(members.read_text())
    except ValueError:  # damaged: rather than dropping rows of the log, take it for one of them
        return True


def _members_file(directory: Path, population: str) -> Path:
    return directory / "checkpoints" / population / _MEMBERS
