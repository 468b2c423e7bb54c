"""SigLIP 2: SigLIP's towers on images of any shape, and a decoder that captions them (arXiv 2502.14786)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.data.transforms.images import normalized
from mmcore.data.transforms.naflex import NaflexPreprocess, Patches
from mmcore.nn import KeyValueCache, Packing, resized_positions
from mmcore.ops import require
from mmcore.parts.decoding import beam_search, decode, in_step, nucleus
from mmcore.parts.vit import VisionConfig
from mmcore.systems.siglip.model import SigLIP, SigLIPConfig, VisionTower
from mmcore.systems.siglip2.decoder import Decoder
from mmcore.systems.siglip2.distiller import Distiller, Targets, Views


@dataclass(frozen=True)
class Siglip2Config(SigLIPConfig):
    """Both towers, the image tower's as that of squares with a position for each patch.

    Args:
        max_patches: of an image that is measured, at most.
        decoder_layers: of the captioning decoder; 0 = there is none.
        num_prototypes: of self-distillation; 0 = there is none.
    """

    max_patches: int = 256
    decoder_layers: int = 0
    num_prototypes: int = 0

    @property
    def preprocess(self) -> NaflexPreprocess:
        """What it wants of an image."""
        vision = self.vision
        numbers = vision.image_mean, vision.image_std, vision.interpolation
        return NaflexPreprocess(vision.patch_size, self.max_patches, *numbers)


class PatchEmbedding(nn.Conv2d):
    """A convolution's weights, for patches that are cut out: [N, 3, P, P] to [N, D]."""

    def forward(self, rows: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return F.linear(rows.flatten(1), self.weight.flatten(1), self.bias)


class NaflexTower(VisionTower):
    """Images of any shape to embeddings [B, D], not yet normalised, and the states that they are made of; its weights
    are those of a `VisionTower` of squares."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        patch = config.patch_size
        self.patch_embed = PatchEmbedding(3, config.width, patch, stride=patch, bias=config.has_patch_bias)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, images: Patches, masked: Tensor | None = None, mask_token: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Packing]:
        """Embeddings [B, D]; the states of all patches, [1, N, D]; where those of each image are. Nothing is padded: an
        image's patches see each other. In place of `masked` ones, int64 [M] of N, the tower sees `mask_token` [D]."""
        rows, patch = images.rows, self.config.patch_size
        wanted = [sum(images.counts), 3, patch, patch]
        require("SigLIP2", list(rows.shape) == wanted, "images must be {}, got {}", wanted, list(rows.shape))
        if rows.dtype == torch.uint8:
            rows = normalized(rows, self.config.image_mean, self.config.image_std)
        dtype = self.patch_embed.weight.dtype
        x = self.patch_embed(rows.to(dtype))
        if masked is not None and mask_token is not None:
            x = x.index_copy(0, masked, mask_token.to(x.dtype).expand(len(masked), -1))
        x = x + resized_positions(self.position_embedding, images.grids).to(dtype)  # pyright: ignore[reportArgumentType]
        packing = Packing.of(images.counts, x.device, is_causal=False)
        states = self.norm_post(self.transformer(x[None], packing))
        return self.head(states, packing), states, packing


class SigLIP2(SigLIP):
    """`SigLIP` of images of any shape, with a `decoder` where the configuration has one."""

    tower = NaflexTower
    config: Siglip2Config

    def __init__(self, config: Siglip2Config) -> None:
        super().__init__(config)
        layers = config.decoder_layers
        self.decoder = Decoder(config.text, config.vision.width, layers) if layers else None
        num = config.num_prototypes
        self.distiller = Distiller(config.vision.width, num) if num else None

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: Patches | None,
        tokens: Tensor | None,
        lengths: Sequence[int] | None = None,
        parallel: Sequence[bool] | None = None,
        *,
        views: Views | None = None,
        targets: Targets | None = None,
        generate: Mapping[str, Any] | None = None,
    ) -> Any:
        """Embed images and captions; pass None for a side that is not there.

        Returns:
            as of `SigLIP`; with `lengths` and `parallel`, see `Decoder`, a row's loss of its caption [B, 1] behind the
            embeddings; with `views` and `targets` behind that `Distiller.losses`. With `views` alone the `Targets` of a
            teacher, and with `generate`, the arguments of `describe`, captions of the images.
        """
        if views is not None and targets is None:
            assert self.distiller is not None
            return self.distiller.targets(self.visual, views)
        wide = torch.promote_types(self.logit_scale.dtype, torch.float32)
        image, words = None, None
        losses: tuple[Tensor, ...] = ()
        if images is not None:
            pooled, states, packing = self.visual(images)
            if generate is not None:
                return self.describe(states, packing, **generate)
            image = F.normalize(pooled.to(wide), dim=-1)
            if lengths is not None:
                assert self.decoder is not None
                losses = (self.decoder(states, packing, tokens, lengths, parallel),)
        if views is not None and targets is not None:
            assert self.distiller is not None
            losses += self.distiller.losses(self.visual, views, targets)
        if tokens is not None:
            words = F.normalize(self.text(tokens).to(wide), dim=-1)
        return image, words, *losses, self.logit_scale.to(wide).exp(), self.logit_bias.to(wide)

    def describe(
        self,
        states: Tensor,
        images: Packing,
        *,
        end: int,
        max_length: int,
        num_beams: int = 1,
        top_p: float | None = None,
    ) -> Tensor:
        """Captions, int64 [B, T], of images by their states; `end` is what stands behind a caption."""
        decoder = self.decoder
        assert decoder is not None
        keys_values = decoder.keys_values(states)
        caches = [KeyValueCache() for _ in keys_values]
        seen = images.seen_by([num_beams] * images.num_rows)
        place = 0

        def step(tokens: Tensor, rows: Tensor | None) -> Tensor:
            nonlocal place
            if rows is not None:
                for cache in caches:
                    cache.select(rows)
            logits = decoder.following(tokens, place, keys_values, seen, caches)
            place += 1
            return logits

        start = torch.full((images.num_rows,), decoder.start, dtype=torch.int64, device=states.device)
        options = {"max_length": max_length, "eos_token_id": end, "pad_token_id": end}
        if num_beams > 1:
            return beam_search(step, start, num_beams=num_beams, **options)
        if in_step(self)["synced_gpus"]:
            options["eos_token_id"] = -1  # ranks whose weights are split run on until all are done
        pick = (lambda x: x.argmax(1)) if top_p is None else partial(nucleus, top_p=top_p)
        return decode(step, start, pick, **options)
