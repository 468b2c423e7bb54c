"""A LLaVA that answers question after question, each answer as it is made, word by word."""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from mmcore.data.sources.conversations import IMAGE, Turn
from mmcore.data.sources.json_formats import is_unicode
from mmcore.data.text.templates import ChatTokens
from mmcore.systems.llava.inputs import SeenChat, SeenImage, generate_inputs, prompt_of, see
from mmcore.systems.llava.model import Llava
from mmcore.tasks.talks import Sampling

# of bytes that make no character, or not yet
_REPLACEMENT = "\ufffd"


def num_positions(model: Llava, tokens: ChatTokens) -> int:
    """Tokens of a prompt and its answer: as many as the language model has positions, or else as it was trained on."""
    positions = getattr(model.language_model.config, "max_position_embeddings", None)
    return tokens.max_length if positions is None else positions


class Dialogue:
    """Questions and answers about images, each read with all that was said and shown before, of a model in evaluation
    mode; `system` is the system's text, None = the template's. A template that reads no questions raises a
    ValueError."""

    def __init__(
        self, model: Llava, tokens: ChatTokens, *, system: str | None = None, sampling: Sampling | None = None
    ) -> None:
        if tokens.template is not None and tokens.template.images_only:
            raise ValueError("Dialogue: tokens must be of a template that reads questions, got 'plain'")
        self.model, self.tokens = model, tokens
        self.system, self.sampling = system, sampling or Sampling()
        self.reset()

    def reset(self) -> None:
        """Forgets what was said and shown."""
        self.images: list[SeenImage] = []  # shown so far
        self.turns: list[Turn] = [] if self.system is None else [Turn("system", self.system)]  # said so far
        self.was_cut = False  # whether the last answer went on where it had to end

    def ask(self, text: str, images: Sequence[Image.Image] = ()) -> Generator[str]:
        """The answer to the next question, in pieces, each as soon as it is known; joined, they are all of it.

        Question and answer are remembered when the last piece is taken. Where the iterator is closed before, the
        answer is stopped, and remembered as far as it was told; as if never asked, where nothing was. The question
        shows its RGB images first; those of earlier ones are seen as well. A ValueError of an empty one, of marks of
        images or of the tokenizer, and of one that is too long for the model with all before it.
        """
        if not text.strip() or not is_unicode(text):
            raise ValueError(f"a question must be text, got {text!r}")
        if IMAGE in text:
            raise ValueError(f"a question must not hold {IMAGE}: images are given beside it, got {text!r}")
        turns, shown, prompt, room = self._read(text, images)
        if room < 1:
            length = len(prompt.chat.tokens)
            what = "the question must leave room for an answer, but with all before it and its images it takes"
            raise ValueError(f"{what} {length} of {length + room} tokens")
        return self._answer(prompt, turns, shown, min(room, self.sampling.max_new_tokens))

    def has_room(self, text: str, images: Sequence[Image.Image] = ()) -> bool:
        """Whether the model has room for an answer to a question after all before it."""
        return self._read(text, images)[3] >= 1

    def _read(self, text: str, images: Sequence[Image.Image]) -> tuple[list[Turn], list[SeenImage], SeenChat, int]:
        """All turns and images with the question, what is read of them, and how many tokens are left for an answer."""
        turns = [*self.turns, Turn("user", f"{IMAGE}\n" * len(images) + text)]
        shown = [*self.images, *(see(image, self.model.config) for image in images)]
        prompt = prompt_of(self.tokens, self.model.config, turns, shown)
        return turns, shown, prompt, num_positions(self.model, self.tokens) - len(prompt.chat.tokens)

    def _answer(self, prompt: SeenChat, turns: list[Turn], shown: list[SeenImage], most: int) -> Generator[str]:
        ids: list[int] = []
        told, is_done = "", False
        pieces = _generated(self.model, self.tokens, prompt, self.sampling, most)
        try:
            for piece in pieces:
                ids += piece
                # what may still change: a character whose bytes are not all there, space that may be the last
                known = self.tokens.text(torch.tensor(ids)).rstrip(_REPLACEMENT).rstrip()
                if known.startswith(told) and known != told:
                    news, told = known[len(told) :], known
                    yield news
            is_done = True
            whole = self.tokens.text(torch.tensor(ids))
            news, told = whole.removeprefix(told), whole
            if news:
                yield news
        finally:
            pieces.close()
            if told or is_done:
                self.was_cut = is_done and len(ids) == most and ids[-1] not in self.tokens.stops
                self.turns = [*turns, Turn("assistant", self.tokens.without_marks(told))]
                self.images = shown


class _Streamer(BaseStreamer):
    """Hands on each token that `generate` makes; the prompt that it is given first has none, since it is embedded."""

    def __init__(self, take: Callable[[list[int]], None]) -> None:
        self.take = take

    def put(self, value: Tensor) -> None:
        self.take(value.flatten().tolist())

    def end(self) -> None:
        pass


def _generated(
    model: Llava, tokens: ChatTokens, prompt: SeenChat, sampling: Sampling, most: int
) -> Generator[list[int]]:
    """Tokens of an answer as they are made, by a thread that ends where this is closed."""
    inputs = generate_inputs([prompt], tokens.pad_token_id, model.config, next(model.parameters()).device)
    made: SimpleQueue[list[int] | None] = SimpleQueue()
    stop = Event()

    def is_stopped(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), stop.is_set(), device=ids.device)

    options = {
        **sampling.options(tokens),
        "max_new_tokens": most,
        "streamer": _Streamer(made.put),
        "stopping_criteria": StoppingCriteriaList([is_stopped]),
    }
    with ThreadPoolExecutor(1) as pool:
        try:
            answer = pool.submit(model.generate, *inputs, **options)
            answer.add_done_callback(lambda _: made.put(None))
            yield from iter(made.get, None)
            answer.result()
        finally:
            stop.set()
