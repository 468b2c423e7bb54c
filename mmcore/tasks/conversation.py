"""Answers in held-out conversations, by exact match with what was said, and dialogues to look at."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from mmcore import checkpoint
from mmcore.data.sources.conversations import IMAGE, ConversationSet, Turn
from mmcore.metrics.vqa import normalize_answer
from mmcore.report.sheets import Exchange, plot_dialogues
from mmcore.tasks.speaking import Options, spread
from mmcore.tasks.subject import Subject, nothing
from mmcore.tasks.talks import Reply

__all__ = ["Options", "follow", "report"]

MAX_FOLLOWED = 96
"""Conversations that a run is measured on while it trains."""
MAX_REPORTED = 1024
"""Conversations that the end of a run is measured on, while other ranks wait."""
MAX_EXCHANGES = 4
"""Of a dialogue on a sheet."""


def answers_recur(train: ConversationSet, val: ConversationSet) -> bool:
    """Whether some held-out answer is one that training has. Where none is, as among captions of pictures, no share of
    equal answers says how good they are."""
    known, wanted = (
        {normalize_answer(t.text) for c in chats.conversations for t in c.turns if t.role == "assistant"}
        for chats in (train, val)
    )
    return not known.isdisjoint(wanted)


def _accuracy(found: Sequence[Reply]) -> float:
    return sum(reply.is_right for reply in found) / len(found)


def _majority_accuracy(train: ConversationSet, found: Sequence[Reply]) -> float:
    """Of the answer most frequent in training for the same question, or of all where it was not asked."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for conversation in train.conversations:
        for before, turn in pairwise(conversation.turns):
            if turn.role == "assistant":
                counts[_question(before)][turn.text] += 1
                overall[turn.text] += 1
    guesses = [(counts[r.question] or overall).most_common(1)[0][0] for r in found]
    return _accuracy([r._replace(said=guess) for r, guess in zip(found, guesses)])


def _question(turn: Turn) -> str:
    return turn.text.replace(IMAGE, "").strip()


def follow(subject: Subject) -> dict[str, float]:
    """The share of right answers while a run trains, where such a share says something (`answers_recur`)."""
    data = subject.data
    if data.val is None or not answers_recur(data.train, data.val):
        return {}
    talks = subject.recipe.converses(subject.assets, subject.model, subject.device)
    return {"answer accuracy": _accuracy(talks.replies(data.val, most=MAX_FOLLOWED, ranks=subject.ranks))}


def report(subject: Subject, options: Any) -> list[Path]:
    """Prints the accuracy of held-out answers, each after what was said before it, where such a share says something
    (`answers_recur`); writes them, and draws dialogues about some pictures, in which the model reads its own answers,
    into the run's folder."""
    data, talks = subject.data, subject.recipe.converses(subject.assets, subject.model, subject.device)
    if data.val is None:
        return nothing(options, f"{data.name} has no held-out conversations: give --val-data or --val-fraction")
    most = MAX_REPORTED if options is None else None
    decoding = {} if options is None else options.decoding.generate_options()
    found: list[Reply] = talks.replies(data.val, most=most, **decoding)
    if not found:
        raise ValueError(f"{data.name} has no held-out conversation that can be answered")
    if answers_recur(data.train, data.val):
        share, of_majority = _accuracy(found), _majority_accuracy(data.train, found)
        numbers = f"{100 * share:.1f} % (majority {100 * of_majority:.1f} %)"
        is_part = most is not None and most < len(data.val)
        part = f", {most} of {len(data.val)} conversations" if is_part else ""
        print(f"answer accuracy (held-out): {numbers}{part}")
    else:
        numbers = "no answer is one of training's"
        print(f"answers (held-out): {numbers}, so that they are to be read, not counted")
    files = [subject.folder / "answers.json"]
    answers = [
        {"id": data.val.sample_id(r.conversation), "question": r.question, "answer": r.said, "wanted": r.wanted}
        for r in found
    ]
    checkpoint.write_json(files[0], answers)
    of_one: dict[int, list[Reply]] = defaultdict(list)
    for reply in found:
        if data.val.conversations[reply.conversation].images:
            of_one[reply.conversation].append(reply)
    pictured = list(of_one)
    dialogues = {i: _dialogue(talks, data.val, i, of_one[i]) for i in (pictured[n] for n in spread(len(pictured)))}
    dialogues = {i: talk for i, talk in dialogues.items() if talk}  # none, where no question has room
    if dialogues:
        files.append(subject.folder / "dialogues.png")
        images = [data.val.raw_images(i)[0] for i in dialogues]
        title = f"{data.name}: dialogues about held-out pictures; {numbers}"
        plot_dialogues(images, list(dialogues.values()), files[1], title=title)
    return files


def _dialogue(talks: Any, chats: ConversationSet, number: int, found: Sequence[Reply]) -> list[Exchange]:
    """The questions of a conversation with the model's answers, each after its own before; where it reads no questions,
    what it said."""
    turns, images = chats.conversations[number].turns, chats.raw_images(number)
    if not talks.reads_questions or not all(_question(t) for t in turns if t.role == "user"):
        return [Exchange(r.question, r.said, r.wanted, r.is_right) for r in found][:MAX_EXCHANGES]
    system = turns[0].text if turns[0].role == "system" else None
    dialogue, exchanges = talks.dialogue(system), []
    for asked, answered in list(pairwise(turns))[system is not None :: 2][:MAX_EXCHANGES]:
        num_shown = asked.text.count(IMAGE)
        shown, images = images[:num_shown], images[num_shown:]
        question = _question(asked)
        if not dialogue.has_room(question, shown):
            break
        reply = Reply(number, question, "".join(dialogue.ask(question, shown)), answered.text)
        exchanges.append(Exchange(question, reply.said, reply.wanted, reply.is_right))
    return exchanges
