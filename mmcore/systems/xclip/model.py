"""xCLIP: CLIP with heads that assign images and captions to clusters (arXiv 2210.09304)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmcore.parts.heads import projection_head
from mmcore.systems.clip.model import CLIP, TowersConfig, unit_norm


class XCLIP(CLIP):
    """CLIP, and of each tower's embedding the logits of K clusters."""

    def __init__(self, config: TowersConfig, num_clusters: int, head_width: int) -> None:
        super().__init__(config)
        sizes = config.embed_dim, head_width, num_clusters
        self.image_head, self.text_head = projection_head(sizes), projection_head(sizes)

    def forward(
        self,
        images: Tensor | None,
        tokens: Tensor | None,
        lengths: Sequence[int] | None = None,
        kept: Tensor | None = None,
        *,
        only_features: bool = False,
        with_heads: bool = False,
    ) -> Any:
        """As `CLIP.forward`; `with_heads`, the embeddings of both sides, the logits of both, [B, K] (None of a side
        that is not there), and the logit scale."""
        if not with_heads:
            return super().forward(images, tokens, lengths, kept, only_features=only_features)
        image = None if images is None else self.embed_image(images, kept)
        text = None if tokens is None else self.text(tokens, lengths)
        unit = [None if x is None else unit_norm(x) for x in (image, text)]
        logits = [None if x is None else head(x) for x, head in ((image, self.image_head), (text, self.text_head))]
        return *unit, *logits, self.scale()
