"""Tokenizers as their libraries leave them on disk."""

from pathlib import Path

import tokenizers

from mmcore.data.text.tokenizer import load_tokenizer, train_tokenizer


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
