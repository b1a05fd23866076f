"""A pretrained model in one call, for scripts: `jxfer.load("hf:OWNER/NAME", num_classes=10)`."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jxfer import models, paths
from jxfer.config import DataConfig, DType, MeshConfig, ModelConfig, SourceConfig
from jxfer.data.text import num_tokens
from jxfer.known import RUN, known_of, namings_for, run_directory
from jxfer.sharding import param_specs
from jxfer.source import load_run
from jxfer.typing import InputError, Rules
from jxfer.weights.load import load as load_weights
from jxfer.weights.load import weights_of
from jxfer.weights.names import joined, own_naming, resizes_of
from jxfer.weights.naming import Naming
from jxfer.weights.open import open_published
from jxfer.weights.tensors import Tensor, in_memory

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Found:
    """What there is at an origin."""

    tensors: Mapping[str, Tensor]
    namings: Sequence[Naming]
    model: ModelConfig
    num_classes: int
    """Outputs of the head, 0 without one."""
    input_shape: tuple[int, ...] | None
    build: Callable[..., nnx.Module] = models.build
    """Builds it with random weights, as `models.build` does."""


def load(
    origin: str,
    *,
    num_classes: int | None = None,
    model: str = models.AUTO,
    input_shape: tuple[int, ...] | None = None,
    rules: Rules = (),
    dtype: DType = "float32",
    mesh: jax.sharding.Mesh | None = None,
) -> nnx.Module:
    """Returns a model with pretrained weights; what became of each leaf and tensor is logged in short.

    Args:
      origin: `hf:OWNER/NAME[@REVISION]`, `file:PATH`, `pkg:NAME`, or `run:DIR` for a finished run of jxfer.
      num_classes: outputs of the head, which starts anew where the weights have another number; None keeps theirs.
      model: a name from `models.names()` where the weights do not say of which network they are.
      input_shape: of one example, such as (224, 224, 3); None takes what the weights were trained on.
      rules: what may differ: `(pattern, action)` with actions `resize` and `reinitialise` for paths of the model and
        `skip` for names in the file, such as `("embed/position", "resize")`.
      dtype: what the model computes in; its parameters are float32.
      mesh: where the parameters shall live, split over its `fsdp` axis; None is the default device.

    Raises:
      InputError: the origin cannot be read, does not say of which network it is, or has something that is missing,
        unused or of another shape that no rule expects.
    """
    asked = ModelConfig(model, dtype=dtype)
    found = _of_run(origin, asked) if origin.startswith(RUN) else _of_published(origin, asked)
    classes, shape = num_classes or found.num_classes, input_shape or found.input_shape
    if not classes:
        raise InputError(f"'{origin}' has no head for `{found.model.name}`; give num_classes")
    if shape is None:
        raise InputError(f"'{origin}' does not say which inputs it was trained on; give input_shape")
    if classes != found.num_classes and not any(paths.match("head/kernel", pattern) for pattern, _ in rules):
        rules = [*rules, ("head/**", "reinitialise")]

    def build() -> nnx.Module:
        return found.build(found.model, num_classes=classes, input_shape=shape, rngs=nnx.Rngs(0))

    size = models.size_of(found.model)
    loaded, manifest = load_weights(
        build,
        found.tensors,
        found.namings,
        size,
        what=origin,
        rules=rules,
        resizes=resizes_of(size),
        shardings=None if mesh is None else _shardings(nnx.eval_shape(build), mesh),
    )
    log.info("%s", manifest)
    return loaded


def _shardings(abstract: nnx.Module, mesh: jax.sharding.Mesh) -> dict[str, jax.sharding.Sharding]:
    return dict(param_specs(weights_of(abstract), MeshConfig().trainable, mesh))


def _of_published(origin: str, asked: ModelConfig) -> _Found:
    known = known_of(SourceConfig(weights=origin), asked)
    published = open_published(origin)
    size = models.size_of(known.model)
    shape = _input_shape(known.model, known.preprocessing)
    tensors = joined(size, published.tensors)
    return _Found(tensors, namings_for(size, published), known.model, len(known.classes), shape)


def _of_run(origin: str, asked: ModelConfig) -> _Found:
    run = load_run(run_directory(origin))
    model = dataclasses.replace(run.model if asked.name == models.AUTO else asked, dtype=asked.dtype)
    tensors = in_memory(run.weights, what=origin)
    return _Found(tensors, (own_naming(tensors),), model, len(run.classes), run.input_shape, run.build_like)


def _input_shape(model: ModelConfig, preprocessing: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Returns the shape of what the published network was trained on, None where nothing says."""
    data = DataConfig(**preprocessing)
    reads = models.reads(model)
    if reads == "text":
        return (num_tokens(data),)
    if reads == "audio":
        return (round(data.sample_rate * data.seconds),) if data.sample_rate and data.seconds else None
    return (data.image_size, data.image_size, data.channels or 3) if data.image_size else None
