"""The device mesh, and where on it each array lives: parameters by rules, what follows them, and batches."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from jxfer import distributed
from jxfer.config import MeshConfig
from jxfer.partition import FROZEN, Partition, arrays_of
from jxfer.paths import match, match_rules
from jxfer.typing import Batch, HostBatch, InputError, Path, PyTree, Rules

AXES = ("data", "fsdp", "model")
"""The axes of every mesh. The batch is split over the first two; `fsdp` and `model` split parameters."""

_SMALLEST_SHARDED = 2**10
"""Leaves of fewer elements are replicated under `fsdp`: gathering them costs more than keeping them."""

_TENSOR = {"tensor": "replicated", "tensor+fsdp": "fsdp"}
"""Rule values for the blocks of transformers (Shoeybi et al. 2019, arXiv:1909.08053, section 3), and what they do with
all that the `model` axis does not split."""

_LEAVES = r"(?:.*/)?(?:{layers})/(?:{names})"
_COLUMNS = re.compile(_LEAVES.format(layers="attention/(?:query|key|value)|mlp/up", names="kernel|bias|lora/up/kernel"))
"""Leaves whose outputs are split: each device computes some heads, or some hidden features, from all inputs."""

_ROWS = re.compile(_LEAVES.format(layers="attention/out|mlp/down", names="kernel|lora/down/kernel"))
"""Leaves whose inputs are split: each device adds up over its own, and one all-reduce adds up over the devices."""


def make_mesh(config: MeshConfig, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh over all devices (or `devices`); the `data` axis takes what `fsdp` and `model` leave.

    Raises:
      InputError: `fsdp` times `model` does not divide the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    inner = config.fsdp * config.model
    if config.fsdp < 1 or config.model < 1 or len(devices) % inner:
        choices = ", ".join(str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0)
        sizes = f"mesh.fsdp {config.fsdp} times mesh.model {config.model}"
        raise InputError(f"{sizes} does not divide {len(devices)} device(s); their product must be one of {choices}")
    shape = (len(devices) // inner, config.fsdp, config.model)
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def param_specs(arrays: Mapping[Path, Any], rules: Rules, mesh: Mesh | AbstractMesh) -> dict[Path, NamedSharding]:
    """Returns the sharding of each parameter, in the order of `arrays` (anything with a `shape`).

    The value of a rule is
    - `replicated`,
    - `fsdp`: the largest dimension that the `fsdp` axis divides is split; small leaves and those without such a
      dimension are replicated,
    - `tensor`: queries, keys, values and the first layer of a block's network are split by outputs over the `model`
      axis, attention's output and the second layer by inputs; all else is replicated,
    - `tensor+fsdp`: the same, and what is left whole of each leaf is split as by `fsdp`,
    - or one axis or `None` per dimension: `None,model`.
    Give all parameters of the model, frozen and trainable: rules are judged against the model, not against the part
    of it that one phase happens to train.

    Raises:
      InputError: a leaf is covered by no rule, a rule decides nothing, axes do not fit a leaf's shape, or `tensor`
        finds nothing of a transformer.
    """
    values = match_rules(arrays, rules)
    tensor = [path for path, value in values.items() if value in _TENSOR]
    if tensor and all(_tensor_axis(path, arrays[path].shape) is None for path in tensor):
        raise InputError(
            f"`{values[tensor[0]]}` has nothing to split: of the {len(tensor)} parameters it places, none is of a "
            "transformer's block, such as `attention/query` or `mlp/up`; use fsdp, or axes such as `None,model`"
        )
    return {path: NamedSharding(mesh, _spec(path, arrays[path].shape, value, mesh)) for path, value in values.items()}


def check_placement(model: nnx.Module, config: MeshConfig) -> None:
    """Checks the placement rules against a model, real or abstract, on a mesh of any number of devices.

    Raises:
      InputError: as `param_specs`, or `tensor` would cut through heads of attention.
    """
    mesh = AbstractMesh((1, config.fsdp, config.model), AXES)
    leaves = Partition.of(model, [("**", FROZEN)]).leaves
    params = {leaf.path: leaf for leaf in leaves if leaf.kind == "parameter"}
    for rules in (config.frozen, config.trainable):
        param_specs(params, rules, mesh)
        check_heads(model, rules, config.model)


def check_heads(model: nnx.Module, rules: Rules, num_parts: int) -> None:
    """Raises InputError where a rule's `tensor` would split a layer of attention into parts of less than a head."""
    for keys, module in nnx.iter_modules(model):
        num_heads, path = getattr(module, "num_heads", None), "/".join(map(str, keys))
        value = next((value for pattern, value in rules if match(f"{path}/query/kernel", pattern)), None)
        if isinstance(num_heads, int) and value in _TENSOR and num_heads % num_parts:
            choices = ", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)
            raise InputError(
                f"`{value}` for `{path}`: mesh.model={num_parts} does not divide its {num_heads} heads; use {choices}"
            )


def part_of(model: nnx.Module, partition: Partition, config: MeshConfig) -> tuple[nnx.Module, Partition]:
    """Returns what one device computes of a model whose blocks `tensor` splits, as shapes, and the partition of that.

    Attention then has a part of the heads, and the network of two layers a part of the features between them. Where the
    rules split only some of the layers of either, it stays whole. The model has passed `check_placement`.
    """
    split = _split_leaves(partition, config)
    if not split:
        return model, partition
    copy = nnx.merge(*nnx.split(model))
    module: Any
    for keys, module in nnx.iter_modules(copy):
        if "/".join(map(str, (*keys, "query/kernel"))) in split:
            module.num_heads //= config.model
    leaves = tuple(dataclasses.replace(leaf, shape=split.get(leaf.path, leaf.shape)) for leaf in partition.leaves)
    own, part = arrays_of(model), dataclasses.replace(partition, leaves=leaves)
    arrays = {leaf.path: jax.ShapeDtypeStruct(leaf.shape, own[leaf.path].dtype) for leaf in leaves}
    return part.assemble(nnx.graphdef(copy), arrays), part


def state_shardings(state: PyTree, specs: Mapping[Path, NamedSharding], mesh: Mesh) -> PyTree:
    """Returns a tree like `state` of shardings: what belongs to a parameter lives where the parameter lives.

    A leaf belongs to a parameter if a dict key on the way to it is the parameter's path and the leaf can be split as
    the parameter is: moments, gradient accumulators and averages follow, whatever Optax wraps them in. Everything
    else (counts, keys, factored moments of lower rank) is replicated.
    """

    def sharding(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # The last name counts: optax.partition keeps a dict by label further up, and a label may equal a path.
        names = [key.key for key in reversed(keys) if isinstance(key, jax.tree_util.DictKey)]
        spec = next((specs[name] for name in names if name in specs), None)
        return _shortest(spec) if spec and _fits(spec, np.shape(leaf)) else NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, state)


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Returns a copy of `tree` placed as `shardings` says; donating the copy leaves `tree` alive."""
    if distributed.count() > 1:
        return jax.tree.map(jnp.copy, put(tree, shardings))
    return jax.device_put(jax.tree.map(_copy, tree), shardings)


def put(tree: PyTree, shardings: PyTree) -> PyTree:
    """Returns the tree placed as `shardings`, a tree or a prefix of one, says.

    What every process holds for itself, such as weights that all of them have read, must be equal in all.
    """
    if distributed.count() == 1:
        return jax.device_put(tree, shardings)
    every = jax.tree.map(lambda sharding, part: jax.tree.map(lambda _: sharding, part), shardings, tree)
    return jax.tree.map(_put, tree, every)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its leading axis split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def num_batch_shards(mesh: Mesh) -> int:
    """Returns into how many parts a batch is split; the number of its rows must be a multiple."""
    return int(mesh.shape["data"] * mesh.shape["fsdp"])


def spanning(tree: PyTree, mesh: Mesh) -> PyTree:
    """Returns the tree ready for a program over the mesh: what each process holds for itself, as in `put`, replicated.

    With one process there is nothing to do: jit moves what it is given.
    """
    if distributed.count() == 1:
        return tree
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: _put(leaf, whole) if leaf.is_fully_addressable else leaf, tree)


@dataclasses.dataclass(frozen=True, eq=False)
class Share:
    """Which rows of every batch this process reads, and how those of all processes become one batch on the mesh."""

    sharding: NamedSharding
    num_rows: int
    """Of a batch over all processes, those that fill it up included."""
    rows: np.ndarray
    """The positions, in order, that this process's devices hold; others may hold some of them too."""

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Returns this process's part of the indices of a batch, filled up with the first of them."""
        return indices[np.where(self.rows < len(indices), self.rows, 0)]

    def put(self, batch: HostBatch) -> Batch:
        """Returns the batch on the devices, made of this process's rows here and of the others' there."""
        if distributed.count() == 1:
            return jax.device_put(batch, self.sharding)
        return {name: self._array(values) for name, values in batch.items()}

    def _array(self, values: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(self.num_rows)
            first = int(np.searchsorted(self.rows, start))
            return values[first : first + stop - start]

        return jax.make_array_from_callback((self.num_rows, *values.shape[1:]), self.sharding, part)


def share_of(mesh: Mesh, batch_size: int, *, multiple: int | None = None, whole: bool = False) -> Share:
    """Returns this process's share of batches of `batch_size` rows, filled up to a multiple of the batch's shards.

    It follows from where the mesh has this process's devices: processes that only `model` tells apart read the same.

    Args:
      mesh: of all processes.
      batch_size: over all processes.
      multiple: of which the filled batch is, instead of the number of shards.
      whole: whether every device gets the whole batch.
    """
    sharding = NamedSharding(mesh, PartitionSpec()) if whole else batch_sharding(mesh)
    num_rows = batch_size + -batch_size % (multiple or num_batch_shards(mesh))
    held: Any = sharding.addressable_devices_indices_map((num_rows,)).values()
    rows = np.unique(np.concatenate([np.arange(*index[0].indices(num_rows)) for index in held]))
    return Share(sharding, num_rows, rows)


def pad_batch(batch: HostBatch, *, multiple: int) -> HostBatch:
    """Returns the batch with its rows padded to a multiple; copies of row 0, real values for norms, with `mask` 0."""
    num_rows = len(next(iter(batch.values())))
    num_padding = -num_rows % multiple
    batch = {"mask": np.ones(num_rows, np.float32)} | batch
    if num_padding == 0:
        return batch
    rows = np.concatenate([np.arange(num_rows), np.zeros(num_padding, np.int64)])
    padded = {name: values[rows] for name, values in batch.items()}
    padded["mask"][num_rows:] = 0
    return padded


def put_batch(batch: HostBatch, mesh: Mesh) -> Batch:
    """Returns the batch on the devices of the mesh; with several processes, each gives its own rows.

    Raises:
      InputError: the rows do not divide among the devices; `pad_batch` first.
    """
    sharding = batch_sharding(mesh)
    num_rows, num_shards = len(next(iter(batch.values()))), num_batch_shards(mesh)
    if num_rows * jax.process_count() % num_shards:
        raise InputError(f"a batch of {num_rows} rows does not divide into {num_shards} shards; use `pad_batch` first")
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return {name: jax.make_array_from_process_local_data(sharding, values) for name, values in batch.items()}


def _spec(path: Path, shape: tuple[int, ...], value: str, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    if value == "replicated":
        return PartitionSpec()
    if value == "fsdp":
        return _fsdp_spec(shape, mesh.shape["fsdp"])
    if value in _TENSOR:
        return _tensor_spec(path, shape, value, mesh)
    axes = [None if axis.strip() == "None" else axis.strip() for axis in value.split(",")]
    if unknown := [axis for axis in axes if axis not in (None, *AXES)]:
        raise InputError(
            f"`{value}` for `{path}`: no mesh axis {unknown[0]!r}; use replicated, fsdp, tensor, tensor+fsdp, or None "
            f"and {AXES}"
        )
    used = [axis for axis in axes if axis is not None]
    if len(axes) != len(shape) or len(set(used)) != len(used):
        raise InputError(f"`{value}` for `{path}` of shape {shape}: name one axis or None per dimension, none twice")
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise InputError(
                f"`{value}` for `{path}` of shape {shape}: {axis}={mesh.shape[axis]} does not divide {size}"
            )
    return PartitionSpec(*axes)


def _fsdp_spec(shape: tuple[int, ...], num_shards: int, axes: Sequence[str | None] = ()) -> PartitionSpec:
    """Splits the largest dimension that divides, of those that `axes` leaves whole."""
    axes = list(axes) or [None] * len(shape)
    divisible = [axis for axis, size in enumerate(shape) if axes[axis] is None and size % num_shards == 0]
    if num_shards > 1 and math.prod(shape) >= _SMALLEST_SHARDED and divisible:
        axes[max(divisible, key=lambda axis: shape[axis])] = "fsdp"
    return PartitionSpec(*axes) if any(axes) else PartitionSpec()


def _tensor_spec(path: Path, shape: tuple[int, ...], value: str, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    split, num_parts = _tensor_axis(path, shape), mesh.shape["model"]
    if split is None or num_parts == 1:
        return _spec(path, shape, _TENSOR[value], mesh)
    if shape[split] % num_parts:
        raise InputError(
            f"`{value}` for `{path}` of shape {shape}: mesh.model={num_parts} does not divide {shape[split]}"
        )
    axes = ["model" if axis == split else None for axis in range(len(shape))]
    return _fsdp_spec(shape, mesh.shape["fsdp"] if _TENSOR[value] == "fsdp" else 1, axes)


def _split_leaves(partition: Partition, config: MeshConfig) -> dict[Path, tuple[int, ...]]:
    """Returns the shape on each device of what `tensor` splits in layers that it splits as a whole."""
    leaves = {leaf.path: leaf for leaf in partition.leaves if leaf.kind == "parameter"}
    trainable, frozen = (match_rules(leaves, rules) for rules in (config.trainable, config.frozen))
    axes = {path: axis for path, leaf in leaves.items() if (axis := _tensor_axis(path, leaf.shape)) is not None}
    split = {path for path in axes if (trainable if leaves[path].moves else frozen)[path] in _TENSOR}
    whole = {_layer(path) for path in axes.keys() - split}
    shapes = {path: list(leaves[path].shape) for path in split if config.model > 1 and _layer(path) not in whole}
    for path, shape in shapes.items():
        shape[axes[path]] //= config.model
    return {path: tuple(shape) for path, shape in shapes.items()}


def _layer(path: Path) -> Path:
    """Returns the attention or the network of two layers that a leaf of `_tensor_axis` is of."""
    return str(re.findall(r".*(?:attention|mlp)(?=/)", path)[0])


def _tensor_axis(path: Path, shape: tuple[int, ...]) -> int | None:
    """Returns the dimension of a transformer's leaf that the `model` axis splits; None where that leaves it whole."""
    if len(shape) > 2:
        return None
    if _COLUMNS.fullmatch(path):
        return len(shape) - 1
    return 0 if _ROWS.fullmatch(path) else None


def _fits(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    if len(sharding.spec) not in (0, len(shape)):
        return False
    sizes = [1 if axis is None else sharding.mesh.shape[axis] for axis in sharding.spec]
    return all(size % parts == 0 for size, parts in zip(shape, sizes, strict=False))


def _shortest(sharding: NamedSharding) -> NamedSharding:
    """Drops trailing `None`s as XLA does in what it returns: to jit, `P(a)` and `P(a, None)` are two types."""
    axes = list(sharding.spec)
    while axes and axes[-1] is None:
        axes.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def _put(leaf: Any, sharding: Sharding) -> jax.Array:
    """Places a leaf on devices of several processes, which `jax.device_put` does for what spans them already."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    values = np.asarray(leaf)

    def part(index: Any) -> np.ndarray:
        return values[index]

    return jax.make_array_from_callback(values.shape, sharding, part)


def _copy(leaf: Any) -> Any:
    # Going from one device to several, device_put keeps the old buffer as the first replica even with
    # may_alias=False (and newer jax keeps NumPy memory): copy where the leaf is, then move.
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, leaf.sharding, may_alias=False)
    return np.array(leaf)
