"""VQ-KD, BEiT v2's tokenizer: patches to codes, from which a teacher's features are decoded (arXiv:2208.06366)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.data import Preprocess
from mmcore.nn import Linear, Transformer
from mmcore.ops import require
from mmcore.parts.vit import VisionConfig, ViT
from mmcore.runs import read_run
from mmcore.settings import from_json
from mmcore.systems.mim.model import draw_weights

_ROUNDS = 10
_ROWS_A_CODE = 64
"""Rows that codes are begun with, at most."""
_CHUNK = 2**24
"""Products of rows and codes that are held at once."""


@dataclass(frozen=True)
class VqKdConfig:
    """Shape of the encoder and the codes, of the decoder, which is as wide, and the width of what it predicts."""

    vision: VisionConfig
    num_tokens: int = 8192
    code_width: int = 32
    decoder_layers: int = 1
    outputs: int = 512
    decay: float = 0.99

    def __post_init__(self) -> None:
        for name in ("num_tokens", "code_width", "decoder_layers", "outputs"):
            require("VqKdConfig", getattr(self, name) >= 1, "{} must be at least 1, got {}", name, getattr(self, name))
        require("VqKdConfig", 0 <= self.decay < 1, "decay must be in [0, 1), got {}", self.decay)


class Codebook(nn.Module):
    """Unit vectors, to the nearest of which others are moved. Training moves each to the mean of what is nearest to it,
    on all ranks, by a share of 1 - `decay`; one that nothing is nearest to stays. The first batch begins them, by ten
    rounds of k-means."""

    def __init__(self, num_tokens: int, width: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.codes = nn.Buffer(torch.zeros(num_tokens, width))
        self.has_begun = nn.Buffer(torch.zeros(1))
        self._begun = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors [N, D] to the nearest codes, float32 with the gradient of unit vectors, the mean square of the
        distance of these, and the codes' numbers, int64 [N]."""
        with torch.autocast(x.device.type, enabled=False):
            unit = F.normalize(x.float(), dim=1)
            if self.training and not self._begun:
                self._begin(unit.detach())
            index = self.nearest(unit.detach())
            codes = self.codes[index]  # a copy, which the update leaves alone
            if self.training:
                self._update(unit.detach(), index)
            return unit + (codes - unit).detach(), (codes - unit).square().mean(), index

    def nearest(self, unit: Tensor) -> Tensor:
        """Of unit vectors [N, D] the codes with the largest products, int64 [N]."""
        return _nearest(unit, self.codes)

    @torch.no_grad()
    def _begin(self, unit: Tensor) -> None:
        self._begun = True
        if self.has_begun.item():
            return
        rows, num = _of_all_ranks(unit), len(self.codes)
        rows = rows[:: max(1, len(rows) // (_ROWS_A_CODE * num))]
        # evenly through the rows ordered by a coordinate: the same codes however many ranks share the rows
        order = rows[:, 0].argsort(stable=True)
        codes = rows[order[torch.linspace(0, len(rows) - 1, num, device=rows.device).round().long()]]
        for _ in range(_ROUNDS):
            sums, count = _sums(rows, _nearest(rows, codes), num)
            codes = torch.where(count > 0, F.normalize(sums, dim=1), codes)
        self.codes.copy_(codes)
        self.has_begun.fill_(1)

    @torch.no_grad()
    def _update(self, unit: Tensor, index: Tensor) -> None:
        sums, count = _sums(unit, index, len(self.codes))
        if dist.is_initialized() and dist.get_world_size() > 1:
            both = torch.cat([sums, count], 1)
            dist.all_reduce(both)
            sums, count = both[:, :-1], both[:, -1:]
        moved = F.normalize(self.codes.lerp(F.normalize(sums, dim=1), 1 - self.decay), dim=1)
        self.codes.copy_(torch.where(count > 0, moved, self.codes))

    def _apply(self, fn: Any, recurse: bool = True) -> "Codebook":
        """Codes stay float32 under weights in bfloat16: their moves would be lost."""
        codes = self.codes
        super()._apply(fn, recurse)
        if self.codes.dtype != codes.dtype:
            self.codes = codes.to(self.codes.device)
        return self


def _nearest(rows: Tensor, codes: Tensor) -> Tensor:
    size = max(1, _CHUNK // len(codes))
    return (
        torch.cat([(part @ codes.T).argmax(1) for part in rows.split(size)]) if len(rows) else rows.new_empty(0).long()
    )


def _sums(rows: Tensor, index: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Of each code the sum of its rows, [V, D], and how many they are, [V, 1]."""
    sums = rows.new_zeros(num, rows.shape[1]).index_add_(0, index, rows)
    return sums, torch.bincount(index, minlength=num).to(rows.dtype)[:, None]


def _of_all_ranks(rows: Tensor) -> Tensor:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def _head(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(Linear(width, width), nn.Tanh(), Linear(width, outputs))


class VqKdTokens(nn.Module):
    """The encoder, `visual`, what narrows its states, and the codes."""

    def __init__(self, config: VqKdConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = ViT(config.vision)
        self.narrow = _head(config.vision.width, config.code_width)
        self.codebook = Codebook(config.num_tokens, config.code_width, config.decay)

    @property
    def num_tokens(self) -> int:
        return self.config.num_tokens

    @property
    def preprocess(self) -> Preprocess:
        """What images have to be like."""
        return self.config.vision.preprocess

    def narrowed(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] to what is moved to a code, [B * P, D]."""
        return self.narrow(self.visual(images)[:, self.config.vision.num_prefix :]).flatten(0, 1)

    def indices(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] to int64 [B, P]."""
        unit = F.normalize(self.narrowed(images).float(), dim=1)
        return self.codebook.nearest(unit).view(len(images), -1)


class VqKdModel(VqKdTokens):
    """The tokenizer while it learns: a decoder makes a teacher's features of codes."""

    def __init__(self, config: VqKdConfig) -> None:
        super().__init__(config)
        vision = config.vision
        width, num_places = vision.width, vision.num_patches + 1
        self.decoder_embed = Linear(config.code_width, width)
        self.decoder_token = nn.Parameter(torch.zeros(width))
        self.decoder_positions = nn.Parameter(torch.zeros(num_places, width))
        options = {"is_causal": False, "activation": vision.activation, "norm_eps": vision.norm_eps}
        sizes = width, config.decoder_layers, vision.num_heads, vision.mlp_dim
        self.decoder = Transformer(*sizes, **options, qkv_bias=vision.qkv_bias)
        self.decoder_norm = nn.LayerNorm(width, eps=vision.norm_eps)
        self.head = _head(width, config.outputs)
        self.targets: Any = None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """As published: cut off normal weights of deviation 0.02, biases 0."""
        tokens: list[Any] = [self.visual.class_embedding, self.visual.position_embedding]
        tokens += [self.decoder_token, self.decoder_positions]
        layers = [m for m in self.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        for x in [*tokens, *(layer.weight for layer in layers)]:
            draw_weights(x, 0.02)
        for layer in layers:
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor, seen: Tensor | None = None, *, only_states: bool = False) -> Any:
        """Images, uint8 [B, 3, S, S], to predicted features [B, P, E], the mean square that codes are off by, the
        codes' numbers [B, P], and the teacher's features, None without `targets`; `seen` is what that is given, None =
        `images`. With `only_states` what the encoder makes of them."""
        if only_states:
            return self.visual(images)
        codes, distance, index = self.codebook(self.narrowed(images))
        x = self.decoder_embed(codes.to(self.decoder_embed.weight.dtype)).unflatten(0, (len(images), -1))
        x = torch.cat([self.decoder_token.to(x.dtype).expand(len(x), 1, -1), x], 1) + self.decoder_positions.to(x.dtype)
        predicted = self.head(self.decoder_norm(self.decoder(x))[:, 1:])
        index = index.view(len(images), -1)
        if self.targets is None:
            return predicted, distance, index, None
        with torch.no_grad():
            return predicted, distance, index, self.targets(images if seen is None else seen)


def load_tokenizer(op: str, run: Path, side: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Shape and weights of a run of vqkd without its decoder; a ValueError of another run, and of another grid."""
    trained = read_run(run)
    is_tokenizer = isinstance(trained.model, VqKdModel)
    require(op, is_tokenizer, "--tokenizer must be a run of vqkd, got {}, which is of {}", run, trained.run.recipe)
    assert isinstance(trained.model, VqKdModel)
    config = trained.model.config
    own = config.vision.image_size // config.vision.patch_size
    what = "--tokenizer must have the grid of {} x {} patches that --model has, got {} x {}"
    require(op, own == side, what, side, side, own, own)
    with torch.device("meta"):
        names = VqKdTokens(config).state_dict()
    state = {name: x.detach().cpu() for name, x in trained.model.state_dict().items() if name in names}
    return asdict(config), state


def tokenizer_of(saved: Any, state: Mapping[str, Tensor]) -> VqKdTokens:
    """The module of `load_tokenizer`'s shape, as JSON holds it, and weights; in evaluation mode, without gradients."""
    with torch.device("meta"):
        tokens = VqKdTokens(from_json(VqKdConfig, saved))
    tokens.load_state_dict(state, assign=True)
    return tokens.eval().requires_grad_(False)
