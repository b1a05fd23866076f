"""Low-rank updates beside layers that may stay frozen (LoRA), and their way back into the kernels of these layers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jxfer import distributed, paths
from jxfer.config import DataConfig
from jxfer.typing import Arrays, InputError, Path, Rules

Layer = nnx.Linear | nnx.Conv

_UPDATE = "/lora/"
"""What the path of every variable of an update has between the layer's path and its own."""

# Uniform in ±1 / sqrt(fan in), as the authors' code starts it.
_DOWN_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Puts a low-rank update beside layers: y = layer(x) + adapter_scale · up(down(x)).

    Of a linear layer (Hu et al. 2021, arXiv:2106.09685, section 4.1) `down` maps to `rank` features and `up` from them,
    both without a bias. Of a convolution (LoCon: Yeh et al. 2023, arXiv:2309.14859) `down` is one of the same windows
    with `rank` channels and `up` maps each pixel. `up` starts at zero, so that the model begins as it was. Convolutions
    in groups, depthwise ones among them, have so few parameters that they are left as they are.
    """

    ranks: tuple[tuple[str, int], ...] = (("head/**", 0), ("**", 8))
    """Pattern over the paths of kernels -> rank, the first match deciding; 0 leaves a layer as it is."""
    adapter_scale: float = 2.0
    """The paper's alpha / r."""
    fresh: ClassVar = ("**/lora/**",)

    def __post_init__(self) -> None:
        for pattern, rank in self.ranks:
            if not isinstance(rank, int) or rank < 0:
                raise InputError(f"LoRA: the rank of `{pattern}` is {rank!r}; give a whole number, 0 for no update")
        if not self.adapter_scale > 0:
            raise InputError(f"LoRA: adapter_scale is {self.adapter_scale!r}; give a number above 0")

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
          InputError: as `adapt`.
        """
        del source_classes, target_classes, data
        adapt(model, self.ranks, adapter_scale=self.adapter_scale, rngs=rngs)


def adapt(model: nnx.Module, ranks: Rules, *, adapter_scale: float, rngs: nnx.Rngs) -> None:
    """Puts low-rank updates beside a model's layers, in place; see `LoRA`.

    The layer's own parameters keep their paths; those of the update are `LAYER/lora/down/kernel` and
    `LAYER/lora/up/kernel`, float32, and `LAYER/lora/scale`, which does not train.

    Args:
      model: any NNX module, real or abstract; its layers of exactly the types `nnx.Linear` and `nnx.Conv` can be
        adapted, those with `lora` already excepted.
      ranks: pattern over the paths of their kernels -> rank, the first match deciding; 0 leaves a layer as it is.
      adapter_scale: the paper's alpha / r.
      rngs: for `down`.

    Raises:
      InputError: a rule decides nothing, a kernel is covered by none, or all ranks are 0.
    """
    layers = {
        "/".join(map(str, (*keys, "kernel"))): module for keys, module in nnx.iter_modules(model) if _adaptable(module)
    }
    found = paths.match_rules(layers, ranks, what="kernel of a linear layer or convolution") if layers else {}
    if not any(found.values()):
        none = "it has no linear layer (nnx.Linear) and no convolution (nnx.Conv) without groups"
        why = "every rank is 0" if layers else none
        raise InputError(f"LoRA puts no update into {type(model).__name__}: {why}")
    for path, rank in found.items():
        if rank:
            _adapt(layers[path], rank, adapter_scale, rngs)


def merged(arrays: Mapping[Path, Any]) -> Arrays:
    """Returns a model's arrays with every update added to the kernel that it lies beside, and gone itself.

    The model without updates that has them computes the same, up to the rounding of one addition per kernel. Sums and
    products are in float64, so that they are the same on every machine.

    Args:
      arrays: by path, on the host or on devices; what has no update beside it is returned as it is.
    """
    whole = {path: value for path, value in arrays.items() if _UPDATE not in path}
    for layer in (path.removesuffix(f"{_UPDATE}scale") for path in arrays if path.endswith(f"{_UPDATE}scale")):
        names = ("kernel", "lora/down/kernel", "lora/up/kernel", "lora/scale")
        values = [np.asarray(distributed.fetch(arrays[f"{layer}/{name}"])) for name in names]
        kernel, down, up, scale = (value.astype(np.float64) for value in values)
        whole[f"{layer}/kernel"] = (kernel + scale * (down @ up)).astype(values[0].dtype)
    return whole


class Scale(nnx.Variable):
    """The factor of an update: no parameter, but it follows the update's label, so that variants can differ in it."""


class Update(nnx.Module):
    """down, times the scale, up."""

    def __init__(self, layer: Layer, rank: int, scale: float, *, rngs: nnx.Rngs):
        self.down = _down(layer, rank, rngs)
        zeros = nnx.initializers.zeros_init()
        options: dict[str, Any] = {"dtype": layer.dtype, "precision": layer.precision, "rngs": rngs}
        self.up = nnx.Linear(rank, layer.out_features, use_bias=False, kernel_init=zeros, **options)
        self.scale = Scale(jnp.float32(scale))

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*b D"]:
        """Maps the layer's input to what is added to its output."""
        x = self.down(x)
        return self.up(x * self.scale.get_value().astype(x.dtype))


class AdaptedLinear(nnx.Linear):
    """A linear layer with an update `lora`."""

    lora: Update

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Maps features [*B C] to [*B D]."""
        return super().__call__(inputs, out_sharding) + self.lora(inputs)


class AdaptedConv(nnx.Conv):
    """A convolution with an update `lora`."""

    lora: Update

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Maps pixels [*B H W C] to [*B h w D]."""
        return super().__call__(inputs, out_sharding) + self.lora(inputs)


_ADAPTED: dict[type, type] = {nnx.Linear: AdaptedLinear, nnx.Conv: AdaptedConv}


def _adaptable(module: Any) -> bool:
    return type(module) in _ADAPTED and getattr(module, "feature_group_count", 1) == 1


def _adapt(layer: Any, rank: int, scale: float, rngs: nnx.Rngs) -> None:
    layer.lora = Update(layer, rank, scale, rngs=rngs)
    # The layer itself becomes another, not a copy in its place: its parameters keep their paths, and where a model has
    # it twice both are adapted. nnx's own __setattr__ would take the class for a part of the model.
    object.__setattr__(layer, "__class__", _ADAPTED[type(layer)])


def _down(layer: Layer, rank: int, rngs: nnx.Rngs) -> Layer:
    """Returns a layer from the same inputs to `rank` features."""
    options: dict[str, Any] = {
        "use_bias": False,
        "kernel_init": _DOWN_INIT,
        "dtype": layer.dtype,
        "precision": layer.precision,
        "rngs": rngs,
    }
    if isinstance(layer, nnx.Linear):
        return nnx.Linear(layer.in_features, rank, **options)
    names = ("strides", "padding", "input_dilation", "kernel_dilation")
    window = {name: getattr(layer, name) for name in names}
    return nnx.Conv(layer.in_features, rank, layer.kernel_size, **window, **options)
