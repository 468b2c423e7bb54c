"""Conversations in endless, exactly resumable batches: tokens with room for images, and what the tower sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmcore.data.broken import BrokenTally
from mmcore.data.config import LoaderSpec
from mmcore.data.loader import MapBatches, MapLoader, Payload
from mmcore.data.sources.conversations import ConversationSet
from mmcore.data.text.chat_batches import collate, group_by_modality_length, pack
from mmcore.data.text.templates import ChatSample, ChatTokens, expand
from mmcore.data.transforms.images import IMAGE_MEAN, image_processor_config, to_tensor
from mmcore.systems.llava.anyres import BICUBIC, Size, split_image
from mmcore.systems.llava.model import LlavaConfig


@dataclass(frozen=True)
class ChatPart:
    """Conversations that are run at once.

    Args:
        tokens: int64 [B, T], IMAGE_TOKEN once for each feature of an image; B is less than the conversations where
            these are packed.
        labels: int64 [B, T], -100 where nothing is learned.
        images: float32 [N, 3, S, S], what the tower sees, in the order of the tokens; N may be 0.
        image_sizes: int64 [I, 2], height and width of each image, or None without tiles.
        position_ids: int64 [B, T], from 0 in each conversation, or None where each has a row of its own.
    """

    tokens: Tensor
    labels: Tensor
    images: Tensor
    image_sizes: Tensor | None
    position_ids: Tensor | None

    def to(self, device: torch.device) -> tuple[Tensor | None, ...]:
        """What `Llava.loss` takes, on another device."""
        fields = (self.tokens, self.labels, self.images, self.image_sizes, self.position_ids)
        return tuple(None if x is None else x.to(device) for x in fields)


@dataclass(frozen=True)
class ChatTrainBatch:
    """One rank's conversations for one optimizer step.

    Args:
        parts: of as many conversations each.
        epoch: epoch that the step belongs to, from 0.
        ids: names of the conversations.
    """

    parts: tuple[ChatPart, ...]
    epoch: int
    ids: list[str]


def views(image: Image.Image, config: LlavaConfig) -> Tensor:
    """What the tower sees of an RGB image: float32 [V, 3, S, S].

    With tiles, all of it and then its tiles; without, all of it, made square by the colour that becomes 0.
    """
    side = config.vision.image_size
    if config.has_tiles:
        parts = split_image(image, config.grid_pinpoints, side)
    else:
        mean = tuple(int(255 * x) for x in IMAGE_MEAN)  # as LLaVA and transformers round it
        longest = max(image.size)
        parts = [ImageOps.pad(image, (longest, longest), color=mean).resize((side, side), BICUBIC)]
    return torch.stack([to_tensor(part) for part in parts])


def processor_config(config: LlavaConfig) -> dict[str, Any]:
    """How `views` prepares an image, as transformers' processors of LLaVA read it (preprocessor_config.json)."""
    settings = image_processor_config(config.vision.image_size)
    if config.has_tiles:
        own = {"image_grid_pinpoints": [list(size) for size in config.grid_pinpoints], "do_pad": True}
        return settings | {"image_processor_type": "LlavaNextImageProcessor", **own}
    return settings | {"image_processor_type": "LlavaImageProcessor", "do_pad": True}


class ChatAccumulator:
    """Collects conversations, and the broken records between them, into one Payload."""

    def __init__(self, tokens: ChatTokens, config: LlavaConfig, *, is_packed: bool, accum: int) -> None:
        self.tokens, self.config, self.is_packed, self.accum = tokens, config, is_packed, accum
        self.samples: list[ChatSample] = []
        self.views: list[list[Tensor]] = []
        self.sizes: list[list[Size]] = []
        self.ids: list[str] = []
        self.broken: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.samples)

    def payload(self) -> Payload[ChatTrainBatch]:
        """The collected conversations as tensors, `accum` parts of the same number of conversations."""
        size = len(self) // self.accum
        parts = tuple(self._part(range(i, i + size)) for i in range(0, len(self), size))
        return Payload(ChatTrainBatch(parts, -1, self.ids), len(self) + len(self.broken), self.broken)

    def _part(self, order: Sequence[int]) -> ChatPart:
        samples, position_ids, pad = [self.samples[i] for i in order], None, self.tokens.pad_token_id
        if self.is_packed:
            batch = pack(samples, self.tokens.max_length, pad)
            order = [order[i] for row in batch.samples for i in row]
            position_ids = batch.position_ids
        else:
            batch = collate(samples, pad)
        side = self.config.vision.image_size
        images = torch.cat([torch.zeros(0, 3, side, side), *(v for i in order for v in self.views[i])])
        sizes = torch.tensor([size for i in order for size in self.sizes[i]], dtype=torch.int64).view(-1, 2)
        image_sizes = sizes if self.config.has_tiles else None
        return ChatPart(batch.tokens, batch.labels, images, image_sizes, position_ids)


class ChatBatches(MapBatches[ChatTrainBatch]):
    """Of conversations, those of a step of about the same length and of one modality, as LLaVA orders them.

    Args:
        source: the conversations.
        spec: how to read them.
        tokens: of the language model.
        config: what images become.
        is_packed: several conversations stand in a row.
        accum: parts of a batch.
    """

    def __init__(
        self,
        source: ConversationSet,
        spec: LoaderSpec,
        tokens: ChatTokens,
        config: LlavaConfig,
        *,
        is_packed: bool,
        accum: int,
    ) -> None:
        super().__init__(len(source), spec)
        self.source, self.tokens, self.config = source, tokens, config
        self.is_packed, self.accum = is_packed, accum

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """Runs of a global batch, each of one modality and of about the same length."""
        spec, generator = self.spec, torch.Generator().manual_seed(int(rng.integers(2**62)))
        lengths, is_multimodal = self.source.lengths(), self.source.is_multimodal()
        return np.array(
            group_by_modality_length(lengths, is_multimodal, spec.batch_size, spec.world_size, generator)
        )

    def new(self) -> ChatAccumulator:
        """An empty batch."""
        return ChatAccumulator(self.tokens, self.config, is_packed=self.is_packed, accum=self.accum)

    def sample_id(self, index: int) -> str:
        """The source's."""
        return self.source.sample_id(index)

    def add(self, batch: ChatAccumulator, index: int, rng: np.random.Generator) -> None:
        """One conversation, with what is seen of the images that fit into it."""
        images = self.source.raw_images(index)
        sizes = [(image.height, image.width) for image in images]
        counts = [self.config.num_image_tokens(size) for size in sizes]
        sample = self.tokens.sample(self.source.conversations[index], counts)
        kept = sample.num_images
        batch.samples.append(expand(sample, counts[:kept]))
        batch.views.append([views(image, self.config) for image in images[:kept]])
        batch.sizes.append(sizes[:kept])
        batch.ids.append(self.sample_id(index))


def chat_loader(
    source: ConversationSet,
    spec: LoaderSpec,
    tokens: ChatTokens,
    config: LlavaConfig,
    *,
    is_packed: bool,
    accum: int = 1,
) -> MapLoader[ChatTrainBatch]:
    """Endless batches of conversations for one rank.

    Args:
        source: the conversations.
        spec: how to read them; `batch_size` conversations a rank and step.
        tokens: of the language model.
        config: what images become.
        is_packed: several conversations stand in a row of `tokens.max_length`, and see nothing of each other.
        accum: parts of a batch, which `batch_size` is a multiple of.

    Raises:
        ValueError: a batch larger than the data, or not of `accum` equal parts.
    """
    if accum < 1 or spec.batch_size % accum:
        raise ValueError(f"chat_loader: accum must divide the batch of {spec.batch_size}, got {accum}")
    tally = BrokenTally(source.max_broken, repr(source.name), source.broken)
    return MapLoader(ChatBatches(source, spec, tokens, config, is_packed=is_packed, accum=accum), tally)
