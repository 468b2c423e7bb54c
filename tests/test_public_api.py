"""The names and signatures that users import are those of the last release, until somebody says otherwise."""

import ast
import difflib

from tests.public_api import LISTING, lines_of, listing


def test_the_public_api_is_the_one_that_is_written_down() -> None:
    written, found = LISTING.read_text().splitlines(), listing()
    changes = [x for x in difflib.unified_diff(written, found, "written", "found", n=0, lineterm="")]
    assert not changes, (
        "the public API changed; if that is meant: a line in CHANGELOG.md, and python -m tests.public_api --write\n"
        + "\n".join(changes)
    )


def test_a_changed_argument_default_type_field_or_method_is_a_change() -> None:
    before = "class A:\n    x: int = 1\n    def f(self, y: int, *, z: float = 0.5) -> int: ...\n"
    for old, new in (
        ("x", "w"),
        ("= 1", "= 2"),
        ("y: int", "y: str"),
        ("z:", "v:"),
        ("0.5", "0.6"),
        ("-> int", ""),
    ):
        assert old in before
        listed = [list(lines_of("A", ast.parse(s).body[0])) for s in (before, before.replace(old, new, 1))]
        assert listed[0] != listed[1], (old, new)


def test_what_is_private_may_change() -> None:
    before, after = (
        "class A:\n    def f(self): ...\n",
        "class A:\n    _b: int\n    def f(self): ...\n    def _g(self): ...\n",
    )
    assert list(lines_of("A", ast.parse(before).body[0])) == list(lines_of("A", ast.parse(after).body[0]))
