"""Peak memory of training steps on this machine against what `mmcore plan` predicts, and all tables of its page."""

from pathlib import Path

import pytest

from bench.measure import CLEAR_REFS
from bench.plan import CASES, measured
from bench.published import PAGES, filled


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="the peak of the resident size cannot be reset")
@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_predicted_within_15_percent(name: str) -> None:
    case = measured(name)
    print(name, case)
    assert case["predicted_bytes"] == pytest.approx(case["measured_bytes"], rel=0.15), case


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_all_tables_are_those_of_the_code(page: Path) -> None:
    assert filled(page.read_text()) == page.read_text(), "python -m bench.published writes them"
