"""The README holds what the committed measurements say, and its Python runs."""

import re
from pathlib import Path

from bench.report import TABLE, load, markdown

ROOT = Path(__file__).parents[1]


def test_tables_are_those_of_the_committed_json():
    text = (ROOT / "README.md").read_text()
    found = [(m[2], m[3]) for m in TABLE.finditer(text)]
    assert found
    for path, table in found:
        assert table == markdown(load([ROOT / path])[0]), f"make docs-tables writes the table of {path}"


def test_python_examples_run():
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})
