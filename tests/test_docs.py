"""The pages of docs/: their Python runs, their commands are understood, their tables and links are right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from docs.generate import api
from tests.distributed.launch import environment
from tests.pages import GENERATED, PAGES, ROOT, blocks, broken_links, check_command, check_tables, commands

DOCS = [page for page in PAGES if page.startswith("docs/")]
# Pages that set up a process group, which would stay with the tests that come after.
APART = ["docs/deepspeed.md"]


@pytest.mark.parametrize("page", [page for page in DOCS if blocks(page, "python") and page not in APART])
def test_python_of_a_page_runs_in_order(page: str) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", APART)
def test_python_of_a_page_runs_in_a_process_of_its_own(page: str) -> None:
    program = "\n".join([*blocks(page, "python"), "import os; os._exit(0)"])
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", PAGES)
def test_json_of_a_page_is_json(page: str) -> None:
    for block in blocks(page, "json"):
        json.loads(block)


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str) -> None:
    for words in commands(page):
        check_command(words)


@pytest.mark.parametrize("page", DOCS)
def test_tables_are_those_of_the_committed_json(page: str, tmp_path: Path) -> None:
    check_tables(page, tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert not broken_links(page)


def test_every_page_is_on_the_map() -> None:
    index = (ROOT / "docs/index.md").read_text()
    assert not [page for page in DOCS if page != "docs/index.md" and f"({Path(page).name})" not in index]


def test_the_api_page_is_what_the_docstrings_say() -> None:
    assert (ROOT / GENERATED).read_text() == api(), f"make docs writes {GENERATED}"


@pytest.mark.parametrize(
    "command",
    [
        "mmcore train clip --bach-size 3", "mmcore eval zero RUN", "make nothing", "python examples/none.py", "xyz",
    ],
)  # fmt: skip
def test_a_command_that_is_wrong_is_seen(command: str) -> None:
    with pytest.raises((AssertionError, SystemExit, pytest.fail.Exception)):
        check_command(command.split())
