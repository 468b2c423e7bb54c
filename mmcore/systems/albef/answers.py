"""Questions about images answered in words by a decoder that reads what an encoder made of both: ALBEF's and BLIP's."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mmcore.data import LoaderSpec, PairData, TrainLoader
from mmcore.data.collate import collate_pairs
from mmcore.fusion_recipe import FusionAssets, FusionSample
from mmcore.losses import global_ratio, trimmed
from mmcore.ops import require
from mmcore.parts.answers import AnswerVocabulary
from mmcore.recipe import Runner, Step
from mmcore.settings import free
from mmcore.systems.albef.align import Resizes
from mmcore.tasks.speaking import Answerer, Decoding


class AskedBatch(NamedTuple):
    """Questions about images, and what people answered."""

    images: Tensor  # uint8 [B, 3, S, S]
    tokens: Tensor  # int64 [B, T]
    num_text: Tensor  # int64 [B]
    owner: Tensor  # int64 [R], the question of each distinct answer
    answers: Tensor  # int64 [R, T']
    num_answer: Tensor  # int64 [R]
    weights: Tensor  # float32 [R], share of a question's people who gave it


@dataclass(frozen=True)
class SaysAnswers(Resizes):
    """Mixin: `model("answers", images, tokens, num_text, owner, answers, num_answer)` to the losses [R] of answers,
    `model("say", images, tokens, num_text, **options)` to tokens, and `model("rank", images, tokens, num_text, answers,
    num_answer, top_k)` to numbers of answers."""

    max_answer: int = 10
    """Tokens of an answer, its first and last included."""
    rank: int | None = None
    """Answer with the likeliest of known answers: of so many that begin most likely, by their whole probability, 128 as
    published; None = word by word, see --decode of mmcore eval vqa."""
    answers: Path | None = field(default=None, metadata=free)
    """What --rank ranks: a JSON list, or a file with one a line; None = all answers to training questions."""

    tasks = ("vqa",)

    @property
    def prompts(self) -> Mapping[str, str | None]:
        return {"vqa": "{}"}

    def loader(self, data: PairData, assets: Any, spec: LoaderSpec) -> TrainLoader:
        return data.question_loader(spec, self.reader(assets))

    def texts(self, data: PairData) -> Sequence[str]:
        assert data.questions is not None
        asked = data.questions.questions
        return [q.text for q in asked] + sorted({answer for q in asked for answer in q.answers})

    def assets(self, data: PairData) -> FusionAssets:
        require(self.name, data.questions is not None, "--data must have questions, got {}", data.name)
        assert data.questions is not None
        require(self.name, self.max_answer >= 3, "--max-answer must be at least 3, got {}", self.max_answer)
        has_effect = self.answers is None or self.rank is not None
        require(self.name, has_effect, "--answers has no effect without --rank, got {}", self.answers)
        require(self.name, self.rank is None or self.rank >= 1, "--rank must be at least 1, got {}", self.rank)
        found = super().assets(data)
        if self.rank is None:
            return found
        if self.answers is not None:
            return replace(found, answers=AnswerVocabulary.of_file(self.answers).answers)
        # as they were learned, not in their normal form
        counts = Counter(x.strip() for q in data.questions.questions for x in q.answers if x.strip())
        return replace(found, answers=tuple(sorted(counts, key=lambda x: (-counts[x], x))))

    def sample(self, assets: FusionAssets, record: Any, rng: Any) -> FusionSample:
        found = super().sample(assets, record, rng)
        return found._replace(answers=tuple(a for a in found.answers if a.strip()))

    def collate(self, assets: FusionAssets, samples: list[FusionSample]) -> AskedBatch:
        batch = collate_pairs([x.pair for x in samples])
        assert batch.questions is not None
        counts = [Counter(x.answers or (x.pair.caption,)) for x in samples]
        owner = [i for i, people in enumerate(counts) for _ in people]
        weights = [count / people.total() for people in counts for count in people.values()]
        answers = assets.wordpiece.padded([answer for people in counts for answer in people], self.max_answer)
        asked = assets.wordpiece.padded(batch.questions, self.max_text)
        return AskedBatch(batch.images, *asked, torch.tensor(owner), *answers, torch.tensor(weights))

    def loss(self, model: Runner, batch: AskedBatch, step: Step) -> dict[str, Tensor]:
        """Each answer's tokens summed, weighted by the share of people who gave it, over the questions of all ranks."""
        asked = trimmed(batch.tokens, batch.num_text), batch.num_text
        answers = trimmed(batch.answers, batch.num_answer), batch.num_answer
        each = model("answers", batch.images, *asked, batch.owner, *answers)
        count = torch.tensor(len(batch.images), device=each.device)
        return {"loss": global_ratio((batch.weights.to(each.dtype) * each).sum(), count)}

    def speaks(self, assets: FusionAssets, model: Runner, device: torch.device, decoding: Decoding) -> Answerer:
        is_ranked, words = self.rank is not None, assets.wordpiece
        what = "--decode has no effect on answers that are ranked, got {}"
        require(self.name, not is_ranked or decoding.decode == "greedy", what, decoding.decode)
        known = [x.to(device) for x in assets.wordpiece.padded(assets.answers, self.max_answer)] if is_ranked else []
        options = {"max_length": self.max_answer, "eos_token_id": words.sep_token_id, **decoding.options()}

        def say(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
            asked = [x.to(device) for x in assets.wordpiece.padded(prompts, self.max_text)]
            read = assets.preprocess(images).to(device), *asked
            if self.rank is not None:
                best = model("rank", *read, *known, min(self.rank, len(assets.answers)))
                return [assets.answers[i] for i in best.tolist()]
            return [words.decode(row) for row in model("say", *read, **options).tolist()]

        return say
