"""BERT's encoder (arXiv:1810.04805) as a text tower, and with an image to read as ALBEF's and BLIP's; its files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmcore.nn import KeyValueCache, KeyValues, Linear, PostNormBlock
from mmcore.ops import masks, require
from mmcore.parts.vit import check_tower, tower_summary
from mmcore.weights.files import read_folder, read_json
from mmcore.weights.layout import Layout, under
from mmcore.weights.settings import Key, Settings, transformers_keys

_STD = 0.02  # of new weights of BERT-base


@dataclass(frozen=True)
class BertConfig:
    """Shape of the encoder, which has `num_positions` places; a caption has at most `context_length` tokens.

    With `image_width` the layers from `first_cross` on may read the states of an image, of that width: ALBEF's from the
    middle on, BLIP's from the first. With `has_decoder` each layer has a second self-attention, BLIP's; with no types
    none is added to the words. `dropout` and `attention_dropout` are of `mmcore.nn.PostNormBlock`, the former of the
    embeddings too.
    """

    vocab_size: int = 30522
    context_length: int = 64
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    activation: str = "gelu"
    norm_eps: float = 1e-12
    pad_token_id: int = 0
    num_types: int = 2
    num_positions: int = 512
    dropout: float = 0.0
    attention_dropout: float = 0.0
    image_width: int | None = None
    first_cross: int = 0
    has_decoder: bool = False

    def __post_init__(self) -> None:
        sizes = {"vocab_size": self.vocab_size, "context_length": self.context_length}
        sizes |= {"num_layers": self.num_layers, "mlp_dim": self.mlp_dim}
        check_tower("BertConfig", self.width, self.num_heads, self.activation, **sizes)
        fits, most = self.context_length <= self.num_positions, self.num_positions
        require("BertConfig", fits, "context_length must be at most {}, got {}", most, self.context_length)
        require("BertConfig", self.num_types >= 0, "num_types must be at least 0, got {}", self.num_types)
        fits = 0 <= self.first_cross < self.num_layers
        require("BertConfig", fits, "first_cross must be in [0, {}), got {}", self.num_layers, self.first_cross)
        require("BertConfig", 0 <= self.dropout < 1, "dropout must be from 0, below 1, got {}", self.dropout)

    @property
    def summary(self) -> str:
        """For the reader."""
        return f"BERT, {self.vocab_size} tokens, {self.context_length} a caption, {tower_summary(self)}"


class BertEncoder(nn.Module):
    """Embeddings of words, places and the first type, and post-LN layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config, self.activation_checkpointing = config, False
        width, eps = config.width, config.norm_eps
        self.word_embedding = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embedding = nn.Parameter(torch.randn(config.num_positions, width) * _STD)
        types = torch.randn(config.num_types, width) * _STD
        self.type_embedding = nn.Parameter(types) if config.num_types else None
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(config.dropout)
        options = {"activation": config.activation, "norm_eps": eps, "dropout": config.dropout}
        options |= {"attention_dropout": config.attention_dropout, "has_decoder": config.has_decoder}
        image_widths = [config.image_width if i >= config.first_cross else None for i in range(config.num_layers)]
        self.blocks = nn.ModuleList(
            PostNormBlock(width, config.num_heads, config.mlp_dim, image_width=x, **options) for x in image_widths
        )
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=_STD)
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_STD * (768 / width) ** 0.5)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.word_embedding.weight[config.pad_token_id].detach())

    def forward(
        self,
        x: Tensor,
        mask: masks.Mask | None = None,
        image: Tensor | Sequence[KeyValues] | None = None,
        *,
        layers: slice = slice(None),
        pool: Callable[[Tensor], Tensor] | None = None,
        caches: Sequence[KeyValueCache] | None = None,
        first_place: int = 0,
        image_mask: masks.Mask | None = None,
        decodes: bool = False,
    ) -> Tensor:
        """What layers make of tokens or of states.

        Args:
            x: int64 [B, T], or states [B, T, D] of the layers before.
            mask: for T queries and T keys, such as `mmkernels.masks.lengths` of the texts; None = all see all.
            image: [B, P, D_image], or `image_keys_values` of it for these layers; None = text alone.
            layers: which ones; all by default.
            pool: takes of the last layer's states, [B, T, D], those that are wanted, of three dimensions where there
                is an image.
            caches: one a layer, of the text that came before.
            first_place: of the first token in its text.
            image_mask: for the T tokens, or those that `pool` takes, and the P states of `image`; None = all see all.
            decodes: by the second self-attention of each layer.

        Returns:
            [B, T, D], or what `pool` makes of it.
        """
        if not x.is_floating_point():
            x = self._embedded(x, first_place)
        chosen: Any = self.blocks[layers]
        recompute, last = self.activation_checkpointing and torch.is_grad_enabled(), len(chosen) - 1
        given = iter(image) if image is not None and not isinstance(image, Tensor) else None
        for i, block in enumerate(chosen):
            read = None if block.cross is None else image if given is None else next(given)
            options = {"image": read, "cache": None if caches is None else caches[i], "decodes": decodes}
            options["image_mask"] = None if read is None else image_mask
            inputs = x, mask, pool if i == last else None
            x = checkpoint(block, *inputs, use_reentrant=False, **options) if recompute else block(*inputs, **options)
        return x

    def _embedded(self, tokens: Tensor, first_place: int) -> Tensor:
        most = len(self.position_embedding) - first_place
        fits = tokens.ndim == 2 and 1 <= tokens.shape[1] <= most
        require("BertEncoder", fits, "tokens must be [B, T] with 1 <= T <= {}, got {}", most, list(tokens.shape))
        places = self.position_embedding[first_place : first_place + tokens.shape[1]]
        x = self.word_embedding(tokens) + places
        return self.dropout(self.norm(x if self.type_embedding is None else x + self.type_embedding[0]))

    def image_keys_values(self, image: Tensor, *, layers: slice = slice(None)) -> list[KeyValues]:
        """Those of [B, P, D_image] in each of the layers that reads it, for as many passes as need them."""
        chosen: Any = self.blocks[layers]
        return [block.cross.keys_values(image) for block in chosen if block.cross is not None]


def _first(x: Tensor) -> Tensor:
    return x[:, 0]


class BertTower(nn.Module):
    """A BERT encoder, its [CLS] state and a projection: captions [B, T], padded on the right or nowhere, to embeddings
    [B, E], not yet normalised."""

    def __init__(self, config: BertConfig, embed_dim: int, *, bias: bool) -> None:
        super().__init__()
        self.transformer = BertEncoder(config)
        self.proj = Linear(config.width, embed_dim, bias=bias)
        nn.init.normal_(self.proj.weight, std=config.width**-0.5)
        if bias:
            nn.init.zeros_(self.proj.bias)

    def forward(self, tokens: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """`lengths` are of the captions, the longest of which is all that is computed; None = all T tokens are."""
        if lengths is not None and len(lengths):
            tokens = tokens[:, : max(lengths)]
        mask = masks.key_padding(tokens != self.transformer.config.pad_token_id, tokens.shape[1])
        return self.proj(self.transformer(tokens, mask, pool=_first))


LAYER = {
    "attn.qkv": "attention.self.{query,key,value}",
    "attn.out": "attention.output.dense",
    "attn_norm.norm": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "mlp_norm.norm": "output.LayerNorm",
}
"""A layer of BertModel's, for a `PostNormBlock`."""
CROSS = {
    "cross.q": "crossattention.self.query",
    "cross.kv": "crossattention.self.{key,value}",
    "cross.out": "crossattention.output.dense",
    "cross_norm.norm": "crossattention.output.LayerNorm",
}
"""What a layer that reads an image has besides, as ALBEF, BLIP and BertModel with cross-attention name it."""
ENCODER = {
    "word_embedding": "embeddings.word_embeddings",
    "position_embedding": "embeddings.position_embeddings.weight",
    "type_embedding": "embeddings.token_type_embeddings.weight",
    "norm": "embeddings.LayerNorm",
    **under("blocks.{i}", "encoder.layer.{i}", LAYER),
}
"""BertModel's and AlignTextModel's, for a `BertEncoder`."""
LAYOUT = Layout(ENCODER, unread=("pooler", "cls", "classifier", "embeddings.position_ids"), older=(("bert.", ""),))
_GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")
KEYS = {
    **transformers_keys(vocab_size=30522, width=768, num_layers=12, num_heads=12, mlp_dim=3072, norm_eps=1e-12),
    "activation": Key(
        "hidden_act",
        "gelu",
        lambda x, _: "gelu_tanh" if x in _GELU_TANH else x,
        lambda x, _: _GELU_TANH[1] if x == "gelu_tanh" else x,
    ),
    "pad_token_id": Key("pad_token_id", 0),
    "num_types": Key("type_vocab_size", 2),
    "num_positions": Key("max_position_embeddings", 512),
}
"""BertConfig's and AlignTextConfig's; `context_length` is no setting of theirs."""
SETTINGS = Settings(KEYS, model_types=("bert",), must={"position_embedding_type": "absolute", "is_decoder": False})


def read_bert(folder: Path, context_length: int) -> tuple[BertConfig, dict[str, Tensor]]:
    """The encoder of a transformers folder of BERT (safetensors), for captions of at most `context_length` tokens: its
    shape, and its weights by their names in a `BertEncoder`; a ValueError of anything else."""
    op = "load_text"
    config = BertConfig(**SETTINGS.read(op, read_json(op, folder / "config.json")), context_length=context_length)
    with torch.device("meta"):
        wanted = BertEncoder(config).state_dict()
    return config, LAYOUT.read(op, read_folder(op, folder), wanted)
