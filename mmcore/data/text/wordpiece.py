"""BERT's WordPiece, which fusion encoders and Q-Formers read: BERT's own vocabulary where it is given, else one
learned from captions."""

import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from mmcore.ops import require

# the ids that a vocabulary of our own gives them, 0 and up
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# what a text to generate begins with: BLIP-2 adds it to BERT's vocabulary, with the highest id
DECODER_TOKEN = "[DEC]"
_PREFIX = "##"
_MAX_FILE_BYTES = 64 * 2**20


class Texts(NamedTuple):
    """Tokens of texts, padded on the right with the padding's id."""

    tokens: Tensor  # int64 [B, T]
    num_text: Tensor  # int64 [B], how many are no padding


class WordPiece:
    """Texts to ids: [CLS], text, [SEP]; a truncated text keeps its [SEP]."""

    def __init__(self, vocab: Sequence[str]) -> None:
        words = [word for word in vocab if word != DECODER_TOKEN]
        ids = {word: i for i, word in enumerate(words)}
        for word in SPECIAL[:4]:
            what = "the vocabulary must hold {}, missing {}"
            require("WordPiece", word in ids, what, ", ".join(SPECIAL[:4]), word)
        require("WordPiece", len(ids) == len(words), "the vocabulary must hold each word once, got some twice")
        self.words = (*words, DECODER_TOKEN)
        self.vocab_size = len(self.words)
        self.pad_token_id, self.cls_token_id, self.sep_token_id = (ids[w] for w in ("[PAD]", "[CLS]", "[SEP]"))
        self.mask_token_id = ids.get("[MASK]")  # None = a vocabulary without one
        self.decoder_token_id = len(words)
        special = torch.tensor([word in SPECIAL for word in self.words])
        self._is_inner = torch.tensor([word.startswith(_PREFIX) for word in self.words])
        self._is_word = ~special & (torch.arange(len(self.words)) < len(words))
        self._model = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
        self._model.normalizer, self._model.pre_tokenizer = _normalizer(), pre_tokenizers.BertPreTokenizer()
        self._decoder = decoders.WordPiece(prefix=_PREFIX, cleanup=True)

    def __call__(self, texts: Sequence[str], max_length: int = 32) -> Texts:
        """Tokenize texts, lower-cased and stripped of accents, as BERT's uncased models do; as long as the longest.

        Args:
            texts: strings; "" is allowed.
            max_length: tokens a text, [CLS] and [SEP] included, at least 2.
        """
        require("WordPiece", max_length >= 2, "max_length must be at least 2, got {}", max_length)
        rows = []
        for text in texts:
            require("WordPiece", isinstance(text, str), "texts must be strings, got {!r}", text)
            # one at a time: encode_batch starts threads, which do not survive a fork into data workers
            ids = self._model.encode(text, add_special_tokens=False).ids[: max_length - 2]
            rows.append([self.cls_token_id, *ids, self.sep_token_id])
        num_text = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        tokens = torch.full((len(rows), max(map(len, rows), default=2)), self.pad_token_id)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = torch.tensor(ids)
        return Texts(tokens, num_text)

    def padded(self, texts: Sequence[str], length: int) -> Texts:
        """As a call, every text padded to `length`, so that the texts of all ranks are of one."""
        tokens, num_text = self(texts, length)
        return Texts(F.pad(tokens, (0, length - tokens.shape[1]), value=self.pad_token_id), num_text)

    def is_word(self, tokens: Tensor) -> Tensor:
        """Where int64 ids stand for a word or a piece of one, no special token: bool of their shape."""
        return self._is_word[tokens]

    def is_inner(self, tokens: Tensor) -> Tensor:
        """Where int64 ids go on with the word of the one before, "##ing": bool of their shape."""
        return self._is_inner[tokens]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the first [SEP], without special tokens."""
        words = (self.words[i] for i in takewhile(lambda i: i != self.sep_token_id, ids))
        return self._decoder.decode([word for word in words if word not in (*SPECIAL, DECODER_TOKEN)])

    def differs_from(self, other: tokenizers.Tokenizer) -> str | None:
        """A text of some of its words in capitals, with accents and beside other marks, of which `other` makes other
        ids; None = it is the same."""
        some = [word for word in self.words if word not in (*SPECIAL, DECODER_TOKEN)]
        some = some[:: max(1, len(some) // 2000)]
        probes = [f"{word[0]}\u0301{word[1:]} {word.upper()}{word}!{word}\u0000 北{word}" for word in some]
        begins = max((word for word in some if word.isalpha()), key=len, default="")
        probes += [begins + word.removeprefix(_PREFIX) for word in some if word.startswith(_PREFIX)]
        ids = [[x.encode(text, add_special_tokens=False).ids for text in probes] for x in (self._model, other)]
        return next((text for text, ours, theirs in zip(probes, *ids, strict=True) if ours != theirs), None)

    def save(self, folder: str | Path) -> None:
        """Write vocab.txt and tokenizer_config.json, as transformers' BertTokenizer reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.txt").write_text("\n".join(self.words) + "\n", encoding="utf-8")
        config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "bos_token": DECODER_TOKEN}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def train_wordpiece(captions: Sequence[str], *, vocab_size: int) -> WordPiece:
    """Learn a vocabulary from captions, of at most `vocab_size` words, [DEC] included; the same captions give the same
    one. Raises ValueError for no captions, or no room for their letters."""
    require("train_wordpiece", bool(captions), "captions must hold at least one string, got none")
    normalizer, splitter = _normalizer(), pre_tokenizers.BertPreTokenizer()
    words = {w for text in captions for w, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    firsts, others = {w[0] for w in words}, {_PREFIX + c for w in words for c in w[1:]}
    # given here, the letters have fixed ids; left to the trainer, their order, so the words, are random
    known = [*SPECIAL, *sorted(firsts | {c[-1] for c in others}), *sorted(others | {_PREFIX + c for c in firsts})]
    what = "vocab_size must be above {}, the captions' letters, got {}"
    require("train_wordpiece", vocab_size > len(known), what, len(known), vocab_size)
    learner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = normalizer, splitter
    options = {"min_frequency": 2, "show_progress": False, "continuing_subword_prefix": _PREFIX}
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size - 1, special_tokens=known, **options)
    learner.train_from_iterator(captions, trainer, length=len(captions))
    ids = learner.get_vocab()
    return WordPiece(sorted(ids, key=ids.__getitem__))


def load_wordpiece(path: str | Path) -> WordPiece:
    """Load a vocabulary that `WordPiece.save`, transformers or BERT's authors wrote: vocab.txt, a word a line,
    tokenizer.json, or a folder with one of them; raises ValueError for nothing to load, a file that is no vocabulary,
    and a tokenizer that keeps cases or accents, which `WordPiece` does not."""
    path = Path(path)
    file = next((x for x in (path, path / "vocab.txt", path / "tokenizer.json") if x.is_file()), None)
    if file is None:
        raise ValueError(f"load_wordpiece: path must be vocab.txt, tokenizer.json or a folder with one, got {path}")
    size, beside = file.stat().st_size, file.parent / "tokenizer_config.json"
    require("load_wordpiece", size <= _MAX_FILE_BYTES, "{} must be at most 64 MiB, got {} bytes", file, size)
    settings = _read_json(beside) if beside.is_file() else {}
    said = {"do_lower_case": settings.get("do_lower_case"), "strip_accents": settings.get("strip_accents")}
    raw: dict[str, Any] = {}
    if file.suffix == ".json":
        raw = _read_json(file)
        model, normalizer = raw.get("model") or {}, raw.get("normalizer") or {}
        what = "{} must describe a WordPiece model, got {}"
        require("load_wordpiece", model.get("type") == "WordPiece", what, file, model.get("type"))
        said |= {"do_lower_case": normalizer.get("lowercase"), "strip_accents": normalizer.get("strip_accents")}
        words = sorted(model["vocab"], key=model["vocab"].__getitem__)
    else:
        words = _read_text(file).splitlines()
    kept = [f"{name} {value}" for name, value in said.items() if value is False]
    what = "tokenizer must be of an uncased BERT, which keeps neither cases nor accents, got {} in {}"
    require("load_wordpiece", not kept, what, " and ".join(kept), file.parent)
    made = WordPiece(words)
    if raw:
        odd = made.differs_from(tokenizers.Tokenizer.from_str(json.dumps(raw | {"truncation": None, "padding": None})))
        what = "{} must split texts as an uncased BERT does, got others for {!r}"
        require("load_wordpiece", odd is None, what, file, odd)
    return made


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"load_wordpiece: {file} must be in UTF-8, got: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"load_wordpiece: {file} must hold JSON, got: {error}") from error
    require("load_wordpiece", isinstance(raw, dict), "{} must hold a JSON object, got {}", file, type(raw).__name__)
    return raw


def _normalizer() -> normalizers.Normalizer:
    return normalizers.BertNormalizer(lowercase=True)
