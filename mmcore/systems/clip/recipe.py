"""CLIP's recipe."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmcore.data import PairData
from mmcore.data.collate import collate_pairs
from mmcore.data.text.tokenizer import VOCABULARY_SIZE, Tokenizer, load_tokenizer
from mmcore.losses import global_contrastive_loss
from mmcore.ops import require
from mmcore.parts.padded import load_folder_tokenizer
from mmcore.parts.vit import VisionConfig
from mmcore.recipe import Claim, Proof, Step
from mmcore.runs import load_weights
from mmcore.settings import from_json, once
from mmcore.systems.clip.given import check_flags, given_towers, locked_names, with_towers
from mmcore.systems.clip.model import CLIP, CLIPConfig, TextConfig, TowersConfig, caption_lengths
from mmcore.systems.clip.names import OPEN_CLIP_SETTINGS
from mmcore.systems.clip.shapes import clip_config
from mmcore.systems.clip.weights import Format, has_settings, load_clip, save_clip
from mmcore.train.optim import Rule
from mmcore.two_towers import OnBPE, PairAssets, fitted
from mmcore.weights.files import write_json
from mmcore.weights.pictures import RULES


class ClipBatch(NamedTuple):
    """Images uint8 [B, 3, S, S], or what a locked tower made of them, [B, D]; tokens int64 [B, T], and how many of each
    caption's count; the patches that are read, int64 [B, K], or None for all; labels [B] of a recipe that has some."""

    images: Tensor
    tokens: Tensor
    lengths: list[int]
    kept: Tensor | None = None
    labels: Tensor | None = None


# of a text tower, what comes with the weights and their tokenizer
_OF_TOKENS = ("vocab_size", "context_length", "eos_token_id")


@dataclass(frozen=True)
class Clip(OnBPE):
    """Train CLIP (arXiv 2103.00020) on image-caption pairs, with the contrastive loss of the global batch."""

    model: str | None = field(default=None, metadata=once)
    """tiny, small, ViT-B-32, ViT-B-16, ViT-L-14, ViT-L-14-336; with -quickgelu for OpenAI's weights; None = that of
    --init, or tiny."""
    init: Path | None = field(default=None, metadata=once)
    """Weights to start from: a file or folder of transformers or open_clip (safetensors, or .pt read weights-only)."""
    vision: str | None = field(default=None, metadata=once)
    """An image tower with its weights in place of --model's: a run that has one, such as of mae; a folder of
    transformers (CLIP, SigLIP, ViT or another vision model) or open_clip; timm:NAME, or timm:NAME@FILE.safetensors."""
    text: Path | None = field(default=None, metadata=once)
    """A text tower with its weights and tokenizer in place of --model's: a folder of transformers, of BERT or another
    encoder."""
    max_text: int | None = field(default=None, metadata=once)
    """Tokens of a caption with --text; None = 64."""
    image_head: bool = True
    """Project what --vision gives of an image; --no-image-head: the texts meet it as it is (LiT)."""
    lock_image: bool = False
    """Keep the image tower of --vision or --init as it is: no gradient, no moments, evaluation mode (LiT)."""
    lock_image_unlocked_groups: int = 0
    """Of a locked image tower, the last groups that do learn, as open_clip counts them: the projection is the first,
    then each layer, the positions, and the patches' convolution."""
    lock_text: bool = False
    """Keep the text tower of --text or --init as it is."""

    kind = CLIP
    formats = ("hf", "open_clip")

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (Rule("logit_scale", clamp=(0.0, math.log(100.0))),)

    def assets(self, data: PairData) -> PairAssets:
        self.check()
        assets = self._assets(data)
        if self.activation_checkpointing:
            with torch.device("meta"):
                self.make(assets.shape).set_activation_checkpointing(True)  # which some towers cannot
        locked = locked_names(self, assets.shape)
        frozen = {n: x for n, x in self.initial(assets, None).items() if locked and n.startswith(locked)}
        return replace(assets, frozen=frozen)

    def check(self) -> None:
        """Raises a ValueError for flags that contradict each other."""
        check_flags(self)

    def _assets(self, data: PairData) -> PairAssets:
        if self.vision is not None or self.text is not None:
            named = clip_config(self.model or "tiny")
            vision, text = given_towers(self)
            shape = with_towers(named, vision, text, has_head=self.image_head)
            if text is not None:
                what = "--tokenizer must be left out with --text, whose folder has one, got {}"
                require("clip", self.tokenizer is None, what, self.tokenizer)
                return PairAssets(shape, text.tokenizer, f"of {self.text}")
            assert isinstance(shape.text, TextConfig)
            tokenizer, origin = self.choose_tokenizer(shape.text, data)
            of_tokens = fitted(shape.text, tokenizer, tokenizer.vocab_size)
            return PairAssets(replace(shape, text=of_tokens), tokenizer, origin)
        shape = clip_config(self.model or "tiny") if self.init is None else self._start().config
        assert isinstance(shape.text, TextConfig)
        tokenizer, origin = self.choose_tokenizer(shape.text, data)
        size = tokenizer.vocab_size if self.init is None else shape.text.vocab_size
        return PairAssets(replace(shape, text=fitted(shape.text, tokenizer, size)), tokenizer, origin, self.init)

    def load_assets(
        self, folder: Path, saved: Mapping[str, Any], frozen: Mapping[str, Tensor], purpose: Any
    ) -> PairAssets:
        shape = from_json(TowersConfig, saved)
        if not isinstance(shape.text, TextConfig):
            tokenizer = load_folder_tokenizer(folder / "tokenizer", shape.text.context_length)
            return PairAssets(shape, tokenizer, frozen=frozen)
        shape = CLIPConfig(**vars(shape)) if isinstance(shape.vision, VisionConfig) else shape
        return PairAssets(shape, load_tokenizer(folder / "tokenizer"), frozen=frozen)

    def make(self, shape: TowersConfig) -> CLIP:
        """The model with new weights."""
        return type(self).kind(shape)

    def build(self, assets: PairAssets) -> CLIP:
        model = self.make(assets.shape)
        model.set_activation_checkpointing(self.activation_checkpointing)
        load_weights(model, assets.frozen, is_whole=False)
        for name, p in model.named_parameters():
            p.requires_grad_(name not in assets.frozen)
        model.locked = locked_names(self, assets.shape)
        return model.train()

    def initial(self, assets: PairAssets, model: CLIP | None) -> Mapping[str, Tensor]:
        if self.init is not None:
            return self._start().state_dict()
        vision, text = given_towers(self)
        of_image = {} if vision is None else {f"visual.{n}": x for n, x in vision.state.items()}
        return of_image | ({} if text is None else {f"text.{n}": x for n, x in text.state.items()})

    def backward(self, model: Any, parts: Sequence[ClipBatch], step: Step) -> dict[str, Tensor]:
        if len(parts) > 1 and self.lock_image and self.lock_image_unlocked_groups <= 1:
            parts = [_with_features(model, model.place(part)) for part in parts]
        return super().backward(model, parts, step)

    def _start(self) -> CLIP:
        """What --init holds, as --model, where it is given, has it; a ValueError where the two are not of one shape."""
        assert self.init is not None
        named = None if self.model is None else clip_config(self.model)
        bare = named if self.init.is_file() and not has_settings(self.init.parent) else None
        loaded = load_clip(self.init, config=bare, image_size=named and named.vision.image_size)
        for part in ("vision", "text") if named else ():
            theirs, ours = (asdict(getattr(config, part)) for config in (loaded.config, named))
            differ = [n for n in ours if n not in (*RULES, *_OF_TOKENS) and theirs[n] != ours[n]]
            if differ:
                n = differ[0]
                wanted = f"a CLIP whose {part} tower has {n} {ours[n]!r}, as --model {self.model} has it"
                raise ValueError(f"--init must be {wanted}, got {theirs[n]!r} in {self.init}: leave --model out")
        return loaded

    def collate(self, assets: PairAssets, samples: list[Any]) -> ClipBatch:
        batch, text = collate_pairs(samples, assets.tokenizer), assets.shape.text
        if isinstance(text, TextConfig):
            return ClipBatch(batch.images, batch.tokens, caption_lengths(batch.tokens, text.eos_token_id))
        return ClipBatch(batch.images, batch.tokens, (batch.tokens != text.pad_token_id).sum(1).tolist())

    def features(self, model: Any, batch: ClipBatch) -> tuple[Tensor, ...]:
        return model(batch.images, batch.tokens, batch.lengths, batch.kept)

    def objective(self, features: tuple[Tensor, ...], parts: Sequence[ClipBatch], step: Step) -> dict[str, Tensor]:
        image, text, scale = features
        return {"loss": global_contrastive_loss(image, text, scale)}

    def export(self, assets: PairAssets, model: CLIP, folder: Path, format: Format) -> None:
        only = self.training_only
        state = {n: x for n, x in model.state_dict().items() if not only or not n.startswith(only)}
        save_clip(model, folder, format=format, state_dict=state)
        assets.tokenizer.save(folder)
        if format == "open_clip":
            name_tokenizer(folder, assets.tokenizer)


def name_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Tells open_clip in its settings of the tokenizer beside them, where it is not CLIP's own."""
    if tokenizer.vocab_size != VOCABULARY_SIZE:
        file = folder / OPEN_CLIP_SETTINGS.what
        config = json.loads(file.read_text())
        config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "."
        write_json(file, config)


@torch.no_grad()
def _with_features(model: Any, batch: ClipBatch) -> ClipBatch:
    """With what a locked tower makes of the images in their place."""
    if batch.images.ndim == 2:
        return batch
    features = model(batch.images, None, None, batch.kept, only_features=True)
    return batch._replace(images=features, kept=None)


PROOF = Proof(
    [("clip", "--data digits --model tiny --epochs 30 --lr 1e-3 --ema 0.99")],
    [
        Claim("zero-shot accuracy (held-out)", "zero-shot top-1", 0.9),
        Claim("text to image R@1 (held-out)", "text to image R@1", 0.5),
    ],
)

# 1,127 pictures a language, none of which has names in two: only what pictures have in common ties the languages
_APART = "--data emoji --language en,zh,de --languages-apart --batch-size 128 --epochs 16 --lr 1e-3"
EMOJI = Proof(
    [("clip", _APART)],
    [
        Claim("text to text R@1 across languages (held-out combinations)", "text to text R@1", 0.4, 0.05, "without"),
        Claim("text to image R@1 (held-out combinations)", "text to image R@1", 0.4, 0.05, "without"),
    ],
    without=[("clip", f"{_APART} --shuffle-pictures")],
)

# few steps, in which a tower that learned from pictures alone has to learn the captions' words and no more
_FEW = "--data scattered --batch-size 128 --steps 80 --lr 1e-3 --warmup 8"
FROM_TOWER = Proof(
    [
        (
            "simclr",
            "--data scattered --views source --batch-size 256 --steps 150 --temperature 0.2 "
            "--optimizer adamw --lr 2e-3 --weight-decay 0.05 --warmup 10",
        ),
        ("clip", f"--vision {{0}} {_FEW}"),
    ],
    [Claim("zero-shot accuracy (held-out)", "zero-shot top-1", 0.55, ceiling=0.4, control="without")],
    without=[("clip", f"--model tiny {_FEW}")],
)
