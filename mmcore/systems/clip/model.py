"""CLIP: an image tower and a text tower whose normalised embeddings meet (arXiv 2103.00020)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.nn import Packing
from mmcore.ops import require
from mmcore.parts import text
from mmcore.parts.bert import BertConfig, BertTower
from mmcore.parts.foreign import ForeignImageTower, ForeignText, ForeignTextTower, ForeignVision
from mmcore.parts.image_tower import ImagePool, ImageTower, PooledTower
from mmcore.parts.vit import Tower, VisionConfig, ViT

# transformers reads this value in a config as "pool at the highest id": its first CLIP configs had it wrong
LEGACY_EOS_TOKEN_ID = 2
_DEFAULT_LOGIT_SCALE = math.log(1 / 0.07)


@dataclass(frozen=True)
class TextConfig(text.TextConfig):
    """Shape of the text tower.

    `eos_token_id` says where a caption is pooled: at the first token of that id. None, or transformers'
    legacy value 2, means the first token with the highest id of its row, which is open_clip's rule.
    """

    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        is_token = self.eos_token_id is None or 0 <= self.eos_token_id < self.vocab_size
        what = "eos_token_id must be in [0, {}), got {}"
        require("TextConfig", is_token, what, self.vocab_size, self.eos_token_id)


@dataclass(frozen=True)
class TowersConfig:
    """Two towers of any kind, the width `embed_dim` of the space they share, and the log of the first logit scale;
    how the image tower is read (see `ImageTower`), and whether what is read is projected."""

    embed_dim: int = 512
    vision: VisionConfig | ForeignVision = field(default_factory=VisionConfig)
    text: TextConfig | BertConfig | ForeignText = field(default_factory=TextConfig)
    init_log_logit_scale: float = _DEFAULT_LOGIT_SCALE
    image_pool: ImagePool = "class"
    has_image_proj: bool = True

    def __post_init__(self) -> None:
        is_size = isinstance(self.embed_dim, int) and self.embed_dim >= 1
        require("CLIPConfig", is_size, "embed_dim must be at least 1, got {}", self.embed_dim)
        fits = self.has_image_proj or self.embed_dim == self.vision.width
        what = "embed_dim must be the image tower's width {} without a projection, got {}"
        require("CLIPConfig", fits, what, self.vision.width, self.embed_dim)


@dataclass(frozen=True)
class CLIPConfig(TowersConfig):
    """CLIP's own towers."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)


def eos_positions(tokens: Tensor, eos_token_id: int | None) -> Tensor:
    """Index, int64 [B], of the first end token of each row of tokens [B, T], 0 where it has none, by the one rule that
    transformers and open_clip agree with: None, or transformers' legacy 2, is the highest id of the row."""
    if eos_token_id is None or eos_token_id == LEGACY_EOS_TOKEN_ID:
        return tokens.argmax(dim=-1)
    return (tokens == eos_token_id).int().argmax(dim=-1)


def caption_lengths(tokens: Tensor, eos_token_id: int | None) -> list[int]:
    """How many tokens of each caption [B, T] count: those up to its end token (see `eos_positions`), behind which a
    causal tower never looks. Reading them waits for a GPU that they are on."""
    return (eos_positions(tokens, eos_token_id) + 1).tolist()


class TextTower(text.TextTower):
    """Causal transformer pooled at the end token: tokens [B, T] to embeddings [B, E], not yet normalised."""

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__(config, embed_dim, is_causal=True, bias=False)
        self.eos_token_id = config.eos_token_id

    def forward(self, tokens: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """[B, T] int64 to [B, E]; T may be shorter than the context. For `lengths` see `CLIP.encode_text`."""
        self.check("CLIP", tokens)
        ends = eos_positions(tokens, self.eos_token_id)
        if lengths is None and tokens.is_cpu and not torch.compiler.is_compiling():
            lengths = (ends + 1).tolist()
        positions = self.position_embedding[: tokens.shape[1]]
        if lengths is None or check_lengths(tokens, ends, lengths) == tokens.numel():
            rows = torch.arange(len(tokens), device=tokens.device)
            x = self.token_embedding(tokens) + positions  # [B, T, D]
            x = self.transformer(x, pool=lambda x: x[rows, ends])
        else:
            packing = Packing.of(lengths, tokens.device)
            ids = packing.pack(tokens[:, : packing.length])
            place = packing.places % packing.length
            x = self.token_embedding(ids) + F.embedding(place, positions)  # [1, N, D]
            # what a GPU cannot be asked beforehand is an index out of range: a length short of its end token
            rows = torch.where(ends < packing.lengths, packing.starts + ends, sum(lengths))
            x = self.transformer(x, packing, pool=lambda x: x[0, rows])
        return self.proj(self.norm_final(x))


def check_lengths(tokens: Tensor, ends: Tensor, lengths: Sequence[int]) -> int:
    """Their sum; a ValueError unless they reach the end tokens, which are at `ends`."""
    rows, most = tokens.shape
    fits = len(lengths) == rows and all(1 <= length <= most for length in lengths)
    what = "lengths must be {} from 1 to {}, one a caption, got {}"
    require("CLIP", fits, what, rows, most, list(lengths))
    if sum(lengths) < tokens.numel() and tokens.is_cpu:
        what = "lengths must reach each caption's end token, got {} for caption {}, which ends at token {}"
        for i, (length, end) in enumerate(zip(lengths, ends.tolist(), strict=True)):
            require("CLIP", length > end, what, length, i, end)
    return sum(lengths)


def _image_tower(config: TowersConfig) -> Any:
    embed_dim = config.embed_dim if config.has_image_proj else None
    if isinstance(config.vision, ForeignVision):
        return ForeignImageTower(config.vision, embed_dim)
    return ImageTower(config.vision, embed_dim, config.image_pool)


def _text_tower(config: TowersConfig) -> Any:
    if isinstance(config.text, ForeignText):
        return ForeignTextTower(config.text, config.embed_dim)
    if isinstance(config.text, BertConfig):
        return BertTower(config.text, config.embed_dim, bias=False)
    return TextTower(config.text, config.embed_dim)


def unit_norm(x: Tensor) -> Tensor:
    """Rows of norm 1, float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class CLIP(nn.Module):
    """CLIP with unit-norm float32 embeddings and a learned logit scale.

    `logit_scale` is a log of shape [1]: DeepSpeed does not take 0-d parameters. Checkpoints that hold it 0-d,
    as transformers and open_clip do, load as they are; `save_clip` writes it 0-d.
    """

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.config = config
        self.visual, self.text = _image_tower(config), _text_tower(config)
        self.locked: tuple[str, ...] = ()  # beginnings of names
        self.add_logit_scale()

    def add_logit_scale(self) -> None:
        """Of a model that makes its towers itself."""
        self.logit_scale = nn.Parameter(torch.full((1,), self.config.init_log_logit_scale))
        self.register_load_state_dict_pre_hook(_accept_0d_logit_scale)

    def train(self, mode: bool = True) -> "CLIP":
        """As every module's; parts whose names begin with one of `locked` stay in evaluation mode."""
        super().train(mode)
        for name, module in self.named_modules():
            if self.locked and f"{name}.".startswith(self.locked):
                module.training = False
        return self

    def encode_image(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Unit-norm embeddings [B, E], float32.

        Args:
            images: [B, 3, S, S], see `ViT`, or what `only_features` made of them before, [B, D]; B may be 0.
            kept: int64 [B, K], the patches that are read; None = all.
        """
        return unit_norm(self.embed_image(images, kept))

    def embed_image(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """`encode_image` before the norm."""
        features = images if images.ndim == 2 else self.visual.features(images, kept)
        return features if self.visual.proj is None else self.visual.proj(features)

    def encode_text(self, tokens: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Unit-norm caption embeddings [B, E], float32.

        Args:
            tokens: [B, T] int64, T at most the context length, each row with its end token; B may be 0.
            lengths: of the captions, by `caption_lengths` before the tokens go to a GPU: the rest is not computed,
                which changes nothing. None = looked up on a CPU; on a GPU, and under torch.compile, all T are.

        Raises:
            ValueError: another shape or dtype; lengths out of range, or short of an end token (on a GPU, an index out
                of range).
        """
        return unit_norm(self.text(tokens, lengths))

    def forward(
        self,
        images: Tensor | None,
        tokens: Tensor | None,
        lengths: Sequence[int] | None = None,
        kept: Tensor | None = None,
        *,
        only_features: bool = False,
    ) -> Any:
        """Embed images and captions; pass None for a side that is not there.

        Under ZeRO-3 parameters are whole only inside a module's forward, so training and evaluation both
        go through here.

        Returns:
            `encode_image` [B, E] (or None), `encode_text` [B', E] (or None), and the logit scale exp(logit_scale),
            [1]; all float32. With `only_features`, what the image tower makes of images before its projection,
            [B, D].
        """
        if only_features:
            return self.visual.features(images, kept)
        image_features = None if images is None else self.encode_image(images, kept)
        text_features = None if tokens is None else self.encode_text(tokens, lengths)
        return image_features, text_features, self.scale()

    def scale(self) -> Tensor:
        """What similarities are multiplied by, [1], at least float32."""
        return self.logit_scale.to(torch.promote_types(self.logit_scale.dtype, torch.float32)).exp()

    def image_tower(self) -> Tower:
        """The image tower for models that read its states: without the last layer, as LAVIS and LLaVA have it, since
        nothing trained what it makes of patches; raises ValueError for a tower of one layer."""
        vision = self.config.vision
        what = "a CLIP's tower must be a ViT for models that read its states, got {}"
        require("load_tower", isinstance(vision, VisionConfig), what, vision.summary)
        assert isinstance(vision, VisionConfig)
        what = "a CLIP's tower must have 2 layers or more, got {}"
        require("load_tower", vision.num_layers >= 2, what, vision.num_layers)
        config = replace(vision, num_layers=vision.num_layers - 1)
        with torch.device("meta"):
            wanted = ViT(config).state_dict().keys()
        return Tower(config, {n: x for n, x in self.visual.state_dict().items() if n in wanted})

    def pooled_tower(self) -> PooledTower:
        """The whole image tower, as it is read, without its projection."""
        state = {n: x for n, x in self.visual.state_dict().items() if not n.startswith("proj.")}
        return PooledTower(self.config.vision, self.config.image_pool, state)

    def set_activation_checkpointing(self, enable: bool) -> None:
        """Keep only each block's input for backward and recompute the rest; a ValueError of a tower of another
        library."""
        for tower in (self.visual, self.text):
            transformer, what = getattr(tower, "transformer", None), "must be left out with a {}"
            if transformer is not None:
                transformer.activation_checkpointing = enable
            elif enable:
                raise ValueError(f"--activation-checkpointing {what.format(tower.config.name)}")


def _accept_0d_logit_scale(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    key = prefix + "logit_scale"
    if key in state_dict and state_dict[key].ndim == 0:
        state_dict[key] = state_dict[key].reshape(1)
