"""`-p bench.gpu.running`: a pytest run that ends by itself, its reports written (`--time-limit SECONDS`: tests that
would begin later are skipped), leaves each test's outcome on disk as it comes (`--lines FILE`), and begins with what
matters most (`--first WORD`, again for what comes next)."""

import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.lines import append

_BEGAN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--time-limit", type=float, default=None, metavar="SECONDS", help="begin no test after it")
    parser.addoption("--lines", type=Path, default=None, metavar="FILE", help="a line of JSON a test")
    parser.addoption("--first", action="append", default=[], metavar="WORD", help="tests with it in their name first")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    words = config.getoption("--first") or []

    def place(item: pytest.Item) -> int:
        name = item.nodeid.lower()
        return next((i for i, word in enumerate(words) if word.lower() in name), len(words))

    items.sort(key=place)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--time-limit")
    if limit is not None and time.monotonic() - _BEGAN > limit:
        pytest.skip(f"not begun: {limit:.0f} s are over")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    result = yield
    path, report = item.config.getoption("--lines"), result.get_result()
    if path is not None and (report.when == "call" or not report.passed):
        timed = getattr(item, "funcargs", {}).get("benchmark")
        found = {} if timed is None or timed.stats is None or report.failed else _times(timed)
        why = str(report.longrepr)[-500:] if report.failed else report.longrepr[2] if report.skipped else ""
        append(path, test=item.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), why=why, **found)


def _times(timed: Any) -> dict[str, Any]:
    return {"group": timed.group, "median_s": timed.stats.stats.median, "extra_info": timed.extra_info}
