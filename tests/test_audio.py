"""Sounds: every width of WAV, resampling, lengths, folders of them, and damaged files."""

import struct

import numpy as np
import pytest

from jxfer.config import DataConfig
from jxfer.data import load_dataset, read_file
from jxfer.data.audio import AudioShape, decode, read_header
from jxfer.typing import InputError

RATE = 8000
PCM, FLOAT = 1, 3


def wav_bytes(samples, *, bits=16, code=PCM, rate=RATE, extensible=False, extra=b""):
    """Returns a WAV file of samples in [-1, 1], [T] or [T channels]; `extra` stands between header and samples."""
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    flat = np.clip(samples.ravel(), -1, 1)
    if code == FLOAT:
        content = flat.astype(f"<f{bits // 8}").tobytes()
    elif bits == 8:
        content = np.clip(np.rint(flat * 128) + 128, 0, 255).astype(np.uint8).tobytes()
    else:
        whole = np.clip(np.rint(flat * 2.0 ** (bits - 1)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype("<i8")
        content = whole.view(np.uint8).reshape(-1, 8)[:, : bits // 8].tobytes()
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", 0xFFFE if extensible else code, channels, rate, rate * frame, frame, bits)
    if extensible:
        form += struct.pack("<HHIH14s", 22, bits, 0, code, bytes(14))
    body = (
        b"WAVEfmt " + struct.pack("<I", len(form)) + form + extra + b"data" + struct.pack("<I", len(content)) + content
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tone(num_samples=400, *, rate=RATE, hertz=440.0, size=0.5):
    return size * np.sin(2 * np.pi * hertz * np.arange(num_samples) / rate)


def write(path, samples, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(wav_bytes(samples, **options))
    return path


@pytest.mark.parametrize(("bits", "code"), [(8, PCM), (16, PCM), (24, PCM), (32, PCM), (32, FLOAT), (64, FLOAT)])
@pytest.mark.parametrize("extensible", [False, True])
def test_every_width_of_wav_is_read(tmp_path, bits, code, extensible):
    path = write(tmp_path / "x.wav", tone(), bits=bits, code=code, extensible=extensible, extra=b"LIST\x03\0\0\0abc\0")
    assert read_header(path) == (RATE, 400)
    samples = decode(path, AudioShape(RATE, 400))
    assert samples.dtype == np.int16
    step = 256 if bits == 8 else 1  # of an 8-bit sample in 16 bits
    assert np.abs(samples - np.rint(tone() * 2**15)).max() <= step


def test_sixteen_bits_come_back_unchanged_and_full_scale_is_not_exceeded(tmp_path):
    extremes = np.array([-1.0, 1.0, 0.0, 2.0**-15])
    path = write(tmp_path / "x.wav", extremes)
    assert decode(path, AudioShape(RATE, 4)).tolist() == [-32768, 32767, 0, 1]


def test_channels_are_averaged(tmp_path):
    path = write(tmp_path / "x.wav", np.stack([tone(), np.zeros(400)], axis=1))
    assert read_header(path) == (RATE, 400)
    assert np.abs(decode(path, AudioShape(RATE, 400)) - np.rint(tone() * 2**14)).max() <= 1


def test_sounds_are_cut_at_the_end_or_filled_with_silence(tmp_path):
    path = write(tmp_path / "x.wav", tone())
    whole = decode(path, AudioShape(RATE, 400))
    np.testing.assert_array_equal(decode(path, AudioShape(RATE, 100)), whole[:100])
    np.testing.assert_array_equal(decode(path, AudioShape(RATE, 500)), np.pad(whole, (0, 100)))


@pytest.mark.parametrize("rate", [16000, 11025, 4000])
def test_resampling_keeps_the_tone(tmp_path, rate):
    num = -(-800 * rate // RATE)
    samples = decode(write(tmp_path / "x.wav", tone(800)), AudioShape(rate, num))
    middle = slice(num // 4, 3 * num // 4)  # the ends ring
    expected = tone(num, rate=rate) * 2**15
    assert np.abs(samples - expected)[middle].max() < 0.01 * 2**15


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no WAV file"),
        (b"RIFF____WAVE", "ends before its samples"),
        (wav_bytes(tone())[:-7], "7 bytes of its samples are missing"),
        (wav_bytes(np.zeros(0)), "no samples"),
        (wav_bytes(tone())[:20] + b"\x55" + wav_bytes(tone())[21:], r"not read here \(format 85, 16 bits\)"),
        (b"RIFF____WAVEdata\x02\0\0\0ab", "does not say how"),
    ],
)
def test_damaged_files_raise_oserror(tmp_path, content, reason):
    path = tmp_path / "x.wav"
    path.write_bytes(content)
    with pytest.raises(OSError, match=reason):
        read_header(path)


def test_samples_that_are_not_finite_raise_oserror(tmp_path):
    path = tmp_path / "x.wav"
    path.write_bytes(wav_bytes(np.zeros(4), bits=32, code=FLOAT)[:-4] + struct.pack("<f", float("nan")))
    with pytest.raises(OSError, match="not finite"):
        decode(path, AudioShape(RATE, 4))


@pytest.mark.parametrize("kind", ["flac", "ogg"])
def test_other_formats_are_read_through_soundfile(tmp_path, kind):
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / f"x.{kind}"
    soundfile.write(path, np.stack([tone(4000)] * 2, axis=1), RATE)
    assert read_header(path) == (RATE, 4000)
    assert np.abs(decode(path, AudioShape(RATE, 4000)) / 2**15 - tone(4000)).max() < 0.05
    path.write_bytes(b"no sound")
    with pytest.raises(OSError, match="x"):
        read_header(path)


def test_without_soundfile_other_formats_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(InputError, match=r"pip install 'jxfer\[audio\]'"):
        read_header(tmp_path / "x.flac")


@pytest.fixture
def root(tmp_path):
    for name, hertz in (("high", 880.0), ("low", 220.0)):
        for i in range(4):
            write(tmp_path / "tones" / name / f"{i}.wav", tone(300 + 20 * i, hertz=hertz))
    return tmp_path / "tones"


def load(root, **settings):
    return load_dataset(DataConfig(name=f"folder:{root}", **settings))


def test_class_folders_of_sounds_are_a_data_set_as_long_as_the_longest(root):
    dataset = load(root)
    assert (dataset.input, dataset.input_shape, dataset.sample_rate) == ("audio", (360,), RATE)
    batch = dataset.splits["train"].read(np.array([0, 7]))
    assert batch["label"].tolist() == [0, 1]
    assert batch["audio"].dtype == np.int16
    assert not batch["audio"][0, 300:].any()
    assert load(root, sample_rate=16000).input_shape == (720,)
    assert load(root, sample_rate=16000, seconds=0.01).input_shape == (160,)


def test_damaged_sounds_are_left_out_and_named(root, caplog):
    (root / "low" / "0.wav").write_bytes(wav_bytes(tone())[:-10])
    (root / "low" / "9.wav").write_bytes(wav_bytes(np.zeros(4), bits=32, code=FLOAT)[:-4] + b"\xff\xff\xff\x7f")
    (root / "low" / "notes.txt").write_text("about the tones")
    dataset = load(root)
    assert sorted(dataset.skipped) == ["low/0.wav", "low/9.wav", "low/notes.txt"]
    assert len(dataset.splits["train"]) == 7
    assert "3 files" in caplog.text


def test_large_sets_are_read_on_demand(root, monkeypatch):
    everything = load(root).splits["train"].read(np.arange(8))
    monkeypatch.setattr("jxfer.data.opening.MEMORY_BYTES", 0)
    lazy = load(root).splits["train"].read(np.arange(8))
    np.testing.assert_array_equal(lazy["audio"], everything["audio"])


def test_a_single_file_is_read_as_those_of_the_data_set(root):
    dataset = load(root, sample_rate=4000)
    config = DataConfig(sample_rate=dataset.sample_rate)
    one = read_file(root / "low" / "1.wav", config, kind="audio", input_shape=dataset.input_shape)
    np.testing.assert_array_equal(one, dataset.splits["train"].read(np.array([5]))["audio"][0])
    with pytest.raises(InputError, match=r"data.sample_rate is not set"):
        read_file(root / "low" / "1.wav", DataConfig(), kind="audio", input_shape=dataset.input_shape)


def test_other_rates_need_a_sample_rate_and_mixed_kinds_are_refused(root):
    write(root / "low" / "9.wav", tone(), rate=16000)
    with pytest.raises(
        InputError, match=r"'high/0.wav' has 8000 samples per second, 'low/9.wav' 16000; set data.sample"
    ):
        load(root)
    (root / "low" / "x.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"mixes kinds of files: 'high/0.wav' and 'low/x.png'; keep one kind"):
        load(root)


def test_a_class_of_which_no_sound_is_left_is_named(root):
    for path in (root / "low").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match=r"no sound is left in '.*/low': files that could not be read: 4"):
        load(root)


def test_a_table_lists_sounds(root):
    rows = [f"{name}/{i}.wav,{name}" for name in ("low", "high") for i in range(4)]
    (root / "tones.csv").write_text("\n".join(["file,label", *rows]))
    dataset = load_dataset(DataConfig(name=f"table:{root}/tones.csv"))
    assert (dataset.input, dataset.input_shape, dataset.class_names) == ("audio", (360,), ("high", "low"))
