"""Captions of held-out pictures, by BLEU-4 and CIDEr."""

from pathlib import Path
from typing import Any

import torch

from mmcore.tasks.speaking import MAX_FOLLOWED, Options, SpeakingOptions, caption, spread, written
from mmcore.tasks.subject import Subject

__all__ = ["Options", "follow", "report"]


def follow(subject: Subject) -> dict[str, float]:
    """BLEU-4 and CIDEr of some pictures while a run trains."""
    val = subject.pairs.val
    if val is None:
        return {}
    asked = SpeakingOptions.of(subject, "caption", None)
    return caption(asked.answerer, val, prompt=asked.prompt, most=MAX_FOLLOWED).scores


def report(subject: Subject, options: Any) -> list[Path]:
    """Prints BLEU-4 and CIDEr of the captions of held-out pictures; writes them as COCO's evaluation reads them, and a
    sheet of some, into the run's folder.

    Returns:
        The files.

    Raises:
        ValueError: `mmcore eval caption` where there are no held-out captions.
    """
    val = subject.pairs.val
    if val is None:
        if options is None:
            return []
        raise ValueError(f"{subject.pairs.name} has no held-out captions to compare with")
    asked = SpeakingOptions.of(subject, "caption", options)
    torch.manual_seed(0)
    found = caption(asked.answerer, val, prompt=asked.prompt)
    numbers = f"BLEU-4 {100 * found.scores['BLEU-4']:.1f}, CIDEr {100 * found.scores['CIDEr']:.1f}"
    print(f"captions (held-out), {asked.decode}, {len(found.index)} images: {numbers}")
    names = [str(i) if val.names is None else val.names[i] for i in found.index]
    results = [
        {"image_id": int(name) if name.isdecimal() else name, "caption": text}
        for name, text in zip(names, found.texts, strict=True)
    ]
    shown = spread(len(found.index))
    return written(
        subject.folder / "captions",
        results,
        [val.raw_image(found.index[i]) for i in shown],
        [found.texts[i] for i in shown],
        [val.captions[found.index[i]] for i in shown],
        title=f"{subject.pairs.name}: captions of held-out pictures, {asked.decode}; {numbers}",
    )
