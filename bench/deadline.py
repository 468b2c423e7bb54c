"""`-p bench.deadline --time-limit SECONDS`: tests that would begin later are skipped, so that a run ends by itself, its
reports written."""

import time

import pytest

_BEGAN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--time-limit", type=float, default=None, metavar="SECONDS", help="begin no test after it")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--time-limit")
    if limit is not None and time.monotonic() - _BEGAN > limit:
        pytest.skip(f"not begun: {limit:.0f} s are over")
