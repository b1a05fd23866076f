"""Stored features: the activations at the frozen boundary, a row per example, under a key over all they depend on.

Runs with other seeds, shots, methods and experiments read the rows they share and compute those that are missing, so
that each example goes once through the frozen stages.
"""

import contextlib
import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jxfer import data, distributed, models
from jxfer.claims import Holder
from jxfer.config import PREPROCESSING, Experiment, to_dict
from jxfer.data import VIEW_SEED, ArraySplit, Dataset, Joined, Prepare, PrepareViews, Split, Subset, Views
from jxfer.data.dataset import MEMORY_BYTES
from jxfer.extract import Prefix, compute_rows, make_feature_step
from jxfer.loop import Session
from jxfer.models.stages import stage_of
from jxfer.partition import fingerprint
from jxfer.state import Fixed, TrainState, merge_state
from jxfer.store import Fields, Store, open_store
from jxfer.typing import HostBatch, InputError, InterruptedRun

FORMAT = 1
"""Raised when rows written by an older jxfer must not be read any more."""

_TRIES = 3  # rows computed anew and read back damaged so often mean a broken disk


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What the stored features of a phase took; all zeros where the phase trains online."""

    boundary: str | None = None
    """The first stage that trains on them; None where there are none."""
    views: int = 0
    """Augmented views of each training example; 1 without augmentation."""
    examples: int = 0
    """Rows that the phase reads: every view of its training examples, and its validation examples."""
    computed: int = 0
    """Of these, how many this phase had to compute."""
    bytes: int = 0
    """Of the rows it reads."""
    flops: float = 0.0
    """Of computing all rows of its training examples, whoever did; validation is not counted, for any method."""
    weights: str = ""
    """Hash of what is frozen before the boundary: where variants differ there, each has rows of its own."""

    def to_json(self) -> dict[str, Any]:
        """Returns what the results record."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name != "weights"}
        return {"stored": self.boundary is not None, **fields, "reused": self.examples - self.computed}


def total(extractions: Iterable[Extraction]) -> Extraction:
    """Sums over the phases of a run; the boundaries of several that store are separated by commas."""
    stored = [extraction for extraction in extractions if extraction.boundary is not None]
    sums = {name: sum(getattr(each, name) for each in stored) for name in ("examples", "computed", "bytes")}
    flops = float(sum(each.flops for each in stored))
    boundary = ", ".join(dict.fromkeys(str(each.boundary) for each in stored)) or None
    return Extraction(boundary, max((each.views for each in stored), default=0), **sums, flops=flops)


@dataclasses.dataclass(frozen=True, eq=False)
class StoredSplit:
    """Features that are read from disk when they are asked for; `names` are those of the rows."""

    ids: np.ndarray
    labels: np.ndarray
    store: Store
    names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray) -> HostBatch:
        """Reads the rows at `indices`; raises InputError if one was damaged since the phase began."""
        names = [self.names[int(index)] for index in indices]
        # A thread that reads ahead may have found the damage before, and then the store has no such rows any more.
        arrays, damaged = ({}, names) if self.store.lacks(names) else self.store.read(names)
        if damaged:
            raise InputError("stored features were damaged while a run used them; start it again to compute them anew")
        return {**arrays, "label": self.labels[indices]}


@dataclasses.dataclass(frozen=True)
class Extractor:
    """What the features of one phase are made of, and with."""

    experiment: Experiment
    dataset: Dataset
    """The target."""
    boundary: str
    state: TrainState
    fixed: Fixed
    mesh: jax.sharding.Mesh
    session: Session
    title: str
    batch_size: int

    def fields(self) -> dict[str, Any]:
        """Returns all that the features of an example depend on, by name; its id names the example."""
        target, model = self.experiment.target, self.experiment.model
        kind, _, place = target.name.partition(":")
        return {
            "format": FORMAT,
            "data": self.dataset.name,
            "data version": self.dataset.version,
            "data place": str(Path(place).absolute()) if kind in ("folder", "table") else "",
            "tokens": _tokens_hash(self.dataset),
            **{name: to_dict(getattr(target, name)) for name in (*PREPROCESSING, "text_columns")},
            "augment": None,
            "model": model.name,
            "size": repr(models.size_of(model)),
            "dtype": model.dtype,
            "weights": prefix_hash(self.state, self.fixed, self.boundary),
            "boundary": self.boundary,
            "mode": "inference",  # of norms and dropout: whatever is before a boundary is frozen
            "code": _code_hash(),
            "jax": jax.__version__,
            "backend": jax.default_backend(),
        }

    def split(self, fields: Fields, prepare: Callable[..., Any], source: Split) -> tuple[Split, float, int]:
        """Returns the features of a split, the operations one takes, and how many had to be computed.

        The ids of the split name the rows.

        Raises:
          InputError: the cache cannot be written, is limited to less, or does not keep what is written.
          InterruptedRun: once the session should stop.
        """
        step = make_feature_step(prepare, stop=self.boundary)
        prefix = Prefix(step, self.state, self.fixed, self.mesh, self.batch_size)
        store = open_store(fields, lambda: prefix.describe(source), note=self.session.note)
        names, computed = source.ids.tolist(), 0
        in_memory = len(names) * store.layout.row_bytes <= MEMORY_BYTES
        title = f"{self.title} · features before {self.boundary}"
        for _ in range(_TRIES):
            if _of_all(store.lacks(names)):
                with self._alone(store, title):
                    store.refresh()
                    if lacking := _of_all(store.lacks(names)):
                        compute_rows(prefix, store, source, lacking, session=self.session, title=title)
                        computed += len(lacking)
            if not in_memory and not any(distributed.gather(store.check(names))):
                return StoredSplit(source.ids, source.labels, store, names), store.row_flops, computed
            if in_memory:
                arrays, damaged = store.read(names)
                if not any(distributed.gather(len(damaged))):
                    return ArraySplit(source.ids, source.labels, arrays), store.row_flops, computed
        raise InputError("features are damaged each time they are written; set JXFER_CACHE to a folder on another disk")

    def _alone(self, store: Store, title: str) -> contextlib.AbstractContextManager[Any]:
        """Waits while another worker computes rows of the same key: they may be the very same ones."""

        def waiting(holder: Holder) -> None:
            if self.session.should_stop():
                raise InterruptedRun(f"stopped while waiting for features from {holder}")
            self.session.progress(f"{title}: waiting for {holder}", 0, 0)

        # The processes of one worker compute together, so none of them may wait for another.
        return store.alone(waiting) if distributed.count() == 1 else contextlib.nullcontext()


def stored_splits(
    extractor: Extractor, train: Split, validation: Split, *, num_steps: int
) -> tuple[Split, Split, Extraction]:
    """Returns the features of a phase's training and validation examples, and what they took.

    Args:
      extractor: of the phase.
      train: with `views`, each example has a row per augmented view, of no more views than the phase has epochs.
      validation: never augmented.
      num_steps: of the phase.

    Raises:
      InputError, InterruptedRun: see `Extractor.split`.
    """
    experiment = extractor.experiment
    fields = extractor.fields()
    plain = Prepare(experiment.target, num_classes=0, train=False)
    stored: tuple[Split, Split]
    if experiment.views is None:
        views = 1
        both, flops, computed = extractor.split(fields, plain, Joined((train, validation)))
        stored = _part(both, 0, len(train)), _part(both, len(train), len(both))
    else:
        views = min(experiment.views, -(-num_steps * experiment.train.batch_size // len(train)))
        augmented = {**fields, "augment": to_dict(experiment.target.augment), "augment seed": VIEW_SEED}
        rows, flops, num_views = extractor.split(augmented, PrepareViews(experiment.target), _Viewed(train, views))
        checked, _, num_plain = extractor.split(fields, plain, validation)
        stored, computed = (Views(rows, views), checked), num_views + num_plain
    num_rows = len(train) * views + len(validation)
    row = stored[1].read(np.zeros(1, int))
    num_bytes = num_rows * sum(value.nbytes for name, value in row.items() if name != "label")
    took = Extraction(
        extractor.boundary, views, num_rows, computed, num_bytes, flops * len(train) * views, fields["weights"]
    )
    return *stored, took


def prefix_hash(state: TrainState, fixed: Fixed, boundary: str) -> str:
    """Returns a hash of the parameters and statistics that the stages before the boundary may use."""
    definition, arrays = fixed.definition, merge_state(state, fixed)
    model: Any = definition.partition.assemble(definition.eval_graphdef, arrays)
    after = tuple(model.stages[model.stages.index(boundary) :])
    random = {leaf.path for leaf in definition.partition.leaves if leaf.kind == "random"}
    used = {path: value for path, value in arrays.items() if path not in random and stage_of(path, after) is None}
    lines = [f"{path} {digest}" for path, digest in sorted(fingerprint(used).items())]
    lines += [f"tap {name}" for name, _ in getattr(model, "taps", ())]  # its features are of several stages
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _of_all(indices: list[int]) -> list[int]:
    """Returns the indices that any process has: their caches may differ, and all compute together."""
    digest = hashlib.sha256(np.asarray(indices, np.int64).tobytes()).hexdigest()
    if len(set(distributed.gather(digest))) == 1:
        return indices
    return sorted(set().union(*distributed.gather(indices)))


@functools.cache
def _code_hash() -> str:
    """Returns a hash of the code that makes features: models, and the reading and preparing of examples."""
    digest = hashlib.sha256()
    for module in (models, data):
        for path in sorted(Path(str(module.__file__)).parent.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=8)
def _tokens_hash(dataset: Dataset) -> str:
    """Returns a hash of all texts as token ids, which a tokeniser's name does not pin; empty for other inputs."""
    if dataset.input != "text":
        return ""
    digest = hashlib.sha256()
    for split in dataset.splits.values():
        digest.update(np.ascontiguousarray(split.read(np.arange(len(split)))["text"]).data)
    return digest.hexdigest()[:16]


def _part(split: Split, start: int, stop: int) -> Split:
    if not isinstance(split, ArraySplit):
        return Subset(split, np.arange(start, stop))
    arrays = {name: value[start:stop] for name, value in split.arrays.items()}
    return ArraySplit(split.ids[start:stop], split.labels[start:stop], arrays)


@dataclasses.dataclass(frozen=True, eq=False)
class _Viewed:
    """The examples of a split once per view, view after view, each with what its random changes come from."""

    base: Split
    views: int

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """Names of the rows, [views × N] str."""
        return np.array([f"{name}#{view}" for view in range(self.views) for name in self.base.ids.tolist()])

    @property
    def labels(self) -> np.ndarray:
        """Labels of the rows, [views × N] int32."""
        return np.tile(self.base.labels, self.views)

    def __len__(self) -> int:
        return len(self.base) * self.views

    def read(self, indices: np.ndarray) -> HostBatch:
        """Reads the examples, with `example` [B], a hash of each one's id, and `view` [B]."""
        num = len(self.base)
        return {
            **self.base.read(indices % num),
            "example": self._hashes[indices % num],
            "view": (indices // num).astype(np.uint32),
        }

    @functools.cached_property
    def _hashes(self) -> np.ndarray:
        names = self.base.ids.tolist()
        return np.array([zlib.crc32(name.encode(errors="surrogateescape")) for name in names], np.uint32)
