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
        "variant": {"learning_rate": 0.001},
        "shots": shots,
        "seed": seed,
        "status": "failed" if failed else "ok",
        "error": "loss is nan at step 37 <of 200>" if failed else None,
        "metrics": None if failed else {"accuracy": accuracy, "loss": 0.4},
        "source_metrics": None,
        "params_total": 80_000,
        "params_trainable": trainable,
        "optimizer_bytes": 8 * trainable,
        "checkpoint_bytes": 12 * trainable,
        "step_flops": 250 * trainable,
        "train_flops": 50_000 * trainable,
        "steps": 200,
        "seconds": 1.4 + trainable / 50_000,
        "config_hash": "0123456789abcdef",
        "subset_hash": f"{seed}{shots}".ljust(16, "f"),
        "weights_hash": None if method == "scratch" else "feedfacecafebeef",
        "audit": None if failed else {"frozen_unchanged": True, "trainable_moved": moved, "trainable_total": moved},
    }


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
            logits = np.eye(len(CLASSES), dtype=np.float32)[said] * 4
            np.savez(run / "predictions.npz", ids=ids, labels=labels, logits=logits)
    np.savez(directory / "examples.npz", ids=ids[:64], images=images[:64])


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
    assert linked == ["accuracy.png", "cost.png", "confusion.png", "confusion_others.png", "examples.png"]
    assert all((built / name).stat().st_size > 2000 for name in linked)
    assert not list(built.glob(".*.tmp"))


def test_markdown_tables_have_as_many_cells_as_headings(built: Path):
    for block in re.findall(r"(?:^\|.*\n)+", (built / "report.md").read_text(), re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_failed_runs_are_listed_and_leave_the_means(built: Path):
    text = (built / "report.md").read_text()
    assert "1 of 200 runs failed" in text
    assert re.search(r"\| lp_ft \| ≈ \d+\.\d ± \d+\.\d \(n = 4\)", text)


def test_building_again_gives_the_same_bytes(built: Path):
    before = (built / "report.html").read_bytes()
    report.build(built)
    assert (built / "report.html").read_bytes() == before


def test_a_directory_without_runs_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match="no finished runs in"):
        report.build(tmp_path)
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(InputError, match="no finished runs in"):
        report.build(tmp_path)


def test_all_failed_is_reported_as_such(tmp_path: Path):
    failed = {("scratch", 1, 0), ("partial", 1, 0)}
    report.build(write_fake(tmp_path, methods=("scratch", "partial"), shots=(1,), seeds=1, fail=failed))
    text = (tmp_path / "report.md").read_text()
    assert "No run finished: 2 of 2 failed." in text
    assert "loss is nan at step 37" in text


def test_only_results_are_needed(tmp_path: Path):
    write_fake(tmp_path, methods=("partial",), shots=(None,), seeds=1)
    for path in [*tmp_path.rglob("*.npz"), *tmp_path.glob("*.json")]:
        path.unlink()
    report.build(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "With all labelled examples, partial reaches" in text
    assert "one seed, so no interval" in text
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["accuracy.png", "cost.png"]


def test_broken_predictions_are_counted_in_the_caption(tmp_path: Path):
    write_fake(tmp_path, methods=("scratch", "partial"), shots=(1, None), seeds=2)
    (tmp_path / "runs/partial-shotsall-seed1/predictions.npz").write_bytes(b"PK torn")
    report.build(tmp_path)
    assert "summed over 1 run; predictions of 1 missing" in (tmp_path / "report.md").read_text()


def test_a_file_that_is_not_json_is_named(tmp_path: Path):
    write_fake(tmp_path, methods=("partial",), shots=(1,), seeds=1)
    (tmp_path / "plans.json").write_text("[{")
    with pytest.raises(InputError, match=r"plans\.json is not JSON"):
        report.build(tmp_path)


def test_hundreds_of_classes_get_a_list_of_errors_instead_of_a_matrix(tmp_path: Path):
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
