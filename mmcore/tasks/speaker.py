"""What `mmcore eval caption|vqa` does with a model that says something of pictures: numbers, files, a sheet."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmcore import checkpoint
from mmcore.data import PairData
from mmcore.data.text.prompts import Task
from mmcore.metrics.vqa import vqa_accuracy
from mmcore.report.sheets import plot_captions
from mmcore.runs import SavedRun
from mmcore.tasks.answers import Answerer, Decoding, answer, caption, majority_accuracy

# pictures of a sheet
NUM_SHOWN = 24


@dataclass(frozen=True)
class Speaker:
    """A run read back from its checkpoint, that says something of pictures.

    Args:
        run: which one.
        data: what it is measured on.
        prompts: of what it can do, as `prompt_texts` takes them.
        says: by a way to choose text, what it says.
    """

    run: SavedRun
    data: PairData
    prompts: Mapping[Task, str | None]
    says: Callable[[Decoding], Answerer]


def print_captions(speaker: Speaker, decoding: Decoding) -> list[Path]:
    """Prints BLEU-4 and CIDEr of the captions of held-out pictures; writes them as COCO's evaluation reads them, and a
    sheet of some, into the run's folder.

    Returns:
        The files.

    Raises:
        ValueError: there are no held-out pictures.
    """
    val = speaker.data.val
    if val is None:
        raise ValueError(f"{speaker.data.name} has no held-out captions to compare with")
    torch.manual_seed(0)
    found = caption(speaker.says(decoding), val, prompt=speaker.prompts["caption"])
    numbers = f"BLEU-4 {100 * found.scores['BLEU-4']:.1f}, CIDEr {100 * found.scores['CIDEr']:.1f}"
    print(f"captions (held-out), {decoding.decode}, {len(found.index)} images: {numbers}")
    names = [str(i) if val.names is None else val.names[i] for i in found.index]
    results = [
        {"image_id": int(name) if name.isdecimal() else name, "caption": text}
        for name, text in zip(names, found.texts, strict=True)
    ]
    shown = _spread(len(found.index))
    return _written(
        speaker,
        "captions",
        results,
        [val.raw_image(found.index[i]) for i in shown],
        [found.texts[i] for i in shown],
        [val.captions[found.index[i]] for i in shown],
        title=f"{speaker.data.name}: captions of held-out pictures, {decoding.decode}; {numbers}",
    )


def print_vqa(speaker: Speaker, decoding: Decoding) -> list[Path]:
    """Prints VQA's accuracy on the held-out questions; writes the answers as VQA's evaluation reads them, and a sheet
    of some, into the run's folder.

    Returns:
        The files.

    Raises:
        ValueError: there are no held-out questions, or a model that answers none.
    """
    val, train = speaker.data.val_questions, speaker.data.questions
    if "vqa" not in speaker.prompts:
        raise ValueError(f"RUN must be of a model that answers questions, got one of {speaker.run.recipe}")
    if val is None or train is None:
        raise ValueError(f"{speaker.data.name} has no held-out questions")
    torch.manual_seed(0)
    found = answer(speaker.says(decoding), val, prompt=speaker.prompts["vqa"])
    kind = ", derived questions" if val.derived else ""
    numbers = (
        f"{100 * found.accuracy:.1f} % (majority {100 * majority_accuracy(train, found.questions):.1f} %)"
    )
    print(f"VQA accuracy (held-out{kind}), {decoding.decode}, {len(found.texts)} questions: {numbers}")
    for name, value in found.by_type.items():
        print(f"  {name} {100 * value:.1f} %")
    results = [
        {"question_id": q.question_id, "answer": text}
        for q, text in zip(found.questions, found.texts, strict=True)
    ]
    place = {q.question_id: i for i, q in enumerate(val.questions)}
    shown = _spread(len(found.texts))
    asked = [found.questions[i] for i in shown]
    return _written(
        speaker,
        "answers",
        results,
        [val.raw_image(place[q.question_id]) for q in asked],
        [found.texts[i] for i in shown],
        [q.answers for q in asked],
        title=f"{speaker.data.name}: answers about held-out pictures, {decoding.decode}; {numbers}",
        questions=[q.text for q in asked],
        right=[
            vqa_accuracy([found.texts[i]], [q.answers]).overall > 0 for i, q in zip(shown, asked, strict=True)
        ],
    )


def _spread(count: int) -> list[int]:
    """Evenly spread over what there is."""
    return [i * count // NUM_SHOWN for i in range(NUM_SHOWN)] if count > NUM_SHOWN else list(range(count))


def _written(
    speaker: Speaker,
    name: str,
    results: list[dict[str, Any]],
    images: list[Image.Image],
    texts: list[str],
    people: Sequence[Sequence[str]],
    *,
    title: str,
    questions: list[str] | None = None,
    right: list[bool] | None = None,
) -> list[Path]:
    files = [speaker.run.folder / f"{name}.{kind}" for kind in ("json", "png")]
    checkpoint.write_json(files[0], results)
    plot_captions(images, texts, people, files[1], title=title, questions=questions, right=right)
    return files
