"""Sources of examples, pinned splits, batches, and augmentation."""

from jxfer.data.augment import NORMAL, VIEW_SEED, Prepare, PrepareViews
from jxfer.data.dataset import ArraySplit, Dataset, Joined, LazySplit, Split, Subset, Views
from jxfer.data.load import encode_texts, keep_words, load_dataset, names, texts_of, tokenizer_json
from jxfer.data.opening import read_file
from jxfer.data.pipeline import batches, eval_batches
from jxfer.data.subsets import Drawn, draw

__all__ = [
    "NORMAL",
    "VIEW_SEED",
    "ArraySplit",
    "Dataset",
    "Drawn",
    "Joined",
    "LazySplit",
    "Prepare",
    "PrepareViews",
    "Split",
    "Subset",
    "Views",
    "batches",
    "draw",
    "encode_texts",
    "eval_batches",
    "keep_words",
    "load_dataset",
    "names",
    "read_file",
    "texts_of",
    "tokenizer_json",
]
