"""The README holds what the committed measurements say, and its Python runs."""

import re
from pathlib import Path

import pytest

from bench.report import TABLE, fill

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["README.md", "kernels/README.md"])
def test_tables_are_those_of_the_committed_json(page: str, tmp_path: Path) -> None:
    written, copy = ROOT / page, tmp_path / page
    copy.parent.mkdir(exist_ok=True)
    copy.write_text(written.read_text())
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    fill(copy)
    assert TABLE.search(copy.read_text())
    assert copy.read_text() == written.read_text(), f"make docs-tables writes the tables of {page}"


def test_python_examples_run():
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})
