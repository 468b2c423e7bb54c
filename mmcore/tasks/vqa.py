"""Answers to questions about held-out pictures, by VQA's accuracy."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmcore.data import Question
from mmcore.data.sources.json_formats import LETTERS
from mmcore.metrics.vqa import FEWEST, choice_of, vqa_accuracy
from mmcore.tasks import conversation
from mmcore.tasks.speaking import MAX_FOLLOWED, Options, Speaker, spread, written
from mmcore.tasks.subject import Subject, nothing

__all__ = ["Options", "follow", "report"]


def follow(subject: Subject) -> dict[str, float]:
    """The accuracy of some answers while a run trains."""
    val = subject.pairs.val_questions
    if val is None:
        return {}
    questions, texts = Speaker.of(subject, "vqa", None).about(val, MAX_FOLLOWED)
    return {"VQA accuracy": vqa_accuracy(chosen(questions, texts), [q.answers for q in questions]).overall}


def chosen(questions: Sequence[Question], texts: Sequence[str]) -> list[str]:
    """What was said; of a question with choices the letter of the one that it names, "" where that is none."""
    said = []
    for question, text in zip(questions, texts, strict=True):
        place = choice_of(text, question.choices) if question.choices else None
        said.append(text if not question.choices else "" if place is None else LETTERS[place])
    return said


def report(subject: Subject, options: Any) -> list[Path]:
    """Prints VQA's accuracy on the held-out questions; writes the answers as VQA's evaluation reads them, and a sheet
    of some, into the run's folder. A model that converses answers the conversations that its run held out, unless it
    is given other data."""
    if options is not None and options.data is None and hasattr(subject.recipe, "converses"):
        if options.prompt is not None:
            raise ValueError(f"--prompt has no effect on conversations without --data, got {options.prompt!r}")
        return conversation.report(subject, options)
    speaker = Speaker.of(subject, "vqa", options)
    val, train = subject.pairs.val_questions, subject.pairs.questions
    if val is None or train is None:
        return nothing(options, f"{subject.pairs.name} has no held-out questions")
    torch.manual_seed(0)
    questions, texts = speaker.about(val)
    answers, types = [q.answers for q in questions], [q.answer_type or "" for q in questions]
    said = chosen(questions, texts)
    accuracy = vqa_accuracy(said, answers, types=types if all(types) else None)
    of_training = Counter(a for q in train.questions for a in q.answers if a.strip()).most_common(1)[0][0]
    of_majority = vqa_accuracy([of_training] * len(questions), answers).overall
    numbers = f"{100 * accuracy.overall:.1f} % (majority {100 * of_majority:.1f} %)"
    kind = ", derived questions" if val.derived else ""
    few = 0 if any(q.choices for q in questions) else sum(len(people) < FEWEST for people in answers)
    of_few = "fewer than three answers a question" if few == len(answers) else f"{few} have fewer than three answers"
    kind += f", exact match: {of_few}" if few else ""
    print(f"VQA accuracy (held-out{kind}), {speaker.decode}, {len(texts)} questions: {numbers}")
    for name, value in (accuracy.by_type | by_group(questions, said)).items():
        print(f"  {name} {100 * value:.1f} %")
    place = {q.question_id: i for i, q in enumerate(val.questions)}
    shown = [(questions[i], texts[i]) for i in spread(len(texts))]
    return written(
        subject.folder / "answers",
        [
            {"question_id": q.question_id, "answer": text, **({"choice": letter} if q.choices else {})}
            for q, text, letter in zip(questions, texts, said, strict=True)
        ],
        [val.raw_image(place[q.question_id]) for q, _ in shown],
        [text for _, text in shown],
        [q.answers for q, _ in shown],
        title=f"{subject.pairs.name}: answers about held-out pictures, {speaker.decode}; {numbers}",
        questions=[q.text for q, _ in shown],
        right=[vqa_accuracy(chosen([q], [text]), [q.answers]).overall > 0 for q, text in shown],
    )


def by_group(questions: Sequence[Question], said: Sequence[str]) -> dict[str, float]:
    """The accuracy of the questions of each of their groups, in the order of the names."""
    names = sorted({name for q in questions for name in q.groups})
    of = {name: [i for i, q in enumerate(questions) if name in q.groups] for name in names}
    return {
        name: vqa_accuracy([said[i] for i in rows], [questions[i].answers for i in rows]).overall
        for name, rows in of.items()
    }
