"""One contrastive step over the whole batch in micro-batches: GradCache (arXiv 2101.06983) under the engine."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcore.losses import global_contrastive_loss
from mmcore.train.engine import Engine


def contrastive_backward(
    engine: Engine, images: Tensor, tokens: Tensor, lengths: Sequence[int], accum: int
) -> Tensor:
    """Loss and gradient of the global batch, holding the activations of one micro-batch at a time.

    With `accum` > 1 the features of all micro-batches are computed without gradient, the loss and the gradients
    of the features once over the whole batch, and then each micro-batch is run again with its share of them.
    The gradient is that of the whole batch, not the mean over micro-batches. The model must be deterministic
    (the two forwards have to agree), which CLIP is.

    Args:
        engine: a CLIP model under the engine: `engine(images, tokens, lengths) -> (image_features [b, E],
            text_features [b, E], logit_scale [1])`.
        images: [B, 3, S, S]; B is divisible by `accum`.
        tokens: [B, T] int64.
        lengths: of the captions, see `CLIP.encode_text`.
        accum: number of micro-batches.

    Returns:
        [] the detached loss of the global batch.
    """
    if images.shape[0] % accum:
        raise ValueError(
            f"contrastive_backward: the batch must be divisible by accum={accum}, got {images.shape[0]}"
        )
    if accum == 1:
        image, text, scale = engine(images, tokens, lengths)
        loss = global_contrastive_loss(image, text, scale)
        engine.backward(loss)
        return loss.detach()

    size = len(lengths) // accum
    of_micro = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    micro = list(zip(images.chunk(accum), tokens.chunk(accum), of_micro, strict=True))
    with torch.no_grad():
        outputs = [engine(*m) for m in micro]
    leaves = [torch.cat([o[i] for o in outputs]).requires_grad_() for i in (0, 1)]
    scale = outputs[0][2].detach().requires_grad_()
    loss = global_contrastive_loss(leaves[0], leaves[1], scale)
    d_image, d_text, d_scale = torch.autograd.grad(loss, [*leaves, scale])
    with engine.accumulate():
        for i, (m, di, dt) in enumerate(zip(micro, d_image.chunk(accum), d_text.chunk(accum), strict=True)):
            image, text, s = engine(*m)
            surrogate = (image * di).sum() + (text * dt).sum() + (s * d_scale).sum() / accum
            engine.backward(surrogate, last=i == accum - 1)
    return loss.detach()
