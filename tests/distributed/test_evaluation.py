"""Held-out evaluation that ranks share: the numbers of one process, to the bit, at less work a rank."""

from typing import Any

import pytest

from tests.distributed.launch import run_ranks

STAGES = {1: 1, 2: 1, 3: 3}
"""Of ZeRO, by the number of ranks."""
RUNS = {
    "clip": ("zero-shot top-1", "image to text R@1"), "mae": ("R^2 of masked patches",), "pairs": ("ITM accuracy",),
    "captions": ("BLEU-4", "CIDEr"), "answers": ("VQA accuracy",), "talks": ("answer accuracy",),
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank finds, by the number of ranks."""
    one = tmp_path_factory.mktemp("one")
    folders = {1: one, **{num_ranks: tmp_path_factory.mktemp("several") for num_ranks in (2, 3)}}
    return {n: run_ranks("worker_evaluation", n, folders[n], one=str(one), zero=zero) for n, zero in STAGES.items()}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("run", RUNS)
def test_ranks_that_share_an_evaluation_find_what_one_process_finds(measured, run, num_ranks):
    alone = measured[1][0][run]
    assert set(RUNS[run]) <= alone["found"].keys()
    for rank in measured[num_ranks]:
        found = rank[run]
        # a product of ZeRO-3's own adds up in another order
        assert found["found"] == (alone["found"] if num_ranks == 2 else pytest.approx(alone["found"], rel=1e-8))
        assert found["calls"] < alone["calls"]
    assert len({rank[run]["calls"] for rank in measured[num_ranks]}) == 1  # or ZeRO-3 hangs


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_broken_images_are_left_out_and_counted_over_all_ranks(measured, num_ranks):
    for rank in measured[num_ranks]:
        assert rank["squares"]["found"] == [[[0, 0], [1, 1]], [], [[4, 4], [5, 5]], [[6, 6], [7, 7]], [[8, 8]]]
        assert rank["squares"]["broken"] == {"not a square": 3}
        assert len(rank["squares"]["worked"]) == {1: 5, 2: 3, 3: 2}[num_ranks]
        assert "3 of 10 records of the held-out images are broken (not a square 3)" in rank["too many"]["error"]
