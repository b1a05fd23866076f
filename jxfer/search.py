"""All variants of one job through the phases of its method, alone or as populations; validation chooses afterwards."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from jxfer import config, distributed, logs
from jxfer.config import Experiment, Method, ModelConfig
from jxfer.context import Context
from jxfer.damage import set_aside
from jxfer.data import Drawn
from jxfer.loop import Session
from jxfer.partition import Audit, arrays_of, fingerprint
from jxfer.phase import PhaseResult, Splits, evaluate_model, run_phase
from jxfer.plan import PlannedPhase, plan_phases, plan_population
from jxfer.population import newest_checkpoint, run_population
from jxfer.rounding import round_frozen
from jxfer.sharding import make_mesh
from jxfer.solve import solve_phase
from jxfer.source import Source
from jxfer.task import Task, base_model, target_model
from jxfer.typing import Arrays, AuditError, NonFiniteError
from jxfer.variants import PlannedPopulation, Variant, variants


@dataclasses.dataclass(frozen=True)
class Job:
    """One cell of the grid."""

    experiment: Experiment
    method: Method
    shots: int | None
    seed: int

    @property
    def name(self) -> str:
        """The name of the run and its folder."""
        return f"{self.method.name}-shots{'all' if self.shots is None else self.shots}-seed{self.seed}"

    @property
    def title(self) -> str:
        """The name of the run for people."""
        return f"{self.method.name} · {'all' if self.shots is None else self.shots} shots · seed {self.seed}"

    @property
    def config_hash(self) -> str:
        """Changes with every setting that can change the result, and with nothing else."""
        method = dataclasses.replace(self.method, summary="")
        cell = dataclasses.replace(self.experiment, methods=(method,), shots=(self.shots,), seeds=1, wandb=False)
        return config.config_hash({"experiment": config.to_dict(cell), "seed": self.seed})


@dataclasses.dataclass(frozen=True, eq=False)
class Lazy:
    """A model that is put together once somebody asks for it, since of most variants that trained nobody does."""

    make: Callable[[], nnx.Module]

    @functools.cached_property
    def model(self) -> nnx.Module:
        """The model."""
        return self.make()

    @functools.cached_property
    def apart(self) -> tuple[nnx.GraphDef, Arrays]:
        """Its structure and its arrays, taken apart once for all variants that begin from it."""
        return nnx.graphdef(self.model), arrays_of(self.model)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A variant on its way through the phases."""

    context: Context
    lazy: Lazy
    """The model as the phases so far left it; variants that begin from the same one share it."""
    phases: tuple[PhaseResult, ...] = ()
    error: NonFiniteError | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A variant after training: the whole model, how it does on validation, and its phases."""

    variant: str
    lazy: Lazy
    validation_metrics: dict[str, float]
    phases: tuple[PhaseResult, ...]

    @property
    def model(self) -> nnx.Module:
        """The whole model."""
        return self.lazy.model


def train_variants(
    job: Job, task: Task, drawn: Drawn, directory: Path, session: Session, source: Source | None
) -> tuple[list[Outcome], list[Candidate], dict[str, Any]]:
    """Returns the variants that trained to their end, those that failed, and what the row says of all."""
    splits = Splits(drawn.train, drawn.validation)
    searched = variants(job.experiment, job.method)
    with session.at_once(f"checkpoints of {job.title} were being checked"):
        distributed.on_main(lambda: set_aside(directory, session.note))
    logs.rewind(directory, keep=_saved_rows(directory, job.method))
    settings = config.to_dict(job.experiment)
    with logs.open_logs(directory, name=job.name, config=settings, wandb=job.experiment.wandb) as log:
        contexts = [_context(job, variant, task, directory, session, log) for variant in searched]
        candidates = _start_models(contexts, searched, task, source)
        phases = plan_phases(job.experiment, job.method, candidates[0].lazy.model)
        tables = [f"{planned.phase.name}, {planned.num_steps} steps\n{planned.partition}" for planned in phases]
        if distributed.is_main():
            (directory / "partition.txt").write_text("\n\n".join(tables) + "\n")
        populations = []
        for index, planned in enumerate(phases):
            population = plan_population(job.experiment, searched, planned, candidates[0].lazy.model, task)
            candidates = _train_phase(candidates, planned, population, splits, index)
            populations.append({"phase": planned.phase.name, **population.to_json()})
    outcomes = [_outcome(candidate, splits) for candidate in candidates if candidate.error is None]
    tried = [_tried(candidate, outcomes) for candidate in candidates]
    failed = [candidate for candidate in candidates if candidate.error is not None]
    return outcomes, failed, {"variants": tried, "population": populations}


def _context(job: Job, variant: Variant, task: Task, directory: Path, session: Session, log: logs.LogRow) -> Context:
    return Context(
        experiment=dataclasses.replace(job.experiment, train=variant.train),
        method=variant.method,
        variant=variant.name,
        seed=job.seed,
        num_classes=len(task.target_classes),
        directory=directory,
        mesh=make_mesh(job.experiment.mesh),
        session=session,
        log=log,
        title=job.title,
    )


def _start_models(
    contexts: Sequence[Context], searched: Sequence[Variant], task: Task, source: Source | None
) -> list[Candidate]:
    """Makes the model that each variant starts from, once for all that start from the same."""

    first = contexts[0]

    @functools.cache
    def start(surgeries: tuple[Any, ...], seed: int) -> Lazy:
        return Lazy(functools.partial(_start_model, first, surgeries, task, source, seed))

    seeds = [first.seed if variant.head_seed is None else variant.head_seed for variant in searched]
    return [
        Candidate(context, start(context.method.surgeries, seed)) for context, seed in zip(contexts, seeds, strict=True)
    ]


def _start_model(
    context: Context, surgeries: tuple[Any, ...], task: Task, source: Source | None, head_seed: int
) -> nnx.Module:
    model = nnx.merge(*_base_model(context.experiment.model, context.method, task, context.seed))
    own = arrays_of(model)
    arrays = {**{path: own[path] for path in source.fresh}, **source.arrays} if source else None
    method = dataclasses.replace(context.method, surgeries=surgeries)
    return target_model(model, method, task, source=arrays, seed=head_seed)


def _train_phase(
    candidates: Sequence[Candidate],
    planned: PlannedPhase,
    population: PlannedPopulation,
    splits: Splits,
    index: int,
) -> list[Candidate]:
    """Trains one phase of all variants that are left, alone or in parts as planned."""
    candidates = _rounded(candidates, planned)
    if planned.phase.solver is not None:
        return _solve_phase(candidates, planned, splits, index)
    left = [position for position, candidate in enumerate(candidates) if candidate.error is None]
    advanced = list(candidates)
    largest = max(population.parts)
    for first in range(0, len(left), largest):
        part = left[first : first + largest]
        trained = _train_part([candidates[position] for position in part], planned, population, splits, index)
        for position, candidate in zip(part, trained, strict=True):
            advanced[position] = candidate
    if all(candidate.error for candidate in advanced):
        raise next(candidate.error for candidate in reversed(advanced) if candidate.error)
    return advanced


def _rounded(candidates: Sequence[Candidate], planned: PlannedPhase) -> list[Candidate]:
    """Rounds what the phase freezes, once for all variants that begin from the same model.

    From here on that is the model: the one that is trained on, measured, compared in the audit and saved.
    """
    dtype = candidates[0].context.experiment.train.frozen_dtype
    if dtype == "float32":
        return list(candidates)

    @functools.cache
    def rounded(lazy: Lazy) -> Lazy:
        graphdef, arrays = lazy.apart
        arrays = round_frozen(arrays, planned.partition, dtype)
        return Lazy(functools.partial(planned.partition.assemble, graphdef, arrays))

    return [dataclasses.replace(candidate, lazy=rounded(candidate.lazy)) for candidate in candidates]


def _solve_phase(candidates: Sequence[Candidate], planned: PlannedPhase, splits: Splits, index: int) -> list[Candidate]:
    """Solves for the head once for all variants that are left and begin from the same model."""
    results: dict[Lazy, PhaseResult] = {}
    solved = []
    for candidate in candidates:
        if candidate.error is None:
            shared = results.get(candidate.lazy)
            result = shared or solve_phase(candidate.context, planned, candidate.lazy.model, splits, index=index)
            # What the first one took counts once.
            features = dataclasses.replace(result.features, computed=0)
            results[candidate.lazy] = dataclasses.replace(result, train_flops=0.0, features=features)
            candidate = _advance(candidate, planned, result)
        solved.append(candidate)
    return solved


def _train_part(
    part: Sequence[Candidate], planned: PlannedPhase, population: PlannedPopulation, splits: Splits, index: int
) -> list[Candidate]:
    first = part[0]
    try:
        if len(part) == 1:
            found: list[PhaseResult | NonFiniteError] = [
                run_phase(first.context, planned, first.lazy.model, splits, index=index)
            ]
        else:
            assert population.cost is not None, "what trains together was costed when that was planned"
            contexts, models = [each.context for each in part], [each.lazy.model for each in part]
            found = [*run_population(contexts, planned, models, splits, index=index, cost=population.cost)]
    except NonFiniteError as error:
        return [dataclasses.replace(candidate, error=error) for candidate in part]
    return [_advance(candidate, planned, result) for candidate, result in zip(part, found, strict=True)]


def _advance(candidate: Candidate, planned: PlannedPhase, result: PhaseResult | NonFiniteError) -> Candidate:
    """Returns the candidate as a phase left it."""
    if isinstance(result, NonFiniteError):
        return dataclasses.replace(candidate, error=result)
    lazy = Lazy(functools.partial(_put_together, planned, *candidate.lazy.apart, result.arrays))
    return dataclasses.replace(candidate, lazy=lazy, phases=(*candidate.phases, result))


def _put_together(planned: PlannedPhase, graphdef: nnx.GraphDef, before: Arrays, moved: Arrays) -> nnx.Module:
    model = planned.partition.assemble(graphdef, before | moved)
    _check_frozen(planned, before, arrays_of(model))
    return model


def _outcome(candidate: Candidate, splits: Splits) -> Outcome:
    context, phases = candidate.context, candidate.phases
    if phases:
        metrics = phases[-1].validation_metrics
    else:
        proceed = functools.partial(context.session.proceed, f"evaluating {context.title}")
        metrics, _ = evaluate_model(
            context.experiment, context.num_classes, candidate.lazy.model, splits.validation, proceed=proceed
        )
    return Outcome(context.variant, candidate.lazy, metrics, phases)


def _tried(candidate: Candidate, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    name = candidate.context.variant
    if candidate.error is not None:
        return {"variant": name, "error": str(candidate.error)}
    found = next(outcome for outcome in outcomes if outcome.variant == name)
    return {"variant": name, "validation_metrics": found.validation_metrics}


def _saved_rows(directory: Path, method: Method) -> Callable[[logs.Row], bool]:
    """Returns whether a row of the log is from before the point at which its phase will resume."""
    names = [phase.name for phase in method.phases]

    @functools.cache
    def resumes_at(variant: str, phase: str) -> int:
        return newest_checkpoint(directory, variant=variant, index=names.index(phase))

    return lambda row: row["step"] <= resumes_at(row["variant"], row["phase"])


@functools.lru_cache(maxsize=2)  # each is a whole model, on the devices
def _base_model(model: ModelConfig, method: Method, task: Task, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
    """Makes the random weights of a seed once for all the runs of a method that begin with them."""
    return nnx.split(base_model(model, method, task, seed=seed))


def _check_frozen(planned: PlannedPhase, before: Arrays, after: Arrays) -> None:
    """Audits the model that is evaluated and saved: what the phase froze is what it was, whatever was put together."""
    _, frozen = planned.partition.split(before)
    # The very same array cannot differ from itself, and most are.
    frozen = {path: value for path, value in frozen.items() if after[path] is not value}
    now = fingerprint({path: after[path] for path in frozen})
    if leaks := tuple(path for path, digest in fingerprint(frozen).items() if now[path] != digest):
        audit = Audit(leaks, (), len(planned.partition.trainable))
        raise AuditError(f"audit after phase `{planned.phase.name}`: {audit}", audit.to_json())
