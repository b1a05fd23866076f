"""The TFDS builder `jxfer_glyphs`: characters rendered from fonts, at 8x8 like the UCI digits or at 32x32."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from jxfer.data import render
from jxfer.data.images import encode_png

EXAMPLES_PER_CLASS = {"train": 300, "test": 50}
SEED = {"train": 0, "test": 1}


@dataclasses.dataclass(kw_only=True)
class GlyphsConfig(tfds.core.BuilderConfig):
    """One resolution of the same renderings."""

    side: int


class JxferGlyphs(tfds.core.GeneratorBasedBuilder):
    """Characters 0-9 A-Z a-z in matplotlib's fonts with random rotation, shear, stroke width and scale."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        GlyphsConfig(name="8x8", description="4x4 block sums of the renderings", side=8),
        GlyphsConfig(name="32x32", description="binary renderings", side=32),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        side = self.builder_config.side
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(side, side, 1)),
                    "label": tfds.features.ClassLabel(names=list(render.CHARACTERS)),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {name: self._generate_examples(name) for name in EXAMPLES_PER_CLASS}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        labels = np.repeat(np.arange(len(render.CHARACTERS)), EXAMPLES_PER_CLASS[split])
        images = render.render(labels, seed=SEED[split])
        counts = render.block_counts(images) if self.builder_config.side == 8 else images * np.uint8(render.LEVELS)
        for index, (pixels, label) in enumerate(zip(render.counts_to_pixels(counts), labels, strict=True)):
            yield f"{index:06d}", {"image": encode_png(pixels), "label": int(label)}
