"""The README holds what the committed measurements say, and its Python runs."""

from pathlib import Path

import pytest

from bench.report.pages import TABLE
from tests.pages import ROOT, blocks, check_tables


@pytest.mark.parametrize("page", ["README.md", "kernels/README.md", "docs/benchmarks.md"])
def test_tables_are_those_of_the_committed_json(page: str, tmp_path: Path) -> None:
    assert TABLE.search((ROOT / page).read_text())
    check_tables(page, tmp_path)


def test_python_examples_run() -> None:
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec"), {})
