"""LLaVA: an image's patches, projected, between the words that a language model reads."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from mmcore.data.transforms.images import Fit, Preprocess
from mmcore.labels import IGNORED, IMAGE_TOKEN
from mmcore.nn import Linear, quicken
from mmcore.ops import require
from mmcore.parts.adapters import Lora, add_adapters, is_adapter, merge_adapters
from mmcore.parts.decoding import in_step
from mmcore.parts.language import LanguageHead
from mmcore.parts.vit import VisionConfig, ViT
from mmcore.systems.llava.anyres import Size, grid_shape, num_packed, num_views, pack_features

Trainable = Literal["projector", "language", "all"]
"""What learns: the projector alone (stage 1), the language model with it (stage 2), the tower too (NeXT)."""


@dataclass(frozen=True)
class LlavaConfig:
    """Shape of what reads images; the language model has a configuration of its own.

    `vision` has no more layers than are run: LLaVA takes the states before the last layer of a CLIP, which
    `mmcore.parts.towers.load_tower` leaves out. `projector` is "linear" (LLaVA 1, arXiv:2304.08485) or "mlp2x_gelu"
    (1.5, arXiv:2310.03744, and NeXT). `grid_pinpoints` are NeXT's resolutions, (height, width); where there are none,
    `fit` makes an image square, "pad" as 1.5 has it.
    """

    vision: VisionConfig
    projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
    grid_pinpoints: tuple[Size, ...] = ()
    fit: Fit = "pad"

    def __post_init__(self) -> None:
        op, kinds, tile = "LlavaConfig", ("linear", "mlp2x_gelu"), self.vision.image_size
        require(op, self.projector in kinds, "projector must be one of {}, got {!r}", kinds, self.projector)
        fits = all(min(p) > 0 and p[0] % tile == p[1] % tile == 0 for p in self.grid_pinpoints)
        what = "grid_pinpoints must be multiples of the tower's image_size {}, got {}"
        require(op, fits, what, tile, self.grid_pinpoints)

    @property
    def preprocess(self) -> Preprocess:
        """What it wants of an image, tiles aside."""
        return replace(self.vision.preprocess, fit=self.fit)

    @property
    def has_tiles(self) -> bool:
        return bool(self.grid_pinpoints)

    def num_views(self, size: Size) -> int:
        """How many images the tower sees of one of (height, width) pixels."""
        return num_views(size, self.grid_pinpoints, self.vision.image_size) if self.has_tiles else 1

    def num_image_tokens(self, size: Size) -> int:
        """How many `IMAGE_TOKEN`s an image of (height, width) pixels takes."""
        if not self.has_tiles:
            return self.vision.num_patches
        return num_packed(size, self.grid_pinpoints, self.vision.image_size, self.vision.patch_size)


def learned_labels(labels: Tensor, position_ids: Tensor | None) -> Tensor:
    """What each place but the last of a row learns, int64 [B, T - 1]; arguments as of `Llava.loss`."""
    if position_ids is not None:  # what comes first has nothing before it
        labels = labels.masked_fill(position_ids == 0, IGNORED)
    return labels[:, 1:]


class Llava(nn.Module):
    """An image tower, a projector, and a causal model of transformers: Llama, Qwen, Mistral (arXiv:2304.08485,
    arXiv:2310.03744, LLaVA-NeXT). What is not `trainable` is frozen and stays in evaluation mode."""

    def __init__(self, config: LlavaConfig, language_model: Any, *, trainable: Trainable = "projector") -> None:
        super().__init__()
        self.config = config
        self.visual = ViT(config.vision)
        width = language_model.get_input_embeddings().embedding_dim
        self.projector: nn.Module = Linear(config.vision.width, width)
        if config.projector == "mlp2x_gelu":
            self.projector = nn.Sequential(self.projector, nn.GELU(), Linear(width, width))
        self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5) if config.has_tiles else None
        quicken(language_model)
        self.language_model: Any = language_model
        self.language_head = LanguageHead(language_model.get_output_embeddings())
        self.activation_checkpointing = False
        self._adapters: tuple[Any, ...] = ()
        self.set_trainable(trainable)

    def set_trainable(self, trainable: Trainable) -> None:
        """Freezes what is not to learn, and no more than that; of a language model with adapters these alone learn."""
        choices = ("projector", "language", "all")
        require("Llava", trainable in choices, "trainable must be one of {}, got {!r}", choices, trainable)
        self.trainable: Trainable = trainable
        self.requires_grad_(True)
        self.visual.requires_grad_(trainable == "all")
        named = list(self.language_model.named_parameters())
        has_adapters = any(is_adapter(name) for name, _ in named)
        for name, parameter in named:
            parameter.requires_grad_(trainable != "projector" and (is_adapter(name) or not has_adapters))
        self.train(self.training)

    def add_adapters(self, lora: Lora) -> None:
        """Puts adapters beside the language model's layers, which learn in place of its weights."""
        # in a tuple, so that it is no part of this module
        self._adapters = (add_adapters(self.language_model, lora),)
        self.set_trainable(self.trainable)

    def merge_adapters(self) -> None:
        """Adds what the adapters learned to the weights, and takes them away; nothing where there are none."""
        for tuner in self._adapters:
            merge_adapters(self.language_model, tuner)
        self._adapters = ()
        self.set_trainable(self.trainable)

    def train(self, mode: bool = True) -> "Llava":
        super().train(mode)
        self.visual.train(mode and self.trainable == "all")
        self.language_model.train(mode and self.trainable != "projector")
        if mode and self.activation_checkpointing:
            # transformers recomputes a layer in training mode alone; what is in it stays in its own mode
            for layer in self._language_layers():
                layer.training = True
        return self

    def set_activation_checkpointing(self, enable: bool) -> None:
        """Recompute activations in the backward, of a frozen language model too."""
        self.activation_checkpointing = enable
        self.visual.transformer.activation_checkpointing = enable
        for layer in self._language_layers():
            layer.gradient_checkpointing = enable
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        self.train(self.training)

    def _language_layers(self) -> list[Any]:
        return [x for x in self.language_model.modules() if isinstance(x, GradientCheckpointingLayer)]

    def forward(self, task: str, *inputs: Any, **options: Any) -> Any:
        """`loss`, `likelihood` or `generate` by name: under ZeRO-3 parameters are whole only inside a forward."""
        return getattr(self, task)(*inputs, **options)

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        images: Tensor,
        image_sizes: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The cross-entropy of the labels, summed, and how many are learned.

        Args:
            tokens: int64 [B, T], padded on the right, `IMAGE_TOKEN` where a feature of an image goes.
            labels: int64 [B, T], the tokens that are learned, -100 elsewhere; the first of a row is not.
            images: [N, 3, S, S], in the order of the rows; of NeXT, the views of each one after the other. N may be 0:
                tower and projector run even so, as ZeRO-3 wants it of every rank.
            image_sizes: int64 [I, 2], height and width of each image before it was cut; of NeXT alone.
            position_ids: int64 [B, T], of rows that hold several documents: it starts at 0 in each, the
                padding included, and tokens see their own document alone. None = a document a row.
        """
        embedded = self._embed(tokens, images, image_sizes)
        # padding is behind all that reads; with a mask or a cache transformers would not look for documents
        places = {} if position_ids is None else {"position_ids": position_ids}
        found = self.language_model.base_model(inputs_embeds=embedded, use_cache=False, **places)
        labels = learned_labels(labels, position_ids)
        return self.language_head(found.last_hidden_state[:, :-1], labels), (labels != IGNORED).sum()

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, num_text: Tensor, images: Tensor, image_sizes: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Token ids that the language model goes on with, by `transformers`' `generate` and its options.

        Args:
            tokens: int64 [B, T], prompts, padded on the left, `IMAGE_TOKEN` where a feature of an image goes.
            num_text: int64 [B], how many are no padding.
            images, image_sizes: as in `loss`.
        """
        length = tokens.shape[1]
        seen = torch.arange(length, device=tokens.device) >= length - num_text[:, None]
        embedded = self._embed(tokens, images, image_sizes)
        options = in_step(self.language_model) | options
        return self.language_model.generate(inputs_embeds=embedded, attention_mask=seen.long(), **options)

    @torch.no_grad()
    def likelihood(
        self, tokens: Tensor, labels: Tensor, images: Tensor, image_sizes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """How likely the labels of each row are, a document a row; arguments as of `loss`.

        Returns:
            The sum of the labels' log-probabilities, float32 [B]; how many they are, int64 [B]; whether each of a row
            is the likeliest token in its place, bool [B].
        """
        embedded = self._embed(tokens, images, image_sizes)
        states = self.language_model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        labels, head = labels[:, 1:], self.language_head
        is_wanted = labels != IGNORED
        wanted, rows = labels[is_wanted], is_wanted.nonzero()[:, 0]
        logits = F.linear(states[:, :-1][is_wanted], head.weight, head.bias).float()  # [N, V]
        found = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        num_missed = torch.zeros_like(labels[:, 0]).index_add(0, rows, (logits.argmax(-1) != wanted).long())
        total = found.new_zeros(len(labels)).index_add(0, rows, found)
        return total, is_wanted.sum(1), num_missed == 0

    def features(self, images: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """What the language model reads of one or more images, [N, D]; arguments as of `loss`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable == "all"):
            states = self.visual(images)[:, self.config.vision.num_prefix :]
        projected = self.projector(states)
        if self.image_newline is None:
            require("Llava", image_sizes is None, "image_sizes must be None without tiles, got {}", "some")
            return projected.flatten(0, 1)
        require("Llava", image_sizes is not None, "image_sizes must be given with tiles, got {}", None)
        assert image_sizes is not None
        sizes: list[Size] = [(height, width) for height, width in image_sizes.tolist()]
        counts = [self.config.num_views(size) for size in sizes]
        what = "images must be the {} views that image_sizes tell of, got {}"
        require("Llava", sum(counts) == len(images), what, sum(counts), len(images))
        pinpoints, tile = self.config.grid_pinpoints, self.config.vision.image_size
        each = zip(projected.split(counts), sizes)
        return torch.cat([pack_features(x, s, grid_shape(s, pinpoints, tile), self.image_newline) for x, s in each])

    def _embed(self, tokens: Tensor, images: Tensor, image_sizes: Tensor | None) -> Tensor:
        """What the language model reads, [B, T, D]."""
        is_image, side, has_images = tokens == IMAGE_TOKEN, self.config.vision.image_size, len(images) > 0
        embedded = self.language_model.get_input_embeddings()(tokens.masked_fill(is_image, 0))
        if not has_images:
            size = self.config.grid_pinpoints[0] if self.config.has_tiles else (side, side)
            image_sizes = torch.tensor([size]) if self.config.has_tiles else None
            images = images.new_zeros(self.config.num_views(size), 3, side, side)
        features = self.features(images, image_sizes).to(embedded.dtype)
        places, num_features = int(is_image.sum()), len(features) if has_images else 0
        what = "tokens must hold {} image tokens, as many as the images have features, got {}"
        require("Llava", places == num_features, what, num_features, places)
        if not has_images:
            return embedded + (0.0 * features).sum()
        return embedded.masked_scatter(is_image[..., None], features)
