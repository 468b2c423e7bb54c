"""BLIP-2's steps over the batches of all ranks (arXiv:2301.12597): contrast, matching and captions, 1:1:1, in stage 1;
answers by a frozen language model in stage 2."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmcore.data.text.prompts import Prompted
from mmcore.data.text.wordpiece import Texts
from mmcore.losses import (
    global_ratio,
    global_token_contrastive_loss,
    hard_negatives,
    matching_loss,
    matching_rows,
    pair_labels,
    trimmed,
)
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
    texts = Texts(trimmed(*batch.texts), batch.texts.num_text)
    pairs: Pairs = model("pairs", batch.images, *texts, LABEL_SMOOTHING)
    labels = pair_labels(batch.image_ids, batch.text_ids)
    contrast = global_token_contrastive_loss(
        pairs.image, pairs.text, 1 / pairs.temperature, labels=(labels, labels), label_smoothing=LABEL_SMOOTHING
    )
    captions = global_ratio(pairs.caption_loss, pairs.num_tokens)
    matching = _matching(model, pairs, texts, batch.image_ids, batch.text_ids, generator)
    return {"loss": contrast + matching + captions, "contrast": contrast, "matching": matching, "captions": captions}


def _matching(
    model: Runner, pairs: Pairs, texts: Texts, image_ids: Tensor, text_ids: Tensor, generator: torch.Generator
) -> Tensor:
    """Of right pairs, of each text with a hard image, and of each image with a hard text."""
    negatives = hard_negatives(
        pairs.image, pairs.text, 1 / pairs.temperature, image_ids=image_ids, text_ids=text_ids, generator=generator
    )
    rows = matching_rows(negatives, pairs.tower, texts)
    return matching_loss(model("match", pairs.keys_values, rows.more, rows.image_index, *rows.texts), rows.is_match)


def stage2_loss(model: Runner, images: Tensor, texts: Prompted) -> Tensor:
    """The mean cross-entropy of one batch over the answers' tokens of all ranks; arguments as of `BLIP2LM.loss`."""
    return global_ratio(*model("loss", images, *texts))
