import copy
import dataclasses

import pytest
import runs

from jxfer import methods
from jxfer.checks import check
from jxfer.config import (
    AugmentConfig,
    DataConfig,
    Experiment,
    Group,
    MeshConfig,
    Method,
    Phase,
    SourceConfig,
    TrainConfig,
)
from jxfer.methods import METHODS
from jxfer.typing import InputError


def trial(**settings):
    return Experiment(**{"name": "trial", "methods": (methods.scratch,), **settings})


def with_phases(*phases):
    return trial(methods=(Method("m", phases=phases),))


def forced(config, **values):
    """A config with values of the wrong type, which the types checked in tests would refuse."""
    changed = copy.copy(config)
    for name, value in values.items():
        object.__setattr__(changed, name, value)
    return changed


HALF = Phase("p", ("head",), share=0.5)


def test_a_group_may_stand_still():
    check(with_phases(Phase("p", ("head",), groups=(("head", Group(0.0, 0.0)),))))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_passes(name):
    check(trial(methods=(METHODS[name],)))


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        (trial(name="a/b"), "name is 'a/b'; it must be letters"),
        (trial(name=".."), "name is '..'"),
        (trial(shots=()), "shots is empty"),
        (trial(shots=(1, 0)), r"shots is \(1, 0\); it must be at least 1"),
        (trial(shots=(1, 5, 1)), "shots has 1 more than once"),
        (forced(trial(), shots=5), "shots is 5; it takes several, each a whole number or none"),
        (trial(seeds=0), "seeds is 0; it must be at least 1"),
        (forced(trial(), seeds=True), "seeds is True; it takes a whole number"),
        (forced(trial(), features="of"), "features is 'of'; it takes one of auto, off; nearest: `off`"),
        (trial(train=TrainConfig(num_steps=0)), "train.num_steps is 0"),
        (trial(train=TrainConfig(batch_size=0)), "train.batch_size is 0"),
        (trial(train=TrainConfig(batch_size=64, num_microbatches=3)), "must divide into equal parts"),
        (trial(train=TrainConfig(num_steps=5, warmup_steps=5)), "the warm-up must be shorter"),
        (trial(train=TrainConfig(learning_rate=float("nan"))), "train.learning_rate is nan"),
        (trial(train=TrainConfig(learning_rate=float("inf"))), "train.learning_rate is inf"),
        (trial(train=TrainConfig(base_batch_size=0)), "train.base_batch_size is 0; it must be at least 1"),
        (
            trial(train=forced(TrainConfig(), optimizer="adam")),
            "train.optimizer is 'adam'; .*nearest: `adamw`",
        ),
        (trial(train=TrainConfig(label_smoothing=1.0)), "0 or more and less than 1"),
        (trial(train=TrainConfig(checkpoint_every=0)), "train.checkpoint_every is 0"),
        (trial(source=SourceConfig(train=TrainConfig(num_steps=-1))), "source.train.num_steps is -1"),
        (trial(source=SourceConfig(weights="out/x")), "source.weights is 'out/x'; it must be `run:DIR`, `hf:OWNER"),
        (trial(target=DataConfig(test_fraction=1.0)), "target.test_fraction is 1.0; it must be more than 0 and less"),
        (trial(target=DataConfig(std=(1.0, 0.0, 1.0), mean=(0.5,))), r"target.std is \(1.0, 0.0, 1.0\)"),
        (trial(target=DataConfig(mean=(0.5, 0.5), std=(1.0, 1.0, 1.0))), "target.mean has 2 values and target.std 3"),
        (trial(target=DataConfig(augment=AugmentConfig(mixup=-1.0))), "target.augment.mixup is -1.0"),
        (trial(mesh=MeshConfig(fsdp=0)), "mesh.fsdp is 0"),
        (trial(methods=(methods.scratch, methods.scratch)), "methods has 'scratch' more than once"),
        (trial(methods=(Method("a b"),)), r"methods\[0\].name is 'a b'"),
        (trial(methods=(forced(Method("m"), start="sorce"),)), r"methods\[0\].start is 'sorce'.*nearest: `source`"),
        (with_phases(Phase("p", ("hed",))), "method `m`, phase `p` trains the label `hed`, .*; nearest: `head`"),
        (with_phases(Phase("p", ("head",), share=0.5)), "shares of its phases add up to 0.5; make it 1"),
        (with_phases(Phase("p", ("head",), share=0.0)), r"methods\[0\].phases\[0\].share is 0.0"),
        (with_phases(Phase("p", ("head",), groups=(("backbone", Group(0.1)),))), "has a group for `backbone`"),
        (
            with_phases(Phase("p", ("head",), groups=(("head", Group(-0.1)),))),
            r"methods\[0\].phases\[0\].groups\[0\]\[1\].learning_rate_scale is -0.1; it must be 0 or more",
        ),
        (
            with_phases(Phase("p", ("head",), groups=(("head", Group(weight_decay_scale=-1.0)),))),
            r"groups\[0\]\[1\].weight_decay_scale is -1.0",
        ),
        (
            with_phases(Phase("p", ("head",), groups=(("head", forced(Group(), learning_rate_scale="1")),))),
            r"groups\[0\]\[1\].learning_rate_scale is '1'; it takes a number",
        ),
        (with_phases(HALF, HALF), "method `m`: phases has 'p' more than once"),
        (with_phases(Phase("p", ())), "method `m`, phase `p` trains nothing; .* `train`: head, backbone"),
        (
            trial(train=TrainConfig(num_steps=1), methods=(runs.TWO_PHASES,)),
            "method `two_phases`, phase `probe` gets 0 of 1 steps; raise its share of 0.5, or train.num_steps",
        ),
        (
            trial(train=TrainConfig(num_steps=10, warmup_steps=5), methods=(runs.TWO_PHASES,)),
            "method `two_phases`, phase `probe` gets 5 of 10 steps and train.warmup_steps is 5; lower that",
        ),
    ],
)
def test_an_impossible_setting_is_one_line_with_its_place(experiment, message):
    with pytest.raises(InputError, match=message) as caught:
        check(experiment)
    assert "\n" not in str(caught.value)


def test_whole_numbers_serve_as_numbers():
    check(trial(train=forced(TrainConfig(), learning_rate=1, clip_norm=2)))


def test_every_checked_field_exists():
    from jxfer.checks import _RANGES

    for cls, ranges in _RANGES.items():
        assert ranges.keys() <= {field.name for field in dataclasses.fields(cls)}
