"""Whether an experiment's settings can be meant: types, ranges, and what fits what, before anything runs."""

import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeAlias

from jxfer.config import (
    AugmentConfig,
    DataConfig,
    Experiment,
    Group,
    MeshConfig,
    Method,
    ModelConfig,
    Phase,
    SearchConfig,
    SourceConfig,
    TrainConfig,
)
from jxfer.origins import KINDS
from jxfer.paths import nearest
from jxfer.typing import InputError

UNIONS = (types.UnionType, typing.Union)
"""How Python spells `A | B`, which depends on what A is."""

_Range: TypeAlias = tuple[str, Callable[[Any], bool]]
"""What a value must be, in words and as a test."""

_AT_LEAST_1: _Range = ("at least 1", lambda value: value >= 1)
_POSITIVE: _Range = ("more than 0", lambda value: value > 0)
_NOT_NEGATIVE: _Range = ("0 or more", lambda value: value >= 0)
_NOT_ZERO: _Range = ("other than 0", lambda value: value != 0)
_INSIDE: _Range = ("more than 0 and less than 1", lambda value: 0 < value < 1)
_BELOW_1: _Range = ("0 or more and less than 1", lambda value: 0 <= value < 1)
_SHARE: _Range = ("more than 0 and at most 1", lambda value: 0 < value <= 1)
_FOLDER: _Range = (
    "letters, digits and `._-`, the first a letter or digit: it names a folder",
    lambda value: re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value) is not None,
)


def _origin(*others: str) -> _Range:
    """Returns the range of a string that says where something published lies, or is of another kind."""
    kinds = (*(other.partition(":")[0] for other in others), *KINDS)
    words = ", ".join(f"`{other}`" for other in others) + ", `hf:OWNER/NAME[@REVISION]`, `file:PATH` or `pkg:NAME`"
    return words, lambda value: any(value.startswith(f"{kind}:") for kind in kinds)


_FINITE: _Range = ("finite", lambda value: not isinstance(value, float) or math.isfinite(value))

_RANGES: dict[type, dict[str, _Range]] = {
    AugmentConfig: {
        "crop_padding": _NOT_NEGATIVE,
        "brightness": _BELOW_1,
        "mixup": _NOT_NEGATIVE,
        "cutmix": _NOT_NEGATIVE,
    },
    DataConfig: {
        "image_size": _AT_LEAST_1,
        "channels": ("1 or 3", lambda value: value in (1, 3)),
        "crop_fraction": _SHARE,
        "tokenizer": _origin("words:N", "vectors:FILE"),
        "max_tokens": _AT_LEAST_1,
        "sample_rate": _AT_LEAST_1,
        "seconds": _POSITIVE,
        "std": _NOT_ZERO,
        "test_fraction": _INSIDE,
        "validation_fraction": _INSIDE,
    },
    TrainConfig: {
        "num_steps": _AT_LEAST_1,
        "batch_size": _AT_LEAST_1,
        "learning_rate": _POSITIVE,
        "base_batch_size": _AT_LEAST_1,
        "weight_decay": _NOT_NEGATIVE,
        "momentum": _BELOW_1,
        "warmup_steps": _NOT_NEGATIVE,
        "clip_norm": _POSITIVE,
        "num_microbatches": _AT_LEAST_1,
        "ema_decay": _INSIDE,
        "label_smoothing": _BELOW_1,
        "eval_every": _AT_LEAST_1,
        "log_every": _AT_LEAST_1,
        "checkpoint_every": _AT_LEAST_1,
        "keep_checkpoints": _AT_LEAST_1,
    },
    MeshConfig: {"fsdp": _AT_LEAST_1, "model": _AT_LEAST_1},
    SourceConfig: {
        "weights": _origin("run:DIR"),
        "seed": _NOT_NEGATIVE,
    },
    ModelConfig: {},
    SearchConfig: {
        "learning_rate": _POSITIVE,
        "weight_decay": _NOT_NEGATIVE,
        "label_smoothing": _BELOW_1,
        "penalty_weight": _NOT_NEGATIVE,
        "head_seed": _NOT_NEGATIVE,
        "adapter_scale": _POSITIVE,
        "samples": _AT_LEAST_1,
        "population": _AT_LEAST_1,
    },
    Group: {"learning_rate_scale": _NOT_NEGATIVE, "weight_decay_scale": _NOT_NEGATIVE},
    Phase: {"share": _SHARE, "layer_decay": _SHARE},
    Method: {"name": _FOLDER},
    Experiment: {"name": _FOLDER, "shots": _AT_LEAST_1, "seeds": _AT_LEAST_1, "views": _AT_LEAST_1},
}


def check(experiment: Experiment) -> None:
    """Checks every setting: its type, its range, and that the settings fit one another.

    Raises:
      InputError: naming the field, its value and what it takes.
    """
    _check_fields("", experiment)
    for place, train in (("source.train", experiment.source.train), ("train", experiment.train)):
        _check_train(place, train)
    for place, data in (("source.data", experiment.source.data), ("target", experiment.target)):
        _check_data(place, data)
    if not experiment.shots:
        raise InputError("shots is empty; give numbers of examples per class, or `none` for all there are")
    _check_distinct("shots", experiment.shots)
    _check_distinct("methods", [method.name for method in experiment.methods])
    _check_views(experiment)
    _check_search(experiment.search)
    for method in experiment.methods:
        _check_method(method)
        _check_steps(method, experiment.train)


def describe(hint: Any) -> str:
    """Says in words what a field of this type takes, such as `a number or none`."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, args))
    if typing.get_origin(hint) in UNIONS:
        return " or ".join(describe(kind) for kind in args)
    if typing.get_origin(hint) is tuple and args[-1] is Ellipsis:
        return f"several, each {describe(args[0])}"
    if typing.get_origin(hint) is tuple:
        return f"a pair of {describe(args[0])} and {describe(args[1])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}
    return words.get(hint) or f"a {hint.__name__}"


def near_choice(value: Any, hint: Any) -> str:
    """Returns `; nearest: ...` where the type is a choice among words, and nothing elsewhere."""
    return f"; nearest: {nearest(str(value), typing.get_args(hint), n=1)}" if typing.get_origin(hint) is Literal else ""


def _check_fields(place: str, config: Any) -> None:
    for name, hint in typing.get_type_hints(type(config)).items():
        value, field = getattr(config, name), f"{place}{name}"
        if not _conforms(value, hint):
            raise InputError(f"{field} is {value!r}; it takes {describe(hint)}{near_choice(value, hint)}")
        items = list(_items(field, value))
        need, test = _RANGES[type(config)].get(name, _FINITE)
        for _, item in items:
            if item is not None and not (_FINITE[1](item) and test(item)):
                raise InputError(f"{field} is {value!r}; it must be {need}")
        for item_field, item in items:
            if type(item) in _RANGES:
                _check_fields(f"{item_field}.", item)


def _items(field: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the value, or what a tuple and the tuples inside it hold, with the place of each."""
    if not isinstance(value, tuple):
        yield field, value
        return
    for i, item in enumerate(value):
        yield from _items(f"{field}[{i}]", item)


def _conforms(value: Any, hint: Any) -> bool:
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return value in args
    if typing.get_origin(hint) in UNIONS:
        return any(_conforms(value, kind) for kind in args)
    if typing.get_origin(hint) is tuple:
        kinds = args[:1] * len(value) if isinstance(value, tuple) and args[-1] is Ellipsis else args
        return isinstance(value, tuple) and len(kinds) == len(value) and all(map(_conforms, value, kinds))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def _check_search(search: SearchConfig) -> None:
    tried = {name: values for name, values in vars(search).items() if isinstance(values, tuple)}
    for name, values in tried.items():
        _check_distinct(f"search.{name}", values)
    if search.samples is not None and not any(tried.values()):
        raise InputError(
            f"search.samples is {search.samples}, but no setting is searched; give two values of one, "
            "such as search.learning_rate"
        )


def _check_train(place: str, train: TrainConfig) -> None:
    if train.batch_size % train.num_microbatches:
        sizes = f"{place}.batch_size is {train.batch_size} and {place}.num_microbatches {train.num_microbatches}"
        raise InputError(f"{sizes}; the batch must divide into equal parts")
    if train.warmup_steps >= train.num_steps:
        steps = f"{place}.warmup_steps is {train.warmup_steps} and {place}.num_steps {train.num_steps}"
        raise InputError(f"{steps}; the warm-up must be shorter than the training")


def _check_data(place: str, data: DataConfig) -> None:
    sizes = {len(values) for values in (data.mean, data.std) if values is not None}
    if 0 in sizes or (len(sizes) == 2 and 1 not in sizes):
        counts = f"{place}.mean has {len(data.mean or ())} values and {place}.std {len(data.std or ())}"
        raise InputError(f"{counts}; give one for all channels or one for each")


def _check_views(experiment: Experiment) -> None:
    augment, views = experiment.target.augment, experiment.views
    if views is None:
        return
    if experiment.features == "off":
        raise InputError(f"views is {views}, but features=off stores none; set views=none or features=auto")
    if not augment.active:
        raise InputError(f"views is {views}, but no image changes; set target.augment.flip=true, say, or views=none")
    for name in ("mixup", "cutmix"):
        if getattr(augment, name):
            raise InputError(
                f"views is {views}, but target.augment.{name} mixes the examples of each batch anew, which views of "
                f"single examples cannot store; set views=none or target.augment.{name}=0"
            )


def _check_distinct(place: str, values: Iterable[Any]) -> None:
    values = list(values)
    for value in values:
        if values.count(value) > 1:
            raise InputError(f"{place} has {value!r} more than once; each must differ")


def _check_method(method: Method) -> None:
    labels = list(dict.fromkeys(label for _, label in method.rules))
    _check_distinct(f"method `{method.name}`: phases", [phase.name for phase in method.phases])
    for phase in method.phases:
        place = f"method `{method.name}`, phase `{phase.name}`"
        if not phase.train and not phase.statistics:
            raise InputError(f"{place} trains nothing; give it labels in `train`: {', '.join(labels)}")
        for label in phase.train:
            if label not in labels:
                raise InputError(
                    f"{place} trains the label `{label}`, which no rule gives; nearest: {nearest(label, labels)}"
                )
        for label, _ in phase.groups:
            if label not in phase.train:
                raise InputError(f"{place} has a group for `{label}`, which it does not train; add it to `train`")
    total = math.fsum(phase.part for phase in method.phases)
    if any(phase.solver is None for phase in method.phases) and not math.isclose(total, 1.0, abs_tol=1e-6):
        raise InputError(f"method `{method.name}`: the shares of its phases add up to {total:g}; make it 1")


def _check_steps(method: Method, train: TrainConfig) -> None:
    stepping = [phase for phase in method.phases if phase.solver is None]
    shares = [phase.share for phase in stepping]
    ends = [round(sum(shares[: i + 1]) * train.num_steps) for i in range(len(shares))]
    for phase, start, end in zip(stepping, [0, *ends], ends, strict=False):
        steps = f"method `{method.name}`, phase `{phase.name}` gets {end - start} of {train.num_steps} steps"
        if end <= start:
            raise InputError(f"{steps}; raise its share of {phase.share:g}, or train.num_steps")
        if train.warmup_steps >= end - start:
            raise InputError(
                f"{steps} and train.warmup_steps is {train.warmup_steps}; lower that, or raise train.num_steps"
            )
