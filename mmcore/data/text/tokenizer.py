"""CLIP's byte-level BPE: OpenAI's own merges where they are given, else merges learned from captions.

Every vocabulary has CLIP's layout: 256 bytes, 256 bytes that end a word, one token a merge, start, end. So no
text is unknown, in any language, and the end token has the highest id: pooling at the end token and pooling
at the highest id, open_clip's rule, are one.
"""

import gzip
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import tokenizers
import torch
from huggingface_hub import try_to_load_from_cache
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from mmcore.ops import require

START_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"
DEFAULT_CONTEXT_LENGTH = 77
VOCABULARY_SIZE = 49408
"""Of CLIP's own."""

_END_OF_WORD = "</w>"
_SPACE = "\u0120"  # its byte, as a byte-level vocabulary writes it
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# OpenAI's file holds more merges than its vocabulary of 49,408 uses
_OPENAI_MERGES = VOCABULARY_SIZE - 512 - 2
_OPENAI_FILE = "bpe_simple_vocab_16e6.txt.gz"
_OPENAI_MODELS = ("base-patch32", "base-patch16", "large-patch14", "large-patch14-336")
_FILES = ("tokenizer.json", "vocab.json", _OPENAI_FILE)
_MAX_FILE_BYTES = 64 * 2**20
# 8 Han characters, or a word of 20 letters: a whole caption must not become one token
_MAX_TOKEN_LENGTH = 24
_MAX_CONTEXT_LENGTH = 2**16
_require = partial(require, "load_tokenizer")


class Tokenizer:
    """Captions to ids [B, context_length]: start, text, end, zeros; a truncated text keeps its end token."""

    def __init__(self, bpe: tokenizers.Tokenizer, *, context_length: int) -> None:
        owner, most = "Tokenizer", _MAX_CONTEXT_LENGTH
        require(owner, 3 <= context_length <= most, "context_length must be in [3, {}], got {}", most, context_length)
        start, end, size = bpe.token_to_id(START_TOKEN), bpe.token_to_id(END_TOKEN), bpe.get_vocab_size()
        if start is None or end is None:
            raise ValueError(f"Tokenizer: the vocabulary must hold {START_TOKEN} and {END_TOKEN}, got {size} others")
        require(owner, end == size - 1, "{} must have the highest id, {}, got {}", END_TOKEN, size - 1, end)
        self.context_length = context_length
        self.vocab_size = size
        self.sot_token_id = start
        self.eos_token_id = end
        self._bpe = bpe

    @property
    def vocabulary(self) -> dict[str, int]:
        """Ids by token; of the same one, the merges are the same too."""
        return self._bpe.get_vocab()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Tokenize captions, lower-cased and with white space collapsed, as transformers' CLIPTokenizer does.

        Args:
            captions: B strings, at least one; "" is allowed. Special tokens in a caption are plain text.

        Returns:
            [B, context_length] int64 on the CPU, padded with 0.
        """
        _check_captions("Tokenizer", captions)
        tokens = torch.zeros(len(captions), self.context_length, dtype=torch.int64)
        for row, caption in enumerate(captions):
            # one at a time: encode_batch starts threads, which do not survive a fork into data workers
            ids = self._bpe.encode(caption, add_special_tokens=False).ids[: self.context_length - 2]
            ids = [self.sot_token_id, *ids, self.eos_token_id]
            tokens[row, : len(ids)] = torch.tensor(ids)
        return tokens

    def pieces(self, caption: str) -> list[str]:
        """Of each token of a caption, without start and end, what it stands for there; a part of a letter as that."""
        found = self._bpe.encode(caption, add_special_tokens=False).offsets[: self.context_length - 2]
        return [caption[start:end] for start, end in found]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the first start or end token, a space behind each word; bytes that are no UTF-8 become
        U+FFFD."""
        words = []
        for i in takewhile(lambda i: i not in (self.sot_token_id, self.eos_token_id), ids):
            word = self._bpe.id_to_token(i) or ""  # a model may have more ids
            words.append(f"{word.removesuffix(_END_OF_WORD)}{_SPACE}" if word.endswith(_END_OF_WORD) else word)
        return self._bpe.decoder.decode(words).strip()

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, vocab.json, merges.txt and tokenizer_config.json, as transformers does."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._bpe.save(str(folder / "tokenizer.json"))
        self._bpe.model.save(str(folder))
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.context_length, "bos_token": START_TOKEN}
        config |= dict.fromkeys(("eos_token", "unk_token", "pad_token"), END_TOKEN)
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def train_tokenizer(captions: Sequence[str], *, vocab_size: int, context_length: int) -> Tokenizer:
    """Learn CLIP's kind of byte-level BPE from captions; the same captions give the same tokenizer.

    Args:
        captions: at least one string, in any language.
        vocab_size: upper bound, at least 514 (bytes, bytes that end a word, start, end); fewer where captions
            are too few to learn as many merges.
        context_length: tokens a caption, start and end included, in [3, 65536].
    """
    _check_captions("train_tokenizer", captions)
    require("train_tokenizer", vocab_size >= 514, "vocab_size must be at least 514, got {}", vocab_size)
    learner = tokenizers.Tokenizer(models.BPE(end_of_word_suffix=_END_OF_WORD))
    learner.normalizer, learner.pre_tokenizer = _normalizer(), _pre_tokenizer()
    options = {"min_frequency": 2, "show_progress": False, "max_token_length": _MAX_TOKEN_LENGTH}
    # as special tokens the alphabet has fixed ids; left to the trainer, its order, so the merges, are random
    options |= {"special_tokens": list(_byte_vocab()), "end_of_word_suffix": _END_OF_WORD}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 2, **options)
    learner.train_from_iterator(captions, trainer, length=len(captions))
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    return Tokenizer(_clip_bpe(_vocab_of(merges), merges), context_length=context_length)


def load_tokenizer(path: str | Path, *, context_length: int | None = None) -> Tokenizer:
    """Load a tokenizer from what `Tokenizer.save`, transformers or OpenAI's CLIP wrote.

    Args:
        path: tokenizer.json, vocab.json (merges.txt beside it), bpe_simple_vocab_16e6.txt.gz, or a folder
            with one of them, preferred in this order.
        context_length: tokens a caption; None takes `model_max_length` of a tokenizer_config.json beside it,
            else 77.
    """
    file = find_tokenizer(Path(path))
    names = ", ".join(_FILES)
    if file is None:
        raise ValueError(f"load_tokenizer: path must be one of {names} or a folder with one, got {path}")
    if context_length is None:
        context_length = _saved_context_length(file.parent / "tokenizer_config.json")
    if file.name.endswith(".txt.gz"):
        merges = _read_openai_merges(file)
        return Tokenizer(_clip_bpe(_vocab_of(merges), merges), context_length=context_length)
    raw = _read_json(file)
    if file.name == "vocab.json":
        merges = _parse_merges(_read_text(file.parent / "merges.txt").splitlines(), file.parent / "merges.txt")
        return Tokenizer(_clip_bpe(raw, merges), context_length=context_length)
    is_bpe = isinstance(raw.get("model"), dict) and raw["model"].get("type", "BPE") == "BPE"
    _require(is_bpe, "{} must describe a BPE model, got {}", file, sorted(raw))
    # transformers leaves its latest call's truncation and padding in the file, and marks tokens that a caption must not
    # be able to write
    added = [x for x in raw.get("added_tokens") or () if x["content"] not in raw["model"].get("vocab", ())]
    raw |= {"truncation": None, "padding": None, "added_tokens": added}
    try:
        bpe = tokenizers.Tokenizer.from_str(json.dumps(raw))
    except Exception as error:  # what tokenizers raises is no more than that
        raise ValueError(f"load_tokenizer: {file} must be a tokenizer's, got: {error}") from error
    return Tokenizer(bpe, context_length=context_length)


def _check_captions(caller: str, captions: Sequence[str]) -> None:
    if isinstance(captions, str) or not isinstance(captions, Sequence):
        raise ValueError(f"{caller}: captions must be a list of strings, got {type(captions).__name__}")
    require(caller, bool(captions), "captions must hold at least one string, got none")
    for i, caption in enumerate(captions):
        require(caller, isinstance(caption, str), "captions must be strings, got {!r} at {}", caption, i)


def _byte_vocab() -> Iterator[str]:
    """The printable stand-ins of the 256 bytes in OpenAI's order, then each as the end of a word."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    stand_ins = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    yield from stand_ins
    yield from (c + _END_OF_WORD for c in stand_ins)


def _vocab_of(merges: Sequence[tuple[str, ...]]) -> dict[str, int]:
    words = dict.fromkeys([*_byte_vocab(), *("".join(pair) for pair in merges), START_TOKEN, END_TOKEN])
    return {word: i for i, word in enumerate(words)}


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _clip_bpe(vocab: Mapping[str, Any], merges: Sequence[tuple[str, ...]]) -> tokenizers.Tokenizer:
    for pair in merges:
        joins = len(pair) == 2 and {*pair, "".join(pair)} <= vocab.keys()
        _require(joins, "each merge must join two tokens of the vocabulary, got {}", pair)
    are_ids = sorted(vocab.values()) == list(range(len(vocab)))
    _require(are_ids, "ids must be 0 to {}, each once, got others", len(vocab) - 1)
    for word in (*_byte_vocab(), START_TOKEN, END_TOKEN):
        _require(word in vocab, "the vocabulary must hold every byte, start and end, missing {}", word)
    pairs, suffixes = [(left, right) for left, right in merges], {"end_of_word_suffix": _END_OF_WORD}
    bpe = tokenizers.Tokenizer(models.BPE(vocab=dict(vocab), merges=pairs, unk_token=END_TOKEN, **suffixes))
    bpe.normalizer, bpe.pre_tokenizer = _normalizer(), _pre_tokenizer()
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.RobertaProcessing(
        (END_TOKEN, vocab[END_TOKEN]), (START_TOKEN, vocab[START_TOKEN]), trim_offsets=False, add_prefix_space=False
    )
    return bpe


def find_tokenizer(path: Path) -> Path | None:
    """The file that `load_tokenizer` reads, or None."""
    return next((file for file in (path, *(path / name for name in _FILES)) if file.is_file()), None)


def find_clip_vocabulary() -> Path | None:
    """CLIP's own vocabulary, of 49,408 tokens, where open_clip or OpenAI's clip is installed, neither of which is
    imported, or in what transformers downloaded of OpenAI's models; None = nowhere."""
    packages = [importlib.util.find_spec(name) for name in ("open_clip", "clip")]
    folders = [Path(place) for found in packages if found for place in found.submodule_search_locations or ()]
    cached = [try_to_load_from_cache(f"openai/clip-vit-{name}", "tokenizer.json") for name in _OPENAI_MODELS]
    files = [*(folder / _OPENAI_FILE for folder in folders), *(Path(x) for x in cached if isinstance(x, str))]
    return next(filter(Path.is_file, files), None)


def _saved_context_length(config: Path) -> int:
    if not config.is_file():
        return DEFAULT_CONTEXT_LENGTH
    length = _read_json(config).get("model_max_length")
    length = DEFAULT_CONTEXT_LENGTH if length is None else length
    _require(isinstance(length, int | float), "{} must have a number as model_max_length, got {!r}", config, length)
    # transformers writes 1e30 for "no limit"
    return int(length) if length <= _MAX_CONTEXT_LENGTH else DEFAULT_CONTEXT_LENGTH


def _read_text(file: Path) -> str:
    _require(file.is_file(), "{} must be there, got no such file", file)
    size = file.stat().st_size
    _require(size <= _MAX_FILE_BYTES, "{} must be at most 64 MiB, got {} bytes", file, size)
    return file.read_text(encoding="utf-8")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw: Any = json.loads(_read_text(file))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"load_tokenizer: {file} must hold JSON, got: {error}") from error
    _require(isinstance(raw, dict), "{} must hold a JSON object, got {}", file, type(raw).__name__)
    return raw


def _read_openai_merges(file: Path) -> list[tuple[str, ...]]:
    try:
        with gzip.open(file) as packed:
            text = packed.read(_MAX_FILE_BYTES)
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"load_tokenizer: {file} must be a whole gzip file, got: {error}") from error
    return _parse_merges(text.decode("utf-8").splitlines(), file)[:_OPENAI_MERGES]


def _parse_merges(lines: Sequence[str], file: Path) -> list[tuple[str, ...]]:
    first = lines[0] if lines else ""
    is_version = first.startswith(("#version", '"bpe_simple_vocab'))
    _require(is_version, "{} must start with a version line, got {!r}", file, first[:40])
    return [tuple(line.split()) for line in lines[1:] if line.strip()]
