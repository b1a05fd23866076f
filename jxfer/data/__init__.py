"""Sources of examples, pinned splits, batches, and augmentation."""

from jxfer.data.augment import NORMAL, Prepare
from jxfer.data.dataset import ArraySplit, Dataset, LazySplit, Split, Subset
from jxfer.data.load import encode_texts, keep_words, load_dataset, names, texts_of, tokenizer_json
from jxfer.data.opening import read_file
from jxfer.data.pipeline import batches, eval_batches
from jxfer.data.subsets import Drawn, draw

__all__ = [
    "NORMAL",
    "ArraySplit",
    "Dataset",
    "Drawn",
    "LazySplit",
    "Prepare",
    "Split",
    "Subset",
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
