"""From samples to log-mel spectrograms, inside jit: frames, Fourier transform, triangles over mels, logarithm."""

import dataclasses
import functools
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

# Slaney's scale (Auditory Toolbox, 1998): linear up to 1 kHz, then 27 mels per factor of 6.4.
SLANEY_LINEAR = 200 / 3
SLANEY_BREAK = 1000.0
SLANEY_FACTOR = np.log(6.4) / 27


@dataclasses.dataclass(frozen=True)
class LogMelConfig:
    """One front end; lengths in samples, frequencies in hertz."""

    sample_rate: int = 16000
    window: int = 400
    """Length of a frame, weighted by a periodic Hann window."""
    hop: int = 160
    """Distance from frame to frame."""
    fft_size: int = 512
    """At least the window; frames are filled with zeros up to it."""
    num_mels: int = 64
    low_hertz: float = 60.0
    """Where the first triangle starts."""
    high_hertz: float = 7800.0
    """Where the last triangle ends."""
    scale: Literal["htk", "slaney"] = "htk"
    """HTK's logarithmic mels with triangles of height 1, or Slaney's with triangles of area 1, librosa's default."""
    log_offset: float = 1e-6
    """Added to the energies before the logarithm, so that silence is finite."""
    amplitude: float = 1.0
    """Multiplies the samples, which are in [-1, 1]: 2**15 for networks trained on int16 samples."""


class LogMel(nnx.Module):
    """A front end without parameters."""

    def __init__(self, config: LogMelConfig):
        self.config = config

    def __call__(self, x: Float[Array, "B T"]) -> Float32[Array, "B F M"]:
        """Maps samples to natural logarithms of energies, one row per frame that lies whole in the sound."""
        config = self.config
        num_frames = frames_of(x.shape[1], config)
        index = np.arange(num_frames)[:, None] * config.hop + np.arange(config.window)  # [F window]
        frames = x.astype(jnp.float32)[:, index] * (config.amplitude * _hann(config.window))
        energies = jnp.abs(jnp.fft.rfft(frames, config.fft_size)) ** 2  # [B F fft_size / 2 + 1]
        return jnp.log(energies @ mel_matrix(config) + config.log_offset)


def frames_of(num_samples: int, config: LogMelConfig) -> int:
    """Returns how many frames lie whole in so many samples."""
    return max(0, (num_samples - config.window) // config.hop + 1)


def samples_of(num_frames: int, config: LogMelConfig) -> int:
    """Returns how many samples so many frames need."""
    return (num_frames - 1) * config.hop + config.window


@functools.lru_cache(maxsize=32)
def mel_matrix(config: LogMelConfig) -> Float32[np.ndarray, "frequencies M"]:
    """Returns the weight of each frequency of the transform in each mel."""
    hertz = np.linspace(0, config.sample_rate / 2, config.fft_size // 2 + 1)
    to_mel, to_hertz = (_htk, _htk_hertz) if config.scale == "htk" else (_slaney, _slaney_hertz)
    lowest, highest = to_mel(np.array([config.low_hertz, config.high_hertz]))
    edges = np.linspace(lowest, highest, config.num_mels + 2)
    # HTK's triangles have straight sides over mels, Slaney's over hertz.
    place, corners = (to_mel(hertz), edges) if config.scale == "htk" else (hertz, to_hertz(edges))
    low, middle, high = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (place[:, None] - low) / (middle - low), (high - place[:, None]) / (high - middle)
    weights = np.maximum(0, np.minimum(rising, falling))
    return (weights if config.scale == "htk" else weights * 2 / (high - low)).astype(np.float32)


def _hann(length: int) -> Float32[np.ndarray, " length"]:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)).astype(np.float32)


def _htk(hertz: np.ndarray) -> np.ndarray:
    return 2595 * np.log10(1 + hertz / 700)


def _htk_hertz(mel: np.ndarray) -> np.ndarray:
    return 700 * (10 ** (mel / 2595) - 1)


def _slaney(hertz: np.ndarray) -> np.ndarray:
    above = SLANEY_BREAK / SLANEY_LINEAR + np.log(np.maximum(hertz, SLANEY_BREAK) / SLANEY_BREAK) / SLANEY_FACTOR
    return np.where(hertz < SLANEY_BREAK, hertz / SLANEY_LINEAR, above)


def _slaney_hertz(mel: np.ndarray) -> np.ndarray:
    start = SLANEY_BREAK / SLANEY_LINEAR
    return np.where(mel < start, mel * SLANEY_LINEAR, SLANEY_BREAK * np.exp((mel - start) * SLANEY_FACTOR))
