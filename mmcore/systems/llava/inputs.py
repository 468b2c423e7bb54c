"""Conversations as `Llava` takes them: tokens with room for images, and what the tower sees of these."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mmcore.data.broken import BrokenRecord
from mmcore.data.sources.conversations import ChatRecord, Turn
from mmcore.data.text.chat_batches import collate, pack
from mmcore.data.text.templates import ChatSample, ChatTokens, expand
from mmcore.data.transforms.images import to_pixels
from mmcore.systems.llava.anyres import Size, split_image
from mmcore.systems.llava.model import LlavaConfig
from mmcore.weights.pictures import processor_settings


class ChatPart(NamedTuple):
    """Conversations that are run at once, in fewer rows than there are where they are packed: see `Llava.loss`."""

    tokens: Tensor  # int64 [B, T], IMAGE_TOKEN once for each feature of an image
    labels: Tensor  # int64 [B, T], -100 where nothing is learned
    images: Tensor  # uint8 [N, 3, S, S], what the tower sees, in the order of the tokens; N may be 0
    image_sizes: Tensor | None  # int64 [I, 2], height and width of each image; None without tiles
    position_ids: Tensor | None  # int64 [B, T], from 0 in each conversation; None where each has a row of its own


class SeenImage(NamedTuple):
    """What the tower sees of an image, uint8 [V, 3, S, S], and the height and width that this had."""

    views: Tensor
    size: Size


class SeenChat(NamedTuple):
    """A conversation in tokens, expanded, and the images that fit into it."""

    chat: ChatSample
    images: Sequence[SeenImage]


def views(image: Image.Image, config: LlavaConfig) -> Tensor:
    """What the tower sees of an RGB image: uint8 [V, 3, S, S].

    With tiles, all of it and then its tiles; without, all of it, made square as `config.fit` says.
    """
    if not config.has_tiles:
        return config.preprocess([image])
    parts = split_image(image, config.grid_pinpoints, config.vision.image_size, config.preprocess.resample)
    return torch.stack([to_pixels(part) for part in parts])


def processor_config(config: LlavaConfig) -> dict[str, Any]:
    """How `views` prepares an image, as transformers' processors of LLaVA read it (preprocessor_config.json)."""
    settings = processor_settings(replace(config.preprocess, fit="pad") if config.has_tiles else config.preprocess)
    if config.has_tiles:
        settings["image_processor_type"] = "LlavaNextImageProcessor"
        settings["image_grid_pinpoints"] = [list(size) for size in config.grid_pinpoints]
    return settings


def see(image: Image.Image, config: LlavaConfig) -> SeenImage:
    """What the tower sees of an RGB image."""
    return SeenImage(views(image, config), (image.height, image.width))


def seen_chat(record: ChatRecord, tokens: ChatTokens, config: LlavaConfig) -> SeenChat:
    """A conversation, with what is seen of the images that fit into it; raises BrokenRecord."""
    images = record.images()
    counts = [config.num_image_tokens((image.height, image.width)) for image in images]
    sample = tokens.sample(record.conversation, counts)
    kept = sample.num_images
    return SeenChat(expand(sample, counts[:kept]), [see(image, config) for image in images[:kept]])


def shown_chat(records: Iterable[ChatRecord], tokens: ChatTokens, config: LlavaConfig) -> list[str]:
    """For a person, what is learned of the first record that is not broken."""
    for record in islice(records, 100):
        try:
            counts = [config.num_image_tokens((image.height, image.width)) for image in record.images()]
            whole, *borders = tokens.shown(tokens.sample(record.conversation, counts))
        except BrokenRecord:
            continue
        learned = f"learned of the first record ({record.id}), between {{{{ and }}}}: {whole}"
        return [learned, *(f"  tokens around answer {n}: {border}" for n, border in enumerate(borders, 1))]
    return []


def prompt_of(tokens: ChatTokens, config: LlavaConfig, turns: Sequence[Turn], images: Sequence[SeenImage]) -> SeenChat:
    """What is read before the answer to the last of the turns, the user's. The images are in the order of the turns;
    there may be more, which later turns show. A ValueError of turns that cannot be written, and of fewer images."""
    written = tokens.prompt(turns)
    sample = ChatSample(written, written)
    here = images[: sample.num_images]
    return SeenChat(expand(sample, [config.num_image_tokens(image.size) for image in here]), here)


def collate_chats(samples: Sequence[SeenChat], tokens: ChatTokens, config: LlavaConfig, *, is_packed: bool) -> ChatPart:
    """Conversations as a batch; packed, several stand in a row of `tokens.max_length` and see nothing of each other."""
    position_ids, chats = None, [sample.chat for sample in samples]
    if is_packed:
        batch = pack(chats, tokens.max_length, tokens.pad_token_id)
        samples = [samples[i] for row in batch.samples for i in row]
        position_ids = batch.position_ids
    else:
        batch = collate(chats, tokens.pad_token_id)
    images, *sizes = image_inputs([image for sample in samples for image in sample.images], config, torch.device("cpu"))
    return ChatPart(batch.tokens, batch.labels, images, sizes[0] if sizes else None, position_ids)


def generate_inputs(
    prompts: Sequence[SeenChat], pad_token_id: int, config: LlavaConfig, device: torch.device
) -> list[Tensor]:
    """The arguments of `Llava.generate` for a batch of prompts, on a device."""
    lengths = torch.tensor([len(prompt.chat.tokens) for prompt in prompts])
    read = torch.full((len(prompts), int(lengths.max())), pad_token_id)
    for row, prompt in zip(read, prompts):
        row[len(row) - len(prompt.chat.tokens) :] = prompt.chat.tokens
    shown = [image for prompt in prompts for image in prompt.images]
    return [read.to(device), lengths.to(device), *image_inputs(shown, config, device)]


def image_inputs(images: Sequence[SeenImage], config: LlavaConfig, device: torch.device) -> list[Tensor]:
    """What a batch shows, as `Llava` takes it: the views of all images and, with tiles, their sizes; on a device."""
    side = config.vision.image_size
    seen = torch.cat([torch.zeros(0, 3, side, side, dtype=torch.uint8), *(image.views for image in images)])
    sizes = torch.tensor([image.size for image in images], dtype=torch.int64).view(-1, 2)
    return [x.to(device) for x in (seen, *((sizes,) if config.has_tiles else ()))]
