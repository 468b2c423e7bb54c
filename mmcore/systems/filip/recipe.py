"""FILIP's recipe: CLIP's, with late interaction in place of one product a pair."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmcore.data import PairData
from mmcore.losses import global_token_contrastive_loss
from mmcore.ops import require
from mmcore.recipe import Claim, Proof, Runner, Step
from mmcore.systems.clip.model import CLIPConfig
from mmcore.systems.clip.recipe import Clip
from mmcore.systems.filip.model import FILIP
from mmcore.tasks.alignment import Aligns
from mmcore.two_towers import PairAssets


@dataclass(frozen=True)
class Filip(Clip):
    """Train FILIP (arXiv 2111.07783) on image-caption pairs: CLIP by the mean of each token's best match."""

    top_tokens: int | None = None
    """Each token meets only so many of an image's or a caption's tokens, those nearest to all of the pair's other side
    (DeCLIP's version has 16); None = all that are not padding."""

    kind = FILIP
    tasks = (*Clip.tasks, "alignment")

    def assets(self, data: PairData) -> PairAssets:
        least = self.top_tokens is None or self.top_tokens >= 1
        require("filip", least, "--top-tokens must be at least 1, got {}", self.top_tokens)
        assets = super().assets(data)
        is_clips = isinstance(assets.shape, CLIPConfig) and self.vision is None and self.text is None
        require("filip", is_clips, "--vision and --text must be left out, got {} and {}", self.vision, self.text)
        return assets

    def objective(self, features: tuple[Tensor, ...], parts: Sequence[Any], step: Step) -> dict[str, Tensor]:
        image, text, scale = features
        words = text.detach().ne(0).any(2)  # padding is 0
        if self.top_tokens is None:
            return {"loss": global_token_contrastive_loss(image, text, scale, b_mask=words)}
        best_image, best_text, best_words = top_tokens(image, text, words, self.top_tokens)
        rows = global_token_contrastive_loss(image, best_text, scale, symmetric=False, b_mask=best_words)
        cols = global_token_contrastive_loss(text, best_image, scale, symmetric=False, mask=words)
        return {"loss": (rows + cols) / 2}

    def aligns(self, assets: PairAssets, model: Runner, device: torch.device) -> Aligns:
        def words(caption: str) -> tuple[list[str], Tensor]:
            pieces = assets.tokenizer.pieces(caption)
            return pieces, model(None, assets.tokenizer([caption]).to(device))[1][0, 1 : len(pieces) + 1]

        num_whole = assets.shape.vision.num_prefix
        return Aligns(assets.preprocess, num_whole, lambda images: model(images, None)[0], words)


def top_tokens(image: Tensor, text: Tensor, words: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each pair of tokens [B, P, E] and [B, T, E] those with the largest sums of cosines with the other side, of
    equal ones the first: [B, P', E], [B, T', E] and which of the latter are no padding, P' and T' at most `count`."""
    nearness = image.detach() @ text.detach().mT  # [B, P, T], 0 for padding
    of_image = nearness.sum(2).argsort(dim=1, descending=True, stable=True)[:, :count]
    of_text = nearness.sum(1).masked_fill(~words, -float("inf")).argsort(dim=1, descending=True, stable=True)[:, :count]
    width = image.shape[2]
    best = [x.gather(1, i[:, :, None].expand(-1, -1, width)) for x, i in ((image, of_image), (text, of_text))]
    return best[0], best[1], words.gather(1, of_text)


PROOF = Proof(
    [("filip", "--data digits --model tiny --epochs 30 --lr 1e-3 --ema 0.99")],
    [
        Claim("zero-shot accuracy by late interaction (held-out)", "zero-shot top-1", 0.88),
        Claim("text to image R@1 by late interaction (held-out)", "text to image R@1", 0.5),
    ],
)
