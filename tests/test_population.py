"""Tests of populations: each variant ends as it would alone, whatever becomes of the others."""

import dataclasses

import numpy as np
import optax
import pytest
import runs
from flax import nnx

from jxfer import checkpoint, methods, plan, population, search
from jxfer.config import Experiment, Method, Phase, SearchConfig
from jxfer.partition import Partition
from jxfer.run import run
from jxfer.search import Job
from jxfer.state import init_population, member, pick
from jxfer.surgery.head import MLPHead, NewHead
from jxfer.task import Task
from jxfer.typing import InterruptedRun
from jxfer.variants import parts_of, variants

RATES = (1e-3, 1e-2, 3e-2)
SOFT = SearchConfig(learning_rate=RATES, label_smoothing=(0.0, 0.2))
STEPS = 6

# Nothing but matrices train, so that these variants can train together while the stages before them run online.
norms = Method(
    "norms",
    rules=(("head/**", "head"), ("**/bn/**", "norm"), ("**", "frozen")),
    surgeries=(NewHead(),),
    phases=(Phase("probe", ("head",), share=0.5), Phase("tune", ("head", "norm"), share=0.5)),
)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    experiment = runs.write_data(tmp_path_factory.mktemp("data"))
    return runs.with_train(experiment, num_steps=STEPS, eval_every=3)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    runs.add_models(monkeypatch)
    runs.use_devices(monkeypatch, 1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        runs.add_models(monkeypatch)
        return runs.write_source(tmp_path_factory.mktemp("source") / "run", "tiny_convnet")


def finish(experiment, method, directory, source, session=runs.QUIET):
    row = run(Job(experiment, method, 3, 0), directory, session, source=source)
    assert row["error"] is None, row["error"]
    return row, checkpoint.load_arrays(directory / "checkpoints" / "final")[0]


def searching(experiment: Experiment, search: SearchConfig, **settings) -> Experiment:
    return dataclasses.replace(experiment, search=search, **settings)


def metrics_by_variant(row) -> dict[str, dict[str, float]]:
    return {variant["variant"]: variant.get("validation_metrics") for variant in row["variants"]}


@pytest.mark.parametrize(
    ("method", "features"),
    [
        (methods.linear_probe, "off"),
        (methods.feature_retraining, "auto"),
        pytest.param(norms, "auto", marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_each_variant_ends_as_it_would_alone(experiment, source, tmp_path, method, features):
    experiment = runs.with_train(experiment, optimizer="sgd")  # Adam's first updates blow rounding up
    search = SearchConfig(learning_rate=(0.01, 0.1), label_smoothing=SOFT.label_smoothing)
    together = searching(experiment, search, features=features)
    row, arrays = finish(together, method, tmp_path / "together", source)
    apart = searching(experiment, dataclasses.replace(search, population=1), features=features)
    alone, expected = finish(apart, method, tmp_path / "apart", source)
    assert max(row["population"][0]["parts"]) == 4
    assert {part for phase in alone["population"] for part in phase["parts"]} == {1}
    assert row["variant"] == alone["variant"]
    for name, metrics in metrics_by_variant(alone).items():
        # float32 through six steps and batch norms: some hundred roundings on top of one another
        assert metrics_by_variant(row)[name] == pytest.approx(metrics, rel=1e-4), name
    for path, value in expected.items():
        np.testing.assert_allclose(arrays[path], value, rtol=1e-4, atol=1e-4, err_msg=path)  # some gradients vanish


def test_the_weights_of_a_penalty_and_the_seeds_of_heads_are_numbers_too(experiment, source, tmp_path):
    method = dataclasses.replace(
        norms, name="pulled", penalties=methods.l2_sp.penalties, surgeries=(MLPHead(),), phases=norms.phases[1:]
    )
    method = dataclasses.replace(method, phases=(dataclasses.replace(method.phases[0], share=1.0),))
    search = SearchConfig(penalty_weight=(0.0, 10.0), head_seed=(0, 5))
    row, _ = finish(searching(experiment, search), method, tmp_path / "together", source)
    alone, _ = finish(
        searching(experiment, dataclasses.replace(search, population=1)), method, tmp_path / "apart", source
    )
    losses = {name: metrics["loss"] for name, metrics in metrics_by_variant(row).items()}
    assert len(set(losses.values())) == 4, "each number makes a difference"
    for name, metrics in metrics_by_variant(alone).items():
        assert losses[name] == pytest.approx(metrics["loss"], rel=1e-4)


def test_a_variant_that_diverges_is_put_aside_and_the_others_go_on(experiment, source, tmp_path):
    rates = (1e-3, 1e38, 1e-2)
    search = SearchConfig(learning_rate=rates)
    settings = dataclasses.replace(experiment.train, optimizer="sgd", eval_every=2)
    row, _ = finish(searching(experiment, search, train=settings), methods.linear_probe, tmp_path / "a", source)
    (failed,) = [variant for variant in row["variants"] if "error" in variant]
    assert failed["variant"] == "learning_rate=1e+38"
    assert "at step" in failed["error"]
    fine = searching(experiment, SearchConfig(learning_rate=(1e-3, 1e-2)), train=settings)
    expected, _ = finish(fine, methods.linear_probe, tmp_path / "b", source)
    for name, metrics in metrics_by_variant(expected).items():
        assert metrics_by_variant(row)[name] == pytest.approx(metrics, rel=1e-6), name


def test_a_run_of_which_no_variant_is_left_fails(experiment, source, tmp_path):
    settings = dataclasses.replace(experiment.train, optimizer="sgd")
    search = SearchConfig(learning_rate=(1e38, 2e38))
    job = Job(searching(experiment, search, train=settings), methods.linear_probe, 3, 0)
    row = run(job, tmp_path, runs.QUIET, source=source)
    assert row["status"] == "failed"
    assert "at step" in row["error"]


def test_models_are_put_together_for_those_who_need_them(experiment, source, tmp_path, monkeypatch):
    made = []

    def put_together(planned, *parts):
        made.append(planned.phase.name)
        return real(planned, *parts)

    real = search._put_together
    monkeypatch.setattr(search, "_put_together", put_together)
    finish(searching(experiment, SearchConfig(learning_rate=RATES)), norms, tmp_path, source)
    assert made == ["probe"] * 3 + ["tune"], "the next phase begins from all, and one is chosen in the end"


@pytest.mark.parametrize("rates", [(), RATES], ids=["alone", "together"])
def test_a_frozen_array_that_a_phase_hands_on_changed_fails_the_run(experiment, source, tmp_path, monkeypatch, rates):
    real = search._advance

    def leaking(candidate, planned, result):
        stem = candidate.lazy.apart[1]["stem/conv/kernel"]
        return real(
            candidate, planned, dataclasses.replace(result, arrays={**result.arrays, "stem/conv/kernel": -stem})
        )

    monkeypatch.setattr(search, "_advance", leaking)
    job = Job(searching(experiment, SearchConfig(learning_rate=rates)), methods.linear_probe, 3, 0)
    row = run(job, tmp_path, runs.QUIET, source=source)
    assert row["status"] == "failed"
    assert row["error"] == "audit after phase `probe`: frozen but changed or not deterministic: stem/conv/kernel"


def test_a_population_in_parts_gives_what_it_gives_whole(experiment, source, tmp_path):
    whole, _ = finish(searching(experiment, SOFT), methods.linear_probe, tmp_path / "whole", source)
    split = dataclasses.replace(SOFT, population=4)
    row, _ = finish(searching(experiment, split), methods.linear_probe, tmp_path / "split", source)
    assert row["population"][0]["parts"] == [3, 3]
    for name, metrics in metrics_by_variant(whole).items():
        assert metrics_by_variant(row)[name] == pytest.approx(metrics, rel=1e-5), name


@pytest.mark.parametrize("features", ["auto", "off"])
def test_devices_share_a_population(experiment, source, tmp_path, monkeypatch, features):
    search = SearchConfig(learning_rate=RATES)
    one, _ = finish(searching(experiment, search, features=features), methods.linear_probe, tmp_path / "one", source)
    runs.use_devices(monkeypatch, 4)
    placed, place = [], population.place_population

    def spy(*args, **kwargs):
        placed.append(place(*args, **kwargs))
        return placed[-1]

    monkeypatch.setattr(population, "place_population", spy)
    row, _ = finish(searching(experiment, search, features=features), methods.linear_probe, tmp_path / "four", source)
    shards = placed[0][0].state.params["head/kernel"].sharding.shard_shape((4, 8, 3))
    assert shards == ((1, 8, 3) if features == "auto" else (4, 8, 3)), (
        "one variant each, or all and a part of the batch"
    )
    for name, metrics in metrics_by_variant(one).items():
        assert metrics_by_variant(row)[name] == pytest.approx(metrics, rel=1e-5), name


def test_a_stopped_population_continues_to_the_same_bits(experiment, source, tmp_path):
    settings = dataclasses.replace(experiment.train, eval_every=2, checkpoint_every=2)
    saving = searching(experiment, SOFT, train=settings)
    expected_row, expected = finish(saving, methods.feature_retraining, tmp_path / "whole", source)
    for num_calls in (3, 2):
        with pytest.raises(InterruptedRun):
            finish(saving, methods.feature_retraining, tmp_path / "stopped", source, runs.stop_after(num_calls))
    row, arrays = finish(saving, methods.feature_retraining, tmp_path / "stopped", source)
    changing = ("seconds", "features")
    assert {k: v for k, v in row.items() if k not in changing} == {
        k: v for k, v in expected_row.items() if k not in changing
    }
    for path, value in expected.items():
        assert arrays[path].tobytes() == value.tobytes(), path
    assert (tmp_path / "stopped" / "metrics.jsonl").read_text().count("validation") == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_text().count("validation")


def test_variants_start_from_their_own_models_and_one_program_picks_any_of_them():
    models = [nnx.Linear(2, 3, rngs=nnx.Rngs(seed)) for seed in (0, 1)]
    partition = Partition.of(models[0], [("**", "head")])
    population, _ = init_population([models[index] for index in (1, 0, 1)], partition, optax.adam(0.1))
    pick.clear_cache()
    for variant, index in enumerate((1, 0, 1)):
        one = member(population, variant)
        np.testing.assert_array_equal(one.params["kernel"], models[index].kernel[...])
        assert one.opt_state[0].count.shape == ()
    assert pick._cache_size() == 1


def test_plans_say_which_variants_train_together_and_why_not(experiment):
    experiment = searching(experiment, SOFT)
    task = Task(runs.SOURCE_CLASSES, runs.TARGET_CLASSES, (8, 8, 1))
    (probe,) = plan.plan_method(experiment, methods.linear_probe, task).populations
    assert probe.parts == (6,)
    assert probe.bytes_each > 0
    (full,) = plan.plan_method(experiment, methods.fine_tuning, task).populations
    assert full.parts == (1,) * 6
    assert "most parameters train" in full.why
    text = str(plan.plan_method(experiment, methods.partial, task))
    assert "convolutions such as" in text
    assert "6, one after the other" in text


def test_a_plan_says_how_a_population_too_large_for_the_device_is_split(experiment, monkeypatch):
    experiment = searching(experiment, SOFT)
    task = Task(runs.SOURCE_CLASSES, runs.TARGET_CLASSES, (8, 8, 1))
    (whole,) = plan.plan_method(experiment, methods.linear_probe, task).populations
    memory = 4 * whole.bytes_each
    monkeypatch.setattr(plan, "device_memory", lambda: memory)
    planned = plan.plan_method(experiment, methods.linear_probe, task)
    assert planned.populations[0].parts == (3, 3)
    said = f"2 populations, one after the other: a variant takes {whole.bytes_each:,} bytes and {memory:,} bytes may be"
    assert said in str(planned)


def test_variants_that_differ_in_what_is_frozen_train_apart(experiment):
    twice = dataclasses.replace(
        norms, phases=(Phase("first", ("norm",), share=0.5), Phase("second", ("head",), share=0.5))
    )
    task = Task(runs.SOURCE_CLASSES, runs.TARGET_CLASSES, (8, 8, 1))
    first, second = plan.plan_method(searching(experiment, SOFT), twice, task).populations
    assert first.parts == (6,)
    assert second.parts == (1,) * 6
    assert "differ in what is frozen now" in second.why


@pytest.mark.parametrize(
    ("memory", "most", "expected"),
    [(None, None, (7,)), (30, None, (3, 2, 2)), (None, 2, (2, 2, 2, 1)), (1, None, (1,) * 7), (1000, 7, (7,))],
)
def test_a_population_is_split_into_even_parts_that_fit(memory, most, expected):
    assert parts_of(7, bytes_each=10, memory=memory, most=most) == expected


def test_a_random_search_draws_the_same_settings_for_every_method_within_its_budget(experiment):
    search = SearchConfig(learning_rate=(1e-4, 1e-1), weight_decay=(0.0, 0.1), samples=12)
    drawn = variants(searching(experiment, search), methods.linear_probe)
    assert len(drawn) == 12
    others = variants(searching(experiment, search), methods.fine_tuning)
    assert [variant.train for variant in drawn] == [variant.train for variant in others]
    rates = np.array([variant.train.learning_rate for variant in drawn])
    assert np.all((rates > 1e-4) & (rates < 1e-1))
    assert np.sum(rates < 10**-2.5) in range(2, 11), "log-uniform: half of them below the geometric mean"
    only_rates = dataclasses.replace(search, weight_decay=())
    alone = variants(searching(experiment, only_rates), methods.linear_probe)
    assert [v.train.learning_rate for v in alone] == list(rates), "what else is searched changes nothing"
