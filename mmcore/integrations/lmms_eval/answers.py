"""Questions of benchmarks answered in batches, and how likely answers of theirs are."""

import logging
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

from PIL import Image

from mmcore.data.sources.conversations import IMAGE, Conversation, Turn
from mmcore.data.text.templates import expand
from mmcore.systems.llava.dialogue import Sampling, num_positions
from mmcore.systems.llava.inputs import SeenChat, SeenImage, collate_chats, generate_inputs, prompt_of, see
from mmcore.systems.llava.talk import Talks

MAX_NEW_TOKENS = 1024
"""Where a task names none."""

_LOG = logging.getLogger(__name__)


class Question(NamedTuple):
    """A text and the images it is about, which stand at its `IMAGE`s if there is one for each, and before it else."""

    text: str
    images: Sequence[Image.Image]


class Answerer:
    """A LLaVA that answers batches of at most `batch_size` questions, each alone."""

    def __init__(self, chat: Talks, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model, self.batch_size = chat.model, batch_size
        self.positions = num_positions(chat.model, chat.tokens)
        self.tokens = copy(chat.tokens)
        self.tokens.max_length = sys.maxsize  # an answer that is cut would be another
        self.device = next(chat.model.parameters()).device
        self.num_too_long = 0  # questions that the model has too few positions for; they have no answer

    def generate(self, questions: Sequence[Question], settings: Mapping[str, Any]) -> list[str]:
        """Answers to a batch; "" where the question is too long. Of a task's `generation_kwargs`, `until`,
        `max_new_tokens`, `temperature`, `top_p`, `do_sample` and `num_beams` are obeyed; others tell how other models
        see images."""
        prompts = [prompt_of(self.tokens, self.model.config, [self._turn(q)], self._seen(q)) for q in questions]
        fit = self._fitting([len(prompt.chat.tokens) + 1 for prompt in prompts])
        answers = [""] * len(questions)
        if fit:
            read = [prompts[i] for i in fit]
            inputs = generate_inputs(read, self.tokens.pad_token_id, self.model.config, self.device)
            room = self.positions - inputs[0].shape[1]
            ids = self.model.generate(*inputs, **self._options(settings, room)).cpu()
            for i, row in zip(fit, ids):
                answers[i] = _cut(self.tokens.text(row), settings.get("until") or ())
        return answers

    def likelihood(self, questions: Sequence[Question], answers: Sequence[str]) -> list[tuple[float, bool]]:
        """The mean loss of each answer's tokens and its end, and whether greedy decoding would say it; infinity where
        question and answer are too long."""
        samples = []
        for question, answer in zip(questions, answers):
            turns = (self._turn(question), Turn("assistant", self.tokens.without_marks(answer)))
            seen = self._seen(question)
            counts = [self.model.config.num_image_tokens(image.size) for image in seen]
            sample = self.tokens.sample(Conversation("question", ("",) * len(counts), turns), counts)
            samples.append(SeenChat(expand(sample, counts), seen))
        fit = self._fitting([len(sample.chat.tokens) for sample in samples])
        found = [(float("inf"), False)] * len(samples)
        if fit:
            part = collate_chats([samples[i] for i in fit], self.tokens, self.model.config, is_packed=False)
            inputs = [x.to(self.device) for x in part if x is not None]
            for i, total, count, is_greedy in zip(fit, *(x.tolist() for x in self.model.likelihood(*inputs))):
                found[i] = (-total / count, is_greedy)
        return found

    def tell_too_long(self) -> None:
        """Warns of what had no answer since the last call."""
        if self.num_too_long:
            sentence = "%d questions had no answer: they are longer than the model's %d tokens"
            _LOG.warning(sentence, self.num_too_long, self.positions)
        self.num_too_long = 0

    def _fitting(self, lengths: Sequence[int]) -> list[int]:
        fit = [i for i, length in enumerate(lengths) if length <= self.positions]
        self.num_too_long += len(lengths) - len(fit)
        return fit

    def _seen(self, question: Question) -> list[SeenImage]:
        return [see(image, self.model.config) for image in question.images]

    def _turn(self, question: Question) -> Turn:
        parts = [self.tokens.without_marks(part) for part in question.text.split(IMAGE)]
        if len(parts) == len(question.images) + 1:
            return Turn("user", IMAGE.join(parts))
        return Turn("user", f"{IMAGE}\n" * len(question.images) + self.tokens.without_marks("".join(parts)))

    def _options(self, settings: Mapping[str, Any], room: int) -> dict[str, Any]:
        temperature = (settings.get("do_sample", True) and settings.get("temperature")) or 0.0
        most = min(settings.get("max_new_tokens") or MAX_NEW_TOKENS, room)
        sampling = Sampling(temperature, (settings.get("top_p") or 1.0) if temperature else 1.0, most)
        return sampling.options(self.tokens) | {"num_beams": settings.get("num_beams") or 1}


def _cut(answer: str, until: str | Sequence[str]) -> str:
    """An answer up to the first of the texts that end it."""
    for end in [until] if isinstance(until, str) else until:
        if end:
            answer = answer.split(end)[0]
    return answer.strip()
