"""BERT's tokens: parity with transformers, learning, truncation, decoding, files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer

from mmcore.data.text.wordpiece import WordPiece, load_wordpiece, train_wordpiece

CAPTIONS = [
    "A small dog runs across the snow.",
    "Two dogs, running: one's small!",
    "Ein Café für zwei Hunde",
    "the snow-covered dog 123",
    "狗 in the snow",
]


@pytest.fixture
def learned() -> WordPiece:
    return train_wordpiece(CAPTIONS * 3, vocab_size=160)


def test_ids_are_those_of_transformers(learned: WordPiece, tmp_path: Path) -> None:
    learned.save(tmp_path)
    theirs = BertTokenizer.from_pretrained(tmp_path)
    for text in [*CAPTIONS, "", "unknowable ☃ dogs", "a" * 200, "  spaces\tand\nlines "]:
        tokens, num_text = learned([text], max_length=64)
        assert tokens[0].tolist() == theirs(text)["input_ids"] and int(num_text) == tokens.shape[1]


def test_learning_is_the_same_in_every_process(learned: WordPiece) -> None:
    code = (
        "import json,sys; from mmcore.data.text.wordpiece import train_wordpiece;"
        "print(json.dumps(train_wordpiece(json.loads(sys.argv[1]), vocab_size=160).words))"
    )
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(CAPTIONS * 3)], capture_output=True, check=True
        )
        assert tuple(json.loads(done.stdout)) == learned.words
    assert learned.vocab_size <= 160 and {"dog", "small"} <= set(learned.words)
    assert (learned.pad_token_id, learned.decoder_token_id) == (0, learned.vocab_size - 1)


def test_texts_are_padded_and_a_truncated_one_keeps_its_end(learned: WordPiece) -> None:
    tokens, num_text = learned(["dog", CAPTIONS[0] * 5], max_length=8)
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
    for call, message in (
        (lambda: load_wordpiece(tmp_path / "none"), "load_wordpiece: path must be vocab.txt or a folder"),
        (lambda: load_wordpiece(tmp_path), r"WordPiece: the vocabulary must hold .*, missing \[PAD\]"),
        (lambda: WordPiece([*learned.words[:-1], "dog", "dog"]), "each word once, got some twice"),
        (lambda: train_wordpiece([], vocab_size=100), "captions must hold at least one string, got none"),
        (
            lambda: train_wordpiece(["abc"], vocab_size=5),
            "vocab_size must be above 11, the captions' letters, got 5",
        ),
        (lambda: learned(["dog"], max_length=1), "max_length must be at least 2, got 1"),
        (lambda: learned([3]), "texts must be strings, got 3"),  # pyright: ignore
    ):
        with pytest.raises(ValueError, match=message):
            call()
