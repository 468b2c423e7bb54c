"""Zero-shot classification of held-out images by the names of their classes."""

from pathlib import Path
from typing import Any

import torch

from mmcore.metrics.retrieval import late_scores
from mmcore.metrics.zeroshot import top_k_accuracy, zero_shot_weights
from mmcore.tasks.subject import Options, Subject, nothing

__all__ = ["Options", "follow", "report"]


@torch.no_grad()
def accuracy(subject: Subject) -> dict[int, float]:
    """Top-1 and top-5 accuracy in [0, 1]; empty where there are no classes."""
    data, held_out = subject.pairs, subject.held_out
    if data.class_names is None or data.templates is None or subject.val.labels is None:
        return {}
    num_prompts = len(data.class_names) * len(data.templates)
    if held_out.text.ndim == 3:
        return _late_accuracy(subject)
    weights = zero_shot_weights(subject.texts, list, data.class_names, data.templates, batch_size=num_prompts)
    labels = torch.tensor(subject.val.labels)[held_out.index]
    ks = tuple(k for k in (1, 5) if k < len(weights))
    if held_out.image.ndim == 2:
        return top_k_accuracy(held_out.image, weights, labels, ks=ks)
    nearest = torch.stack([(row @ weights.T).amax(0) for row in held_out.image])
    return top_k_accuracy(nearest, torch.eye(len(weights)), labels, ks=ks)


def _late_accuracy(subject: Subject) -> dict[int, float]:
    """By late interaction with each prompt, the mean over the prompts of a class (arXiv 2111.07783)."""
    names, templates, held_out = subject.pairs.class_names, subject.pairs.templates, subject.held_out
    assert names is not None and templates is not None and subject.val.labels is not None
    prompts = subject.texts([template.replace("{}", name) for name in names for template in templates])
    scores = late_scores(held_out.image, prompts)[0].unflatten(1, (len(names), len(templates))).mean(2)
    labels = torch.tensor(subject.val.labels)[held_out.index]
    return top_k_accuracy(scores, torch.eye(len(names)), labels, ks=tuple(k for k in (1, 5) if k < len(names)))


def follow(subject: Subject) -> dict[str, float]:
    """While a run trains."""
    if subject.pairs.val is None:
        return {}
    return {f"zero-shot top-{k}": value for k, value in accuracy(subject).items()}


def report(subject: Subject, options: Any) -> list[Path]:
    """Prints the accuracy on the held-out images."""
    if options is None and subject.pairs.val is None:
        return []
    found = accuracy(subject)
    if not found:
        return nothing(options, f"{subject.pairs.name} has no classes to tell apart; mmcore eval retrieval measures it")
    for k, value in found.items():
        name = "zero-shot accuracy" if k == 1 else f"zero-shot top-{k} accuracy"
        print(f"{name} (held-out): {100 * value:.1f} %")
    return []
