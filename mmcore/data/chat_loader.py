"""Conversations in endless, exactly resumable batches: tokens with room for images, and what the tower sees of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmcore.data.broken import BrokenTally
from mmcore.data.chat_batches import collate, group_by_modality_length, pack
from mmcore.data.config import LoaderSpec
from mmcore.data.conversations import ConversationSet
from mmcore.data.images import IMAGE_MEAN, to_tensor
from mmcore.data.loader import MapBatches, MapLoader, Payload
from mmcore.data.templates import ChatSample, ChatTokens, expand
from mmcore.models.anyres import BICUBIC, Size, split_image
from mmcore.models.llava import LlavaConfig


@dataclass(frozen=True)
class ChatTrainBatch:
    """One rank's conversations for one optimizer step.

    Args:
        tokens: int64 [B, T], IMAGE_TOKEN once for each feature of an image; B is less than the conversations where
            these are packed.
        labels: int64 [B, T], -100 where nothing is learned.
        images: float32 [N, 3, S, S], what the tower sees, in the order of the tokens; N may be 0.
        image_sizes: int64 [I, 2], height and width of each image, or None without tiles.
        position_ids: int64 [B, T], from 0 in each conversation, or None where each has a row of its own.
        epoch: epoch that the step belongs to, from 0.
        ids: names of the conversations.
    """

    tokens: Tensor
    labels: Tensor
    images: Tensor
    image_sizes: Tensor | None
    position_ids: Tensor | None
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
        mean = tuple(round(255 * x) for x in IMAGE_MEAN)
        longest = max(image.size)
        parts = [ImageOps.pad(image, (longest, longest), color=mean).resize((side, side), BICUBIC)]
    return torch.stack([to_tensor(part) for part in parts])


class ChatAccumulator:
    """Collects conversations, and the broken records between them, into one Payload."""

    def __init__(self, tokens: ChatTokens, config: LlavaConfig, *, is_packed: bool) -> None:
        self.tokens, self.config, self.is_packed = tokens, config, is_packed
        self.samples: list[ChatSample] = []
        self.views: list[list[Tensor]] = []
        self.sizes: list[list[Size]] = []
        self.ids: list[str] = []
        self.broken: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.samples)

    def payload(self) -> Payload[ChatTrainBatch]:
        """The collected conversations as tensors."""
        pad, order, position_ids = self.tokens.pad_token_id, range(len(self)), None
        if self.is_packed:
            batch = pack(self.samples, self.tokens.max_length, pad)
            order = [i for row in batch.samples for i in row]
            position_ids = batch.position_ids
        else:
            batch = collate(self.samples, pad)
        side = self.config.vision.image_size
        images = torch.cat([torch.zeros(0, 3, side, side), *(v for i in order for v in self.views[i])])
        sizes = torch.tensor([size for i in order for size in self.sizes[i]], dtype=torch.int64).view(-1, 2)
        has_tiles = self.config.has_tiles
        made = ChatTrainBatch(
            batch.tokens, batch.labels, images, sizes if has_tiles else None, position_ids, -1, self.ids
        )
        return Payload(made, len(self) + len(self.broken), self.broken)


class ChatBatches(MapBatches[ChatTrainBatch]):
    """Of conversations, those of a step of about the same length and of one modality, as LLaVA orders them.

    Args:
        source: the conversations.
        spec: how to read them.
        tokens: of the language model.
        config: what images become.
        is_packed: several conversations stand in a row.
    """

    def __init__(
        self,
        source: ConversationSet,
        spec: LoaderSpec,
        tokens: ChatTokens,
        config: LlavaConfig,
        *,
        is_packed: bool,
    ) -> None:
        super().__init__(len(source), spec)
        self.source, self.tokens, self.config, self.is_packed = source, tokens, config, is_packed

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """Runs of a global batch, each of one modality and of about the same length."""
        spec, generator = self.spec, torch.Generator().manual_seed(int(rng.integers(2**62)))
        lengths, is_multimodal = self.source.lengths(), self.source.is_multimodal()
        return np.array(
            group_by_modality_length(lengths, is_multimodal, spec.batch_size, spec.world_size, generator)
        )

    def new(self) -> ChatAccumulator:
        """An empty batch."""
        return ChatAccumulator(self.tokens, self.config, is_packed=self.is_packed)

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
    source: ConversationSet, spec: LoaderSpec, tokens: ChatTokens, config: LlavaConfig, *, is_packed: bool
) -> MapLoader[ChatTrainBatch]:
    """Endless batches of conversations for one rank.

    Args:
        source: the conversations.
        spec: how to read them; `batch_size` conversations a rank and step.
        tokens: of the language model.
        config: what images become.
        is_packed: several conversations stand in a row of `tokens.max_length`, and see nothing of each other.

    Raises:
        ValueError: a batch larger than the data.
    """
    tally = BrokenTally(source.max_broken, repr(source.name), source.broken)
    return MapLoader(ChatBatches(source, spec, tokens, config, is_packed=is_packed), tally)
