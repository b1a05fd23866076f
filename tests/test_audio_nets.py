"""Networks on sounds: the front end against its definition, shapes, silence, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jxfer.models.audio_cnn import CONFIGS as CNNS
from jxfer.models.audio_cnn import AudioCnn, AudioCnnConfig
from jxfer.models.logmel import LogMel, LogMelConfig, frames_of, mel_matrix, samples_of
from jxfer.models.speech_embedding import CONFIGS, FRONT_END, SpeechEmbedding, SpeechEmbeddingConfig, WindowedLogMel
from jxfer.models.stages import run_stages
from jxfer.partition import arrays_of
from jxfer.typing import InputError

TINY = SpeechEmbeddingConfig(widths=(4, 4, 4, 4, 4))
TINY_CNN = AudioCnnConfig(num_mels=16, widths=(4, 4, 4, 4))


def speech(num_samples, config=TINY):
    rngs = nnx.Rngs(0)
    return SpeechEmbedding(config, input_shape=(num_samples,), num_classes=3, dtype=jnp.float32, rngs=rngs)


def sounds(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-0.5, 0.5, shape), jnp.float32)


@pytest.mark.parametrize("scale", ["htk", "slaney"])
def test_a_spectrogram_is_its_definition(scale):
    config = LogMelConfig(window=400, num_mels=20, scale=scale, high_hertz=3800.0)
    x = np.asarray(sounds(2, 1000))
    found = LogMel(config)(jnp.asarray(x))
    assert found.shape == (2, frames_of(1000, config), 20) == (2, 4, 20)
    for row, frame in ((0, 0), (1, 3)):
        part = x[row, frame * 160 : frame * 160 + 400].astype(np.float64) * np.hanning(401)[:400]
        energies = np.abs(np.fft.rfft(part, 512)) ** 2
        np.testing.assert_allclose(
            found[row, frame], np.log(energies @ mel_matrix(config) + 1e-6), rtol=1e-4, atol=1e-4
        )


def test_htk_triangles_add_up_to_one_and_slaneys_have_area_one():
    htk = mel_matrix(LogMelConfig(num_mels=20, low_hertz=300.0, fft_size=4096))
    hertz = np.linspace(0, 8000, 2049)
    inside = htk.argmax(axis=0)  # between the middles of the first and the last triangle
    np.testing.assert_allclose(htk[inside[0] + 1 : inside[-1]].sum(axis=1), 1, atol=1e-6)
    slaney = mel_matrix(LogMelConfig(num_mels=20, low_hertz=300.0, fft_size=4096, scale="slaney"))
    np.testing.assert_allclose(slaney.sum(axis=0) * (hertz[1] - hertz[0]), 1, rtol=0.01)


def test_a_tone_is_loudest_in_the_mel_around_it():
    config = LogMelConfig(num_mels=40)
    tone = 0.5 * jnp.sin(2 * jnp.pi * 1000 * jnp.arange(1600) / 16000)
    loudest = int(LogMel(config)(tone[None])[0, 3].argmax())
    assert loudest == int(mel_matrix(config)[32].argmax())  # 32 of 256 times 8 kHz


def test_frames_and_samples_are_inverse():
    assert frames_of(samples_of(76, FRONT_END), FRONT_END) == 76
    assert frames_of(samples_of(76, FRONT_END) - 1, FRONT_END) == 75
    assert frames_of(10, FRONT_END) == 0


def test_the_embedding_has_the_published_number_of_parameters():
    shapes = nnx.eval_shape(lambda: speech(16000, CONFIGS["speech_embedding"]))
    sizes = {path: np.prod(value.shape) for path, value in arrays_of(shapes).items() if not path.startswith("head")}
    constants = 8 + 4 + 4 + 1  # of the published graph's paddings, reshapes and floor
    assert sum(sizes.values()) + constants == 328_217


def test_stages_have_the_stated_shapes():
    model = nnx.view(speech(8000), use_running_average=True)
    x = sounds(2, 8000)
    shapes = {
        name: jax.eval_shape(lambda x, name=name: run_stages(model, x, stop=name), x) for name in model.stages[1:]
    }
    assert shapes["stem"]["hidden"].shape == (2, 16 * 8 - 8 + 76, 32, 1)
    assert shapes["pool"]["hidden"].shape == (2, 16, 4)
    assert shapes["pool"]["mask"].shape == (2, 16)
    assert shapes["head"].shape == (2, 4)
    assert jax.eval_shape(model, x).shape == (2, 3)


def test_a_whole_spectrogram_gives_what_its_windows_give():
    model = nnx.view(speech(8000), use_running_average=True)
    embed = nnx.jit(lambda model, x: run_stages(model, x, start="stem", stop="pool")["hidden"])
    framed = nnx.jit(lambda model, x: run_stages(model, x, stop="stem"))(model, sounds(1, 8000))
    whole = embed(model, framed)
    for window in (0, 5, 15):
        alone = embed(model, {**framed, "hidden": framed["hidden"][:, 8 * window : 8 * window + 76]})
        np.testing.assert_allclose(whole[:, window], alone[:, 0], rtol=1e-4, atol=1e-5)


def test_silence_after_a_sound_changes_nothing():
    model = nnx.view(speech(8000), use_running_average=True)
    x = sounds(2, 4000)
    features = nnx.jit(lambda model, x: model.features(x))
    short, long = (features(model, jnp.pad(x, ((0, 0), (0, extra)))) for extra in (0, 5000))
    np.testing.assert_allclose(short, long, rtol=1e-5, atol=1e-5)


def test_silence_alone_is_finite():
    silence = jnp.zeros((1, 4000))
    for model in (speech(4000), cnn(4000)):
        assert np.isfinite(nnx.jit(lambda model, x: model(x))(model, silence)).all()
    assert WindowedLogMel()(silence)["mask"].any()


def test_gradients_reach_every_parameter():
    for model, x in ((speech(4000), sounds(2, 4000)), (cnn(4000), sounds(2, 4000))):
        grads = nnx.jit(nnx.grad(lambda model, x: (model(x) ** 2).sum()))(model, x)
        for path, grad in nnx.to_flat_state(grads):
            assert np.abs(grad.get_value()).max() > 0, path


def cnn(num_samples, config=TINY_CNN, dtype=jnp.float32):
    return AudioCnn(config, input_shape=(num_samples,), num_classes=3, dtype=dtype, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("sample_rate", [8000, 16000])
def test_the_cnn_maps_sounds_to_float32_logits(sample_rate):
    config = AudioCnnConfig(sample_rate=sample_rate, num_mels=16, widths=(4, 4, 4, 4), dropout=0.1)
    model = nnx.view(cnn(8000, config, jnp.bfloat16), use_running_average=True, deterministic=True)
    logits = jax.eval_shape(model, sounds(2, 8000))
    assert (logits.shape, logits.dtype) == ((2, 3), jnp.float32)
    assert cnn(8000).stages == ("frontend", "layer1", "layer2", "layer3", "layer4", "pool", "head")
    assert CNNS["audio_cnn"].front_end.fft_size == 512


def test_sounds_too_short_for_the_cnn_are_refused():
    with pytest.raises(
        InputError, match=r"sounds of 2000 samples are too short for `audio_cnn`; set data.seconds to 0.175"
    ):
        cnn(2000)
