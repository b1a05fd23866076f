"""The TFDS builder `jxfer_digits`: the 1,797 handwritten 8x8 digits that scikit-learn carries."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from jxfer.data.images import encode_png
from jxfer.data.render import counts_to_pixels


class JxferDigits(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits of the UCI repository (Alpaydin and Kaynak, 1998), as in `sklearn.datasets.load_digits`."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        for index, (counts, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            yield f"{index:06d}", {"image": encode_png(counts_to_pixels(counts)), "label": int(label)}
