"""The global contrastive loss on many simulated ranks: exact, and sending what `mmcore.plan` says."""

import pytest

from bench.measure import CLEAR_REFS
from bench.scale import HOW, measured_one, simulate


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("num_ranks", [8, 64])
def test_exact_on_every_rank(num_ranks: int, how: str) -> None:
    """512 ranks, whose ring takes minutes, are in `bench/results`: `python -m bench.scale FILE` runs all."""
    found = simulate(num_ranks, how)
    print(found)
    assert max(found["errors"].values()) < 1e-13
    assert found["sent_bytes"] == pytest.approx(found["planned_sent_bytes"], abs=64)


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="the peak of the resident size cannot be reset")
@pytest.mark.parametrize("how", HOW)
def test_memory_of_a_rank_is_as_planned(how: str) -> None:
    found = measured_one(64, how)
    assert found["planned_bytes"] == pytest.approx(found["measured_bytes"], rel=0.15), found
