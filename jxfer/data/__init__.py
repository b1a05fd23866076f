"""Sources of examples, pinned splits, batches, and augmentation."""

from jxfer.data.augment import Prepare
from jxfer.data.dataset import ArraySplit, Dataset, LazySplit, Split, Subset
from jxfer.data.load import load_dataset, names
from jxfer.data.pipeline import batches, eval_batches
from jxfer.data.subsets import Drawn, draw

__all__ = [
    "ArraySplit",
    "Dataset",
    "Drawn",
    "LazySplit",
    "Prepare",
    "Split",
    "Subset",
    "batches",
    "draw",
    "eval_batches",
    "load_dataset",
    "names",
]
