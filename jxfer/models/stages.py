"""What a stage is: one of a model's named parts, run in order, from the pixels to the head."""

from typing import Any, Protocol, runtime_checkable

from flax import nnx
from jaxtyping import Array, Float

from jxfer import paths
from jxfer.typing import InputError, Path


@runtime_checkable
class Staged(Protocol):
    """A model made of stages: `stages` names its attributes in the order in which they run, `head` last.

    An attribute is a callable module, or an `nnx.List` of blocks applied in turn, so that parameter paths read
    `layer4/0/conv1/kernel`.
    """

    stages: tuple[str, ...]

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Maps images to float32 logits: all stages."""
        ...

    def features(self, x: Float[Array, "B H W C"]) -> Float[Array, "B D"]:
        """Maps images to what the head sees: all stages but the last."""
        ...


def run_stages(
    model: Any, x: Float[Array, "B ..."], *, start: str | None = None, stop: str | None = None
) -> Float[Array, "B ..."]:
    """Runs the stages from `start` (inclusive) up to `stop` (exclusive); None means from the first, to the end.

    Args:
      model: a `Staged` model.
      x: what the stage `start` takes: images where it is None, otherwise what `run_stages(..., stop=start)` returned.
      start: the first stage to run.
      stop: the first stage not to run.

    Raises:
      InputError: the model has no such stage, or `stop` comes before `start`.
    """
    first = 0 if start is None else _index(start, model.stages)
    last = len(model.stages) if stop is None else _index(stop, model.stages)
    if last < first:
        raise InputError(f"cannot run from stage `{start}` up to `{stop}`, which comes before it; swap them")
    for name in model.stages[first:last]:
        stage = getattr(model, name)
        for block in stage if isinstance(stage, nnx.List) else (stage,):
            x = block(x)
    return x


def stage_of(path: Path, stages: tuple[str, ...]) -> str | None:
    """Returns the stage that a parameter path lies in, None where it lies in none."""
    return next((name for name in stages if path == name or path.startswith(name + "/")), None)


def _index(name: str, stages: tuple[str, ...]) -> int:
    if name not in stages:
        raise paths.unknown("stage", name, stages)
    return stages.index(name)
