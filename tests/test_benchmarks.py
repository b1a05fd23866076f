"""The benchmark scripts run, and the counts in their tables hold; their times are for people to read."""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from jxfer.xla_flags import NO_YNN_FUSION, is_known

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Imports a benchmark as Python runs it: with its own folder on the path."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


def test_freezing_saves_flops_and_optimizer_state_where_masking_saves_neither(script, capsys, monkeypatch):
    partition = script("partition")
    monkeypatch.setattr(partition, "is_known", lambda flag: False)  # which has a test of its own
    results = partition.main(["--quick"])["convnet"]
    full, forward = results["full fine-tuning"], results[partition.FORWARD]
    masked, frozen = results["differentiate everything, then mask"], results["jxfer, frozen backbone"]
    last = results["jxfer, last stage + head"]
    assert frozen.flops / forward.flops <= 1.02
    assert frozen.flops < last.flops < masked.flops
    assert masked.flops / forward.flops > 2.9
    assert masked.optimizer_bytes == pytest.approx(full.optimizer_bytes, abs=64), "differ in counters alone"
    assert frozen.optimizer_bytes < full.optimizer_bytes / 50
    printed = capsys.readouterr().out
    assert partition.machine().split(", load")[0] in printed
    assert all(name in printed for name in results)


@pytest.mark.slow
@pytest.mark.skipif(not is_known(NO_YNN_FUSION), reason="this XLA has no such flag")
def test_processes_with_and_without_the_flag_take_turns(script):
    partition = script("partition")
    gains = partition.flag_gains(["--quick"], rounds=2)
    assert list(gains) == [partition.FORWARD, partition.FULL_TUNING]
    assert all(0.2 < ratio.median < 5 for _, _, ratio in gains.values())
    assert "ms with the flag" in partition.render_gains(partition.QUICK[0], gains)


def test_a_child_makes_the_calls_it_is_asked_for_under_its_own_environment(script, tmp_path):
    children = script("children")
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        "import children\n"
        "note = lambda name: open(name, 'a').write(os.environ['WHO'])\n"
        f"children.serve({{name: lambda name=name: note({str(tmp_path)!r} + '/' + name) for name in 'ab'}})\n"
    )
    with children.child([str(program)], WHO="1") as one, children.child([str(program)], WHO="2") as two:
        for call, name in ((one, "a"), (two, "a"), (two, "b"), (one, "a")):
            call(name)
        assert {name: (tmp_path / name).read_text() for name in "ab"} == {"a": "121", "b": "2"}
        with pytest.raises(RuntimeError, match="said '' and not 'done'"):
            one("no such call")


TIMM = """
import torch

__version__ = "0"

def create_model(name, *, num_classes, img_size):
    assert name == "vit_tiny_patch16_224"
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * img_size**2, num_classes))
"""
"""As much of timm as the benchmark asks for."""


def test_without_a_gpu_the_gpu_benchmark_refuses(script, capsys):
    with pytest.raises(SystemExit) as ended:
        script("gpu").main([])
    assert ended.value.code == 2
    assert "no GPU: jax sees cpu; pip install" in capsys.readouterr().err


def test_the_gpu_benchmark_measures_both_sides_by_turns(script, capsys, monkeypatch):
    gpu = script("gpu")
    monkeypatch.setattr(gpu, "ask", lambda request: gpu.answer(request))  # here, to be quick
    pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    exec(TIMM, sys.modules["timm"].__dict__)
    found = gpu.main(["--quick", "--batches", "2", "--rounds", "1"])
    assert [(each["way"], each["batch"], len(each["seconds"])) for each in found] == [("jxfer", 2, 2), ("timm", 2, 2)]
    assert found[0]["step_flops"] > 0
    printed = capsys.readouterr().out
    assert "vit_ti_16 at 16×16, bfloat16" in printed
    assert "time / jxfer" in printed


def test_a_process_of_the_gpu_benchmark_answers_or_says_what_is_wrong(script):
    gpu = script("gpu")
    assert gpu.ask({"way": "about"})["platform"] == "cpu"
    assert gpu.ask({"way": "timm"})["error"]
    assert "KeyError" in gpu.ask({"way": "jxfer"})["error"]


def test_the_table_of_the_gpu_benchmark_has_images_a_second_and_the_share_of_the_peak(script):
    gpu = script("gpu")
    one = {"model": "m", "batch": 64}
    rows = [
        one | {"way": "jxfer", "seconds": [0.1, 0.3, 0.2], "step_flops": 64e9, "peak_bytes": 2**31},
        one | {"way": "timm", "seconds": [0.4], "peak_bytes": None},
        one | {"way": "timm compiled", "seconds": [], "error": "torch.OutOfMemoryError: CUDA out of memory."},
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in gpu.render(rows, 1e12).splitlines()[2:]]
    assert lines == [
        ["64", "jxfer", "200.00", "320", "1.000", "1.00", "0.320", "2.0"],
        ["64", "timm", "400.00", "160", "2.000", "1.00", "0.160", "–"],
        ["64", "timm compiled", "does not fit", "–", "–", "–", "–", "–"],
    ]


@pytest.mark.slow
def test_a_filled_cache_of_compiled_programs_makes_the_second_command_a_quick_one(script, capfd):
    ratios = script("startup").main(["--quick"])
    assert ratios["convnet"].median < 0.9
    assert "filled / empty" in capfd.readouterr().out


def test_a_linear_probe_on_resnet50_keeps_moments_of_its_head_alone(script):
    optimizer_bytes, head_bytes = script("partition").probe_bytes("resnet50", (224, 224, 3), num_classes=1000)
    assert head_bytes == 4 * (2048 * 1000 + 1000)
    assert 0 <= optimizer_bytes - 2 * head_bytes < 64, "beside AdamW's two moments only counters and settings"


def test_the_three_loops_do_the_same_work(script, capsys):
    overhead = script("overhead")
    results = overhead.main(["--quick"])["convnet"]
    by_hand = results[overhead.BY_HAND].step_flops
    assert all(result.step_flops == pytest.approx(by_hand, rel=0.01) for result in results.values())
    printed = capsys.readouterr().out
    assert all(name in printed for name in results)


def test_ten_epochs_on_stored_features_take_one_pass_of_the_extractor(script, capsys):
    features = script("features")
    results = features.main(["--quick"])
    online, stored = (results[f"head, {way}"] for way in ("online", "stored"))
    assert stored.flops < online.flops / 8
    assert results["last stage and head, stored"].flops < results["last stage and head, online"].flops
    assert stored.bytes == 128 * 128 * 4
    assert online.bytes == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in results)


def test_a_population_shares_the_backbone(script):
    population = script("population")
    one, eight = population.flops_of_heads("convnet", 8)
    assert one < eight < 1.1 * one


@pytest.mark.slow
def test_a_population_is_timed_beside_loops_of_single_runs(script, capsys):
    population = script("population")
    (ratios,) = population.main(["--quick"]).values()
    assert {population.POPULATION, population.STEPS_BY_JXFER, population.SCANS} <= ratios.keys()
    assert "the FLOPs of one" in capsys.readouterr().out


def test_a_round_goes_once_through_all_calls_and_the_next_begins_one_later(script):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = script("timing").interleave(calls, rounds=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab", "once to compile, then the rounds"
    assert {name: values.shape for name, values in seconds.items()} == dict.fromkeys("abc", (3,))


def test_ratios_are_taken_within_rounds(script):
    load = np.array([1.0, 5.0, 2.0, 9.0])
    measured = script("timing").ratio(1.1 * load, load)
    assert (measured.low, measured.median, measured.high) == pytest.approx((1.1, 1.1, 1.1))


def test_solving_a_path_at_once_reaches_the_objective_of_scikit_learn(script, capsys):
    results = script("solvers").main(["--quick", "--strengths", "6"])
    assert {setting.head for setting in results} == {"logistic", "ridge"}
    assert all(result.excess < 1e-4 for result in results.values())
    assert "| logistic | 400 × 16, 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "layouts"),
    [
        ("convnet", {"data", "fsdp"}),
        pytest.param("vit_ti_16", {"tensor", "tensor+fsdp", "fsdp"}, marks=pytest.mark.slow),
    ],
)
def test_devices_exchange_what_the_partition_predicts_and_share_the_operations(script, capsys, model, layouts):
    rows = script("sharding").main(["--quick", "--model", model])
    assert "On paper, not measured" in capsys.readouterr().out
    ways = ("full fine-tuning", "last stage + head", "head")
    assert {(row.way, row.layout) for row in rows if row.devices == 8} == {
        (way, each) for way in ways for each in layouts
    }
    for row in rows:
        reduced, gathered = (row.collectives.get(kind, 0) for kind in ("all-reduce", "all-gather"))
        predicted, sharded = (row.predicted.get(kind, 0) for kind in ("all-reduce", "all-gather"))
        if row.devices == 1:
            assert (row.collectives, row.predicted) == ({}, {})
            continue
        assert predicted <= reduced <= 1.01 * (predicted + row.apart) + 2048, row
        assert sharded <= gathered <= 1.02 * sharded, row
        whole = 0.4 if "tensor" in row.layout else 0.1  # norms and residuals, of which so small a network has many
        assert row.predicted_flops < row.flops < (1 + whole) * row.predicted_flops, row


def test_bytes_of_collectives_are_read_off_the_program(script):
    program = """
      %all-reduce.1 = (f32[2,3]{1,0}, bf16[4]{0}) all-reduce(f32[2,3] %a, bf16[4] %b), channel_id=1
      %ag = f32[8,2]{1,0} all-gather(f32[1,2]{1,0} %c), dimensions={0}
      %add = f32[100]{0} add(%d, %all-reduce.1)
    """
    assert script("sharding").collective_bytes(program) == {"all-reduce": 32, "all-gather": 64}


def test_a_delta_of_a_probe_is_a_small_part_of_the_whole(script, capsys):
    _, part = script("checkpoints").main(["--quick"])
    assert part < 0.1, "of a small network, whose index files weigh"
    assert "a checkpoint every 50 steps" in capsys.readouterr().out
