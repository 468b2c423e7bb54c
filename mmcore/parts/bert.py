"""BERT's encoder as a text tower: captions to the state of their [CLS] token (arXiv:1810.04805), and its files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmcore.nn import Linear, PostNormBlock
from mmcore.ops import masks, require
from mmcore.parts.vit import check_tower, tower_summary
from mmcore.weights.files import read_folder, read_json
from mmcore.weights.layout import Layout, under
from mmcore.weights.settings import Key, Settings, transformers_keys

_STD = 0.02  # of new weights


@dataclass(frozen=True)
class BertConfig:
    """Shape of the encoder, which has `num_positions` places; a caption has at most `context_length` tokens."""

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

    def __post_init__(self) -> None:
        sizes = {"vocab_size": self.vocab_size, "context_length": self.context_length}
        sizes |= {"num_layers": self.num_layers, "mlp_dim": self.mlp_dim, "num_types": self.num_types}
        check_tower("BertConfig", self.width, self.num_heads, self.activation, **sizes)
        fits, most = self.context_length <= self.num_positions, self.num_positions
        require("BertConfig", fits, "context_length must be at most {}, got {}", most, self.context_length)

    @property
    def summary(self) -> str:
        """For the reader."""
        return f"BERT, {self.vocab_size} tokens, {self.context_length} a caption, {tower_summary(self)}"


class BertEncoder(nn.Module):
    """Embeddings of words, places and the first type, and post-LN layers in which a token sees all that is no
    padding; without dropout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config, self.activation_checkpointing = config, False
        width, eps = config.width, config.norm_eps
        self.word_embedding = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embedding = nn.Parameter(torch.randn(config.num_positions, width) * _STD)
        self.type_embedding = nn.Parameter(torch.randn(config.num_types, width) * _STD)
        self.norm = nn.LayerNorm(width, eps=eps)
        options = {"activation": config.activation, "norm_eps": eps}
        self.blocks = nn.ModuleList(
            PostNormBlock(width, config.num_heads, config.mlp_dim, **options) for _ in range(config.num_layers)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.word_embedding.weight[config.pad_token_id].detach())

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, T], padded on the right or nowhere, to the states [B, D] of the first token of each."""
        fits = tokens.ndim == 2 and 1 <= tokens.shape[1] <= len(self.position_embedding)
        what = "tokens must be [B, T] with 1 <= T <= {}, got {}"
        require("BertEncoder", fits, what, len(self.position_embedding), list(tokens.shape))
        length, recompute = tokens.shape[1], self.activation_checkpointing and torch.is_grad_enabled()
        mask = masks.key_padding(tokens != self.config.pad_token_id, length)
        x = self.norm(self.word_embedding(tokens) + self.position_embedding[:length] + self.type_embedding[0])
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            inputs = x, mask, _first if i == last else None
            x = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        return x


def _first(x: Tensor) -> Tensor:
    return x[:, 0]


class BertTower(nn.Module):
    """A BERT encoder, its [CLS] state and a projection: captions [B, T] to embeddings [B, E], not yet normalised."""

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
        return self.proj(self.transformer(tokens))


LAYER = {
    "attn.qkv": "attention.self.{query,key,value}",
    "attn.out": "attention.output.dense",
    "attn_norm.norm": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "mlp_norm.norm": "output.LayerNorm",
}
"""A layer of BertModel's, for a `PostNormBlock`."""
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
