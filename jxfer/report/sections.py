"""What the report says, in order: one function per section, each returning nothing where there is nothing to say."""

import json
from collections.abc import Callable
from typing import Any

from jxfer.report import costs, curves, pictures, style, tables
from jxfer.report.confusions import confusions, shown_examples
from jxfer.report.directory import Material
from jxfer.report.document import Block, Document, Fold, Section, Text, number, size
from jxfer.report.document import Code as CodeBlock
from jxfer.report.findings import best_table, certainty, headline, shots_text


def document(material: Material) -> Document:
    """Puts the whole report together."""
    sections = [Section(title, blocks) for title, make in _SECTIONS if (blocks := make(material))]
    return Document(
        title=str(material.experiment.get("name") or material.results.rows[0].get("experiment") or "Ablation"),
        subtitle=_subtitle(material),
        headline=headline(material.results, material.comparisons, material.baselines),
        certainty=certainty(material.results, material.comparisons, material.baselines),
        sections=tuple(sections),
    )


def _accuracy(material: Material) -> tuple[Block, ...]:
    results = material.results
    if not results.accuracy:
        return ()
    looks = style.looks(results.methods, material.baselines)
    return (
        curves.accuracy_figure(results, looks),
        tables.accuracy_table(results, material.comparisons),
        Text("The best at each number of examples", tone="best"),
        best_table(results, material.comparisons, material.baselines),
    )


def _cost(material: Material) -> tuple[Block, ...]:
    results = material.results
    if not results.accuracy:
        return ()
    figure = costs.cost_figure(results, style.looks(results.methods, material.baselines))
    shots = next(s for s in reversed(results.shots) if any((m, s) in results.accuracy for m in results.methods))
    text = Text(f"With {shots_text(shots)}, means over seeds.")
    return (*((figure,) if figure else ()), text, tables.cost_table(results, shots))


def _confusion(material: Material) -> tuple[Block, ...]:
    found = confusions(material)
    if not found:
        return ()
    best, *others = found
    blocks: tuple[Block, ...] = (pictures.best_confusion_figure(material, best),)
    return (*blocks, pictures.other_confusions_figure(material, others)) if others else blocks


def _examples(material: Material) -> tuple[Block, ...]:
    origin, shown = shown_examples(material)
    return (pictures.gallery(material, shown, origin),) if shown else ()


def _partitions(material: Material) -> tuple[Block, ...]:
    return tuple(_partition(plan) for plan in material.plans)


def _partition(plan: dict[str, Any]) -> Fold:
    phases = plan.get("phases", [])
    blocks: list[Block] = [] if phases else [Text("Nothing trains.")]
    for phase in phases:
        blocks += [Text(str(phase["name"]), tone="best"), Text(_phase_text(phase)), tables.leaves_table(phase)]
    trainable = " → ".join(number(phase.get("params_trainable")).text for phase in phases) or "0"
    return Fold(f"{plan['method']}: {trainable} trainable", tuple(blocks))


def _phase_text(phase: dict[str, Any]) -> str:
    parts = [
        f"{phase.get('steps', '–')} steps",
        f"{number(phase.get('params_trainable')).text} of {number(phase.get('params_total')).text} parameters train",
        f"optimizer state {size(phase.get('optimizer_bytes')).text}",
        f"{number(phase.get('step_flops')).text} FLOPs per step",
        f"temporaries {size(phase.get('temp_bytes')).text}",
        f"frozen up to {phase.get('frozen_boundary') or 'nothing'}",
    ]
    return ", ".join(parts) + "."


def _checks(material: Material) -> tuple[Block, ...]:
    audit = tables.audit_table(material.results)
    subsets = Text(_subset_text(material))
    if not audit.rows:
        return (subsets,)
    intro = Text(
        "At the end of every phase each run checks that frozen parameters and statistics are bit-identical to the "
        "start and that every trainable leaf moved; a run that fails this is a failed run."
    )
    return (intro, audit, subsets)


def _subset_text(material: Material) -> str:
    """Whether methods were compared on the same training examples, by the hash of their ids."""
    seen: dict[tuple[Any, int], set[str]] = {}
    for row in material.results.rows:
        if row.get("subset_hash"):
            seen.setdefault((row["shots"], row["seed"]), set()).add(row["subset_hash"])
    differing = sum(len(hashes) > 1 for hashes in seen.values())
    if not seen:
        return "No subset hashes were recorded, so whether methods saw the same training examples is unknown."
    if differing:
        return f"Methods saw different training examples in {differing} of {len(seen)} draws: compare them with care."
    return f"All methods saw the same training and validation examples in each of the {len(seen)} draws."


def _failed(material: Material) -> tuple[Block, ...]:
    failed = material.results.failed
    if not failed:
        return ()
    count = f"{len(failed)} of {len(material.results.rows)} runs failed and are in no mean above."
    return (Text(count, tone="bad"), tables.failed_table(material.results))


def _what_was_run(material: Material) -> tuple[Block, ...]:
    blocks: list[Block] = []
    versions = dict(material.versions)
    if command := versions.pop("command", None):
        blocks.append(CodeBlock(command if isinstance(command, str) else " ".join(map(str, command))))
    if look := material.source_validation:
        text = f"The source model reached {100 * look['accuracy']:.1f} % on the source's validation split"
        blocks.append(Text(f"{text} after {look['step']} steps." if "step" in look else f"{text}."))
    if versions:
        blocks.append(tables.pairs_table(versions, ("What", "Version")))
    runs = tables.runs_table(material.results)
    blocks.append(Fold(f"Every run, with hashes ({len(runs.rows)})", (runs,)))
    if material.experiment:
        config = json.dumps(material.experiment, indent=2, ensure_ascii=False)
        blocks.append(Fold("The experiment, every setting", (CodeBlock(config),)))
    return tuple(blocks)


def _subtitle(material: Material) -> str:
    first = material.results.rows[0]
    results = material.results
    num_ok = len(results.rows) - len(results.failed)
    parts = [
        f"{first.get('source') or '?'} → {first.get('target') or '?'}",
        str(first.get("model") or ""),
        f"{num_ok} of {len(results.rows)} runs finished",
        str(material.versions.get("device") or ""),
    ]
    return " · ".join(part for part in parts if part)


_SECTIONS: tuple[tuple[str, Callable[[Material], tuple[Block, ...]]], ...] = (
    ("Accuracy", _accuracy),
    ("Failed runs", _failed),
    ("Cost", _cost),
    ("Confusion", _confusion),
    ("Example predictions", _examples),
    ("What trains", _partitions),
    ("Checks", _checks),
    ("What was run", _what_was_run),
)
