"""Zero-shot classification of held-out images by the names of their classes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmcore.metrics.retrieval import late_scores
from mmcore.metrics.zeroshot import top_k_accuracy, zero_shot_weights
from mmcore.tasks.subject import Options, Subject, nothing

__all__ = ["Options", "follow", "report"]

FLAG = "--zeroshot-data"


@torch.no_grad()
def accuracy(subject: Subject) -> dict[int, float]:
    """Top-1 and top-5 accuracy in [0, 1]; empty where there are no classes."""
    data = subject.pairs
    if data.class_names is None or data.templates is None or subject.val.labels is None:
        return {}
    index, image, _ = subject.pictures
    labels = torch.tensor(subject.val.labels)[index]
    prompts = [template.replace("{}", name) for name in data.class_names for template in data.templates]
    if subject.texts(prompts[:1]).ndim == 3:  # by late interaction, the mean over the prompts of a class
        scores = late_scores(image, subject.texts(prompts))[0].unflatten(1, (len(data.class_names), -1)).mean(2)
        return top_k_accuracy(scores, torch.eye(scores.shape[1]), labels, ks=_ks(scores.shape[1]))
    weights = zero_shot_weights(subject.texts, list, data.class_names, data.templates, batch_size=len(prompts))
    ks = _ks(len(weights))
    if image.ndim == 2:
        return top_k_accuracy(image, weights, labels, ks=ks)
    nearest = torch.stack([(row @ weights.T).amax(0) for row in image])
    return top_k_accuracy(nearest, torch.eye(len(weights)), labels, ks=ks)


def _ks(num_classes: int) -> tuple[int, ...]:
    return tuple(k for k in (1, 5) if k < num_classes)


def follow(subject: Subject) -> dict[str, float]:
    """While a run trains: of the held-out images, and of those of --zeroshot-data."""
    found = {} if subject.pairs.val is None else accuracy(subject)
    values = {f"zero-shot top-{k}": value for k, value in found.items()}
    classified = _classified(subject)
    more = {} if classified is None else accuracy(classified)
    return values | {f"zero-shot top-{k} ({FLAG})": value for k, value in more.items()}


def report(subject: Subject, options: Any) -> list[Path]:
    """Prints the accuracy on the held-out images, and on those of --zeroshot-data unless others are asked for."""
    classified = _classified(subject) if getattr(options, "data", None) is None else None
    if options is None and subject.pairs.val is None and classified is None:
        return []
    found = {"held-out": accuracy(subject) if subject.pairs.val is not None or classified is None else {}}
    if classified is not None:
        found[f"{FLAG} {classified.pairs.name}"] = accuracy(classified)
    if not any(found.values()):
        return nothing(options, f"{subject.pairs.name} has no classes to tell apart; mmcore eval retrieval measures it")
    for what, values in found.items():
        for k, value in values.items():
            name = "zero-shot accuracy" if k == 1 else f"zero-shot top-{k} accuracy"
            print(f"{name} ({what}): {100 * value:.1f} %")
    return []


def _classified(subject: Subject) -> Subject | None:
    """The same model, measured on the images of --zeroshot-data; None where there are none."""
    data = getattr(subject.recipe, "zeroshot", None)
    return None if data is None else replace(subject, data=data)
