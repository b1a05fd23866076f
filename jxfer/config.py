"""Every setting and every default: frozen dataclasses, and their way to JSON, hashes and back."""

import dataclasses
import hashlib
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

from jxfer.typing import InputError

Schedule = Literal["constant", "cosine", "linear"]
OptimizerName = Literal["sgd", "adamw", "lamb", "lion"]
DType = Literal["float32", "bfloat16"]
FrozenDType = Literal["float32", "bfloat16", "int8"]
NonFinite = Literal["stop", "skip", "rollback"]


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random changes of the training images, made on the device inside the jitted step; all off by default."""

    crop_padding: int = 0
    """Pixels of zero padding before a random crop back to the original size."""
    flip: bool = False
    """Mirror left-right with probability 1/2."""
    brightness: float = 0.0
    """Largest relative change of brightness, contrast and (three channels) saturation."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution (Zhang et al. 2018, arXiv:1710.09412); 0 is off."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta distribution (Yun et al. 2019, arXiv:1905.04899); 0 is off."""

    @property
    def active(self) -> bool:
        """Whether any augmentation is on."""
        return self != AugmentConfig()


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A data set and how its examples are prepared; what is None here comes with the source's weights, if they say."""

    name: str = "tfds:jxfer_digits"
    """`tfds:NAME[/CONFIG][:VERSION]`, `tfds:DIR` for a prepared folder, `folder:PATH`, or
    `table:FILE` (csv, tsv, jsonl)."""
    image_size: int | None = None
    """Side in pixels to which images are resized on reading; None at last keeps the size they all have."""
    channels: int | None = None
    """1 or 3 to convert on reading; None at last keeps what the data set has."""
    crop_fraction: float | None = None
    """Share of the resized image's short side that the crop of its middle keeps; None at last is 1."""
    resample: Literal["bilinear", "bicubic"] | None = None
    """How images are resized; None at last is bilinear."""
    mean: tuple[float, ...] | None = None
    """Subtracted per channel from pixels in [0, 1], in the channels' final order; None at last is 0.5."""
    std: tuple[float, ...] | None = None
    """Divided by, after the mean; None at last is 0.5."""
    channel_order: Literal["rgb", "bgr"] | None = None
    """None at last is rgb."""
    tokenizer: str | None = None
    """`hf:OWNER/NAME`, `pkg:NAME` or `file:PATH` of a `tokenizer.json`, or `words:N` for the N most frequent words of
    the training texts; None at last is words:20000."""
    max_tokens: int | None = None
    """Length at which texts are cut; None at last is 128."""
    sample_rate: int | None = None
    """Samples per second to which sounds are resampled on reading; None at last keeps what they all have."""
    seconds: float | None = None
    """Length to which sounds are cut or filled with silence; None at last is that of the longest."""
    text_columns: tuple[str, ...] = ("text",)
    """Of a table: the columns, by name, or by number from 1 where the file has no header, whose texts are joined."""
    label_column: str = "label"
    """Of a table, likewise."""
    test_fraction: float = 0.5
    """Share of each class held out as the test split when the data set has none; the same for every seed."""
    validation_fraction: float = 0.3
    """Share of each class, of what is not test, drawn by seed as validation when the data set has no such split."""
    augment: AugmentConfig = AugmentConfig()


PREPROCESSING = (
    "image_size",
    "channels",
    "crop_fraction",
    "resample",
    "mean",
    "std",
    "channel_order",
    "tokenizer",
    "max_tokens",
    "sample_rate",
    "seconds",
)
"""The fields of `DataConfig` that travel with weights."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network: a name from `jxfer list models` and the type it computes in (parameters stay float32)."""

    name: str = "convnet"
    """`auto` is the network that the source's weights are of."""
    dtype: DType = "float32"
    size: tuple[tuple[str, str], ...] = ()
    """Fields of the named size to change, such as `(("num_layers", "2"), ("scan", "true"))`."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How one model is trained; `num_steps` counts optimizer updates over all phases."""

    num_steps: int = 200
    batch_size: int = 64
    """Global batch size, whatever the number of devices."""
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 1e-3
    base_batch_size: int | None = None
    """Batch size that `learning_rate`, searched ones too, is meant for: for `batch_size` it is scaled linearly with sgd
    and by the square root with the adaptive optimizers. None takes it as it is."""
    weight_decay: float = 1e-4
    """Applied to parameters of two and more dimensions (kernels), not to biases and norms."""
    momentum: float = 0.9
    """Of sgd."""
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    clip_norm: float | None = None
    """Largest global norm of the gradients of what moves; None does not clip."""
    num_microbatches: int = 1
    """Gradient accumulation: the batch is processed in this many equal parts before one update."""
    remat: bool = False
    """Rematerialisation: keep for the backward pass only what goes into each block, and run the block again there.
    On CPUs XLA undoes this but where blocks run as a loop (`--model.size scan=true`)."""
    frozen_dtype: FrozenDType = "float32"
    """Type in which frozen kernels and embeddings are held. Fewer bits round them once when a phase begins: what is
    then trained on, measured, stored and saved is the rounded model."""
    ema_decay: float | None = None
    """Evaluate an exponential moving average of what moves; None keeps none."""
    label_smoothing: float = 0.0
    non_finite: NonFinite = "stop"
    """What follows a loss or gradient that is not finite: `stop` ends the run, `skip` leaves out that step's update,
    `rollback` goes back to the last checkpoint, or the phase's start, and on with the data in another order."""
    eval_every: int = 50
    """Optimizer steps between looks at the validation split."""
    log_every: int = 25
    checkpoint_every: int | None = None
    """Steps between checkpoints to resume from; None saves only the finished run."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay, besides the best on validation."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; `data` takes what the others leave."""

    fsdp: int = 1
    model: int = 1
    frozen: tuple[tuple[str, str], ...] = (("**", "replicated"),)
    """Placement rules of frozen parameters: pattern -> `replicated`, `fsdp`, `tensor` (the blocks of transformers split
    over `model`), `tensor+fsdp` or axes such as `None,model`."""
    trainable: tuple[tuple[str, str], ...] = (("**", "fsdp"),)
    """Placement rules of trainable parameters and their optimizer state."""


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """What the weights come from: a data set to pre-train on once, the weights of a finished run, or published ones."""

    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    weights: str | None = None
    """`run:DIR`, the weights of a finished run; `hf:OWNER/NAME[@REVISION]`, `file:PATH` or `pkg:NAME`, published ones;
    None pre-trains on `data`."""
    load: tuple[tuple[str, str], ...] = ()
    """Rules for published weights: pattern over parameter paths -> `resize` or `reinitialise`, or over the file's own
    names -> `skip`. What no rule names must be in the file, fit, and be used."""
    classes: tuple[str, ...] = ()
    """Names of the published head's classes, in order, where the files do not say."""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """Settings tried for every method alike; validation chooses. Empty means the value of `train` alone.

    Without `samples` every combination is tried.
    """

    learning_rate: tuple[float, ...] = ()
    weight_decay: tuple[float, ...] = ()
    label_smoothing: tuple[float, ...] = ()
    penalty_weight: tuple[float, ...] = ()
    """Of the methods that have penalties."""
    head_seed: tuple[int, ...] = ()
    """Seeds of the random weights of new heads and adapters."""
    adapter_scale: tuple[float, ...] = ()
    """Of the methods that have adapters."""
    samples: int | None = None
    """Random search with this budget: so many settings, each number drawn between the smallest and the largest value
    given, log-uniformly where all are positive."""
    population: int | None = None
    """The most variants that train together as one population; None is as many as fit into the device's memory, 1
    trains them one after the other."""


@dataclasses.dataclass(frozen=True)
class Group:
    """How the parameters of one label train, relative to the run's settings."""

    learning_rate_scale: float = 1.0
    weight_decay_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Phase:
    """A partition with a duration: which labels train, for what share of the run's steps."""

    name: str
    train: tuple[str, ...]
    """Labels that train; every other label is frozen."""
    share: float = 1.0
    """Part of the run's `num_steps`; the shares of a method's phases without a solver add up to 1."""
    groups: tuple[tuple[str, Group], ...] = ()
    """Label -> group, for the labels that differ from `Group()`."""
    layer_decay: float = 1.0
    """Factor of the learning rate per stage of distance from the head."""
    statistics: bool = False
    """Whether normalisation statistics of frozen layers are estimated anew from the training batches."""
    solver: Any = None
    """From `jxfer.solvers`: finds the head from stored features, in place of steps; validation chooses its setting."""

    @property
    def part(self) -> float:
        """Its share of the steps; none where a solver finds the head."""
        return self.share if self.solver is None else 0.0


@dataclasses.dataclass(frozen=True)
class Method:
    """How to transfer, as data: labels over paths, alterations, penalties, and what trains when."""

    name: str
    summary: str = ""
    """One line for `jxfer list methods`."""
    start: Literal["source", "scratch"] = "source"
    rules: tuple[tuple[str, str], ...] = (("head/**", "head"), ("**", "backbone"))
    """Pattern -> label; `{last}` stands for the last stage with parameters before the head."""
    surgeries: tuple[Any, ...] = ()
    penalties: tuple[Any, ...] = ()
    phases: tuple[Phase, ...] = ()
    """In order; none means that nothing trains."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A source, a target, a model, and the methods, shots and seeds to compare."""

    name: str
    source: SourceConfig = SourceConfig()
    target: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    search: SearchConfig = SearchConfig()
    mesh: MeshConfig = MeshConfig()
    methods: tuple[Method, ...] = ()
    shots: tuple[int | None, ...] = (None,)
    """Labelled training examples per class; `none` (Python None) takes all there are."""
    seeds: int = 5
    save: Literal["full", "delta"] = "full"
    """Whether a finished run keeps all weights, or only those that differ from its source's, with the source's hash."""
    features: Literal["auto", "off"] = "auto"
    """`auto` trains on stored features wherever that gives the same result; `off` always runs the whole model."""
    views: int | None = None
    """Augmented views of each training example to store, of which epoch e trains on number e mod `views`; None trains
    online wherever the training images are augmented."""
    wandb: bool = False
    """Also log to Weights & Biases, if it is installed."""


def to_dict(config: Any) -> Any:
    """Returns `config` as JSON-ready dicts, lists and scalars; others' dataclasses carry their type's name."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        foreign = type(config).__module__ != __name__
        return {"type": type(config).__name__, **fields} if foreign else fields
    if isinstance(config, (tuple, list)):
        return [to_dict(value) for value in config]
    if isinstance(config, dict):
        return {name: to_dict(value) for name, value in config.items()}
    return config


def from_dict(cls: Any, values: Any) -> Any:
    """Rebuilds what `to_dict` wrote, for a type of this file without surgeries or penalties.

    Raises:
      InputError: a field is unknown, so the file was written by another version or by hand.
    """
    if dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls)
        if unknown := sorted(set(values) - set(hints)):
            raise InputError(
                f"{getattr(cls, '__name__', cls)} has no field {unknown[0]!r}; its fields: {', '.join(hints)}"
            )
        return typing.cast(Any, cls)(**{name: from_dict(hints[name], value) for name, value in values.items()})
    if typing.get_origin(cls) is tuple and values is not None:
        args = typing.get_args(cls)
        element = [args[0]] * len(values) if args[-1] is Ellipsis else args
        return tuple(from_dict(kind, value) for kind, value in zip(element, values, strict=True))
    if typing.get_origin(cls) in (types.UnionType, typing.Union) and values is not None:
        return from_dict(next(kind for kind in typing.get_args(cls) if kind is not type(None)), values)
    return values


def config_hash(config: Any) -> str:
    """Returns the first 16 hex digits of the SHA-256 of the config's canonical JSON."""
    text = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save(config: Any, path: Path) -> None:
    """Writes the resolved config as indented JSON, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(to_dict(config), indent=2) + "\n")
    temporary.replace(path)
