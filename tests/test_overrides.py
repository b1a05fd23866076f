import dataclasses

import pytest

from jxfer import methods, overrides
from jxfer.config import Experiment, Method, SearchConfig, TrainConfig
from jxfer.overrides import load_experiment, override, settings, split_options
from jxfer.typing import InputError

EXPERIMENT = Experiment(name="trial", train=TrainConfig(num_steps=7), methods=(methods.scratch,))

FILE = '''"""A claim worth testing.

More of it.
"""
from jxfer.config import Experiment

experiment = Experiment(name="here")
'''


def replaced(config, path, value):
    name, *rest = path
    return dataclasses.replace(config, **{name: replaced(getattr(config, name), rest, value) if rest else value})


def test_a_numbered_switch_takes_the_number_that_follows():
    assert split_options(["--n", "3", "x"], numbered={"n": "7"}) == (["x"], {"n": "3"})
    assert split_options(["--n", "x"], numbered={"n": "7"}) == (["x"], {"n": "7"})
    assert split_options(["x", "--n"], numbered={"n": "7"}) == (["x"], {"n": "7"})
    assert split_options(["--n=4", "5"], numbered={"n": "7"}) == (["5"], {"n": "4"})


def test_a_file_gives_its_experiment_by_path_or_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "here.py").write_text(FILE)
    assert load_experiment("experiments/here.py") == Experiment(name="here") == load_experiment("here")
    assert overrides.experiments() == {"experiments/here.py": "A claim worth testing."}
    with pytest.raises(InputError, match=r"no experiment `hre`; nearest: `experiments/here.py`"):
        load_experiment("hre")


def test_a_file_may_define_its_own_dataclass_with_annotations_kept_as_text(tmp_path):
    file = tmp_path / "own.py"
    own = "from dataclasses import dataclass\n\n@dataclass(frozen=True)\nclass Own:\n    rate: float = 0.5\n"
    docstring, rest = FILE.split("\nfrom ")
    file.write_text(f"{docstring}\nfrom __future__ import annotations\n{own}\nfrom {rest}surgery = Own()\n")
    assert load_experiment(file) == Experiment(name="here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nexperiment = (\n", r"bad.py:2: SyntaxError: '\(' was never closed"),
        ("import no_such_module", "bad.py:1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def f():\n    return 1 / 0\n\nf()\n", "bad.py:2: ZeroDivisionError: division by zero"),
        ("from jxfer.config import *\n\nexperiment = Experiment()\n", "bad.py:3: TypeError: .*'name'"),
        ("import sys\n\nsys.exit(3)\n", "bad.py:3: SystemExit: 3"),
        ("x = 1", "bad.py defines no `experiment`"),
        ("experiment = 'trial'", "`experiment` in .*bad.py is a str, not an Experiment"),
    ],
)
def test_a_file_that_fails_is_one_line_with_its_place(tmp_path, text, message):
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_experiment(file)
    assert "\n" not in str(caught.value)


def test_options_are_told_from_operands():
    operands, options = split_options(["x.py", "--a.b-c", "-1", "--json", "--d=e=f", "y", "--d", "2"], ["json"])
    assert operands == ["x.py", "y"]
    assert options == {"a.b_c": "-1", "json": "", "d": "2"}


@pytest.mark.parametrize("args", [["--out"], ["--out", "--json"]])
def test_an_option_without_its_value_is_an_error(args):
    with pytest.raises(InputError, match="`--out` needs a value"):
        split_options(args, ["json"])


@pytest.mark.parametrize(
    ("args", "path", "value"),
    [
        (["--name", "other"], "name", "other"),
        (["--train.learning_rate", "3e-4"], "train.learning_rate", 3e-4),
        (["--train.learning-rate=3e-4"], "train.learning_rate", 3e-4),
        (["--train.clip_norm", "1.5"], "train.clip_norm", 1.5),
        (["--train.clip_norm", "none"], "train.clip_norm", None),
        (["--source.train.schedule", "linear"], "source.train.schedule", "linear"),
        (["--target.augment.flip", "true"], "target.augment.flip", True),
        (["--wandb", "False"], "wandb", False),
        (["--shots", "1,5"], "shots", (1, 5)),
        (["--shots", "5, none"], "shots", (5, None)),
        (["--seeds", "3"], "seeds", 3),
        (["--target.mean", ".1,.2,.3"], "target.mean", (0.1, 0.2, 0.3)),
        (["--search.learning_rate", "1e-3"], "search.learning_rate", (1e-3,)),
        (["--search.learning_rate", "none"], "search.learning_rate", ()),
        (["--source.weights", "run:out/x/source"], "source.weights", "run:out/x/source"),
        (
            ["--mesh.trainable", "head/**=None,model **=fsdp"],
            "mesh.trainable",
            (("head/**", "None,model"), ("**", "fsdp")),
        ),
    ],
)
def test_a_setting_is_overridden_and_the_rest_stays(args, path, value):
    changed = override(EXPERIMENT, args)
    assert changed == replaced(EXPERIMENT, path.split("."), value)


SEARCH = dataclasses.replace(EXPERIMENT, search=SearchConfig(learning_rate=(1e-3, 1e-2)))


def test_a_setting_that_the_search_replaces_says_what_to_give_instead():
    message = (
        "--train.learning_rate has no effect: search.learning_rate tries 0.001, 0.01; give --search.learning_rate 3e-4"
    )
    with pytest.raises(InputError, match=message):
        override(SEARCH, ["--train.learning_rate", "3e-4"])
    with pytest.raises(InputError, match=r"search.weight_decay tries 0.1; give --search.weight_decay 0"):
        override(EXPERIMENT, ["--search.weight_decay", "0.1", "--train.weight_decay", "0"])


def test_a_search_can_be_emptied_for_a_setting_of_the_training():
    changed = override(SEARCH, ["--search.learning_rate", "none", "--train.learning_rate", "3e-4"])
    assert (changed.search, changed.train.learning_rate) == (SearchConfig(), 3e-4)


def test_no_override_changes_nothing():
    assert override(EXPERIMENT, []) == EXPERIMENT


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--train.learnin_rate", "1"], "unknown option `--train.learnin_rate`; nearest: `--train.learning_rate`"),
        (["--learning_rate", "1"], "nearest: `--train.learning_rate`"),
        (["--train", "1"], "unknown option `--train`"),
        (["--methods.0.name", "x"], "unknown option `--methods.0.name`"),
        (["--train.num_steps", "1.5"], "--train.num_steps takes a whole number, not `1.5`"),
        (["--train.learning_rate", "fast"], "--train.learning_rate takes a number, not `fast`"),
        (["--seeds", "3", "--wandb", "maybe"], "--wandb takes true or false, not `maybe`"),
        (["--train.schedule", "cosin"], "takes one of constant, cosine, linear, not `cosin`; nearest: `cosine`"),
        (["--shots", "1,few"], "--shots takes several, each a whole number or none, not `1,few`"),
        (["--mesh.frozen", "head/**"], "--mesh.frozen takes several, each a pair of text and text, not `head/\\*\\*`"),
        (["--seeds", "3", "more"], "unexpected argument `more`"),
    ],
)
def test_what_does_not_fit_is_one_line_with_the_fix(args, message, capfd):
    with pytest.raises(InputError, match=message) as caught:
        override(EXPERIMENT, args)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_every_setting_but_the_methods_can_be_overridden():
    def leaves(config, prefix=""):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                yield from leaves(value, f"{prefix}{field.name}.")
            else:
                yield f"{prefix}{field.name}"

    assert set(settings()) == set(leaves(Experiment(name="x", methods=(Method("m"),)))) - {"methods"}
    assert len(overrides.settings_help()) == len(settings())
