import dataclasses
import json

import pytest

from jxfer import config, methods
from jxfer.config import DataConfig, Experiment, Group, Phase, SourceConfig, TrainConfig
from jxfer.typing import InputError

EXPERIMENT = Experiment(
    name="trial",
    source=SourceConfig(train=TrainConfig(clip_norm=1.0)),
    target=DataConfig("folder:x", mean=(0.1, 0.2, 0.3), image_size=32),
    shots=(1, None),
)


@pytest.mark.parametrize("value", [EXPERIMENT, EXPERIMENT.target, Phase("p", ("a", "b"), groups=(("a", Group(0.5)),))])
def test_json_and_back_is_the_same_config(value):
    text = json.dumps(config.to_dict(value))
    assert config.from_dict(type(value), json.loads(text)) == value


def test_a_saved_config_is_whole_and_leaves_nothing_else(tmp_path):
    config.save(EXPERIMENT, tmp_path / "experiment.json")
    assert json.loads((tmp_path / "experiment.json").read_text()) == config.to_dict(EXPERIMENT)
    assert [file.name for file in tmp_path.iterdir()] == ["experiment.json"]


def test_an_unknown_field_of_a_saved_config_is_named():
    with pytest.raises(InputError, match=r"TrainConfig has no field 'num_step'; its fields: num_steps"):
        config.from_dict(TrainConfig, {"num_step": 3})


def test_the_hash_changes_with_any_setting_and_with_nothing_else():
    changed = dataclasses.replace(EXPERIMENT, train=TrainConfig(momentum=0.8))
    same = dataclasses.replace(EXPERIMENT, train=TrainConfig())
    assert config.config_hash(changed) != config.config_hash(EXPERIMENT) == config.config_hash(same)
    assert len(config.config_hash(EXPERIMENT)) == 16


def test_what_a_method_does_to_the_model_is_in_its_dict():
    saved = config.to_dict(methods.l2_sp)
    assert [surgery["type"] for surgery in saved["surgeries"]] == ["NewHead"]
    assert [penalty["type"] for penalty in saved["penalties"]] == ["L2SP"]


def test_only_a_changed_augmentation_is_active():
    assert not config.AugmentConfig().active
    assert config.AugmentConfig(flip=True).active
