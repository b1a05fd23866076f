"""A linear head that sees every stage: the pooled activations of all of them, joined."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jxfer.config import DataConfig
from jxfer.models.blocks import GlobalPool
from jxfer.models.stages import stage, stage_of, tapped
from jxfer.partition import arrays_of, eval_graphdef
from jxfer.surgery.head import linear_head, zero_linear
from jxfer.typing import Input, InputError

_DTYPES: dict[Input, Any] = {"image": jnp.float32, "text": jnp.int32, "audio": jnp.float32}
"""Of examples as the model takes them."""


@dataclasses.dataclass(frozen=True)
class TapHead:
    """Puts a linear head, zero at the start, on the pooled activations of every stage that has parameters.

    What the old head saw is among them (Evci et al. 2022, arXiv:2201.03529, section 3.1).
    """

    input_shape: tuple[int, ...] = ()
    """Of an example; runs and plans put that of their task here."""
    input: Input = "image"
    """Likewise."""
    fresh: ClassVar = ("head/**",)

    def __call__(
        self,
        model: Any,
        *,
        source_classes: Sequence[str],
        target_classes: Sequence[str],
        data: DataConfig,
        rngs: nnx.Rngs,
    ) -> None:
        """Alters the model in place.

        Raises:
          InputError: the model has no linear head, or no stages.
        """
        del source_classes, data
        old = linear_head(model)
        if not hasattr(model, "stages"):
            raise InputError(f"{type(model).__name__} names no `stages` whose activations a head could see")
        names = _tappable(model)
        example = jax.ShapeDtypeStruct((1, *self.input_shape), _DTYPES[self.input])
        inference = nnx.merge(eval_graphdef(model), nnx.state(model))
        shapes = jax.eval_shape(lambda x: tapped(inference, x, names), example)
        model.taps = tuple((name, shape.shape[-1]) for name, shape in zip(names, shapes, strict=True))
        model.head = zero_linear(sum(width for _, width in model.taps), len(target_classes), old, rngs)


def _tappable(model: Any) -> tuple[str, ...]:
    """Returns the stages with parameters, and the last one before the head unless it pools as we do."""
    stages = tuple(model.stages)
    with_parameters = {stage_of(path, stages) for path in arrays_of(model)}
    last = stages[-2]
    pools = isinstance(stage(model, last), GlobalPool)
    return tuple(name for name in stages[:-1] if name in with_parameters or (name == last and not pools))
