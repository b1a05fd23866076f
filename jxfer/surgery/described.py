"""A head made of words: each class's row is what the source itself makes of a description of that class."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from jxfer import data, paths
from jxfer.config import DataConfig
from jxfer.partition import eval_graphdef
from jxfer.surgery.head import linear_head
from jxfer.typing import InputError


@dataclasses.dataclass(frozen=True)
class DescribedHead:
    """Puts in place of the head the features of one description per class, so that the nearest description wins.

    Classification without a labelled example, by the meaning of the labels (Chang et al. 2008, "Importance of Semantic
    Representation: Dataless Classification"). A class's logit is `scale` times the cosine of its description with the
    text, where the text's features are as long as the descriptions' are on average.
    """

    descriptions: tuple[tuple[str, str], ...]
    """Class -> what it is about."""
    scale: float = 20.0
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
          InputError: a class of the target has no description.
        """
        del source_classes
        features = _features(model, [self._describe(name) for name in target_classes], data)  # [K D]
        lengths = jnp.linalg.norm(features, axis=1, keepdims=True)
        old = linear_head(model)
        head = nnx.Linear(old.in_features, len(target_classes), dtype=old.dtype, rngs=rngs)
        head.kernel.set_value((self.scale * features / lengths / jnp.mean(lengths)).T)
        model.head = head

    def _describe(self, name: str) -> str:
        known = dict(self.descriptions)
        if name not in known:
            raise InputError(f"no description of class `{name}`; nearest described: {paths.nearest(name, known)}")
        return known[name]


def _features(model: Any, texts: Sequence[str], config: DataConfig) -> Any:
    inference: Any = nnx.merge(eval_graphdef(model), nnx.state(model))
    return inference.features(jnp.asarray(data.encode_texts(texts, config))).astype(jnp.float32)
