"""From sound files to int16 arrays of one length: WAV by itself, other formats through `soundfile`."""

import dataclasses
import io
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float32, Int16

from jxfer.typing import InputError

COMPRESSED = (".flac", ".ogg", ".mp3")
"""What the package soundfile reads for us."""

SUFFIXES = (".wav", *COMPRESSED)
"""File names by which a folder is known to hold sounds."""

FULL_SCALE = 2**15
"""An int16 sample of a float sample of 1."""

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # format codes of WAV
UNKNOWN_LENGTH = 0xFFFFFFFF  # of a data chunk written to a pipe
SAMPLE_TYPES = {
    (PCM, 8): "u1",
    (PCM, 16): "<i2",
    (PCM, 24): "u1",
    (PCM, 32): "<i4",
    (FLOAT, 32): "<f4",
    (FLOAT, 64): "<f8",
}


@dataclasses.dataclass(frozen=True)
class AudioShape:
    """The rate to which sounds are resampled, and the length to which they are cut or filled with silence."""

    sample_rate: int
    num_samples: int

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise InputError("data.seconds is shorter than one sample; it must be longer")


@dataclasses.dataclass(frozen=True)
class Wave:
    """What the header of a WAV file says; `offset` and `num_bytes` are those of the samples."""

    sample_rate: int
    num_channels: int
    code: int
    bits: int
    offset: int
    num_bytes: int


def resampled_length(num_samples: int, *, sample_rate: int, new_rate: int) -> int:
    """Returns how many samples a sound has at another rate."""
    return -(-num_samples * new_rate // sample_rate)


def read_header(path: Path) -> tuple[int, int]:
    """Returns samples per second and their number without reading the samples; raises OSError if unreadable.

    Raises:
      InputError: the format needs the package `soundfile`, which is not installed.
    """
    if path.suffix.lower() != ".wav":
        return _not_empty(*_through_soundfile(path, lambda file: (file.samplerate, file.frames)))
    with path.open("rb") as stream:
        wave = _read_wave(stream)
        return _not_empty(wave.sample_rate, wave.num_bytes * 8 // wave.bits // wave.num_channels)


def decode(path: Path, shape: AudioShape) -> Int16[np.ndarray, " T"]:
    """Reads one sound: channels averaged, resampled, and cut at the end or filled up there.

    Raises:
      OSError: the file is missing, damaged or no sound.
      InputError: its format needs the package `soundfile`, which is not installed.
    """
    sample_rate, samples = _read(path)
    if sample_rate != shape.sample_rate:
        from scipy.signal import resample_poly

        divisor = math.gcd(sample_rate, shape.sample_rate)
        samples = resample_poly(samples, shape.sample_rate // divisor, sample_rate // divisor)
    samples = samples[: shape.num_samples]
    scaled = np.clip(np.rint(samples * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)
    return np.pad(scaled, (0, shape.num_samples - len(scaled)))


def _read(path: Path) -> tuple[int, Float32[np.ndarray, " T"]]:
    """Returns samples per second and the mean of the channels, in [-1, 1]."""
    if path.suffix.lower() != ".wav":
        sample_rate, samples = _through_soundfile(path, lambda file: (file.samplerate, file.read(dtype="float32")))
        return sample_rate, samples.reshape(len(samples), -1).mean(axis=1)
    with path.open("rb") as stream:
        wave = _read_wave(stream)
        stream.seek(wave.offset)
        content = stream.read(wave.num_bytes)
    samples = _to_float(content, wave).reshape(-1, wave.num_channels).mean(axis=1)
    if not np.isfinite(samples).all():
        raise OSError("it holds samples that are not finite")
    return wave.sample_rate, samples


def _to_float(content: bytes, wave: Wave) -> Float32[np.ndarray, " n"]:
    values = np.frombuffer(content, SAMPLE_TYPES[wave.code, wave.bits])
    if wave.code == FLOAT:
        return values.astype(np.float32)
    if wave.bits == 8:  # the only width without a sign
        return (values.astype(np.float32) - 128) / 128
    if wave.bits == 24:
        padded = np.zeros((len(values) // 3, 4), np.uint8)
        padded[:, 1:] = values.reshape(-1, 3)
        values = padded.view("<i4").ravel()
    return values.astype(np.float32) / 2.0 ** (15 if wave.bits == 16 else 31)


def _read_wave(stream: BinaryIO) -> Wave:
    """Reads the chunks up to the samples; whatever does not fit is an OSError."""
    length = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    riff = stream.read(12)
    if riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
        raise OSError("it is no WAV file")
    form = None
    while True:
        head = stream.read(8)
        if len(head) < 8:
            raise OSError("it ends before its samples")
        name, size = struct.unpack("<4sI", head)
        if name == b"data":
            break
        content = stream.read(size + size % 2)  # chunks start at even places
        form = content if name == b"fmt " else form
    size = length - stream.tell() if size == UNKNOWN_LENGTH else size
    if stream.tell() + size > length:
        raise OSError(f"{stream.tell() + size - length} bytes of its samples are missing")
    return _wave(form, offset=stream.tell(), num_bytes=size)


def _wave(form: bytes | None, *, offset: int, num_bytes: int) -> Wave:
    if form is None or len(form) < 16:
        raise OSError("it does not say how its samples are stored")
    code, num_channels, sample_rate, _, _, bits = struct.unpack("<HHIIHH", form[:16])
    if code == EXTENSIBLE and len(form) >= 26:
        code = struct.unpack("<H", form[24:26])[0]
    if (code, bits) not in SAMPLE_TYPES or num_channels < 1 or sample_rate < 1:
        raise OSError(f"its samples are stored in a way not read here (format {code}, {bits} bits); convert it to PCM")
    frame = num_channels * bits // 8
    return Wave(sample_rate, num_channels, code, bits, offset, num_bytes // frame * frame)


def _not_empty(sample_rate: int, num_samples: int) -> tuple[int, int]:
    if num_samples < 1:
        raise OSError("it holds no samples")
    return sample_rate, num_samples


def _through_soundfile(path: Path, read: Callable[[Any], tuple[int, Any]]) -> tuple[int, Any]:
    try:
        import soundfile
    except ImportError as error:
        if path.suffix.lower() not in COMPRESSED:
            raise OSError("it is no WAV file") from error
        raise InputError(f"'{path}' is no WAV file; to read other formats: pip install 'jxfer[audio]'") from error
    try:
        with soundfile.SoundFile(path) as file:
            return read(file)
    except soundfile.SoundFileError as error:
        raise OSError(str(error)) from error
