"""What recipes of models that embed images and captions apart, such as CLIP's and SigLIP's, have in common."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmcore.data import DataConfig, LoaderSpec, PairData, TrainLoader
from mmcore.data.collate import PairSample, collate_pairs
from mmcore.data.opening import open_held_out
from mmcore.data.text.tokenizer import (
    VOCABULARY_SIZE,
    Tokenizer,
    find_clip_vocabulary,
    find_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from mmcore.ops import require
from mmcore.recipe import Contrastive, Embeds, OnPairs, Represents, Runner, VisionAssets
from mmcore.settings import flag, free, once

CLIPS, CAPTIONS = "clip", "captions"


@dataclass(frozen=True)
class PairAssets(VisionAssets):
    """The shape of a model of images and captions, and what makes int64 [B, T] of captions, with `save(folder)`."""

    tokenizer: Any
    origin: str = ""  # of the tokenizer, for the reader
    start: Path | None = None  # of the weights, likewise

    def save(self, folder: Path) -> dict[str, Any]:
        self.tokenizer.save(folder / "tokenizer")
        return super().save(folder)

    @property
    def summary(self) -> dict[str, str]:
        tokens = f"{self.tokenizer.vocab_size} tokens, {self.tokenizer.context_length} a caption, {self.origin}"
        started = {} if self.start is None else {"weights": f"of {self.start}"}
        return {**started, **super().summary, "text tower": self.shape.text.summary, "tokenizer": tokens}


def check_same_tokenizer(given: Any, beside: Any, path: Any, init: Path) -> None:
    """Raises a ValueError unless a tokenizer that was given for somebody's weights is the one that lies beside them:
    has its vocabulary, merges and way with cases, accents and white space."""
    probes = ["A  Café's «Naïve» 北京 No. 123!", *given.vocabulary]
    if given.vocabulary != beside.vocabulary or not given(probes).equal(beside(probes)):
        raise ValueError(f"--tokenizer must be left out: another one lies beside the weights in {init}, got {path}")


@cache
def _classes(data: str, names: str | None, templates: str | None, max_broken: float) -> PairData:
    """A folder of classes, listed once."""
    what = "--zeroshot-data must be a folder of classes, got {!r}"
    require("train", Path(data).expanduser().is_dir(), what, data)
    config = DataConfig(data, class_names=names, templates=templates, max_broken=max_broken)
    found = open_held_out(config)
    require("train", found.templates is not None, what, data)
    return found


@dataclass(frozen=True)
class TwoTowers(OnPairs, Contrastive):
    """Mixin: images and captions are embedded apart, `model(images, None)[0]` and `model(None, tokens)[1]`, as unit
    vectors, by towers `visual` and `text`. Its assets are `PairAssets`, its micro-batches what the model is called
    with."""

    model: str | None = field(default=None, metadata=once)
    """A shape by its name."""
    tokenizer: Any = field(default=None, metadata=once)
    """A tokenizer's files; None = that of --init, or one is learned from the captions."""
    tokenizer_samples: int = field(default=1_000_000, metadata=free)
    """Of more samples than these a vocabulary is learned from a random choice."""
    init: Path | None = field(default=None, metadata=once)
    """Weights to start from."""
    zeroshot_data: str | None = field(default=None, metadata=free)
    """Folder of classes, such as ImageNet's val with its synset folders, that zero-shot accuracy is followed on while
    the run trains and at its end, shared among ranks; beside what is held out."""
    zeroshot_names: str | None = field(default=None, metadata=free)
    """Of --zeroshot-data, as --class-names is of a folder of --data."""
    zeroshot_templates: str | None = field(default=None, metadata=free)
    """Of --zeroshot-data, as --templates is of a folder of --data; openai = CLIP's 80."""
    activation_checkpointing: bool = field(default=False, metadata=free)
    """Recompute activations in the backward: less memory, about a third more time."""

    kind: ClassVar[Callable[[Any], Any]]
    """The model, made of `PairAssets.shape`."""
    tasks = ("zeroshot", "retrieval", "crosslingual")

    def loader(self, data: Any, assets: Any, spec: LoaderSpec) -> TrainLoader:
        _ = self.zeroshot  # a mistake is told before the run begins
        return super().loader(data, assets, spec)

    @property
    def zeroshot(self) -> PairData | None:
        """What --zeroshot-data names; a ValueError for no folder of classes."""
        if self.zeroshot_data is not None:
            return _classes(self.zeroshot_data, self.zeroshot_names, self.zeroshot_templates, self.data.max_broken)
        for name in ("zeroshot_names", "zeroshot_templates"):
            value = getattr(self, name)
            require("train", value is None, "{} has no effect without --zeroshot-data, got {!r}", flag(name), value)
        return None

    def build(self, assets: PairAssets) -> Any:
        model = type(self).kind(assets.shape)
        for tower in (model.visual, model.text):
            tower.transformer.activation_checkpointing = self.activation_checkpointing
        return model

    def collate(self, assets: PairAssets, samples: list[PairSample]) -> Any:
        batch = collate_pairs(samples, assets.tokenizer)
        return batch.images, batch.tokens

    def features(self, model: Runner, batch: Any) -> tuple[Tensor, ...]:
        return model(*batch)

    def embeds(self, assets: PairAssets, model: Runner, device: torch.device) -> Embeds:
        def image(images: Tensor) -> Tensor:
            return model(images, None)[0]

        def text(captions: list[str]) -> Tensor:
            return model(None, assets.tokenizer(captions).to(device))[1]

        return Embeds(assets.preprocess, image, lambda features: features, text)

    def represents(self, assets: PairAssets, model: Runner, device: torch.device) -> Represents:
        return Represents(assets.preprocess, ("embedding",), lambda images: (model(images, None)[0],))

    def image_tower(self, assets: PairAssets, model: Any) -> Any:
        return model.image_tower()

    def pooled_tower(self, assets: PairAssets, model: Any) -> Any:
        return model.pooled_tower()


@dataclass(frozen=True)
class OnBPE(TwoTowers):
    """Mixin: captions are tokens of CLIP's kind of BPE."""

    tokenizer: str | None = field(default=None, metadata=once)
    """CLIP's BPE files (a folder with vocab.json and merges.txt, tokenizer.json, or bpe_simple_vocab_16e6.txt.gz);
    'clip', CLIP's own, where open_clip is installed; 'captions', one is learned from them. None = the one beside
    --init, or clip from ViT-B-32 up, captions below."""

    def choose_tokenizer(self, text: Any, data: PairData) -> tuple[Tokenizer, str]:
        """What --tokenizer and --init say together, and where it is from; a ValueError where they contradict each
        other."""
        beside = None if self.init is None else find_tokenizer(self.init if self.init.is_dir() else self.init.parent)
        is_clips = text.vocab_size == VOCABULARY_SIZE
        chosen = self.tokenizer or beside or (CLIPS if is_clips else CAPTIONS)
        if chosen == CAPTIONS:
            what = "--tokenizer must be the one of the weights with --init, none lies beside {}, got {}"
            require("clip", self.init is None, what, self.init, CAPTIONS)
            captions = data.captions(self.tokenizer_samples, self.run.seed)
            learned = train_tokenizer(captions, vocab_size=text.vocab_size, context_length=text.context_length)
            return learned, f"learned from {len(captions)} captions"
        path = find_clip_vocabulary() or (beside if is_clips else None) if chosen == CLIPS else Path(chosen)
        what = "CLIP's vocabulary must be installed (pip install open_clip_torch), or --tokenizer be a folder with it"
        require("clip", path is not None, "{}, or {}, to learn another one; got {}", what, CAPTIONS, "neither")
        assert path is not None
        tokenizer = load_tokenizer(path, context_length=text.context_length)
        if self.init is None:
            return tokenizer, f"of {path}"
        if beside is not None:
            own = load_tokenizer(beside, context_length=text.context_length)
            check_same_tokenizer(tokenizer, own, path, self.init)
        fits = tokenizer.vocab_size <= text.vocab_size and text.eos_token_id in (None, tokenizer.eos_token_id)
        wanted = f"at most {text.vocab_size} tokens and the end token {text.eos_token_id}, as the weights of --init"
        got = f"{tokenizer.vocab_size} and {tokenizer.eos_token_id}"
        require("clip", fits, "--tokenizer must have {}, got {} in {}", wanted, got, path)
        return tokenizer, f"of {path}"


def fitted(text: Any, tokenizer: Tokenizer, vocab_size: int) -> Any:
    """The shape of a text tower for a tokenizer."""
    length, end = tokenizer.context_length, tokenizer.eos_token_id
    return replace(text, vocab_size=vocab_size, context_length=length, eos_token_id=end)
