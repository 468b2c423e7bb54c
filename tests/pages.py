"""What the Markdown pages hold: blocks of code, commands, links, headings, and tables made from the committed JSON."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

from bench.report.pages import fill
from mmcore import cli

ROOT = Path(__file__).parents[1]
GENERATED = "docs/api.md"
PAGES = ["README.md", "kernels/README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
# Commands of others, which stand on pages as they are.
FOREIGN = ("pip", "git", "cd", "bash")


def blocks(page: str, language: str) -> list[str]:
    """Code blocks of a language, by the name behind the fence."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def check_tables(page: str, folder: Path) -> None:
    """Writes a copy's tables anew in a folder and compares."""
    written, copy = ROOT / page, folder / page
    copy.parent.mkdir(exist_ok=True)
    copy.write_text(written.read_text())
    (folder / "bench").symlink_to(ROOT / "bench")
    fill(copy)
    assert copy.read_text() == written.read_text(), f"make docs-tables writes the tables of {page}"


def commands(page: str) -> Iterator[list[str]]:
    """The words of each command, without those that set variables, lines that go on joined."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"\w+=", words[0]):
                words = words[1:]
            if words:
                yield words


class Parsed(Exception):
    """A command line was understood; what it asks for was not done."""


def _raise_parsed(parser: Any) -> Any:
    def parse(*args: Any, **kwargs: Any) -> Any:
        raise Parsed(parser(*args, **kwargs))

    return parse


def parse(words: list[str]) -> None:
    """Hands the words behind `mmcore` to the command's own parser, and stops it there."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        # a module of its own holds each name that the command looks up
        patch.setattr(tyro, "cli", _raise_parsed(tyro.cli))
        patch.setattr(tyro.extras, "subcommand_cli_from_dict", _raise_parsed(tyro.extras.subcommand_cli_from_dict))
        cli.main(words)


def check_command(words: list[str]) -> None:
    """Raises where a command would not be understood: an option that is not there, a file, a target of make."""
    name, *rest = (word for word in words if word != "--help")
    if name in FOREIGN:
        return
    if name == "mmcore":
        parse(rest)
    elif name in ("torchrun", "deepspeed") and "mmcore.train" in rest:
        place = rest.index("mmcore.train")
        assert rest[place - 1] in ("-m", "--module"), rest
        parse(["train", *rest[place + 1 :]])
    elif name == "make":
        assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in rest), rest
    elif name == "python" and rest[0] == "-m":
        assert rest[1] == "bench" and rest[2] in ("report", "tables", "towers"), rest
    elif name in ("python", "pytest", "torchrun", "deepspeed"):
        files = [x for x in rest if x.endswith((".py", "/"))]
        assert files and all((ROOT / file).exists() for file in files), rest
    else:
        raise AssertionError(f"no check knows the command {shlex.join(words)}")


def anchors(text: str) -> set[str]:
    """Those that GitHub gives the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken_links(page: str) -> list[str]:
    """Links to files and headings that are not there."""
    found, text = [], (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            found.append(target)
    return found
