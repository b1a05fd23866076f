"""Tables of texts, images and sounds: columns, splits, classes, and every row that does not fit named."""

import json

import numpy as np
import pytest
from PIL import Image

from jxfer.config import DataConfig
from jxfer.data import ArraySplit, draw, load_dataset, read_file
from jxfer.typing import InputError

pytest.importorskip("tokenizers")
ROWS = [("good film", "pos"), ("bad film", "neg"), ("a good one", "pos"), ("what a bad one", "neg")]


def load(path, **settings):
    return load_dataset(DataConfig(name=f"table:{path}", max_tokens=4, **settings))


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


def csv_of(rows, header="text,label"):
    return "\n".join([header, *(",".join(row) for row in rows)]) + "\n"


@pytest.fixture
def table(tmp_path):
    return write(tmp_path / "reviews.csv", csv_of(ROWS))


def test_rows_of_texts_become_token_ids(table):
    dataset = load(table)
    split = dataset.splits["train"]
    assert isinstance(split, ArraySplit)
    assert (dataset.name, dataset.input, dataset.input_shape) == ("reviews.csv", "text", (4,))
    assert dataset.class_names == ("neg", "pos")
    assert split.labels.tolist() == [1, 0, 1, 0]
    assert split.ids.tolist() == ["line 2", "line 3", "line 4", "line 5"]
    tokens = split.read(np.arange(4))["text"]
    assert tokens.dtype == np.int32
    assert ((tokens > 0).sum(axis=1) == [2, 2, 3, 4]).all()
    assert tokens[0, 1] == tokens[1, 1]  # film


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", 'label\ttext\npos\tgood "film"\nneg\tbad, film\nneg\t5" wide\npos\tx\n'),
        (
            "a.jsonl",
            '{"text": "good \\"film\\"", "label": "pos"}\n\n{"label": "neg", "text": "bad, film", "more": [1]}\n' * 2,
        ),
        (
            "A.CSV",
            '\ufefftext,label\r\n"good ""film""",pos\r\n"bad, film\nof two lines",neg\r\n' + "x,pos\r\ny,neg\r\n",
        ),
    ],
)
def test_every_format_is_read_with_quotes_commas_and_blank_lines(tmp_path, name, text):
    dataset = load(write(tmp_path / name, text))
    assert dataset.class_names == ("neg", "pos")
    assert len(dataset.splits["train"]) == 4
    first = dataset.splits["train"].read(np.array([0]))["text"][0]
    assert (first > 0).sum() == 4  # good " film "


def test_without_a_header_columns_are_numbered_and_texts_joined(tmp_path):
    rows = [("3", "Oil up", "prices rise"), ("10", "Goal", "they win"), ("3", "Oil", "down"), ("10", "x", "")]
    path = write(tmp_path / "news.csv", "\n".join(",".join(f'"{field}"' for field in row) for row in rows))
    dataset = load(path, text_columns=("2", "3"), label_column="1")
    assert dataset.class_names == ("3", "10"), "numbers in the order of their values"
    assert dataset.splits["train"].ids[0] == "line 1"
    assert (dataset.splits["train"].read(np.array([0, 3]))["text"] > 0).sum(axis=1).tolist() == [4, 1]


def test_a_column_split_makes_the_splits(tmp_path):
    rows = [(*ROWS[i % 4], split) for split in ("train", "val", "test") for i in range(4)]
    dataset = load(write(tmp_path / "a.csv", csv_of(rows, "text,label,split")))
    assert {name: len(split) for name, split in dataset.splits.items()} == dict.fromkeys(
        ("train", "validation", "test"), 4
    )
    assert len(draw(dataset, DataConfig(), shots=1, seed=0).train) == 2


def test_json_numbers_are_classes(tmp_path):
    lines = [json.dumps({"text": "x", "label": label}) for label in (10, 9, 10, 9)]
    assert load(write(tmp_path / "a.jsonl", "\n".join(lines))).class_names == ("9", "10")


def test_texts_longer_than_the_limit_of_pythons_reader_are_fine(tmp_path):
    rows = [("word " * 40_000, "a"), ("x", "b"), ("y", "a"), ("z", "b")]
    assert len(load(write(tmp_path / "a.csv", csv_of(rows))).splits["train"]) == 4


def test_a_column_file_makes_a_table_of_images(tmp_path, caplog):
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        Image.new("RGB", (6, 5), (i, i, i)).save(tmp_path / "pictures" / f"{i}.png")
    whole = (tmp_path / "pictures" / "0.png").read_bytes()
    (tmp_path / "pictures" / "4.png").write_bytes(whole[:-30])
    rows = [(f"pictures/{i}.png", "ab"[i % 2], "train") for i in range(5)]
    path = write(tmp_path / "a.csv", csv_of(rows, "file,label,split"))
    dataset = load(path)
    assert (dataset.input, dataset.input_shape, dataset.skipped) == ("image", (5, 6, 3), ("pictures/4.png",))
    assert dataset.splits["train"].ids.tolist() == [f"pictures/{i}.png" for i in range(4)]
    pixels = dataset.splits["train"].read(np.array([2]))["image"][0]
    config = DataConfig(name=f"table:{path}")
    np.testing.assert_array_equal(
        read_file(tmp_path / "pictures" / "2.png", config, kind="image", input_shape=dataset.input_shape), pixels
    )
    with pytest.raises(InputError, match=r"is 6x5, the others 3x3; set data.image_size"):
        read_file(tmp_path / "pictures" / "2.png", config, kind="image", input_shape=(3, 3, 3))
    with pytest.raises(OSError, match=r"4\.png"):
        read_file(tmp_path / "pictures" / "4.png", config, kind="image", input_shape=dataset.input_shape)


def test_the_version_changes_with_the_table_and_with_its_files(tmp_path):
    for i in range(4):
        Image.new("RGB", (6, 5), (i, i, i)).save(tmp_path / f"{i}.png")
    rows = [(f"{i}.png", "ab"[i % 2]) for i in range(4)]
    path = write(tmp_path / "a.csv", csv_of(rows, "file,label"))
    versions = [load(path).version]
    Image.new("RGB", (6, 5), (9, 9, 9)).save(tmp_path / "0.png")
    versions.append(load(path).version)
    write(path, csv_of(rows, "file,label") + "\n")
    versions.append(load(path).version)
    assert len(set(versions)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; it needs a row"),
        ("text,label\n", "is empty; it needs a row"),
        ("texts,label\nx,a\n", r"line 2, has no column `text`; nearest: `texts`.*set data.text_columns"),
        ("text,klabel\nx,a\n", r"line 2, has no column `label`; nearest: `klabel`.*set data.label_column"),
        ("text,label\nx,a\ny,b,c\n", r"line 3: 3 fields where the first line has 2"),
        ('text,label\nx,a\n"y\nz,b\n', r"line 4: unexpected end of data"),
        ("text,text\nx,a\n", r"has 2 columns named `text`"),
        ("text,label\nx,a\ny,\n", r"line 3: column 'label' is empty"),
        ("text,label,split\nx,a,trian\n", r"line 2: split is 'trian'; choose one of: train, validation, test"),
        ("text,label\nx,a\ny,a\nz,b\n", r"line 4: class 'b' has one example only; .*data.label_column"),
        ("text,label\nx,a\ny,a\n", "texts of one class only, 'a'"),
        (
            "text,label,split\nx,a,train\ny,b,train\nz,c,test\n",
            "class 'c' has no training texts, but there is 'line 4'",
        ),
        ("file,label\nx.png,a\n", r"line 2: no file '.*/x.png'"),
        ("file,label\na.csv,a\na.csv,b\n", r"line 3: 'a.csv' is listed in line 2 already"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, text, message):
    path = write(tmp_path / "a.csv", text)
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "x", "label": "a"}\n{"text": "x"\n', r"line 2: .*each line must be one JSON object"),
        ('{"text": "x", "label": "a"}\n' + "[" * 100_000, r"line 2: .*recursion.*each line must be one JSON object"),
        ('{"text": "x", "label": ' + "9" * 5000 + "}", r"line 1: Exceeds the limit.*each line must be one JSON object"),
        ('["x", "a"]\n', r"line 1: no object but"),
        ('{"text": ["x"], "label": "a"}\n', r"line 1: `text` is no text or number"),
        ('{"text": "x", "label": "a"}\n{"text": null, "label": "a"}\n', r"line 2, has no column `text`"),
    ],
)
def test_json_lines_that_do_not_fit_are_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        load(write(tmp_path / "a.jsonl", text))


def test_latin_1_is_refused_with_the_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\nx,a\ncafé,b\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"'.*a.csv', line 3, is not UTF-8, perhaps Latin-1"):
        load(path)


def test_missing_tables_and_other_formats_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no file '.*/absent.csv'; data.name is table:FILE"):
        load(tmp_path / "absent.csv")
    with pytest.raises(InputError, match=r"its name must end in one of: .csv, .tsv, .jsonl"):
        load(write(tmp_path / "a.xls", "x"))


def test_ag_news_is_read_as_it_is_published(real_data):
    config = DataConfig(f"table:{real_data}/ag_news/test.csv", text_columns=("2", "3"), label_column="1")
    dataset = load_dataset(config)
    assert dataset.class_names == ("1", "2", "3", "4")
    assert len(dataset.splits["train"]) == 7600
    tokens = dataset.splits["train"].read(np.arange(7600))["text"]
    assert tokens.shape == (7600, 128)
    assert (tokens == 1).mean() < 0.01, "few words lie outside 20,000"
