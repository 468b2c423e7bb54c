"""`mmcore chat`: questions about images at a terminal, or line by line from a pipe."""

import importlib
import importlib.util
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from PIL import Image
from transformers.utils import logging

from mmcore.data.broken import BrokenRecord
from mmcore.data.sources.conversations import check_sides
from mmcore.data.sources.files import read_image_file
from mmcore.data.transforms.images import decode_rgb
from mmcore.errors import complain
from mmcore.runs import WeightsKey
from mmcore.tasks.talks import Sampling, load_chat_model

HELP = """\
  /image FILE ...   show one or more images with the next question
  /reset            forget what was said, and show the images of --image again
  /help             this
  /quit             end, as Ctrl-D does; Ctrl-C stops an answer"""

# a model that says them may not move the cursor
_NO_CONTROLS = dict.fromkeys(c for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t")


@dataclass(frozen=True)
class ChatConfig:
    """Ask a LLaVA about images, question after question. Where standard input is no terminal, each of its lines is a
    question or a command, and the answers alone are printed, one a line."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run of llava-stage1 or llava-stage2 (its newest checkpoint is used), one checkpoint of it, or a folder of
    transformers (LlavaForConditionalGeneration, LlavaNextForConditionalGeneration)."""
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """An image that the first question shows; may be given several times."""
    template: str | None = None
    """How a folder of transformers was trained: v1 (Vicuna), llama_3, chatml, or auto, its tokenizer's own; None =
    auto, where there is one. A run knows."""
    system: str | None = None
    """Text of the system; None = the template's."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    seed: int = 0
    """Of what is drawn with a --temperature."""
    llm: Path | None = None
    """Where the run's language model is now; None = where it was."""
    weights: WeightsKey = "auto"
    """Of a run: ema = the averaged weights, weight = the trained ones, auto = ema where the run kept one."""


def open_image(file: Path) -> Image.Image:
    """An RGB image to ask about; a ValueError where it is missing, damaged, or has too few pixels or too many."""
    try:
        return check_sides(file.name, decode_rgb(read_image_file(str(file.expanduser()))))
    except BrokenRecord as error:
        what = "an image must be a readable JPEG, PNG, WebP, GIF or BMP"
        raise ValueError(f"{what}, got {file}: {error.reason}") from None


class Talk:
    """Questions and commands to a dialogue, one after the other, the first of which shows these images; where no person
    reads along, the answers alone are printed, one a line."""

    def __init__(self, dialogue: Any, images: Sequence[tuple[str, Image.Image]], *, is_person: bool) -> None:
        self.dialogue, self.first, self.is_person = dialogue, images, is_person
        self.waiting: list[Image.Image] = []  # what the next question shows
        self.num_refused = 0  # lines that nothing could be done with
        self._show(images)

    def run(self, read: Callable[[], str]) -> None:
        """Takes lines until `read` raises an EOFError."""
        while True:
            try:
                line = read().strip()
                if line == "/quit":
                    return
                self.take(line)
            except EOFError:
                self._say("")
                return
            except KeyboardInterrupt:  # at the prompt it takes back what was typed
                if not self.is_person:
                    raise
                self._say("")

    def take(self, line: str) -> None:
        """One question or command, but for /quit; what is wrong with it is said in a sentence."""
        try:
            if line.startswith("/"):
                self._obey(*line.partition(" ")[::2])
            elif line:
                self._answer(line)
        except ValueError as error:
            self.num_refused += 1
            complain(error, 2)
            if not (self.is_person or line.startswith("/")):
                print(flush=True)  # questions and answers stay in step

    def _answer(self, question: str) -> None:
        said = len(self.dialogue.turns)
        with closing(self.dialogue.ask(question, self.waiting)) as pieces:
            if self.is_person:
                self._tell(pieces)
            else:
                print(" ".join("".join(pieces).splitlines()), flush=True)
        if len(self.dialogue.turns) > said:
            self.waiting = []

    def _tell(self, pieces: Iterator[str]) -> None:
        with _interrupts() as pressed:
            print("model: ", end="", flush=True)
            for piece in pieces:
                print(piece.translate(_NO_CONTROLS), end="", flush=True)
                if pressed:
                    print(" [stopped]")
                    return
        print(" [cut: --max-new-tokens, or the model, allows no more]" if self.dialogue.was_cut else "")

    def _obey(self, command: str, rest: str) -> None:
        rest = rest.strip()
        if command == "/image":
            files = [rest] if Path(rest).expanduser().is_file() else shlex.split(rest)
            if not files:
                raise ValueError("/image must be followed by a file, got nothing")
            self._show([(Path(file).name, open_image(Path(file))) for file in files])
        elif command == "/reset":
            self.dialogue.reset()
            self.waiting = []
            self._say("What was said is forgotten.")
            self._show(self.first)
        elif command == "/help":
            self._say(HELP)
        else:
            raise ValueError(f"a command must be /image, /reset, /help or /quit, got {command}")

    def _show(self, images: Sequence[tuple[str, Image.Image]]) -> None:
        for name, image in images:
            self.waiting.append(image)
            self._say(f"{name} ({image.width} x {image.height} pixels) is shown with the next question.")

    def _say(self, text: str) -> None:
        if self.is_person:
            print(text)


def main(arguments: list[str]) -> None:
    """Runs `mmcore chat RUN ...`; exits with 2 where a line of a pipe could not be answered."""
    config = tyro.cli(ChatConfig, args=arguments, prog="mmcore chat")
    images = [(file.name, open_image(file)) for file in config.image]
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    is_person = sys.stdin.isatty()
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal that lacks a character of the answer
        sys.stdout.reconfigure(errors="replace")
    try:
        chat = load_chat_model(config.run, weights=config.weights, llm=config.llm, template=config.template)
        torch.manual_seed(config.seed)
        dialogue = chat.dialogue(config.system, config.sampling)
        if is_person:
            device = next(chat.model.parameters()).device.type
            print(f"{chat.origin}, on {device}. /help lists what else can be typed, Ctrl-D ends.")
            if importlib.util.find_spec("readline"):  # where it is loaded, input() edits lines by it
                importlib.import_module("readline")
        talk = Talk(dialogue, images, is_person=is_person)
        talk.run(partial(input, "you: ") if is_person else input)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # nobody reads on; what is still in the buffer has no reader either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    if talk.num_refused and not is_person:
        sys.exit(2)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C makes longer; it raises none, since Python drops an exception that a destructor meets."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
