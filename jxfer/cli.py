"""The commands, and nothing else: from a command line to an exit status."""

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jxfer import __version__
from jxfer.commands import Arguments, Command, help_of, overview, print_table, title_of, whole_number

if TYPE_CHECKING:
    from jxfer.config import Experiment

# What imports jax is imported inside functions, so that `jxfer --help` does not wait for it.

DONE, BAD_INPUT, RUN_FAILED, INTERRUPTED, KILLED, BROKEN_PIPE = 0, 2, 3, 75, 130, 141
"""Exit statuses. An exception that is none of jxfer's own is a bug: it keeps its traceback and exits with 1."""

SWITCHES = ("help", "json", "stablehlo", "all")
"""Options without a value."""

NUMBERED = {"profile": "10"}
"""Options that may do without their number, and what it then is."""

LISTS_OF = ("models", "datasets", "methods", "experiments")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    try:
        status = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit fails again
        return BROKEN_PIPE
    except (Exception, KeyboardInterrupt) as error:
        if (known := _explain(error)) is None:
            raise
        status, line = known
        print(line, file=sys.stderr)
        return status


def ablate(args: Arguments) -> int:
    """Trains the grid of an experiment, prints its table and builds its report."""
    from jxfer import ablate, distributed, report
    from jxfer.session import open_session, stopped_at_once

    experiment = _experiment(args)
    directory = _directory(args, experiment)
    with open_session() as session:
        results = ablate.ablate(experiment, directory, session, command=args.line)
    if distributed.is_main():
        with stopped_at_once("the report was being built"):
            comparisons = report.build(directory)
        print_table(report.summary_table(results, comparisons))
        print(f"open {directory / 'report.html'}")
    return _report_failures(results)


def run(args: Arguments) -> int:
    """Trains one cell of the grid."""
    from jxfer import ablate, distributed
    from jxfer.session import open_session
    from jxfer.typing import InputError

    if "method" not in args.options:
        raise InputError("`jxfer run` needs `--method NAME`; `jxfer list methods` lists them")
    experiment = _experiment(args)
    directory = _directory(args, experiment)
    cell = (args.options["method"], _shots(experiment), whole_number(args, "seed", default=0))
    steps = whole_number(args, "profile", default=0, least=1) if "profile" in args.options else None
    traces = set(directory.glob(_TRACES))
    with open_session() as session:
        session = dataclasses.replace(session, trace_steps=steps)
        row = ablate.run_one(experiment, *cell, directory, session, command=args.line)
        if steps and set(directory.glob(_TRACES)) == traces:
            session.note("nothing was traced: the run was done before, or takes no steps; --out gives it another place")
    if row["status"] == "ok" and distributed.is_main():
        values = ", ".join(f"{name} {value:.4g}" for name, value in row["metrics"].items())
        print(f"{title_of(row)}: {values} on the test split, after {row['steps']} steps in {row['seconds']:.0f} s")
    return _report_failures([row])


def plan(args: Arguments) -> int:
    """Says what would train and what it would cost."""
    from jxfer.plan import plan_experiment

    experiment = _experiment(args)
    plans = [plan_experiment(experiment, method) for method in experiment.methods]
    if "json" in args.options:
        objects = [plan.to_json() for plan in plans]
        print(json.dumps(objects[0] if "method" in args.options else objects, indent=2))
    else:
        print("\n\n".join(map(str, plans)))
    return DONE


def report(args: Arguments) -> int:
    """Rebuilds tables, figures and page from the results in a directory."""
    from jxfer import report
    from jxfer.typing import InputError

    directory = Path(args.operands[0])
    if not directory.is_dir():
        raise InputError(f"no directory `{directory}`; give the `--out` of an ablation")
    report.build(directory)
    print(f"open {directory / 'report.html'}")
    return DONE


def predict(args: Arguments) -> int:
    """Says what a finished run takes files, folders or lines of text for."""
    from jxfer.predict import predict, print_json, print_table
    from jxfer.source import load_run

    directory, *inputs = args.operands
    _prepare_jax()
    run = load_run(Path(directory))
    show = print_json if "json" in args.options else print_table
    if failed := show(predict(run, inputs), run.classes):
        print(f"jxfer: inputs that could not be read: {failed}", file=sys.stderr)
    return BAD_INPUT if failed else DONE


def export(args: Arguments) -> int:
    """Writes a finished run for others to read."""
    from jxfer.directory import reporting
    from jxfer.export import export
    from jxfer.source import load_run

    _prepare_jax()
    run, folder = load_run(Path(args.operands[0])), Path(args.operands[1])
    with reporting(folder):
        files = export(run, folder, names=args.options.get("names"), stablehlo="stablehlo" in args.options)
    for file in files:
        print(f"{file}  {file.stat().st_size:,} bytes")
    return DONE


def list_names(args: Arguments) -> int:
    """Lists what can be named in an experiment or on the command line."""
    from jxfer import data, methods, models, overrides, paths

    for kind in args.operands or LISTS_OF:
        if kind not in LISTS_OF:
            raise paths.unknown("list", kind, LISTS_OF)
        found: dict[str, str] = {
            "models": lambda: dict.fromkeys(models.names(), ""),
            "datasets": lambda: dict.fromkeys(data.names(), ""),
            "methods": lambda: {name: method.summary for name, method in methods.METHODS.items()},
            "experiments": overrides.experiments,
        }[kind]()
        if not args.operands:
            print(f"{kind}:")
        width = max(map(len, found), default=0)
        for name, summary in found.items():
            print(f"{'' if args.operands else '  '}{name:{width}}  {summary}".rstrip())
    return DONE


def features_list(args: Arguments) -> int:
    """Lists what is stored, and the limit."""
    from jxfer import stored

    del args
    if table := stored.table():
        print_table(table)
    print(stored.summary())
    return DONE


def features_rm(args: Arguments) -> int:
    """Removes what is stored under some keys, or all."""
    from jxfer import stored

    for known in stored.pick(args.operands, every="all" in args.options):
        stored.remove(known)
        print(f"removed {known.key}: {known.num_bytes / 1e6:,.1f} MB")
    return DONE


def features_check(args: Arguments) -> int:
    """Compares training on stored features with training online."""
    from jxfer.equivalence import compare
    from jxfer.session import open_session

    experiment, failed = _experiment(args), False
    with open_session() as session:
        for comparison in compare(experiment, session):
            print(comparison)
            failed |= not comparison.ok
    return RUN_FAILED if failed else DONE


_TRACES = "runs/*/profile/*"

_OUT = {"out": "DIR       where results are kept (out/NAME); the same DIR again continues, several at once share"}

_PROCESSES = {
    "coordinator": "HOST:PORT where process 0 of several listens (JXFER_COORDINATOR); clusters say so themselves",
    "num_processes": "N         how many processes train as one (JXFER_NUM_PROCESSES); 1: this one works alone",
    "process_id": "I         which of them this is, from 0 (JXFER_PROCESS_ID)",
}

COMMANDS = {
    "ablate": Command(
        ablate,
        "EXPERIMENT",
        "train every method, number of shots and seed of an experiment, and report",
        _OUT | {"methods": "A,B       these methods instead of the experiment's own"} | _PROCESSES,
        joins=True,
    ),
    "run": Command(
        run,
        "EXPERIMENT",
        "train one method at one number of shots and one seed",
        _OUT
        | {
            "method": "NAME      which method",
            "seed": "N         which seed (0)",
            "profile": f"[STEPS]   write a trace of so many steps ({NUMBERED['profile']}) into the run's directory",
        }
        | _PROCESSES,
        joins=True,
    ),
    "plan": Command(
        plan,
        "EXPERIMENT",
        "say what would train and what it would cost, without training",
        {"method": "NAME      this method alone", "json": "          print JSON"},
    ),
    "report": Command(report, "DIR", "rebuild the tables, figures and page of an ablation"),
    "predict": Command(
        predict,
        "RUN INPUT...",
        "say what a finished run takes files and folders for (`-`: texts, one a line)",
        {"json": "          print a JSON object a line"},
    ),
    "export": Command(
        export,
        "RUN DIR",
        "write a finished run as safetensors under the field's names, with config and model card",
        {
            "names": "NAMES     whose names: torchvision, timm, transformers, jxfer, ...",
            "stablehlo": "          write the whole function too, for any batch size",
        },
    ),
    "list": Command(list_names, "[WHAT]", f"list what can be named: {', '.join(LISTS_OF)}"),
    "features list": Command(features_list, "", "list the stored features, the most recently used first"),
    "features rm": Command(features_rm, "[KEY...]", "remove stored features", {"all": "          all of them"}),
    "features check": Command(
        features_check,
        "EXPERIMENT",
        "train some steps on stored features and online, and compare",
        {"method": "NAME      this method alone"},
    ),
}


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview(COMMANDS))
        return DONE
    if argv[0] == "--version":
        print(_versions())
        return DONE
    # Read by XLA's logging when jax is imported: without it, every cached program that loads says so.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from jxfer import paths

    group = [name for name in COMMANDS if name.startswith(f"{argv[0]} ")]
    asked = bool({"-h", "--help"} & set(argv))
    name = " ".join(argv[:2]) if group else argv[0]
    if asked and name in (*COMMANDS, f"{argv[0]} -h", f"{argv[0]} --help"):
        print("\n\n".join(help_of(each, COMMANDS[each]) for each in ([name] if name in COMMANDS else group)))
        return DONE
    if name not in COMMANDS:
        raise paths.unknown("command", name, group or COMMANDS)
    command = COMMANDS[name]
    if not command.joins:
        return command.call(_arguments(name, argv, command))

    from jxfer import overrides, peers

    _, options = overrides.split_options(argv[1:], SWITCHES, NUMBERED)
    with peers.together(options, _explain):
        return command.call(_arguments(name, argv, command))


def _arguments(name: str, argv: list[str], command: Command) -> Arguments:
    from jxfer import overrides, paths
    from jxfer.typing import InputError

    fields = overrides.settings() if command.takes_settings else {}
    known = [f"--{name}" for name in (*command.options, *fields)]
    for option in (overrides.option_name(arg) for arg in argv if arg.startswith("--")):
        if f"--{option}" not in known:
            raise paths.unknown("option", f"--{option}", known)
    operands, options = overrides.split_options(argv[len(name.split()) :], SWITCHES, NUMBERED)
    if not command.least_operands <= len(operands) <= command.most_operands:
        surplus = len(operands) > command.most_operands
        words = command.operands.split()
        problem = (
            f"unexpected argument `{operands[int(command.most_operands)]}`"
            if surplus
            else f"no {words[min(len(operands), len(words) - 1)]} given"
        )
        raise InputError(f"{problem}; usage: {' '.join(['jxfer', name, command.operands]).strip()} [OPTIONS]")
    own = {option: value for option, value in options.items() if option in command.options}
    settings = tuple(f"--{option}={value}" for option, value in options.items() if option in fields)
    return Arguments(shlex.join(["jxfer", *argv]), tuple(operands), own, settings)


def _experiment(args: Arguments) -> "Experiment":
    """Returns the experiment of the command line, checked, and makes jax ready for it."""
    from jxfer import checks, overrides
    from jxfer.typing import InputError

    experiment = overrides.override(overrides.load_experiment(args.operands[0]), args.settings)
    experiment = _with_methods(experiment, args.options)
    checks.check(experiment)
    if not experiment.methods:
        raise InputError(f"experiment `{experiment.name}` has no methods; name some in its file or on the command line")
    _prepare_jax()
    return experiment


def _prepare_jax() -> None:
    from jxfer.session import prepare_jax

    prepare_jax()


def _with_methods(experiment: "Experiment", options: Mapping[str, str]) -> "Experiment":
    if "method" in options:
        names = [options["method"]]
    elif "methods" in options:
        names = [name.strip() for name in options["methods"].split(",")]
    else:
        return experiment

    from jxfer.ablate import pick_methods

    return dataclasses.replace(experiment, methods=pick_methods(experiment, names))


def _directory(args: Arguments, experiment: "Experiment") -> Path:
    from jxfer.ablate import default_directory

    return Path(args.options["out"]) if "out" in args.options else default_directory(experiment)


def _shots(experiment: "Experiment") -> int | None:
    from jxfer.typing import InputError

    if len(experiment.shots) > 1:
        shots = ", ".join("none" if shots is None else str(shots) for shots in experiment.shots)
        raise InputError(f"experiment `{experiment.name}` has several shots ({shots}); choose with `--shots K`")
    return experiment.shots[0]


def _report_failures(results: Sequence[Mapping[str, Any]]) -> int:
    from jxfer import distributed

    failed = [row for row in results if row["status"] == "failed"]
    if failed and distributed.is_main():
        print(f"jxfer: {len(failed)} of {len(results)} runs failed:", file=sys.stderr)
        for row in failed:
            print(f"  {title_of(row)}: {row['error']}", file=sys.stderr)
    return RUN_FAILED if failed else DONE


def _explain(error: BaseException) -> tuple[int, str] | None:
    """Returns exit status and line of what is no bug."""
    from jxfer.typing import InputError, InterruptedRun

    if isinstance(error, KeyboardInterrupt):
        return KILLED, "jxfer: stopped at once; the run that was under way continues from its last checkpoint"
    if isinstance(error, InterruptedRun):
        return INTERRUPTED, f"jxfer: {error}; run the same command again to continue"
    if isinstance(error, InputError):
        return BAD_INPUT, f"jxfer: error: {error}"
    return None


def _versions() -> str:
    import importlib.metadata
    import platform

    return f"jxfer {__version__}, jax {importlib.metadata.version('jax')}, Python {platform.python_version()}"
