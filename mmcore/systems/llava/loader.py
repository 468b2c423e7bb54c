"""Conversations as batches: tokens with room for images, and what the tower sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmcore.data.sources.conversations import ChatRecord
from mmcore.data.text.chat_batches import collate, pack
from mmcore.data.text.templates import ChatSample, ChatTokens, expand
from mmcore.data.transforms.images import to_pixels
from mmcore.systems.llava.anyres import BICUBIC, Size, split_image
from mmcore.systems.llava.model import LlavaConfig


class ChatPart(NamedTuple):
    """Conversations that are run at once: what `Llava.loss` takes.

    Args:
        tokens: int64 [B, T], IMAGE_TOKEN once for each feature of an image; B is less than the conversations where
            these are packed.
        labels: int64 [B, T], -100 where nothing is learned.
        images: uint8 [N, 3, S, S], what the tower sees, in the order of the tokens; N may be 0.
        image_sizes: int64 [I, 2], height and width of each image, or None without tiles.
        position_ids: int64 [B, T], from 0 in each conversation, or None where each has a row of its own.
    """

    tokens: Tensor
    labels: Tensor
    images: Tensor
    image_sizes: Tensor | None
    position_ids: Tensor | None


class SeenChat(NamedTuple):
    """A conversation in tokens, with what is seen of the images that fit into it, and their sizes."""

    chat: ChatSample
    views: list[Tensor]
    sizes: list[Size]


def views(image: Image.Image, config: LlavaConfig) -> Tensor:
    """What the tower sees of an RGB image: uint8 [V, 3, S, S].

    With tiles, all of it and then its tiles; without, all of it, made square by the colour that becomes 0.
    """
    side = config.vision.image_size
    if config.has_tiles:
        parts = split_image(image, config.grid_pinpoints, side)
    else:
        mean = tuple(int(255 * x) for x in config.vision.image_mean)  # as LLaVA and transformers round it
        longest = max(image.size)
        parts = [ImageOps.pad(image, (longest, longest), color=mean).resize((side, side), BICUBIC)]
    return torch.stack([to_pixels(part) for part in parts])


def processor_config(config: LlavaConfig) -> dict[str, Any]:
    """How `views` prepares an image, as transformers' processors of LLaVA read it (preprocessor_config.json)."""
    settings = config.vision.preprocess.processor()
    if config.has_tiles:
        own = {"image_grid_pinpoints": [list(size) for size in config.grid_pinpoints], "do_pad": True}
        return settings | {"image_processor_type": "LlavaNextImageProcessor", **own}
    return settings | {"image_processor_type": "LlavaImageProcessor", "do_pad": True}


def seen_chat(record: ChatRecord, tokens: ChatTokens, config: LlavaConfig) -> SeenChat:
    """A conversation, with what is seen of the images that fit into it; raises BrokenRecord."""
    images = record.images()
    sizes = [(image.height, image.width) for image in images]
    counts = [config.num_image_tokens(size) for size in sizes]
    sample = tokens.sample(record.conversation, counts)
    kept = sample.num_images
    seen = [views(image, config) for image in images[:kept]]
    return SeenChat(expand(sample, counts[:kept]), seen, sizes[:kept])


def collate_chats(samples: Sequence[SeenChat], tokens: ChatTokens, config: LlavaConfig, *, is_packed: bool) -> ChatPart:
    """Conversations as a batch; packed, several stand in a row of `tokens.max_length` and see nothing of each other."""
    position_ids, chats = None, [sample.chat for sample in samples]
    if is_packed:
        batch = pack(chats, tokens.max_length, tokens.pad_token_id)
        samples = [samples[i] for row in batch.samples for i in row]
        position_ids = batch.position_ids
    else:
        batch = collate(chats, tokens.pad_token_id)
    side = config.vision.image_size
    images = torch.cat(
        [torch.zeros(0, 3, side, side, dtype=torch.uint8), *(x for sample in samples for x in sample.views)]
    )
    sizes = torch.tensor([size for sample in samples for size in sample.sizes], dtype=torch.int64).view(-1, 2)
    image_sizes = sizes if config.has_tiles else None
    return ChatPart(batch.tokens, batch.labels, images, image_sizes, position_ids)
