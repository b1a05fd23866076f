"""What the README shows is true: its example runs, and what it names exists."""

import re
from pathlib import Path

from jxfer import models
from jxfer.methods import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_library_example_runs_as_printed(capsys):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "import jxfer" in block)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "442 of 922 parameters train" in printed
    assert "442 of 922 parameters train" in README


def test_every_method_and_experiment_is_in_the_readme():
    for name in METHODS:
        assert f"`{name}`" in README
    for path in (ROOT / "experiments").glob("*.py"):
        assert f"experiments/{path.name}" in README


def test_every_path_the_readme_links_to_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_models_the_readme_names_can_be_built():
    named = set(re.findall(r"`((?:resnet|convnet)\w*)`", README))
    assert named
    assert named <= set(models.names())
