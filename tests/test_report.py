"""The report as a whole, on a made-up ablation directory with class names that want to be markup."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jxfer import report
from jxfer.report.directory import read_directory
from jxfer.report.latex import escape
from jxfer.report.results import read_results
from jxfer.typing import InputError

METHODS = (
    "scratch",
    "zero_shot",
    "linear_probe",
    "feature_retraining",
    "fine_tuning",
    "fine_tuning_keep_head",
    "partial",
    "lp_ft",
)
SHOTS = (1, 2, 5, 10, 20)
EVIL = ('<b>"x"</b>', "a|b", "$\\frac$", "zwei`", "</script><script>alert(1)</script>", "&lt;")
CLASSES = (*EVIL, "6", "7", "_8_", "9")
FIGURES = (
    "accuracy",
    "differences",
    "cost",
    "curves",
    "curves_most",
    "settings",
    "settings_most",
    "reliability",
    "confusion",
)
FIGURES += ("confusion_others", "depth", "examples")
_BY_SHOTS = dict(zip((*SHOTS, None), (0.0, 0.07, 0.13, 0.17, 0.19, 0.2), strict=True))
_BASE = dict(zip(METHODS, (0.68, 0.61, 0.755, 0.75, 0.74, 0.765, 0.72, 0.76), strict=True))


def write_fake(directory: Path, *, methods=METHODS, shots=SHOTS, seeds=5, fail=(), num_test=120) -> Path:
    """Writes an ablation's directory with plausible accuracies; `fail` holds (method, shots, seed) that failed."""
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True, exist_ok=True)
    rows = [_row(rng, m, k, s, failed=(m, k, s) in fail) for m in methods for k in shots for s in range(seeds)]
    (directory / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    experiment = {
        "name": "glyphs_to_digits",
        "methods": [{"name": m, "start": "scratch" if m == "scratch" else "source"} for m in methods],
        "shots": list(shots),
        "seeds": seeds,
    }
    (directory / "experiment.json").write_text(json.dumps(experiment))
    (directory / "classes.json").write_text(json.dumps({"source": list("abc"), "target": CLASSES}))
    versions = {"python": "3.11.9", "jax": "0.10.2", "device": "cpu × 2", "command": ["jxfer", "ablate", "<e>.py"]}
    (directory / "versions.json").write_text(json.dumps(versions))
    (directory / "plans.json").write_text(json.dumps([_plan(method) for method in methods]))
    leaves = [{"path": "stem/kernel", "status": "loaded"}, {"path": "head/bias", "status": "re-initialised"}]
    manifest = {"what": "hf:<i>x</i>", "naming": "torch", "coverage": 0.993, "used": 1.0, "leaves": leaves}
    (directory / "manifest.json").write_text(json.dumps(manifest | {"tensors": [{"name": "a", "status": "used"}]}))
    (directory / "source").mkdir(exist_ok=True)
    (directory / "source" / "result.json").write_text(json.dumps({"metrics": {"accuracy": 0.875}}))
    _write_arrays(directory, rng, rows, num_test)
    return directory


def _row(rng: np.random.Generator, method: str, shots: int | None, seed: int, *, failed: bool) -> dict[str, Any]:
    accuracy = 0.615 if method == "zero_shot" else min(_BASE[method] * 0.85 + 1.4 * _BY_SHOTS[shots], 0.955)
    accuracy += 0 if method == "zero_shot" else (0.05 * (method == "scratch") * _BY_SHOTS[shots])
    accuracy += 0 if method == "zero_shot" else rng.normal(0, 0.012)
    trainable = {"scratch": 80_000, "zero_shot": 0, "linear_probe": 650, "partial": 45_000}.get(method, 79_000)
    moved = 0 if method == "zero_shot" else 6
    return {
        "experiment": "glyphs_to_digits",
        "source": "jxfer_glyphs",
        "target": "jxfer_digits",
        "model": "convnet",
        "method": method,
        "variant": f"learning_rate={(0.001, 0.01)[seed % 2]}",
        "variants": [] if method == "zero_shot" else [_variant(rate, accuracy) for rate in (0.001, 0.01, 0.1)],
        "shots": shots,
        "seed": seed,
        "status": "failed" if failed else "ok",
        "error": "loss is nan at step 37 <of 200>" if failed else None,
        "metrics": None if failed else {"accuracy": accuracy, "loss": 0.4},
        "source_metrics": None if method in ("scratch", "lp_ft") else {"accuracy": 0.9 - accuracy / 9, "loss": 0.3},
        "params_total": 80_000,
        "params_trainable": trainable,
        "optimizer_bytes": 8 * trainable,
        "checkpoint_bytes": 12 * trainable,
        "step_flops": 250 * trainable,
        "train_flops": 50_000 * trainable,
        "steps": 200,
        "seconds": 1.4 + trainable / 50_000,
        "config_hash": "0123456789abcdef",
        "features": {"stored": method in ("linear_probe", "lp_ft"), "boundary": "head", "views": 1, "examples": 400}
        | {"computed": 300, "reused": 100, "bytes": 51_200, "flops": 3e9},
        "stages": [_stage(index, accuracy) for index in range(4)] if method == "linear_probe" else [],
        "population": [{"phase": "tune", "parts": [2, 1], "why": "<memory>", "bytes_each": 2048}],
        "subset_hash": f"{seed}{shots}".ljust(16, "f"),
        "weights_hash": None if method == "scratch" else "feedfacecafebeef",
        "audit": None if failed else {"frozen_unchanged": True, "trainable_moved": moved, "trainable_total": moved},
    }


def _variant(rate: float, accuracy: float) -> dict[str, Any]:
    loss = 4 * abs(np.log10(rate) + 2.2) / 100
    return {"variant": f"learning_rate={rate}", "validation_metrics": {"accuracy": accuracy - loss, "loss": 0.5}}


def _stage(index: int, accuracy: float) -> dict[str, Any]:
    return {"stage": f"layer{index}", "validation_metrics": {"accuracy": accuracy - 0.1 * (3 - index)}}


def _plan(method: str) -> dict[str, Any]:
    if method == "zero_shot":
        return {"method": method, "phases": []}
    shapes = {"stem/conv/kernel": (3, 3, 1, 16), "layer1/conv/kernel": (3, 3, 16, 32), "head/bias": (10,)}
    leaves = [
        {
            "path": path,
            "shape": shape,
            "dtype": "float32",
            "count": int(np.prod(shape)),
            "label": "head" if path.startswith("head") or method == "scratch" else "frozen",
            "learning_rate_scale": 1.0,
            "weight_decay": 0.0001,
        }
        for path, shape in shapes.items()
    ]
    phase = {"steps": 200, "params_total": 80_000, "params_trainable": 650, "optimizer_bytes": 5200}
    phase |= {"step_flops": 1.2e6, "temp_bytes": 3_000_000, "frozen_boundary": "head", "leaves": leaves}
    saving = "stored: once per <example>; an epoch of these takes 5e+06 FLOPs instead of 1.9e+09"
    phase["features"] = saving if method == "linear_probe" else "online: the first stage trains"
    names = ("probe", "fine-tune") if method == "lp_ft" else ("train",)
    return {"method": method, "phases": [{"name": name, **phase} for name in names]}


def _write_arrays(directory: Path, rng: np.random.Generator, rows: list[dict[str, Any]], num_test: int) -> None:
    ids = np.array([f"test/{index:07}" for index in range(num_test)])
    labels = (np.arange(num_test) % len(CLASSES)).astype(np.int32)
    images = rng.integers(0, 60, (num_test, 8, 8, 1), dtype=np.uint8)
    for index, label in enumerate(labels):
        images[index, 1:7, 1 + label // 2 : 3 + label // 2] += 150
    for row in rows:
        if row["status"] == "ok":
            run = directory / "runs" / f"{row['method']}-shots{row['shots'] or 'all'}-seed{row['seed']}"
            run.mkdir(parents=True, exist_ok=True)
            right = rng.random(num_test) < row["metrics"]["accuracy"]
            said = np.where(right, labels, (labels + rng.choice([1, 3, 7], num_test)) % len(CLASSES))
            logits = np.eye(len(CLASSES), dtype=np.float32)[said] * 4 + rng.normal(size=(num_test, len(CLASSES)))
            arrays = {"ids": ids, "labels": labels, "logits": logits.astype(np.float32)}
            if row["method"] != "partial":
                arrays |= {"validation_labels": labels[:50], "validation_logits": arrays["logits"][:50] + 0.1}
            np.savez(run / "predictions.npz", **arrays)
            _write_log(run / "metrics.jsonl", row)
    np.savez(directory / "examples.npz", ids=ids[:64], images=images[:64])


def _write_log(path: Path, row: dict[str, Any]) -> None:
    """Looks at validation: two phases, in each of which steps start anew, and a torn last line."""
    looks = [
        {"step": step, "phase": phase, "variant": variant["variant"], "split": "validation"}
        | {"accuracy": variant["validation_metrics"]["accuracy"] * (1 - 1 / (index + 2)), "loss": 1.0}
        for variant in row["variants"]
        for index, (phase, step) in enumerate((p, s) for p in ("probe", "tune") for s in (50, 100))
    ]
    path.write_text("".join(json.dumps(look) + "\n" for look in looks) + '{"step": 1')


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_fake(tmp_path_factory.mktemp("ablation"), fail={("lp_ft", 1, 2)})
    report.build(directory)
    return directory


def test_the_page_asks_nothing_of_other_hosts(built: Path):
    page = (built / "report.html").read_text()
    assert not re.search(r"""(?:src|href|action)\s*=\s*["']?\s*(?:https?:)?//""", page)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "default-src 'none'" in page


def test_without_scripts_every_row_is_there(built: Path):
    html = re.sub(r"<script>.*?</script>|<wbr>", "", (built / "report.html").read_text(), flags=re.DOTALL)
    assert all(f"<td>{method}</td>" in html for method in METHODS)
    assert "<noscript" not in html


def test_markup_in_names_and_errors_stays_text(built: Path):
    page = (built / "report.html").read_text()
    assert "<b>&quot;x" not in page
    assert '<b>"x"' not in page
    assert "alert(1)</script>" not in page
    assert page.count("<script>") == 1
    assert "loss is nan at step 37 &lt;of 200&gt;" in page
    text = (built / "report.md").read_text()
    assert "a\\|b" in text or "a|b" not in text
    assert "<script>" not in text


def test_markdown_links_the_figures_that_exist(built: Path):
    linked = re.findall(r"\]\(([a-z_]+\.png)\)", (built / "report.md").read_text())
    assert linked == [f"{name}.png" for name in FIGURES]
    assert all((built / name).stat().st_size > 2000 for name in linked)
    assert not list(built.glob(".*.tmp"))


def test_markdown_tables_have_as_many_cells_as_headings(built: Path):
    for block in re.findall(r"(?:^\|.*\n)+", (built / "report.md").read_text(), re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_latex_tables_are_escaped_and_whole(built: Path):
    text = (built / "tables.tex").read_text()
    tables = text.split(r"\begin{table}")[1:]
    assert len(tables) == 1 + len(SHOTS)
    for table in tables:
        rows = re.findall(r"^.* \\\\$", table, re.MULTILINE)
        columns = len(re.search(r"\\begin\{tabular\}\{([lr]+)\}", table)[1])
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {columns - 1}
        assert table.count("{") - table.count(r"\{") == table.count("}") - table.count(r"\}")
    assert r"linear\_probe & " in text
    assert not re.search(r"(?<!\\)[%#_]", text.split("\n", 1)[1])
    assert text.isascii()


def test_latex_prints_any_name_as_it_is():
    assert escape("50% of $x_1$ & {y}\\^~") == (
        r"50\% of \$x\_1\$ \& \{y\}\textbackslash{}\textasciicircum{}\textasciitilde{}"
    )


def test_what_runs_recorded_beside_accuracy_is_shown(built: Path):
    text = (built / "report.md").read_text()
    sections = dict(re.findall(r"^## (.*)\n\n((?:.|\n)*?)(?=^## |\Z)", text, re.MULTILINE))
    assert "| before transfer | 87.5 |" in sections["Source after transfer"]
    assert re.search(r"\| zero_shot \| \*\*● 0\*\* \|", sections["Cost"])
    assert "| linear_probe | 5 |" in sections["Calibration"]
    assert "| partial | 5 |" in sections["Calibration"]  # which kept no validation logits
    assert "| 0.001 × 3, 0.01 × 2 |" in sections["Training"]
    assert re.search(r"linear_probe \| 25 \| head \| 1 \| 400 \| 300 \| 100 \| 50 KiB \| 3 G", sections["Shared work"])
    assert "| linear_probe | tune | 3 | 2 + 1 | 2 KiB | &lt;memory&gt; |" in sections["Shared work"]
    saved = "once per &lt;example&gt;; an epoch of these takes 5e+06 FLOPs instead of 1.9e+09"
    assert f"| linear_probe | train | {saved} |" in sections["Shared work"]
    assert "online: the first stage trains" not in sections["Shared work"]
    assert "| model | 99.30 | bytes that come from the file | 1 loaded, 1 re-initialised |" in sections["Checks"]
    assert "&lt;i&gt;" in sections["Checks"]
    assert sections["What was run"].count("| unchanged, 6 of 6 moved |") == 25 * 7 - 1, (
        "all but zero_shot and a failed one"
    )
    assert "| zwei" in sections["Classes"]


def test_failed_runs_are_listed_and_leave_the_means(built: Path):
    text = (built / "report.md").read_text()
    assert "1 of 200 runs failed" in text
    assert re.search(r"\| lp_ft \| (?:≈ )?\d+\.\d ± \d+\.\d \(n = 4\)", text)


def test_runs_that_skipped_steps_or_went_back_are_listed(tmp_path: Path, sketched):
    write_fake(tmp_path, methods=("partial", "scratch"), shots=(5,), seeds=2)
    file = tmp_path / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row, skipped, rollbacks in zip(rows, (0, 3, 0, 0), (0, 0, 0, 2), strict=True):
        row |= {"skipped_steps": skipped, "rollbacks": rollbacks}
    report.build(tmp_path)
    assert "Steps skipped" not in (tmp_path / "report.md").read_text()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.build(tmp_path)
    text = (tmp_path / "report.md").read_text()
    _, _, table = text.partition("| Steps skipped | Rollbacks |")
    listed = [line.split(" | ") for line in table.splitlines()[2:4]]
    expected = [(rows[1], f"3 of {rows[1]['steps']}", "0 |"), (rows[3], f"0 of {rows[3]['steps']}", "2 |")]
    assert [(cells[0][2:], cells[2], *cells[3:]) for cells in listed] == [
        (row["method"], str(row["seed"]), skipped, rollbacks) for row, skipped, rollbacks in expected
    ]


def test_settings_that_were_put_aside_are_listed_with_why(tmp_path: Path, sketched):
    write_fake(tmp_path, methods=("partial", "scratch"), shots=(5,), seeds=2)
    file = tmp_path / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    report.build(tmp_path)
    assert "put aside" not in (tmp_path / "report.md").read_text()
    for row in rows[:2]:
        row["variants"][2] = {"variant": "learning_rate=0.1", "error": f"loss is nan at step {row['seed']}<b>"}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.build(tmp_path)
    assert "Settings that were put aside (1)" in (tmp_path / "report.md").read_text()
    cells = re.search(
        r"<td>partial</td><td>learning_<wbr>rate=0.1</td><td[^>]*>2</td><td>loss is nan at step 0&lt;b&gt;</td>",
        (tmp_path / "report.html").read_text(),
    )
    assert cells


def test_building_again_gives_the_same_bytes(tmp_path: Path):
    report.build(write_fake(tmp_path, methods=("linear_probe", "scratch"), shots=(5,), seeds=2))
    before = (tmp_path / "report.html").read_bytes()
    report.build(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


def test_a_directory_without_runs_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match="no finished runs in"):
        report.build(tmp_path)
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(InputError, match="no finished runs in"):
        report.build(tmp_path)


def test_all_failed_is_reported_as_such(tmp_path: Path, sketched):
    failed = {("scratch", 1, 0), ("partial", 1, 0)}
    report.build(write_fake(tmp_path, methods=("scratch", "partial"), shots=(1,), seeds=1, fail=failed))
    text = (tmp_path / "report.md").read_text()
    assert "No run finished: 2 of 2 failed." in text
    assert "loss is nan at step 37" in text


def test_only_results_are_needed(tmp_path: Path):
    write_fake(tmp_path, methods=("partial",), shots=(None,), seeds=1)
    for path in [*tmp_path.rglob("*.npz"), *tmp_path.rglob("metrics.jsonl"), *tmp_path.glob("*.json")]:
        path.unlink()
    report.build(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "With all labelled examples, partial reaches" in text
    assert "one seed, so no interval" in text
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["accuracy.png", "cost.png", "settings.png"]


def test_broken_predictions_are_counted_in_the_caption(tmp_path: Path, sketched):
    write_fake(tmp_path, methods=("partial",), shots=(None,), seeds=2)
    (tmp_path / "runs/partial-shotsall-seed1/predictions.npz").write_bytes(b"PK torn")
    report.build(tmp_path)
    assert "summed over 1 run; predictions of 1 missing" in (tmp_path / "report.md").read_text()


def test_a_file_that_is_not_json_is_named(tmp_path: Path):
    write_fake(tmp_path, methods=("partial",), shots=(1,), seeds=1)
    (tmp_path / "plans.json").write_text("[{")
    with pytest.raises(InputError, match=r"plans\.json is not JSON"):
        report.build(tmp_path)


def test_hundreds_of_classes_get_a_list_of_errors_instead_of_a_matrix(tmp_path: Path, sketched):
    write_fake(tmp_path, methods=("partial",), shots=(1,), seeds=1)
    K = 300
    labels = np.arange(600, dtype=np.int32) % K
    logits = np.eye(K, dtype=np.float32)[(labels + (np.arange(600) % 5 == 0)) % K]
    ids = np.array([f"t{index}" for index in range(600)])
    np.savez(tmp_path / "runs/partial-shots1-seed0/predictions.npz", ids=ids, labels=labels, logits=logits)
    report.build(tmp_path)
    assert "50 most frequent errors" in (tmp_path / "report.html").read_text()


def test_the_terminal_table_has_methods_by_shots(built: Path):
    from rich.console import Console

    console = Console(width=140, record=True, file=io.StringIO())
    console.print(report.summary_table(read_results(built / "results.jsonl"), read_directory(built).comparisons))
    text = console.export_text()
    assert all(method in text for method in METHODS)
    assert "20 per class" in text
    assert re.search(r"zero_shot +(≈ )?61\.5 ± 0\.0", text)
