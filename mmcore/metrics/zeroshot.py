"""Zero-shot classification: a class is the mean direction of its prompts (arXiv 2103.00020, section 3.1)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.metrics.ranking import check_features, check_ks, wrong_above_best


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
        class_names: at least one.
        templates: at least one, each holding "{}" where the class name goes.
        batch_size: prompts encoded at a time.

    Returns:
        [num_classes, E] float32, on the device of the embeddings.

    Raises:
        ValueError: no classes, no templates, a template without "{}".
    """
    if isinstance(class_names, str) or not class_names:
        raise ValueError(f"zero_shot_weights: class_names must be a list of at least one name, got {class_names!r}")
    if isinstance(templates, str) or not templates:
        raise ValueError(f"zero_shot_weights: templates must be a list of at least one, got {templates!r}")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"zero_shot_weights: templates must hold {{}} for the class name, got {template!r}")
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

    Raises:
        ValueError: shapes that do not fit, no images, labels out of range, features that are not finite.
    """
    check_features("top_k_accuracy", image_features=image_features, class_weights=class_weights)
    check_ks("top_k_accuracy", ks)
    num_classes = len(class_weights)
    if labels.shape != (len(image_features),) or labels.dtype != torch.int64:
        raise ValueError(
            f"top_k_accuracy: labels must be int64 [{len(image_features)}], got {labels.dtype} {list(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"top_k_accuracy: labels must be in [0, {num_classes}), got {int(labels.min())} to {int(labels.max())}"
        )

    def relevant(start: int, stop: int) -> Tensor:
        return F.one_hot(labels[start:stop], num_classes).bool()

    above = [a for a, _ in wrong_above_best(image_features, class_weights, relevant, chunk_size=chunk_size)]
    ranks = torch.cat(above)
    return {k: (ranks < k).double().mean().item() for k in ks}
