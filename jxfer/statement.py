"""What a plan says: its phases and their costs, as JSON and as text."""

import dataclasses
from typing import Any

from jxfer.activations import Activations
from jxfer.config import TrainConfig
from jxfer.cost import Cost
from jxfer.optim import learning_rate, scaling_rule
from jxfer.partition import Partition
from jxfer.planned import PlannedPhase
from jxfer.rounding import held_bytes
from jxfer.variants import PlannedPopulation


@dataclasses.dataclass(frozen=True)
class Plan:
    """The phases of a method and their costs, in order."""

    method: str
    train: TrainConfig
    phases: tuple[tuple[PlannedPhase, Cost], ...]
    populations: tuple[PlannedPopulation, ...] = ()
    """Of the phases: which variants of the search train together."""
    activations: tuple[Activations | None, ...] = ()
    """Of the phases: what a backward pass keeps, of one variant; None where a solver finds the head."""

    def to_json(self) -> dict[str, Any]:
        """Returns what `jxfer plan --json` prints; bytes and floating-point operations per optimizer step."""
        return {
            "method": self.method,
            "phases": list(map(self._phase_json, self.phases, self.populations, self.activations)),
        }

    def _phase_json(
        self, costed: tuple[PlannedPhase, Cost], population: PlannedPopulation, activations: Activations | None
    ) -> dict[str, Any]:
        planned, cost = costed
        return {
            "name": planned.phase.name,
            "steps": planned.num_steps,
            "params_total": planned.partition.params_total,
            "params_trainable": planned.partition.params_trainable,
            **dataclasses.asdict(cost),
            "activations": None if activations is None else dataclasses.asdict(activations),
            "learning_rate": learning_rate(self.train),
            "learning_rate_rule": scaling_rule(self.train),
            "frozen_dtype": self.train.frozen_dtype,
            "frozen_bytes": held_bytes(planned.partition, self.train.frozen_dtype),
            "frozen_bytes_saved": self._bytes_saved(planned.partition),
            "frozen_boundary": planned.boundary,
            "features": planned.why,
            "population": population.to_json(),
            "leaves": [self._leaf_json(planned.partition, leaf) for leaf in planned.partition.leaves],
        }

    def _rate_lines(self, planned: PlannedPhase) -> list[str]:
        rule = scaling_rule(self.train)
        if rule is None or planned.phase.solver is not None:
            return []
        return [f"learning rate: {learning_rate(self.train):g}, which is {self.train.learning_rate:g} by {rule}"]

    def _bytes_saved(self, partition: Partition) -> int:
        return held_bytes(partition, "float32") - held_bytes(partition, self.train.frozen_dtype)

    def _frozen_line(self, partition: Partition) -> str:
        size, dtype = held_bytes(partition, self.train.frozen_dtype), self.train.frozen_dtype
        return f"frozen parameters in {dtype}: {size:,} bytes, {self._bytes_saved(partition):,} fewer than in float32"

    def _leaf_json(self, partition: Partition, leaf: Any) -> dict[str, Any]:
        rate, decay = partition.scales(leaf)
        return {
            "path": leaf.path,
            "shape": list(leaf.shape),
            "dtype": leaf.dtype,
            "count": leaf.count,
            "kind": leaf.kind,
            "label": leaf.label,
            "learning_rate_scale": rate,
            "weight_decay": decay * self.train.weight_decay,
        }

    def __str__(self) -> str:
        if not self.phases:
            return f"{self.method}: nothing trains"
        parts = []
        for (planned, cost), population, kept in zip(self.phases, self.populations, self.activations, strict=True):
            parts += [
                f"{self.method} · phase {planned.phase.name} · {planned.num_steps} steps",
                str(planned.partition),
                *([] if planned.phase.solver is None else [f"solver: {planned.phase.solver}"]),
                f"one {'step' if planned.phase.solver is None else 'iteration'}: "
                f"{cost.step_flops:,.0f} FLOPs, {cost.temp_bytes:,} temporary bytes; "
                f"optimizer state: {cost.optimizer_bytes:,} bytes",
                *self._rate_lines(planned),
                *([] if kept is None else [f"activations kept for the backward pass: {kept}"]),
                *([self._frozen_line(planned.partition)] if self.train.frozen_dtype != "float32" else []),
                f"features: {planned.why}",
                *([f"variants: {population}"] if sum(population.parts) > 1 else []),
                "",
            ]
        return "\n".join(parts).rstrip()
