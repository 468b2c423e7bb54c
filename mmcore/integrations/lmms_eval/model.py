"""The class that lmms-eval makes and asks, by the signatures of its 0.7.3."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, groupby
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from PIL import Image
from tqdm import tqdm

from mmcore.integrations.lmms_eval import NAME
from mmcore.integrations.lmms_eval.answers import Answerer, Question
from mmcore.runs import WeightsKey
from mmcore.tasks.talks import load_chat_model


class MmcoreLlava(lmms):
    """A LLaVA of mmcore's or of transformers', as a simple model of lmms-eval's: text and images in, text out.

    Args:
        pretrained: a run of llava-stage1 or llava-stage2, a checkpoint of one, or a folder of transformers.
        batch_size: questions at once.
        weights, llm, template: as of `load_chat_model`, whose errors these are.
        device: None = this rank's GPU, or the CPU where there is none.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        weights: WeightsKey = "auto",
        llm: str | None = None,
        template: str | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal():
            raise ValueError(f"{NAME}: batch_size must be a number, got {batch_size}")
        own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device or own)
        where, moved = Path(str(pretrained)).expanduser(), None if llm is None else Path(llm)
        chat = load_chat_model(where, weights=weights, llm=moved, template=template, device=self.device)
        self.answerer: Answerer | None = Answerer(chat, int(batch_size))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "MmcoreLlava":
        """As lmms-eval's, but what stands among the model's arguments, `batch_size=8`, counts more than an option of
        the command line, which has a default."""
        named = {part.split("=")[0].strip() for part in arg_string.split(",")}
        others = {name: x for name, x in (additional_config or {}).items() if name not in named}
        return super().create_from_arg_string(arg_string, others)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer to each request of (text, generation_kwargs, doc_to_visual, doc_id, task, split)."""
        answers: list[str] = []
        with self._answering(len(requests)) as (answerer, bar):
            for _, alike in groupby((r.args for r in requests), key=lambda args: repr(args[1])):
                for batch in _batches(alike, answerer.batch_size):
                    shown = ((text, show(self._document(*place))) for text, _, show, *place in batch)
                    questions = [Question(text, _images(visuals)) for text, visuals in shown]
                    answers += answerer.generate(questions, batch[0][1])
                    bar.update(len(batch))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """The mean loss of each request's answer, and whether greedy decoding says it.

        It is the loss, as of lmms-eval's own models, and not its negative: multiple choice takes the least. A request
        is (text, the answer or doc_to_target, doc_to_visual, doc_id, task, split).
        """
        found: list[tuple[float, bool]] = []
        with self._answering(len(requests)) as (answerer, bar):
            for batch in _batches((r.args for r in requests), answerer.batch_size):
                questions, answers = [], []
                for text, target, doc_to_visual, *place in batch:
                    document = self._document(*place)
                    questions.append(Question(text, _images(doc_to_visual(document))))
                    answers.append(target if isinstance(target, str) else target(document))
                found += answerer.likelihood(questions, answers)
                bar.update(len(batch))
        # what is handed over bare becomes a string on the way to multiple choice
        return [GenerationResult(pair) for pair in found]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of each request's rounds, each asked alone, as what doc_to_text makes of the rounds before.

        A request is (text, generation_kwargs, doc_to_visual, doc_to_text, doc_id, task, split); doc_to_text gives the
        visuals, the text, whether the rounds are over, the answers so far, and what it is to be told next.
        """
        answers: list[list[str]] = []
        with self._answering(len(requests)) as (answerer, bar):
            for text, settings, doc_to_visual, doc_to_text, *place in (r.args for r in requests):
                document = self._document(*place)
                said, told = (answerer.generate([Question(text, _images(doc_to_visual(document)))], settings), None)
                for number in count(1):
                    visuals, text, is_over, said, told = doc_to_text(
                        document, previous_output=list(said), round_idx=number, previous_round_info=told
                    )
                    if is_over:
                        break
                    said = [*said, *answerer.generate([Question(text, _images(visuals))], settings)]
                answers.append(list(said))
                bar.update()
        return answers

    def clean(self) -> None:
        """Gives back the model's memory once all is answered."""
        self.answerer = None
        super().clean()

    @contextmanager
    def _answering(self, num_requests: int) -> Iterator[tuple[Answerer, Any]]:
        """The model and a progress bar; after the block a warning counts the questions that were too long."""
        if self.answerer is None:
            raise ValueError(f"{NAME}: the model is gone since clean(): make it anew")
        with tqdm(total=num_requests, disable=self.rank != 0, desc=NAME) as bar:
            yield self.answerer, bar
        self.answerer.tell_too_long()

    def _document(self, doc_id: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]


def _batches(items: Iterable[Any], size: int) -> list[list[Any]]:
    listed = list(items)
    return [listed[first : first + size] for first in range(0, len(listed), size)]


def _images(visuals: Sequence[Any] | None) -> list[Image.Image]:
    """RGB images of what a task shows."""
    for visual in visuals or ():
        if not isinstance(visual, Image.Image):
            raise ValueError(f"{NAME}: what a task shows must be images of Pillow, got {type(visual).__name__}")
    return [visual.convert("RGB") for visual in visuals or ()]
