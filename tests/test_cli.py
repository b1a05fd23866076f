import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from jxfer import ablate, cli, plan, report, session
from jxfer.cli import main
from jxfer.report.comparisons import Comparisons
from jxfer.typing import InputError, InterruptedRun

TRIAL = '''"""A trial."""
from jxfer import methods
from jxfer.config import Experiment, ModelConfig, SourceConfig, TrainConfig

train = TrainConfig(num_steps=4, batch_size=16, eval_every=2, log_every=2, checkpoint_every=1)
experiment = Experiment(
    name="trial",
    source=SourceConfig(train=train),
    train=train,
    methods=(methods.scratch, methods.linear_probe),
    shots=(1,),
    seeds=1,
)
'''


def row(method="scratch", *, status="ok", error=None):
    return {
        "method": method,
        "shots": 1,
        "seed": 0,
        "status": status,
        "error": error,
        "metrics": {"accuracy": 0.5} if status == "ok" else None,
        "steps": 4,
        "seconds": 1.0,
    }


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """The folder of an experiment, as the current directory, with a jax that is left as it was."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trial.py").write_text(TRIAL)
    monkeypatch.setattr(session, "prepare_jax", lambda: None)
    return tmp_path


@pytest.fixture
def calls(trial, monkeypatch):
    """What `ablate` was called with; it trains nothing and returns the rows put into `calls.rows`."""
    seen = []

    def fake(experiment, directory, session, *, command):
        seen.append((experiment, directory, session, command))
        return [row()]

    monkeypatch.setattr(ablate, "ablate", fake)
    monkeypatch.setattr(report, "build", lambda directory: Comparisons({}))
    return seen


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(args, capsys):
    assert main(args) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_help_of_a_command_lists_its_options(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"--{option.replace('_', '-')} " in out for option in cli.COMMANDS[name].options)
    assert ("--train.learning_rate a number (0.001)" in out) == cli.COMMANDS[name].takes_settings


def test_the_version_names_what_it_runs_on(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"jxfer 0.1.0, jax {jax.__version__}, Python 3")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ablat"], "unknown command `ablat`; nearest: `ablate`"),
        (["ablate"], "no EXPERIMENT given; usage: jxfer ablate EXPERIMENT"),
        (["ablate", "trial.py", "more"], "unexpected argument `more`"),
        (["ablate", "trail.py"], "no experiment `trail.py`"),
        (["ablate", "trial.py", "--metods", "A"], "unknown option `--metods`; nearest: `--methods`"),
        (["ablate", "trial.py", "--train.num_step", "3"], "nearest: `--train.num_steps`"),
        (["ablate", "trial.py", "--train.num_steps", "0"], "train.num_steps is 0; it must be at least 1"),
        (["ablate", "trial.py", "--methods", "scratch,lp_tf"], "unknown method `lp_tf`; nearest: `lp_ft`"),
        (["ablate", "trial.py", "--shots"], "`--shots` needs a value"),
        (["run", "trial.py"], "`jxfer run` needs `--method NAME`"),
        (["run", "trial.py", "--method", "scratch", "--shots", "1,2"], "has several shots (1, 2); choose"),
        (["run", "trial.py", "--method", "scratch", "--seed", "x"], "--seed takes a whole number, 0 or more, not `x`"),
        (["run", "trial.py", "--method", "scratch", "--seed="], "--seed takes a whole number, 0 or more, not ``"),
        (
            ["run", "trial.py", "--method", "scratch", "--profile=0"],
            "--profile takes a whole number, 1 or more",
        ),
        (["plan", "trial.py", "--jsn"], "unknown option `--jsn`; nearest: `--json`"),
        (["plan", "trial.py", "--method", "scrach"], "unknown method `scrach`; nearest: `scratch`"),
        (["report", "nowhere"], "no directory `nowhere`"),
        (["report", "."], "no finished runs in ."),
        (["list", "model"], "unknown list `model`; nearest: `models`"),
        (["features"], "unknown command `features`; nearest: `features rm`, `features list`"),
        (["features", "lst"], "unknown command `features lst`; nearest: `features list`"),
        (["features", "list", "all"], "unexpected argument `all`; usage: jxfer features list [OPTIONS]"),
        (["features", "rm"], "name the KEY... to remove, as `jxfer features list` shows them, or give --all"),
        (["features", "rm", "0123", "--all"], "or give --all, not both"),
        (["features", "rm", "--al"], "unknown option `--al`; nearest: `--all`"),
        (["features", "check", "trail.py"], "no experiment `trail.py`"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_status_2(trial, args, message, capsys):
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jxfer: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert [file.name for file in trial.iterdir()] == ["trial.py"]


def test_an_experiment_without_methods_says_how_to_name_some(trial, capsys):
    (trial / "bare.py").write_text("from jxfer.config import Experiment\nexperiment = Experiment('bare')\n")
    assert main(["ablate", "bare.py"]) == 2
    assert "`bare` has no methods" in capsys.readouterr().err


def test_the_options_of_ablate_reach_it(calls, capsys):
    args = ["ablate", "trial.py", "--methods", "fine_tuning, scratch", "--shots", "1,none", "--seeds", "3"]
    assert main([*args, "--train.learning_rate=0.5", "--out", "there"]) == 0
    experiment, directory, _, command = calls[0]
    assert [method.name for method in experiment.methods] == ["fine_tuning", "scratch"]
    assert (experiment.shots, experiment.seeds, experiment.train.learning_rate) == ((1, None), 3, 0.5)
    assert directory == Path("there")
    assert command.startswith("jxfer ablate trial.py --methods 'fine_tuning, scratch' --shots 1,none")
    out = capsys.readouterr().out
    assert "Method" in out
    assert out.endswith("open there/report.html\n")


def test_results_go_to_a_folder_of_the_experiment_by_default(calls):
    assert main(["ablate", "trial.py"]) == 0
    assert calls[0][1] == Path("out/trial")


def test_failed_runs_are_listed_and_give_status_3(calls, monkeypatch, capsys):
    rows = [row(), row("lp_ft", status="failed", error="loss is nan at step 3")]
    monkeypatch.setattr(ablate, "ablate", lambda *args, **kwargs: rows)
    assert main(["ablate", "trial.py"]) == 3
    err = capsys.readouterr().err
    assert err == "jxfer: 1 of 2 runs failed:\n  lp_ft · 1 shots · seed 0: loss is nan at step 3\n"


def test_an_ablation_of_which_all_runs_failed_still_has_its_report(trial, monkeypatch, capsys):
    rows = [row(name, status="failed", error="loss is nan at step 3") for name in ("scratch", "lp_ft")]

    def fail(experiment, directory, session, *, command):
        directory.mkdir(parents=True)
        (directory / "results.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
        return rows

    monkeypatch.setattr(ablate, "ablate", fail)
    assert main(["ablate", "trial.py"]) == 3
    out, err = capsys.readouterr()
    assert out.endswith("open out/trial/report.html\n")
    assert "No run finished: 2 of 2 failed." in (trial / "out" / "trial" / "report.md").read_text()
    assert err.startswith("jxfer: 2 of 2 runs failed:\n  scratch · 1 shots · seed 0: loss is nan at step 3\n")


def test_the_options_of_run_reach_it(trial, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(ablate, "run_one", lambda *args, **kwargs: seen.append(args) or row())
    assert main(["run", "trial.py", "--method", "lp_ft", "--shots", "none", "--seed", "4"]) == 0
    experiment, *rest = seen[0][:5]
    assert [experiment.name, *rest] == ["trial", "lp_ft", None, 4, Path("out/trial")]
    assert (
        capsys.readouterr().out == "scratch · 1 shots · seed 0: accuracy 0.5 on the test split, after 4 steps in 1 s\n"
    )


@pytest.mark.parametrize(("args", "steps"), [([], None), (["--profile"], 10), (["--profile", "3"], 3)])
def test_profile_takes_a_number_or_does_without(trial, monkeypatch, capsys, args, steps):
    seen = []
    monkeypatch.setattr(ablate, "run_one", lambda *args, **kwargs: seen.append(args[-1]) or row())
    assert main(["run", "--method", "scratch", *args, "trial.py"]) == 0
    assert seen[0].trace_steps == steps
    assert ("nothing was traced" in capsys.readouterr().err) == bool(args), "run_one did nothing"


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (InputError("no such thing"), 2, "jxfer: error: no such thing\n"),
        (InterruptedRun("stopped after step 3"), 75, "jxfer: stopped after step 3; run the same command again"),
        (KeyboardInterrupt(), 130, "jxfer: stopped at once"),
    ],
)
def test_each_end_has_its_exit_status(calls, monkeypatch, capsys, error, status, text):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(ablate, "ablate", fail)
    assert main(["ablate", "trial.py"]) == status
    assert capsys.readouterr().err.startswith(text)


def test_a_bug_keeps_its_traceback(calls, monkeypatch):
    monkeypatch.setattr(ablate, "ablate", lambda *args, **kwargs: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["ablate", "trial.py"])


def test_signals_ask_the_loop_to_stop_and_the_second_interrupt_insists():
    before = signal.getsignal(signal.SIGTERM)
    with session.stop_signals() as signals:
        assert not signals.arrived()
        signal.raise_signal(signal.SIGTERM)
        assert signals.arrived()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_comes_where_nothing_can_be_raised_still_ends_what_it_may_end_at_once(monkeypatch):
    class Collected:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def sleep():
        with session.stopped_at_once("it slept"):
            Collected()
            time.sleep(30)

    monkeypatch.setattr(sys, "unraisablehook", session._print_unless_known)
    began = time.monotonic()
    with pytest.raises(InterruptedRun, match="stopped while it slept"):
        sleep()
    assert time.monotonic() - began < 10


def test_the_compilation_cache_is_ours_unless_the_user_has_one(monkeypatch, tmp_path):
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    monkeypatch.setenv("JXFER_CACHE", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "theirs")
    session.prepare_jax()
    assert updates == {}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    session.prepare_jax()
    assert updates["jax_compilation_cache_dir"] == str(tmp_path / "xla")


@pytest.mark.parametrize("what", cli.LISTS_OF)
def test_a_list_names_what_there_is(trial, what, capsys):
    (trial / "experiments").mkdir()
    (trial / "experiments" / "one.py").write_text(TRIAL)
    assert main(["list", what]) == 0
    line = {
        "models": "convnet",
        "datasets": "tfds:jxfer_digits",
        "methods": "scratch                train from random weights: the baseline to beat",
        "experiments": "experiments/one.py  A trial.",
    }[what]
    assert line in capsys.readouterr().out.splitlines()


def test_without_a_name_list_prints_all_of_them(trial, capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [f"{what}:" for what in cli.LISTS_OF]


def test_a_plan_is_one_object_with_a_method_and_a_list_without(trial, monkeypatch, capsys):
    class Plan:
        def __init__(self, name):
            self.name = name

        def to_json(self):
            return {"method": self.name, "phases": []}

        def __str__(self):
            return f"plan of {self.name}"

    monkeypatch.setattr(plan, "plan_experiment", lambda experiment, method: Plan(method.name))
    assert main(["plan", "trial.py"]) == 0
    assert capsys.readouterr().out == "plan of scratch\n\nplan of linear_probe\n"
    assert main(["plan", "trial.py", "--json"]) == 0
    assert [item["method"] for item in json.loads(capsys.readouterr().out)] == ["scratch", "linear_probe"]
    assert main(["plan", "trial.py", "--json", "--method", "lp_ft"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "lp_ft"


def command(*args: str, **options):
    """Starts the command as a process of its own, on one device."""
    code = "import sys; from jxfer.cli import main; sys.exit(main())"
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", code, *args], env=environment, text=True, **options)


def test_a_reader_that_leaves_early_is_no_error(trial):
    with command("plan", "--help", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait() == 141
        assert process.stderr.read() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_the_report_is_built_ends_with_its_status_too(number, trial, calls, monkeypatch, capsys):
    before = signal.getsignal(number)
    monkeypatch.setattr(report, "build", lambda directory: signal.raise_signal(number))
    assert main(["ablate", "trial.py"]) == 75
    assert capsys.readouterr().err == (
        "jxfer: stopped while the report was being built; run the same command again to continue\n"
    )
    assert signal.getsignal(number) is before


def test_an_ablation_stops_on_sigterm_continues_and_then_has_nothing_to_do(trial, capsys, sketched):
    args = ["ablate", "trial.py", "--methods", "scratch", "--train.num_steps", "200"]
    args += ["--train.checkpoint_every", "50", "--train.eval_every", "100"]
    checkpoints = trial / "out" / "trial" / "runs" / "scratch-shots1-seed0" / "checkpoints"
    with command(*args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while not any(checkpoints.glob("**/*50*")) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 75, err
    assert "run the same command again to continue" in err
    with command(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.endswith("open out/trial/report.html\n")
    results = (trial / "out" / "trial" / "results.jsonl").read_text()
    assert json.loads(results)["steps"] == 200
    assert main(args) == 0
    assert (trial / "out" / "trial" / "results.jsonl").read_text() == results
    assert capsys.readouterr().err == "1/1 runs\n"
