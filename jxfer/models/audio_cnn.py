"""A small convolutional network on log-mel spectrograms, after PANNs (Kong et al. 2019, arXiv:1912.10211)."""

import dataclasses
import itertools
from typing import ClassVar

import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jxfer.models import blocks
from jxfer.models.convnet import PooledLayer
from jxfer.models.logmel import LogMel, LogMelConfig, samples_of
from jxfer.models.stages import run_stages
from jxfer.typing import InputError


@dataclasses.dataclass(frozen=True)
class AudioCnnConfig:
    """One size of the network."""

    reads: ClassVar[str] = "audio"
    sample_rate: int = 16000
    """Of the sounds it is meant for; windows are 25 ms, every 10 ms."""
    num_mels: int = 64
    widths: tuple[int, ...] = (32, 64, 128, 256)
    """Channels of `layer1` to `layer4`, each of which halves time and mels."""
    dropout: float = 0.0
    """Share of whole channels dropped at the end of each layer in training."""

    @property
    def front_end(self) -> LogMelConfig:
        """The spectrogram, up to just below the highest frequency that the rate allows."""
        window = self.sample_rate // 40
        return LogMelConfig(
            sample_rate=self.sample_rate,
            window=window,
            hop=self.sample_rate // 100,
            fft_size=2 ** (window - 1).bit_length(),
            num_mels=self.num_mels,
            high_hertz=0.4875 * self.sample_rate,
        )


CONFIGS = {"audio_cnn": AudioCnnConfig()}


class AudioCnn(nnx.Module):
    """A spectrogram as an image of one channel, four layers of one convolution each, and the mean."""

    def __init__(
        self,
        config: AudioCnnConfig,
        *,
        input_shape: tuple[int, ...],
        num_classes: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        least = samples_of(2 ** len(config.widths), config.front_end)
        if input_shape[0] < least:
            raise InputError(
                f"sounds of {input_shape[0]} samples are too short for `audio_cnn`; set data.seconds to"
                f" {least / config.sample_rate:g} or more"
            )
        names = [f"layer{i + 1}" for i in range(len(config.widths))]
        self.stages = ("frontend", *names, "pool", "head")
        self.frontend = Spectrogram(config.front_end)
        for name, (before, width) in zip(names, itertools.pairwise((1, *config.widths)), strict=True):
            layer = PooledLayer(before, width, window=2, dropout=config.dropout, dtype=dtype, rngs=rngs)
            setattr(self, name, layer)
        self.pool = blocks.GlobalPool()
        self.head = blocks.linear_head(config.widths[-1], num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B T"]) -> Float[Array, "B K"]:
        """Maps samples in [-1, 1] to float32 logits."""
        return run_stages(self, x)

    def features(self, x: Float[Array, "B T"]) -> Float[Array, "B D"]:
        """Maps samples to what the head sees."""
        return run_stages(self, x, stop="head")


class Spectrogram(nnx.Module):
    """The front end as an image: silence, which also surrounds it, is 0."""

    def __init__(self, config: LogMelConfig):
        self.logmel = LogMel(config)

    def __call__(self, x: Float[Array, "B T"]) -> Float[Array, "B F M 1"]:
        """Maps samples to rows of mels, [B F M 1]."""
        silence = np.log(self.logmel.config.log_offset)
        return (self.logmel(x) - silence)[..., None]
