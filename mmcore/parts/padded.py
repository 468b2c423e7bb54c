"""Captions as tokens of one length: a tokenizer of transformers for a text tower that sees its padding, as SigLIP's."""

import re
import string
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Regex, normalizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmcore.data.text.wordpiece import train_wordpiece
from mmcore.ops import require
from mmcore.parts.language import tiny_tokenizer
from mmcore.weights.files import LOCAL, read_json

_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
_VOCABULARIES += ("sentencepiece.bpe.model", "spm.model")
_PUNCTUATION = "[" + re.escape(string.punctuation) + "]"


class PaddedTokenizer:
    """Captions to ids [B, context_length]: padded on the right, cut with the tokens that end a text kept.

    Args:
        tokenizer: of transformers, with padding or an end of text, which pads where there is none.
        context_length: tokens a caption, at least 2.
        lower: lower-case captions, as SigLIP's are, whatever the tokenizer does.
    """

    def __init__(self, tokenizer: Any, context_length: int, *, lower: bool = True) -> None:
        require("PaddedTokenizer", context_length >= 2, "context_length must be at least 2, got {}", context_length)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        has_padding = tokenizer.pad_token is not None
        require("PaddedTokenizer", has_padding, "tokenizer must have padding or an end of text, got {}", "neither")
        # what is written into its folder says so too
        tokenizer.padding_side, tokenizer.model_max_length = "right", context_length
        self.context_length = context_length
        self.vocab_size = len(tokenizer)
        self.vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.pad_token_id: int = tokenizer.pad_token_id
        self._tokenizer, self._lower = tokenizer, lower

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """[B, context_length] int64 on the CPU."""
        # one at a time: a batch is encoded by threads, which do not survive a fork into data workers
        texts = [x.lower() if self._lower else x for x in captions]
        rows = [self._tokenizer(x, padding="max_length", truncation=True).input_ids for x in texts]
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), self.context_length)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the first that pads, without special tokens."""
        return self._tokenizer.decode(list(takewhile(lambda i: i != self.pad_token_id, ids)), skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        self._tokenizer.save_pretrained(folder)


def load_folder_tokenizer(folder: Path, context_length: int) -> PaddedTokenizer:
    """The tokenizer in a folder of transformers as it is; a ValueError without one, or without padding and end of
    text."""
    # without one of these, transformers makes an empty tokenizer of what config.json says
    is_there = any((folder / name).is_file() for name in _VOCABULARIES)
    require("load_folder_tokenizer", is_there, "folder must hold a tokenizer, such as tokenizer.json, got {}", folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
    except (OSError, ValueError, ImportError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"load_folder_tokenizer: folder must hold a tokenizer, got {folder}: {why}") from None
    return PaddedTokenizer(tokenizer, context_length, lower=False)


def learned_wordpiece(captions: Sequence[str], vocab_size: int, context_length: int) -> PaddedTokenizer:
    """BERT's WordPiece of at most `vocab_size` words, learned from captions: [CLS], the caption, [SEP]."""
    with TemporaryDirectory() as folder:
        train_wordpiece(captions, vocab_size=vocab_size).save(folder)
        return load_folder_tokenizer(Path(folder), context_length)


def load_padded_tokenizer(folder: Path, context_length: int) -> PaddedTokenizer:
    """The tokenizer in a folder of transformers, by its tokenizer.json alone, with the cleaning that the first SigLIP's
    does beside it; a ValueError without such a file, of a damaged one, and of one without padding and end of text."""
    op, file = "load_padded_tokenizer", folder / "tokenizer.json"
    require(op, file.is_file(), "folder must hold tokenizer.json, got {}", folder)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what tokenizers raises is no more than that
        raise ValueError(f"{op}: {file} must be a tokenizer's, got: {error}") from error
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and str(read_json(op, settings).get("tokenizer_class")).startswith("SiglipTokenizer"):
        # done in Python there; what we write has it in tokenizer.json, and another class
        backend = tokenizer.backend_tokenizer
        inner = backend.normalizer
        clean = [normalizers.Lowercase(), normalizers.Replace(Regex(_PUNCTUATION), "")]
        clean += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
        backend.normalizer = normalizers.Sequence([*clean, *([inner] if inner else [])])
    return PaddedTokenizer(tokenizer, context_length)


def padded_tokenizer(
    folder: Path | None, captions: Callable[[], list[str]], vocab_size: int, context_length: int
) -> PaddedTokenizer:
    """The one in a folder, or, without one, a byte-level BPE of at most `vocab_size` tokens learned from captions;
    errors as of `load_padded_tokenizer`, and where there are no captions."""
    if folder is not None:
        return load_padded_tokenizer(folder, context_length)
    learned = tiny_tokenizer([caption.lower() for caption in captions()], vocab_size=vocab_size)
    learned.backend_tokenizer.normalizer = normalizers.Lowercase()
    return PaddedTokenizer(learned, context_length)
