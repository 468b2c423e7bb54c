"""Answers to questions about held-out pictures, by VQA's accuracy."""

from pathlib import Path
from typing import Any

import torch

from mmcore.metrics.vqa import vqa_accuracy
from mmcore.tasks import conversation
from mmcore.tasks.speaking import MAX_FOLLOWED, Options, SpeakingOptions, answer, majority_accuracy, spread, written
from mmcore.tasks.subject import Subject

__all__ = ["Options", "follow", "report"]


def follow(subject: Subject) -> dict[str, float]:
    """The accuracy of some answers while a run trains."""
    val = subject.pairs.val_questions
    if val is None:
        return {}
    asked = SpeakingOptions.of(subject, "vqa", None)
    return {"VQA accuracy": answer(asked.answerer, val, prompt=asked.prompt, most=MAX_FOLLOWED).accuracy}


def report(subject: Subject, options: Any) -> list[Path]:
    """Prints VQA's accuracy on the held-out questions; writes the answers as VQA's evaluation reads them, and a sheet
    of some, into the run's folder. A model that converses answers the conversations that its run held out, unless it
    is given other data.

    Returns:
        The files.

    Raises:
        ValueError: `mmcore eval vqa` where there are no held-out questions, or of a model that answers none.
    """
    if options is not None and options.data is None and hasattr(subject.recipe, "converses"):
        if options.prompt is not None:
            raise ValueError(f"--prompt has no effect on conversations without --data, got {options.prompt!r}")
        return conversation.report(subject, options)
    asked = SpeakingOptions.of(subject, "vqa", options)
    val, train = subject.pairs.val_questions, subject.pairs.questions
    if val is None or train is None:
        if options is None:
            return []
        raise ValueError(f"{subject.pairs.name} has no held-out questions")
    torch.manual_seed(0)
    found = answer(asked.answerer, val, prompt=asked.prompt)
    kind = ", derived questions" if val.derived else ""
    of_majority = majority_accuracy(train, found.questions)
    numbers = f"{100 * found.accuracy:.1f} % (majority {100 * of_majority:.1f} %)"
    print(f"VQA accuracy (held-out{kind}), {asked.decode}, {len(found.texts)} questions: {numbers}")
    for name, value in found.by_type.items():
        print(f"  {name} {100 * value:.1f} %")
    results = [
        {"question_id": q.question_id, "answer": text} for q, text in zip(found.questions, found.texts, strict=True)
    ]
    place = {q.question_id: i for i, q in enumerate(val.questions)}
    shown = [(found.questions[i], found.texts[i]) for i in spread(len(found.texts))]
    return written(
        subject.folder / "answers",
        results,
        [val.raw_image(place[q.question_id]) for q, _ in shown],
        [text for _, text in shown],
        [q.answers for q, _ in shown],
        title=f"{subject.pairs.name}: answers about held-out pictures, {asked.decode}; {numbers}",
        questions=[q.text for q, _ in shown],
        right=[vqa_accuracy([text], [q.answers]).overall > 0 for q, text in shown],
    )
