"""CLIP's BPE and BERT's WordPiece: agreement with transformers' and OpenAI's, learning, files, refusals."""

import gzip
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer

from mmcore.data.text.tokenizer import END_TOKEN, START_TOKEN, Tokenizer, load_tokenizer, train_tokenizer
from mmcore.data.text.wordpiece import WordPiece, load_wordpiece, train_wordpiece
from mmcore.systems.clip.model import eos_positions
from tests.refusals import refuses

CAPTIONS = [
    "A photo of a cat", "a photo of the dog's bone", "a handwritten digit 7", "two dogs, one cat!",
    "一只猫在睡觉", "一只狗和一只猫",
] * 3  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CAPTIONS, vocab_size=600, context_length=16)


def test_tokens_are_start_text_end_zeros_and_a_truncated_caption_keeps_its_end(tokenizer: Tokenizer):
    end = tokenizer.eos_token_id
    tokens = tokenizer(["a cat", "", "cat " * 100, "cat " * 14, "cat " * 13])
    assert tokens.dtype == torch.int64 and tokens.shape == (5, 16)
    assert tokens[1].tolist() == [end - 1, end] + [0] * 14
    assert tokens[0, 0] == end - 1 and tokens[0].tolist().count(end) == 1
    assert not tokens[0, int(eos_positions(tokens, end)[0]) + 1 :].any()
    assert tokens[2:4, -1].tolist() == [end] * 2 and torch.equal(tokens[2], tokens[3])
    assert tokens[4, -2:].tolist() == [end, 0]


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=30))
def test_no_text_is_unknown_or_touches_the_special_tokens(text: str):
    tokenizer = train_tokenizer(CAPTIONS[:2], vocab_size=530, context_length=256)
    text = text.encode("utf-8", "ignore").decode()
    row = tokenizer([text])[0].tolist()
    end = row.index(tokenizer.eos_token_id)
    assert row[0] == tokenizer.sot_token_id
    assert all(0 <= i < tokenizer.sot_token_id for i in row[1:end]) and not any(row[end + 1 :])
    assert end > 1 or not any(c.isalnum() for c in text)


def test_special_tokens_spelled_out_in_a_caption_are_plain_text(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path)
    for each in (tokenizer, load_tokenizer(tmp_path)):
        row = each([f"{END_TOKEN} {START_TOKEN}"])[0].tolist()
        assert row.count(each.eos_token_id) == 1 and row.count(each.sot_token_id) == 1


def test_training_is_the_same_in_every_process():
    words = [a + b + c + d for a in "abcde" for b in "fghij" for c in "klmno" for d in "pqrst"] * 2
    code = "import sys, tests.mmcore.test_tokenizer as own; print(own.trained(sys.stdin.read().split()))"
    done = subprocess.run(
        [sys.executable, "-c", code], input=" ".join(words), capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert done.stdout == trained(words) + "\n" and len(done.stdout) > 10_000


def trained(words: list[str]) -> str:
    learned = train_wordpiece(words, vocab_size=160)
    return train_tokenizer(words, vocab_size=700, context_length=8)._bpe.to_str() + "".join(learned.words)


def test_saved_tokenizer_loads_the_same_from_each_of_its_files(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path)
    backs = [load_tokenizer(path) for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "vocab.json")]
    for back in (*backs, pickle.loads(pickle.dumps(tokenizer))):
        sizes = back.vocab_size, back.eos_token_id, back.context_length
        assert sizes == (tokenizer.vocab_size, tokenizer.eos_token_id, 16)
        assert torch.equal(back(CAPTIONS), tokenizer(CAPTIONS))
    assert load_tokenizer(tmp_path, context_length=9).context_length == 9


@pytest.mark.parametrize("source", ["tokenizer.json", "vocab.json"])
def test_transformers_clip_tokenizer_reads_our_folder_to_the_same_ids(tokenizer: Tokenizer, source: str, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    if source == "vocab.json":
        (tmp_path / "tokenizer.json").unlink()
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    texts = [*CAPTIONS[:6], "", "it's   100% NEW, isn't it?", "naïve Ünïcode 😀 ﬁ", "cat " * 40]
    expected = theirs(texts, truncation=True, max_length=16, padding="max_length", return_tensors="pt").input_ids
    # transformers pads with the end token
    ours = tokenizer(texts)
    assert torch.equal(torch.where(ours == 0, tokenizer.eos_token_id, ours), expected)


def test_openais_merges_file_gives_openais_ids(tmp_path: Path):
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2"', "c a", "ca t</w>", "t h", "th e</w>", "d o", ""]
    file = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.context_length, tokenizer.vocab_size) == (77, 512 + 5 + 2)
    # "!" is 0, "a" 64, "a</w>" 320, merges from 512 on: start, the, cat, ",", a, do, g, end
    assert tokenizer(["The cat, a dog"])[0, :9].tolist() == [517, 515, 513, 267, 320, 516, 326, 518, 0]


def test_openais_merges_file_is_cut_to_its_vocabulary(tmp_path: Path):
    stand_ins = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    pairs = [f"{a} {b}" for a in stand_ins for b in stand_ins]
    pairs += [f"{a}{b} {c}" for a in stand_ins for b in stand_ins[:5] for c in stand_ins]
    assert len(pairs) > 48894
    file = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    file.write_bytes(gzip.compress("\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2"', *pairs]).encode()))
    tokenizer = load_tokenizer(file)
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (49408, 49407)


@pytest.mark.parametrize(("captions", "match"), [
    ([], "captions must hold at least one string, got none"), ("a cat", "captions must be a list of strings, got str"),
    (["a", None], "captions must be strings, got None at 1"), ([b"a"], "captions must be strings, got b'a' at 0"),
])  # fmt: skip
def test_empty_lists_and_other_than_strings_are_refused(captions, match: str, tokenizer: Tokenizer):
    refuses(match, tokenizer, captions)
    refuses(match, train_tokenizer, captions, vocab_size=600, context_length=8)


def test_vocabulary_has_the_size_asked_for_at_most_and_sizes_out_of_range_are_refused():
    words = [f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"] * 2
    assert train_tokenizer(words, vocab_size=550, context_length=8).vocab_size == 550
    assert train_tokenizer(["a"], vocab_size=5000, context_length=8).vocab_size == 514
    refuses("vocab_size must be at least 514, got 513", train_tokenizer, ["a"], vocab_size=513, context_length=8)
    refuses(r"context_length must be in \[3, 65536\], got 2", train_tokenizer, ["a"], vocab_size=514, context_length=2)


def test_damaged_and_foreign_files_are_refused(tokenizer: Tokenizer, tmp_path: Path):
    refuses("path must be one of", load_tokenizer, tmp_path)
    tokenizer.save(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    swapped = {**vocab, END_TOKEN: vocab[START_TOKEN], START_TOKEN: vocab[END_TOKEN]}
    short = {word: i for word, i in vocab.items() if i < len(vocab) - 1}
    for name, text, message, path in (
        ("tokenizer.json", "{", "must hold JSON", "tokenizer.json"),
        ("tokenizer.json", "[]", "JSON object, got list", "tokenizer.json"),
        ("tokenizer.json", '{"model": {"type": "WordPiece"}}', "BPE model", "tokenizer.json"),
        ("merges.txt", "a b\n", "must start with a version line, got 'a b'", "vocab.json"),
        ("merges.txt", "#version: 0.2\nzq zz\n", "must join two tokens of the vocabulary", "vocab.json"),
        ("vocab.json", json.dumps({**vocab, "new": 9999}), "ids must be 0 to", "vocab.json"),
        ("vocab.json", json.dumps(swapped), "must have the highest id", "vocab.json"),
        ("vocab.json", json.dumps(short), r"missing <\|endoftext\|>", "vocab.json"),
    ):
        tokenizer.save(tmp_path)
        (tmp_path / name).write_text(text, encoding="utf-8")
        refuses(message, load_tokenizer, tmp_path / path)
    tokenizer.save(tmp_path)
    (tmp_path / "merges.txt").unlink()
    refuses(r"merges\.txt must be there", load_tokenizer, tmp_path / "vocab.json")
    (tmp_path / "x.txt.gz").write_bytes(b"plain")
    refuses("whole gzip file", load_tokenizer, tmp_path / "x.txt.gz")


SENTENCES = [
    "A small dog runs across the snow.", "Two dogs, running: one's small!", "Ein Café für zwei Hunde",
    "the snow-covered dog 123", "狗 in the snow",
]  # fmt: skip


@pytest.fixture
def learned() -> WordPiece:
    return train_wordpiece(SENTENCES * 3, vocab_size=160)


def test_ids_are_those_of_transformers(learned: WordPiece, tmp_path: Path) -> None:
    learned.save(tmp_path)
    theirs = BertTokenizer.from_pretrained(tmp_path)
    for text in [*SENTENCES, "", "unknowable ☃ dogs", "a" * 200, "  spaces\tand\nlines "]:
        tokens, num_text = learned([text], max_length=64)
        assert tokens[0].tolist() == theirs(text)["input_ids"] and int(num_text) == tokens.shape[1]


def test_texts_are_padded_and_a_truncated_one_keeps_its_end(learned: WordPiece) -> None:
    assert learned.vocab_size <= 160 and {"dog", "small"} <= set(learned.words)
    assert (learned.pad_token_id, learned.decoder_token_id) == (0, learned.vocab_size - 1)
    tokens, num_text = learned(["dog", SENTENCES[0] * 5], max_length=8)
    assert tokens.shape == (2, 8) and tokens.dtype == torch.int64
    assert tokens[1, -1] == learned.sep_token_id and num_text.tolist()[1] == 8
    assert (tokens[0, int(num_text[0]) :] == 0).all() and tokens[0, 0] == learned.cls_token_id


def test_a_text_that_is_decoded_reads_as_it_was(learned: WordPiece) -> None:
    for text in ("a small dog runs across the snow.", "two dogs, running: small!", "ein cafe"):
        ids = learned([text]).tokens[0].tolist()
        # BERT's tokens do not tell whether a space stood before a colon
        assert learned.decode([learned.decoder_token_id, *ids[1:], 0, 0]).replace(" :", ":") == text


def test_what_is_saved_loads_again(learned: WordPiece, tmp_path: Path) -> None:
    learned.save(tmp_path)
    for path in (tmp_path, tmp_path / "vocab.txt"):
        assert load_wordpiece(path).words == learned.words


def test_berts_own_vocabulary_gets_the_decoders_token_behind_it(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[unused0]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ndog\n")
    found = load_wordpiece(tmp_path)
    assert (found.vocab_size, found.decoder_token_id, found.words[-1]) == (8, 7, "[DEC]")
    assert found(["dog cat"]).tokens.tolist() == [[3, 6, 2, 4]]


def test_bad_input_is_refused_by_name(learned: WordPiece, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("dog\n")
    refuses("load_wordpiece: path must be vocab.txt, tokenizer.json or a folder", load_wordpiece, tmp_path / "none")
    refuses(r"WordPiece: the vocabulary must hold .*, missing \[PAD\]", load_wordpiece, tmp_path)
    refuses("each word once, got some twice", WordPiece, [*learned.words[:-1], "dog", "dog"])
    refuses("captions must hold at least one string, got none", train_wordpiece, [], vocab_size=100)
    refuses("vocab_size must be above 11, the captions' letters, got 5", train_wordpiece, ["abc"], vocab_size=5)
    refuses("max_length must be at least 2, got 1", learned, ["dog"], max_length=1)
    refuses("texts must be strings, got 3", learned, [3])
