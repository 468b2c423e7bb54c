"""What `Llava.generate` reads: a conversation up to an answer, with what the tower sees of its images."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mmcore.data.sources.conversations import Turn
from mmcore.data.text.templates import ChatSample, ChatTokens, expand
from mmcore.systems.llava.anyres import Size
from mmcore.systems.llava.loader import views
from mmcore.systems.llava.model import LlavaConfig


class SeenImage(NamedTuple):
    """What the tower sees of an image, uint8 [V, 3, S, S], and the height and width that this had."""

    views: Tensor
    size: Size


def see(image: Image.Image, config: LlavaConfig) -> SeenImage:
    """What the tower sees of an RGB image."""
    return SeenImage(views(image, config), (image.height, image.width))


class Prompt(NamedTuple):
    """What is read before an answer."""

    tokens: Tensor  # int64 [T], IMAGE_TOKEN for each feature of an image
    images: Sequence[SeenImage]


def prompt_of(tokens: ChatTokens, config: LlavaConfig, turns: Sequence[Turn], images: Sequence[SeenImage]) -> Prompt:
    """The prompt that a conversation is up to here.

    Args:
        tokens: of the language model.
        config: what images become.
        turns: the last is the user's.
        images: in the order of the turns; there may be more, which later turns show.

    Raises:
        ValueError: turns that cannot be written, or fewer images than these show.
    """
    written = tokens.prompt(turns)
    sample = ChatSample(written, written)
    here = images[: sample.num_images]
    counts = [config.num_image_tokens(image.size) for image in here]
    return Prompt(expand(sample, counts).tokens, here)


def generate_inputs(
    prompts: Sequence[Prompt], pad_token_id: int, config: LlavaConfig, device: torch.device
) -> list[Tensor]:
    """The arguments of `Llava.generate` for a batch of prompts, on a device."""
    lengths = torch.tensor([len(prompt.tokens) for prompt in prompts])
    read = torch.full((len(prompts), int(lengths.max())), pad_token_id)
    for row, prompt in zip(read, prompts):
        row[len(row) - len(prompt.tokens) :] = prompt.tokens
    shown = [image for prompt in prompts for image in prompt.images]
    return [read.to(device), lengths.to(device), *image_inputs(shown, config, device)]


def image_inputs(images: Sequence[SeenImage], config: LlavaConfig, device: torch.device) -> list[Tensor]:
    """What a batch shows, as `Llava` takes it: the views of all images and, with tiles, their sizes; on a device."""
    side = config.vision.image_size
    seen = torch.cat([torch.zeros(0, 3, side, side, dtype=torch.uint8), *(image.views for image in images)])
    sizes = torch.tensor([image.size for image in images]).view(-1, 2)
    return [x.to(device) for x in (seen, *((sizes,) if config.has_tiles else ()))]
