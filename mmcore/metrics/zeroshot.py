"""Zero-shot classification: a class is the mean direction of its prompts (arXiv 2103.00020, section 3.1)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.metrics.retrieval import check_features, check_ks, wrong_above_best
from mmcore.ops import require


@torch.no_grad()
def zero_shot_weights(
    encode_text: Callable[[Any], Tensor],
    tokenizer: Callable[[list[str]], Any],
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
) -> Tensor:
    """One unit-norm classifier row a class: normalise each prompt's embedding, average, normalise.

    Args:
        encode_text: tokens to embeddings [B, E]; moves the tokens to its own device.
        tokenizer: prompts to tokens, whatever `encode_text` takes.
        templates: each holding "{}" where the class name goes.
        batch_size: prompts encoded at a time.

    Returns:
        [num_classes, E] float32, on the device of the embeddings.
    """
    for name, values, what in (("class_names", class_names, "one name"), ("templates", templates, "one")):
        listed = len(values) > 0 and not isinstance(values, str)
        require("zero_shot_weights", listed, "{} must be a list of at least {}, got {!r}", name, what, values)
    for template in templates:
        sentence = "templates must hold {{}} for the class name, got {!r}"
        require("zero_shot_weights", "{}" in template, sentence, template)
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    embeddings = [
        F.normalize(encode_text(tokenizer(prompts[i : i + batch_size])).float(), dim=-1)
        for i in range(0, len(prompts), batch_size)
    ]
    per_class = torch.cat(embeddings).view(len(class_names), len(templates), -1)  # [num_classes, templates, E]
    return F.normalize(per_class.mean(dim=1), dim=-1)


@torch.no_grad()
def top_k_accuracy(
    image_features: Tensor,
    class_weights: Tensor,
    labels: Tensor,
    *,
    ks: tuple[int, ...] = (1, 5),
    chunk_size: int = 4096,
) -> dict[int, float]:
    """Share of images whose class is among the k with the highest inner product; ties count against it.

    Args:
        image_features: [N, E] floating point.
        class_weights: [num_classes, E], as `zero_shot_weights` returns.
        labels: [N] int64 in [0, num_classes).
        ks: ranks; a k of num_classes or more gives 1.
        chunk_size: images scored at a time.

    Returns:
        {k: accuracy in [0, 1]}.
    """
    check_features("top_k_accuracy", image_features=image_features, class_weights=class_weights)
    check_ks("top_k_accuracy", ks)
    op, size, num_classes = "top_k_accuracy", len(image_features), len(class_weights)
    fits = labels.shape == (size,) and labels.dtype == torch.int64
    require(op, fits, "labels must be int64 [{}], got {} {}", size, labels.dtype, list(labels.shape))
    first, last = int(labels.min()), int(labels.max())
    in_range = first >= 0 and last < num_classes
    require(op, in_range, "labels must be in [0, {}), got {} to {}", num_classes, first, last)

    def relevant(start: int, stop: int) -> Tensor:
        return F.one_hot(labels[start:stop], num_classes).bool()

    counts = wrong_above_best(image_features, class_weights, relevant, chunk_size=chunk_size)
    ranks = torch.cat([above for above, _ in counts])
    return {k: (ranks < k).double().mean().item() for k in ks}
