"""Google's speech embedding (Lin et al. 2020, arXiv:2002.01322): 0.77 s of speech to 96 numbers, every 80 ms.

The published network sees windows of 76 frames of 32 mels. All its convolutions over time are without padding and its
poolings halve time three times, so one pass over a whole spectrogram gives what it gives for windows every 8 frames.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jxfer.models import blocks
from jxfer.models.logmel import LogMel, LogMelConfig, samples_of
from jxfer.models.stages import run_stages

NUM_MELS = 32
FRONT_END = LogMelConfig(
    window=512, num_mels=NUM_MELS, high_hertz=3800.0, scale="slaney", log_offset=1.0, amplitude=2.0**15
)
"""That of openWakeWord, which publishes the weights for other frameworks, but for the floor: it cuts at 80 dB below the
loudest mel, which makes quiet frames depend on loud ones; 1 is below the energy of one step of an int16 sample."""

WINDOW_FRAMES, WINDOW_HOP = 76, 8
"""Frames that one embedding sees, and from one embedding to the next."""

# (pairs of convolutions, pooling over time and mels) of each layer
LAYERS = ((1, (2, 2)), (2, (1, 2)), (2, (2, 2)), (2, (1, 2)), (2, (2, 2)))

SLOPE, FLOOR = 0.2, -0.4
"""Of the activation, a leaky ReLU that ends below."""

_INIT = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")


@dataclasses.dataclass(frozen=True)
class SpeechEmbeddingConfig:
    """One size of the network."""

    reads: ClassVar[str] = "audio"
    sample_rate: ClassVar[int] = FRONT_END.sample_rate
    """Of the sounds it is meant for; the weights know no other."""
    widths: tuple[int, int, int, int, int] = (24, 48, 72, 96, 96)
    """Channels of `layer1` to `layer5`; the stem has those of the first, the embedding those of the last."""


CONFIGS = {"speech_embedding": SpeechEmbeddingConfig()}


class SpeechEmbedding(nnx.Module):
    """Spectrogram, stem, five layers, an embedding per window, and the mean over the windows that touch the sound.

    From the front end to the embedding flow {"hidden": [B F M C], "mask": [B W] bool}, W being the windows.
    """

    def __init__(
        self,
        config: SpeechEmbeddingConfig,
        *,
        input_shape: tuple[int, ...],
        num_classes: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        del input_shape  # sounds of any length are filled with silence
        stem = config.widths[0]
        first, second, third, fourth, fifth = config.widths
        self.stages = ("frontend", "stem", "layer1", "layer2", "layer3", "layer4", "layer5", "embed", "pool", "head")
        self.frontend = WindowedLogMel()
        self.stem = Stem(stem, dtype=dtype, rngs=rngs)
        self.layer1 = Layer(stem, first, *LAYERS[0], dtype=dtype, rngs=rngs)
        self.layer2 = Layer(first, second, *LAYERS[1], dtype=dtype, rngs=rngs)
        self.layer3 = Layer(second, third, *LAYERS[2], dtype=dtype, rngs=rngs)
        self.layer4 = Layer(third, fourth, *LAYERS[3], dtype=dtype, rngs=rngs)
        self.layer5 = Layer(fourth, fifth, *LAYERS[4], dtype=dtype, rngs=rngs)
        self.embed = Embed(fifth, dtype=dtype, rngs=rngs)
        self.pool = MeanOverWindows()
        self.head = blocks.linear_head(fifth, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B T"]) -> Float[Array, "B K"]:
        """Maps samples in [-1, 1] to float32 logits."""
        return run_stages(self, x)

    def features(self, x: Float[Array, "B T"]) -> Float[Array, "B D"]:
        """Maps samples to what the head sees, the mean embedding."""
        return run_stages(self, x, stop="head")


class WindowedLogMel(nnx.Module):
    """The spectrogram of a sound with silence on both sides, so that windows slide over it from its start to its end.

    Embeddings of a sound at the start of a window are poor: with silence after it alone, a linear probe on spoken
    digits is right 20 points less often.
    """

    def __init__(self) -> None:
        self.logmel = LogMel(FRONT_END)

    def __call__(self, x: Float[Array, "B T"]) -> dict[str, Array]:
        """Maps samples to {"hidden": [B F 32 1], "mask": [B W]}: which windows touch the sound, silent ends aside."""
        before = WINDOW_FRAMES * FRONT_END.hop
        step = WINDOW_HOP * FRONT_END.hop
        num_windows = -(-(before + x.shape[1]) // step)
        total = samples_of((num_windows - 1) * WINDOW_HOP + WINDOW_FRAMES, FRONT_END)
        padded = jnp.pad(x, ((0, 0), (before, total - before - x.shape[1])))
        # As the published network has it: decibels / 10 + 2.
        hidden = self.logmel(padded)[..., None] / jnp.log(10.0) + 2
        return {"hidden": hidden, "mask": jnp.arange(num_windows) * step < before + _lengths(x)[:, None]}


class Stem(nnx.Module):
    """3×3 convolution, ReLU, batch norm and the activation, in this order."""

    def __init__(self, out_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = _conv(1, out_features, (3, 3), use_bias=False, dtype=dtype, rngs=rngs)
        self.bn = blocks.batch_norm(out_features, epsilon=1e-3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Mapping[str, Array]) -> dict[str, Array]:
        """Shortens time by 2 frames."""
        return {**x, "hidden": activation(self.bn(nnx.relu(self.conv(x["hidden"]))))}


class Layer(nnx.Module):
    """Pairs of convolutions over mels and over time, and a maximum; batch norms are folded into the convolutions."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_pairs: int,
        pooling: tuple[int, int],
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        widths = (in_features, *[out_features] * num_pairs)
        self.pooling = pooling
        self.pairs = nnx.List(
            [Pair(before, after, dtype=dtype, rngs=rngs) for before, after in itertools.pairwise(widths)]
        )

    def __call__(self, x: Mapping[str, Array]) -> dict[str, Array]:
        """Shortens time by 2 frames per pair, then divides time and mels by the pooling."""
        hidden = x["hidden"]
        for pair in self.pairs:
            hidden = pair(hidden)
        return {**x, "hidden": nnx.max_pool(hidden, self.pooling, strides=self.pooling)}


class Pair(nnx.Module):
    """A 1×3 convolution over mels and a 3×1 convolution over time."""

    def __init__(self, in_features: int, out_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.mels = _conv(in_features, out_features, (1, 3), dtype=dtype, rngs=rngs)
        self.time = _conv(out_features, out_features, (3, 1), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B F M C"]) -> Float[Array, "B f M D"]:
        """Shortens time by 2 frames."""
        return activation(self.time(activation(self.mels(x))))


class Embed(nnx.Module):
    """The last 3×1 convolution, which leaves one vector per window."""

    def __init__(self, num_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = _conv(num_features, num_features, (3, 1), use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Mapping[str, Array]) -> dict[str, Array]:
        """Maps {"hidden": [B f 1 C]} to {"hidden": [B W C]}."""
        return {**x, "hidden": self.conv(x["hidden"])[:, :, 0]}


class MeanOverWindows(nnx.Module):
    """The mean of the embeddings that the mask keeps."""

    def __call__(self, x: Mapping[str, Array]) -> Float[Array, "B C"]:
        """Maps {"hidden": [B W C], "mask": [B W]} to one vector each."""
        mask = x["mask"][..., None]
        return jnp.sum(x["hidden"], axis=1, where=mask) / jnp.sum(mask, axis=1)


def activation(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """A leaky ReLU with a floor."""
    return jnp.maximum(nnx.leaky_relu(x, SLOPE), FLOOR)


def _conv(
    in_features: int,
    out_features: int,
    size: tuple[int, int],
    *,
    use_bias: bool = True,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Returns a convolution that pads the mels and not the time."""
    padding = ((0, 0), (size[1] // 2, size[1] // 2))
    return nnx.Conv(
        in_features, out_features, size, padding=padding, use_bias=use_bias, kernel_init=_INIT, dtype=dtype, rngs=rngs
    )


def _lengths(x: Float[Array, "B T"]) -> Array:
    """Returns the number of samples up to the last that is not exactly 0."""
    sounds: Bool[Array, "B T"] = x != 0
    return jnp.max(jnp.where(sounds, jnp.arange(1, x.shape[1] + 1), 0), axis=1)
