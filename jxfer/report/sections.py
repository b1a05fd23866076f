"""What the report says, in order: one function per section, each returning nothing where there is nothing to say."""

import json
from collections.abc import Callable
from typing import Any

from jxfer.report import breakdown, calibration, costs, curves, details, pictures, speed, style, tables, training
from jxfer.report.confusions import confusions, shown_examples
from jxfer.report.differences import differences_figure
from jxfer.report.directory import Material
from jxfer.report.document import Block, Document, Fold, Section, Table, Text, number, size
from jxfer.report.document import Code as CodeBlock
from jxfer.report.findings import best_table, certainty, headline, methods_text, shots_name, shots_text
from jxfer.report.results import extremes

_COVERED = (
    "Only runs on the same training subset are compared, seed by seed, on the same test examples. Of the bootstrap the "
    "standard error is used, times a quantile of t: its percentiles claim too much from a handful of seeds. Below five "
    "seeds little can be found at all. Intervals stand on their own; only p is corrected. Neither covers another "
    "source model, or another choice of data sets."
)


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


def paper_tables(material: Material) -> list[tuple[str, str, Table]]:
    """Label, caption and table of what goes into a paper: accuracy, and the comparisons at each number of shots."""
    results, comparisons = material.results, material.comparisons
    found = [("accuracy", "", tables.accuracy_table(results, comparisons))]
    for shots in results.shots:
        if pairs := comparisons.at(shots):
            caption = f"With {shots_text(shots)}. {methods_text(pairs, len(pairs))}"
            found.append((f"pairs-{shots_name(shots)}", caption, details.comparison_table(comparisons, shots)))
    return found


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


def _comparisons(material: Material) -> tuple[Block, ...]:
    comparisons = material.comparisons
    tested = [shots for shots in reversed(material.results.shots) if comparisons.at(shots)]
    if not tested:
        return ()
    pairs = [pair for shots in tested for pair in comparisons.at(shots)]
    text = methods_text(pairs, max(len(comparisons.at(shots)) for shots in tested))
    tables_ = [(shots, details.comparison_table(comparisons, shots)) for shots in tested]
    first, *others = tables_
    figure = differences_figure(material, style.looks(material.results.methods, material.baselines))
    return (
        Text(text),
        *((figure,) if figure else ()),
        Text(_COVERED, tone="muted"),
        Text(f"With {shots_text(first[0])}", tone="best"),
        first[1],
        *(Fold(f"With {shots_text(shots)}", (table,)) for shots, table in others),
    )


def _cost(material: Material) -> tuple[Block, ...]:
    results = material.results
    if not results.accuracy:
        return ()
    figure = costs.cost_figure(results, style.looks(results.methods, material.baselines))
    shots = next(s for s in reversed(results.shots) if any((m, s) in results.accuracy for m in results.methods))
    text = Text(f"With {shots_text(shots)}, means over seeds.")
    return (*((figure,) if figure else ()), text, tables.cost_table(results, shots))


def _training(material: Material) -> tuple[Block, ...]:
    looks = style.looks(material.results.methods, material.baselines)
    blocks: list[Block] = []
    for name, shots in zip(("curves", "curves_most"), extremes(material.results), strict=False):
        if curves := training.learning_curves(material, shots):
            blocks.append(training.curves_figure(shots, curves, looks, name=name))
    if choices := training.choices_table(material.results):
        blocks += [Text("What the search chose", tone="best"), choices]
    for name, shots in zip(("settings", "settings_most"), extremes(material.results), strict=False):
        if figure := training.settings_figure(material.results, shots, looks, name=name):
            blocks.append(figure)
    if table := tables.put_aside_table(material.results):
        blocks.append(Fold(f"Settings that were put aside ({len(table.rows)})", (table,)))
    if table := tables.disturbed_table(material.results):
        said = "Steps with a loss or gradient that is not finite were left out, or trained again on other batches."
        blocks += [Text(said, tone="bad"), table]
    if table := speed.speed_table(material):
        blocks += [Text("How fast it trained", tone="best"), table]
    return tuple(blocks)


def _calibration(material: Material) -> tuple[Block, ...]:
    for shots in reversed(material.results.shots):
        if said := calibration.predictions_of(material, shots):
            looks = style.looks(material.results.methods, material.baselines)
            figure = calibration.reliability_figure(said, shots, looks)
            return (Text(f"With {shots_text(shots)}."), calibration.calibration_table(said), figure)
    return ()


def _classes(material: Material) -> tuple[Block, ...]:
    for shots in reversed(material.results.shots):
        if said := calibration.predictions_of(material, shots):
            return (breakdown.class_table(material, said, shots),)
    return ()


def _depth(material: Material) -> tuple[Block, ...]:
    looks = style.looks(material.results.methods, material.baselines)
    for shots in reversed(material.results.shots):
        if figure := breakdown.depth_figure(material.results, shots, looks):
            return (figure,)
    return ()


def _source(material: Material) -> tuple[Block, ...]:
    table = details.source_table(material)
    return (table,) if table else ()


def _sharing(material: Material) -> tuple[Block, ...]:
    stored, together = details.features_table(material.results), details.population_table(material.results)
    blocks: list[Block] = [Text("Features stored at the frozen boundary", tone="best"), stored] if stored else []
    if stored and (saving := details.saving_table(material.plans)):
        blocks.append(saving)
    if together:
        blocks += [Text("Settings of the search that trained together", tone="best"), together]
    return tuple(blocks)


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
    weights = details.weights_table(material.manifest)
    loaded: tuple[Block, ...] = (Text("Weights loaded", tone="best"), weights) if weights else ()
    if not audit.rows:
        return (subsets, *loaded)
    intro = Text(
        "At the end of every phase each run checks that frozen parameters and statistics are bit-identical to the "
        "start and that every trainable leaf moved; a run that fails this is a failed run."
    )
    return (intro, audit, subsets, *loaded)


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
    ("Comparisons", _comparisons),
    ("Failed runs", _failed),
    ("Cost", _cost),
    ("Training", _training),
    ("Calibration", _calibration),
    ("Classes", _classes),
    ("Confusion", _confusion),
    ("Depth", _depth),
    ("Source after transfer", _source),
    ("Example predictions", _examples),
    ("What trains", _partitions),
    ("Shared work", _sharing),
    ("Checks", _checks),
    ("What was run", _what_was_run),
)
