"""`mmcore chat` as a user meets it: at a terminal, from a pipe, and with what it cannot read."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from mmcore.cli import main
from mmcore.systems.llava.dialogue import Dialogue
from mmcore.systems.llava.weights import save_llava
from mmcore.tasks.talks import Sampling, load_chat_model
from mmcore.tasks.terminal import Talk, open_image
from tests.distributed.launch import ROOT, environment
from tests.refusals import refuses
from tests.systems.cli import MMCORE
from tests.systems.llava.fixtures import Saying, chat_tokens, ids_of, image, llava, tokenizer, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA in a folder of transformers, and images beside it."""
    parent = tmp_path_factory.mktemp("chat")
    save_llava(llava(), parent / "llava", tokenizer=tokenizer())
    for n in (1, 2):
        image(n).save(parent / f"{n}.png")
    image(3).save(parent / "a name with spaces.png")
    return parent / "llava"


def answers(folder: Path, questions: Sequence[tuple[str, list[int]]], *, most: int = 6) -> list[str]:
    """What a dialogue of Python's says."""
    chat = load_chat_model(folder, template="v1")
    dialogue = Dialogue(chat.model, chat.tokens, sampling=Sampling(max_new_tokens=most))
    return ["".join(dialogue.ask(text, [image(n) for n in images])) for text, images in questions]


def one_line(answer: str) -> str:
    return " ".join(answer.splitlines())


def piped(monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: object) -> int:
    """The exit code of `mmcore chat` in this process."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    try:
        main(["chat", *map(str, arguments)])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


def test_a_pipe_gives_one_answer_a_line_and_nothing_else(folder: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    shown = ["--image", folder.parent / "1.png", "--image", folder.parent / "a name with spaces.png"]
    lines = "what is it?\n\n/image {0}/2.png {0}/1.png\nand these?\n/reset\nagain?\n/help\n/quit\nnever read\n"
    options = [folder, "--template", "v1", "--max-new-tokens", 6, *shown]
    assert piped(monkeypatch, lines.format(folder.parent), *options) == 0
    said = answers(folder, [("what is it?", [1, 3]), ("and these?", [2, 1])])
    said += answers(folder, [("again?", [1, 3])])
    assert capsys.readouterr() == ("".join(f"{one_line(x)}\n" for x in said), "")


def test_a_line_that_cannot_be_answered_has_a_sentence_an_empty_line_and_exit_2(folder: Path, monkeypatch, capsys):
    lines = "what is it?\n/image missing.png\n/image\n/image 'x\n/show x\nwhat? " + "what? " * 200 + "\nand now?"
    assert piped(monkeypatch, lines, folder, "--template", "v1", "--max-new-tokens", 6) == 2
    out, err = capsys.readouterr()
    first, second = answers(folder, [("what is it?", []), ("and now?", [])])
    assert out == f"{one_line(first)}\n\n{one_line(second)}\n"
    sentences = err.splitlines()
    assert len(sentences) == 5 and all(sentence.startswith("mmcore: ") for sentence in sentences)
    assert "got missing.png: missing file" in sentences[0]
    assert "/image must be followed by a file, got nothing" in sentences[1]
    assert "must be /image, /reset, /help or /quit, got /show" in sentences[3] and "of 512 tokens" in sentences[4]


class Terminal:
    """A process at a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        self.end, end = pty.openpty()
        env = environment() | {"TERM": "dumb"}
        command = [*MMCORE, *map(str, arguments)]
        # tests that run in a shell's background would hand on that Ctrl-C is ignored
        as_at_a_terminal = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=end,
            stdout=end,
            stderr=end,
            start_new_session=True,
            preexec_fn=as_at_a_terminal,
        )
        os.close(end)
        self.shown = ""

    def wait(self, text: str) -> str:
        """What was shown up to a text that comes."""
        deadline = time.monotonic() + 120
        while text not in self.shown:
            assert time.monotonic() < deadline, f"no {text!r} in {self.shown!r}"
            if select.select([self.end], [], [], 1)[0]:
                self.shown += os.read(self.end, 4096).decode(errors="replace").replace("\r\n", "\n")
        before, self.shown = self.shown.split(text, 1)
        return before

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def interrupt_until(self, text: str) -> None:
        """Ctrl-C, again and again until a text comes: CPython's input() misses a signal that arrives after a key's
        echo and before it waits for the next key."""
        for _ in range(60):
            os.kill(self.process.pid, signal.SIGINT)
            if select.select([self.end], [], [], 1)[0]:
                break
        self.wait(text)


def test_a_terminal_streams_stops_at_ctrl_c_and_ends_at_ctrl_d(folder: Path) -> None:
    options = ["--template", "v1", "--max-new-tokens", 200, "--image", folder.parent / "1.png"]
    terminal = Terminal("chat", folder, *options)
    before = terminal.wait("you: ")
    assert before.startswith(f"{folder}, on ") and "/help" in before and "Ctrl-D" in before
    assert "1.png (20 x 14 pixels) is shown with the next question." in before
    terminal.type("what is it?\n")
    terminal.wait("model: ")
    os.kill(terminal.process.pid, signal.SIGINT)
    stopped = terminal.wait(" [stopped]\n")
    (whole,) = answers(folder, [("what is it?", [1])], most=200)
    assert len(stopped) < len(whole)
    terminal.wait("you: ")
    for typed, shown in (
        ("/image missing.png", "got missing.png: missing file"),
        (f"/image {folder.parent}/a name with spaces.png", "spaces.png (20 x 14 pixels) is shown with"),
        ("/help", "/reset"),
        ("/reset", "1.png (20 x 14 pixels) is shown"),
    ):
        terminal.type(typed + "\n")
        assert "Traceback" not in terminal.wait(shown)
        terminal.wait("you: ")
    terminal.type("half a question")
    terminal.wait("half a question")
    terminal.interrupt_until("you: ")
    terminal.type("what is it?\n")
    terminal.wait("model: ")
    assert " [cut: --max-new-tokens" in terminal.wait("you: ")
    terminal.type("\x04")
    assert terminal.process.wait(60) == 0


def test_a_terminal_is_spared_what_moves_its_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokens = llava(), chat_tokens()
    Saying(model, [ids_of(tokens, " a\x1b[2J dog\x07\n\tand\x9b a cat\r")])
    Talk(Dialogue(model, tokens), [], is_person=True).take("what is it?")
    assert capsys.readouterr().out == "model: a[2J dog\n\tand a cat\n"


@pytest.mark.parametrize("has_tiles", [False, True])
def test_runs_and_folders_of_both_kinds_answer(has_tiles: bool, tmp_path: Path) -> None:
    model = llava(has_tiles=has_tiles)
    save_llava(model, tmp_path / "folder", tokenizer=tokenizer())
    write_run(tmp_path / "run", model=model)
    said = set()
    for name, template in (("folder", "v1"), ("run", None), ("run/checkpoints/step-00000003", None)):
        chat = load_chat_model(tmp_path / name, template=template, weights="auto" if template else "weight")
        dialogue = Dialogue(chat.model, chat.tokens, sampling=Sampling(max_new_tokens=8))
        said.add("".join(dialogue.ask("what is it?", [image(1, (40, 20))])))
    assert len(said) == 1


def test_options_reach_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run", model=llava())
    (run / "language_model").rename(tmp_path / "moved")
    assert piped(monkeypatch, "what is it?", run) == 2
    assert f"{run}/language_model, which is gone: say where by --llm" in capsys.readouterr().err
    drawn = Sampling(temperature=1.5, top_p=0.9, max_new_tokens=8)
    options = ["--llm", tmp_path / "moved", "--system", "Be brief.", "--temperature", 1.5, "--top-p", 0.9]
    image(1).save(tmp_path / "1.png")
    options += ["--max-new-tokens", 8, "--seed", 3, "--image", tmp_path / "1.png"]
    printed = []
    for weights in ("auto", "ema", "weight"):
        assert piped(monkeypatch, "what is it?", run, *options, "--weights", weights) == 0
        printed.append(capsys.readouterr().out)
        chat = load_chat_model(run, weights=weights, llm=tmp_path / "moved")
        torch.manual_seed(3)
        dialogue = Dialogue(chat.model, chat.tokens, system="Be brief.", sampling=drawn)
        assert printed[-1] == one_line("".join(dialogue.ask("what is it?", [image(1)]))) + "\n"
    assert printed[0] == printed[1] != printed[2]


def test_a_chat_template_of_the_tokenizer_serves_where_none_is_named(tmp_path: Path) -> None:
    known = tokenizer()
    known.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + (eos_token if m.role == 'assistant' else ' ') }}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    save_llava(llava(), tmp_path / "llava", tokenizer=known)
    assert load_chat_model(tmp_path / "llava").tokens.template is None
    named = load_chat_model(tmp_path / "llava", template="v1").tokens.template
    assert named is not None and named.user_marks == ("USER: ", " ")
    known.chat_template = (
        "{% for m in messages %}{% for c in m.content if c.type %}{{ c.text }}{% endfor %}{% endfor %}"
    )
    save_llava(llava(), tmp_path / "lists", tokenizer=known)
    refuses(
        r"--template must say how .*, by auto, v1.*must write an end of an answer", load_chat_model, tmp_path / "lists"
    )


def test_images_that_cannot_be_shown_are_errors(tmp_path: Path) -> None:
    image(1, (1, 9)).save(tmp_path / "thin.png")
    (tmp_path / "text.png").write_text("no image")
    for name, reason in (
        ("missing.png", "missing file"),
        (".", "unreadable file"),
        ("a\0b.png", "unreadable file"),
        ("thin.png", "image of one pixel"),
        ("text.png", "not an image"),
    ):
        refuses(f"must be a readable JPEG, PNG, .*: {reason}", open_image, tmp_path / name)
