"""Answers as classes: the vocabulary of a classifier of questions, soft targets by what people answered, head, loss."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.losses import global_ratio
from mmcore.metrics.vqa import normalize_answer
from mmcore.nn import Linear
from mmcore.ops import require

Order = Literal["norm first", "gelu first"]
SCORES = (0.0, 0.3, 0.6, 0.9)
"""Of an answer that none, one, two or three of ten people gave; more give 1."""


def target_score(count: int) -> float:
    """Of an answer that so many of a question's people gave."""
    return SCORES[count] if count < len(SCORES) else 1.0


class AnswerVocabulary:
    """Answers as they are said, in the order of a classifier's outputs; what people answered is compared with them in
    its normal form (`mmcore.metrics.vqa.normalize_answer`), of equal ones with the first."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers = tuple(answers)
        self._place: dict[str, int] = {}
        for i, answer in enumerate(self.answers):
            self._place.setdefault(normalize_answer(answer) or answer, i)
        op, size, distinct = "AnswerVocabulary", len(self.answers), len(set(self.answers))
        require(op, size >= 1, "answers must hold at least one, got none")
        require(op, distinct == size, "answers must hold each once, got {} of {}", size, distinct)

    def __len__(self) -> int:
        return len(self.answers)

    @classmethod
    def of_questions(cls, answers: Iterable[Sequence[str]], least: int = 9) -> "AnswerVocabulary":
        """Those that are given at least `least` times over all questions, the most frequent first: 3,129 of VQAv2's
        with 9 (arXiv 1707.07998). Each is said as most people wrote it. A ValueError where there are none."""
        counts, written = Counter[str](), defaultdict[str, Counter[str]](Counter)
        for x in (x for people in answers for x in people):
            if form := normalize_answer(x):
                counts[form] += 1
                written[form][x.strip()] += 1
        kept = sorted((x for x, count in counts.items() if count >= least), key=lambda x: (-counts[x], x))
        what = "questions must have answers that are given {} times or more, got none among {}"
        require("AnswerVocabulary", bool(kept), what, least, len(counts))
        return cls([min((-count, said) for said, count in written[x].items())[1] for x in kept])

    @classmethod
    def of_file(cls, path: Path) -> "AnswerVocabulary":
        """A JSON list of answers, such as LXMERT's trainval_label2ans.json, or a file with one a line."""
        require("AnswerVocabulary", path.is_file(), "path must be a file of answers, got {}", path)
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return cls([line.strip() for line in text.splitlines() if line.strip()])
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"AnswerVocabulary: {path} must hold JSON, got: {error}") from error
        fits = isinstance(found, list) and all(isinstance(x, str) for x in found)
        require("AnswerVocabulary", fits, "{} must hold a list of strings, got {}", path, type(found).__name__)
        return cls(found)

    def targets(self, people: Sequence[Sequence[str]]) -> Tensor:
        """What people answered to B questions, repeats included, to scores float32 [B, A]: 0, .3, .6, .9 or 1 by how
        many gave an answer (1 of a question that has fewer than three answers), all 0 where none is known."""
        found = torch.zeros(len(people), len(self))
        for row, answers in enumerate(people):
            for answer, count in Counter(normalize_answer(x) for x in answers).items():
                if answer in self._place:
                    whole = len(answers) < len(SCORES) - 1
                    found[row, self._place[answer]] = 1.0 if whole else target_score(count)
        return found


class AnswerHead(nn.Module):
    """Linear to twice the width, LayerNorm and GELU, Linear to the answers: ViLT, VLMo, BEiT-3 norm first, LXMERT last.

    Args:
        width: D of inputs [B, D].
        num_answers: A of outputs [B, A].
        order: of norm and GELU.
        norm_eps: of the norm.
    """

    def __init__(self, width: int, num_answers: int, *, order: Order = "norm first", norm_eps: float = 1e-5) -> None:
        super().__init__()
        require("AnswerHead", num_answers >= 1, "num_answers must be at least 1, got {}", num_answers)
        self.order = order
        self.fc1 = Linear(width, 2 * width)
        self.norm = nn.LayerNorm(2 * width, eps=norm_eps)
        self.fc2 = Linear(2 * width, num_answers)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] to logits [B, A]."""
        x = self.fc1(x)
        x = F.gelu(self.norm(x)) if self.order == "norm first" else self.norm(F.gelu(x))
        return self.fc2(x)


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of logits [B, A] with scores [B, A] in [0, 1], summed over the answers, averaged over the
    questions of all ranks; a question without a known answer counts as one (arXiv:1707.07998)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.binary_cross_entropy_with_logits(wide, targets.to(wide.dtype), reduction="sum")
    return global_ratio(total, torch.tensor(len(logits), device=logits.device))
