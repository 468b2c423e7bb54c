"""Text-to-text retrieval across languages: from a caption in one to that of the same picture in another."""

from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcore.metrics.retrieval import recall_between
from mmcore.report.pictures import plot_retrieval
from mmcore.tasks.subject import Options, Subject, nothing

__all__ = ["Options", "follow", "report"]

MEAN = "text to text R@1"
NUM_QUERIES = 8


@dataclass(frozen=True)
class Way:
    """From a language to another: captions of the pictures that have some in both."""

    names: tuple[str, str]
    queries: Tensor  # [Q] positions among all captions
    candidates: Tensor  # [N]
    owner: Tensor  # of all captions, the picture

    def right(self, start: int, stop: int) -> Tensor:
        """[stop - start, N] the candidates that are of the same picture."""
        return self.owner[self.queries[start:stop], None] == self.owner[self.candidates]


def ways(subject: Subject) -> list[Way]:
    """Of each two languages of the held-out captions, both; none where there are fewer."""
    if subject.pairs.val is None or subject.val.languages is None:
        return []
    owner = subject.held_out.owner
    language = [x for i in subject.held_out.index.tolist() for x in subject.val.languages[i]]
    found = []
    for names in permutations(dict.fromkeys(language), 2):
        first, other = (torch.tensor([i for i, x in enumerate(language) if x == name]) for name in names)
        queries = first[torch.isin(owner[first], owner[other])]
        candidates = other[torch.isin(owner[other], owner[first])]
        if len(queries):
            found.append(Way(names, queries, candidates, owner))
    return found


def recalls(subject: Subject) -> dict[tuple[str, str], dict[str, float]]:
    """R@k and its chance from each language to each other one."""
    text = subject.held_out.text
    return {way.names: recall_between(text[way.queries], text[way.candidates], way.right) for way in ways(subject)}


def follow(subject: Subject) -> dict[str, float]:
    """The mean R@1 of all ways while a run trains; nothing where the captions are of one language."""
    if subject.pairs.val is None or subject.val.languages is None:
        return {}
    found = [recall["R@1"] for recall in recalls(subject).values()]
    return {MEAN: sum(found) / len(found)} if found else {}


def report(subject: Subject, options: Any) -> list[Path]:
    """Prints R@1, R@5, R@10 of each way beside what chance would give, and their means; draws some captions with the
    pictures whose captions in another language are nearest."""
    found = recalls(subject) if options is not None or subject.pairs.val is not None else {}
    if not found:
        why = (
            f"{subject.pairs.name} must have held-out captions in two languages, such as --data emoji --language en,zh"
        )
        return nothing(options, why)
    num = len({int(i) for way in ways(subject) for i in way.owner[way.queries]})
    print(f"text to text ({subject.pairs.val_name}), {num} pictures, in % with chance in brackets:")
    ks = [key for key in next(iter(found.values())) if not key.startswith("chance")]
    means = {key: sum(x[key] for x in found.values()) / len(found) for key in next(iter(found.values()))}
    for name, recall in [*((" to ".join(names), x) for names, x in found.items()), ("mean", means)]:
        print(f"  {name}: " + "  ".join(f"{k} {100 * recall[k]:.1f} ({100 * recall[f'chance_{k}']:.1f})" for k in ks))
    if options is not None:
        return []
    path = subject.folder / "crosslingual.png"
    _draw(subject, path)
    return [path]


def _draw(subject: Subject, path: Path) -> None:
    """Captions, evenly drawn from each way, with the pictures of the nearest captions in the other language."""
    held_out, asked = subject.held_out, ways(subject)
    chosen = [asked[i * max(len(asked), NUM_QUERIES) // NUM_QUERIES % len(asked)] for i in range(NUM_QUERIES)]
    queries, scores, relevant = [], [], []
    for number, way in enumerate(chosen):
        query = way.queries[(2 * number + 1) * len(way.queries) // (2 * NUM_QUERIES)]
        score = torch.full((len(held_out.index),), -1.0)
        near = held_out.text[way.candidates] @ held_out.text[query]
        score.scatter_reduce_(0, held_out.owner[way.candidates], near, "amax")
        queries.append(f"{way.names[0]} to {way.names[1]}: {held_out.captions[query]}")
        scores.append(score)
        relevant.append(torch.arange(len(score)) == held_out.owner[query])
    images = [subject.val.raw_image(i) for i in held_out.index.tolist()]
    of = "Text to text, each found caption by its picture"
    plot_retrieval(queries, torch.stack(scores), torch.stack(relevant), images, path, title=of)
