"""Tokenizers as their libraries leave them on disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import AutoTokenizer, BertTokenizer

from mmcore.checkpoint import write_json
from mmcore.data.text.tokenizer import load_tokenizer, train_tokenizer
from mmcore.data.text.wordpiece import load_wordpiece
from mmcore.two_towers import check_same_tokenizer
from tests.refusals import refuses


def test_truncation_and_padding_that_a_call_left_in_the_file_are_not_the_tokenizers(tmp_path: Path) -> None:
    learned = train_tokenizer(["a red dog runs over the wide green hills at noon"], vocab_size=600, context_length=32)
    learned.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    before = load_tokenizer(tmp_path)(["a red dog runs over the wide green hills"])
    raw = tokenizers.Tokenizer.from_file(str(file))
    raw.enable_truncation(6)
    raw.enable_padding(length=6)
    raw.save(str(file))
    assert load_tokenizer(tmp_path)(["a red dog runs over the wide green hills"]).tolist() == before.tolist()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    said = ["a red dog runs over the wide green hills at noon"] * 3
    train_tokenizer(said, vocab_size=560, context_length=32).save(tmp_path / "own")
    return tmp_path / "own"


def change(file: Path, **changes: Any) -> None:
    write_json(file, json.loads(file.read_text()) | changes)


def test_special_tokens_in_a_caption_are_plain_text_in_transformers_own_files_too(folder: Path, tmp_path: Path) -> None:
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "tokenizer.json").read_text())["added_tokens"]
    said = ["a dog <|endoftext|> runs <|startoftext|>", "a red dog"]
    ours, found = load_tokenizer(folder)(said), load_tokenizer(tmp_path / "theirs")(said)
    assert found.tolist() == ours.tolist() and (found == ours.max()).sum(1).tolist() == [1, 1]


@pytest.mark.parametrize(("file", "changes", "said"), [
    ("tokenizer.json", {"normalizer": {"type": "Nope"}}, "tokenizer.json must be a tokenizer's"),
    ("tokenizer_config.json", {"model_max_length": "77"}, "must have a number as model_max_length, got '77'"),
])  # fmt: skip
def test_a_damaged_tokenizer_is_refused_by_its_file(folder: Path, file: str, changes: dict, said: str) -> None:
    change(folder / file, **changes)
    refuses(said, load_tokenizer, folder)


def test_a_length_that_the_settings_leave_out_is_clips(folder: Path) -> None:
    change(folder / "tokenizer_config.json", model_max_length=None)
    assert load_tokenizer(folder).context_length == 77


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "merges"])
def test_the_same_words_split_in_another_way_are_another_tokenizer(folder: Path, part: str) -> None:
    own, file = load_tokenizer(folder), folder / "tokenizer.json"
    check_same_tokenizer(own, load_tokenizer(folder), "given", folder)
    raw = json.loads(file.read_text())
    changed = {"model": raw["model"] | {"merges": raw["model"]["merges"][1:]}} if part == "merges" else {part: None}
    change(file, **changed)
    other = load_tokenizer(folder)
    assert own.vocabulary == other.vocabulary
    refuses("--tokenizer must be left out: another one", check_same_tokenizer, own, other, "given", folder)


@pytest.mark.parametrize(("change", "said"), [
    ({"normalizer": None}, "must split texts as an uncased BERT does"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "must split texts as an uncased BERT does"),
    ({"prefix": "@@"}, "must split texts as an uncased BERT does"),
    ({"gap": 1}, "must split texts as an uncased BERT does"),
    ({"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}}, None),
])  # fmt: skip
def test_a_bert_tokenizer_that_splits_otherwise_is_refused(tmp_path: Path, change: dict, said: str | None) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s", "cafe", "!"]
    BertTokenizer({word: i for i, word in enumerate(words)}).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    raw = json.loads(file.read_text())
    if "prefix" in change:
        raw["model"]["continuing_subword_prefix"] = change["prefix"]
    elif "gap" in change:
        raw["model"]["vocab"]["dog"] = 99
    else:
        raw |= change
    write_json(file, raw)
    if said is None:
        assert load_wordpiece(tmp_path)(["A Dogs café!"]).tokens.tolist() == [[2, 5, 6, 7, 8, 9, 3]]
    else:
        refuses(said, load_wordpiece, tmp_path)


@pytest.mark.parametrize(("name", "content"), [
    ("tokenizer.json", b"{"), ("tokenizer_config.json", b"[]"), ("vocab.txt", b"caf\xe9")
])  # fmt: skip
def test_a_damaged_bert_tokenizer_is_refused_by_its_file(tmp_path: Path, name: str, content: bytes) -> None:
    if name != "tokenizer.json":
        (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    (tmp_path / name).write_bytes(content)
    refuses(f"load_wordpiece: .*{name} must", load_wordpiece, tmp_path)
