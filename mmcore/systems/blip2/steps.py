"""BLIP-2's steps over the batches of all ranks (arXiv:2301.12597): contrast, matching and captions, 1:1:1, in stage 1;
answers by a frozen language model in stage 2."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmcore.data.text.prompts import Prompted
from mmcore.data.text.wordpiece import Texts
from mmcore.losses import (
    fetch_rows,
    global_ratio,
    global_token_contrastive_loss,
    hard_negatives,
    matching_loss,
    pair_labels,
)
from mmcore.losses.ranks import world_size_of
from mmcore.recipe import Runner
from mmcore.systems.blip2.model import Pairs

LABEL_SMOOTHING = 0.1


class Pair(NamedTuple):
    """Of texts and their images."""

    images: Tensor  # [B, 3, S, S]
    texts: Texts  # each rank's padded to the same length
    image_ids: Tensor  # int64 [B], equal for equal images on all ranks: no image is a negative of its own captions
    text_ids: Tensor  # int64 [B], equal for equal captions on all ranks


def stage1_losses(model: Runner, batch: Pair, generator: torch.Generator) -> dict[str, Tensor]:
    """The "loss" of one batch and its three parts; every rank calls it, with a generator, of the negatives, that has a
    seed of its own for each rank and step."""
    texts = _trimmed(batch.texts)
    pairs: Pairs = model("pairs", batch.images, *texts, LABEL_SMOOTHING)
    labels = pair_labels(batch.image_ids, batch.text_ids)
    contrast = global_token_contrastive_loss(
        pairs.image, pairs.text, 1 / pairs.temperature, labels=(labels, labels), label_smoothing=LABEL_SMOOTHING
    )
    captions = global_ratio(pairs.caption_loss, pairs.num_tokens)
    matching = _matching(model, pairs, texts, batch.image_ids, batch.text_ids, generator)
    return {"loss": contrast + matching + captions, "contrast": contrast, "matching": matching, "captions": captions}


def _trimmed(texts: Texts) -> Texts:
    """Without what is padding in every text of every rank."""
    longest = texts.num_text.max()
    if world_size_of(None) > 1:
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return Texts(texts.tokens[:, : int(longest)], texts.num_text)


def _matching(
    model: Runner, pairs: Pairs, texts: Texts, image_ids: Tensor, text_ids: Tensor, generator: torch.Generator
) -> Tensor:
    """Of right pairs, of each text with a hard image, and of each image with a hard text."""
    negatives = hard_negatives(
        pairs.image, pairs.text, 1 / pairs.temperature, image_ids=image_ids, text_ids=text_ids, generator=generator
    )
    own = torch.arange(len(image_ids), device=image_ids.device)
    # -1 where no negative was found
    of_text, of_image = own[negatives.images >= 0], own[negatives.texts >= 0]
    more, image_index = _images_to_fetch(pairs, negatives.images[of_text])
    fetched = Texts(*(fetch_rows(x, negatives.texts[of_image]) for x in texts))
    rows = Texts(*(torch.cat([x, x[of_text], y]) for x, y in zip(texts, fetched, strict=True)))
    index = torch.cat([own, image_index, of_image])
    logits = model("match", pairs.keys_values, more, index, *rows)
    is_match = torch.arange(len(index), device=index.device) < len(own)
    return matching_loss(logits, is_match)


def _images_to_fetch(pairs: Pairs, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """States of the images that other ranks have, and where each image stands in this rank's and those."""
    size = len(pairs.tower)
    first = dist.get_rank() * size if world_size_of(None) > 1 else 0
    is_own = (numbers >= first) & (numbers < first + size)
    foreign, place = numbers[~is_own].unique(return_inverse=True)
    index = numbers - first
    index[~is_own] = size + place
    return fetch_rows(pairs.tower, foreign), index


def stage2_loss(model: Runner, images: Tensor, texts: Prompted) -> Tensor:
    """The mean cross-entropy of one batch over the answers' tokens of all ranks; arguments as of `BLIP2LM.loss`."""
    return global_ratio(*model("loss", images, *texts))
