"""What makes tokens of patches: any module with `indices(images)`, `num_tokens` and `preprocess`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from mmcore.data import PairData, Preprocess
from mmcore.data.sources.base import PairSource
from mmcore.ops import require
from mmcore.parts.pixels import patchify
from mmcore.weights.files import LOCAL, read_json

_EPS = 0.1  # of DALL-E's pixels, which are between 0.1 and 0.9
_FITTED = 4096
"""Images that k-means is fitted to, at most."""
_DOWN = 8
"""Pixels of a side that DALL-E's encoder makes a token of."""


class PatchTokens(nn.Module):
    """The nearest of some patches of pixels: k-means, for images as simple as digits.

    Args:
        centres: [V, 3 P P], pixels in [0, 1] as of `patchify`.
        preprocess: what images have to be like.
    """

    def __init__(self, centres: Tensor, preprocess: Preprocess) -> None:
        super().__init__()
        self.centres = nn.Buffer(centres)
        self.num_tokens, self.preprocess = len(centres), preprocess

    def indices(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] to int64 [B, P]."""
        size = round((self.centres.shape[1] / 3) ** 0.5)
        rows = patchify(images.to(self.centres.dtype) / 255, size)
        return torch.cdist(rows.flatten(0, 1), self.centres).argmin(1).view(rows.shape[:2])


def fit_patches(data: PairData, preprocess: Preprocess, patch: int, num_tokens: int, seed: int) -> Tensor:
    """`PatchTokens.centres` of the patches of some training images, by k-means; a ValueError of a source that is not in
    random access, or has fewer different patches."""
    source = data.source
    what = "--tokenizer kmeans must be of data in random access, got {!r}"
    require("mim", isinstance(source, PairSource), what, data.name)
    assert isinstance(source, PairSource)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(source), generator=generator)[:_FITTED].sort().values.tolist()
    rows = patchify(preprocess([source.raw_image(i) for i in chosen]).float() / 255, patch).flatten(0, 1)
    distinct = rows.unique(dim=0)
    what = "--num-tokens must be at most the {} different patches of the images, got {}"
    require("mim", 2 <= num_tokens <= len(distinct), what, len(distinct), num_tokens)
    return kmeans(rows, distinct[torch.randperm(len(distinct), generator=generator)[:num_tokens]], 20)


def kmeans(rows: Tensor, centres: Tensor, num_rounds: int) -> Tensor:
    """Centres [V, D], moved to the means of the rows [N, D] nearest to each, a few times; one without rows stays."""
    for _ in range(num_rounds):
        nearest = torch.cdist(rows, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        count = torch.bincount(nearest, minlength=len(centres))[:, None]
        centres = torch.where(count > 0, sums / count.clamp(min=1), centres)
    return centres


class DallETokens(nn.Module):
    """The encoder of DALL-E's discrete autoencoder, as transformers' FlavaImageCodebook: a token each 8 x 8 pixels.

    Args:
        settings: of its config.json.
        side: tokens of a side.
    """

    def __init__(self, settings: dict[str, Any], side: int) -> None:
        super().__init__()
        self.codebook = FlavaImageCodebook(FlavaImageCodebookConfig(**settings))
        self.num_tokens = self.codebook.config.vocab_size
        self.preprocess = Preprocess(side * _DOWN, interpolation="lanczos")

    def indices(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] to int64 [B, P]."""
        x = images.to(next(self.parameters()).dtype) / 255 * (1 - 2 * _EPS) + _EPS
        return self.codebook.get_codebook_indices(x).flatten(1)


def load_dalle(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of a folder of FlavaImageCodebook, as `DallETokens` takes them."""
    settings = read_json("mim", folder / "config.json")
    kind = settings.get("model_type")
    what = "--tokenizer must be a run of vqkd or a folder of a flava_image_codebook, got {}, which is of {!r}"
    require("mim", kind == "flava_image_codebook", what, folder, kind)
    theirs: Any = FlavaImageCodebook
    model = theirs.from_pretrained(folder, **LOCAL)
    names = ("num_groups", "input_channels", "num_blocks_per_group", "hidden_size", "vocab_size")
    kept = {name: getattr(model.config, name) for name in names}
    return kept, {f"codebook.{name}": x for name, x in model.state_dict().items()}
