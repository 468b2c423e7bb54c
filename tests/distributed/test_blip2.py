"""BLIP-2's first stage on two and four ranks is that of one process."""

from typing import Any

import pytest
import torch

from tests.distributed import worker_blip2 as worker
from tests.distributed.launch import run_ranks

Results = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("blip2")
    return {n: run_ranks("worker_blip2", n, folder / str(n)) for n in (1, 2, 4)}


@pytest.mark.parametrize("num_ranks", [2, 4])
class TestOnRanks:
    def test_rows_come_from_the_ranks_that_have_them(self, results: Results, num_ranks: int) -> None:
        for result in results[num_ranks]:
            assert result["fetched"] == result["uneven"] == result["wanted"] and result["nothing"] == [0, 5]

    def test_gradients_of_rows_go_back_to_the_ranks_that_have_them(self, results: Results, num_ranks: int) -> None:
        expected = [0.0] * 8
        for rank in range(num_ranks):
            for row, share in list(zip([7, 0, 3, 3, 6, 1], range(1, 7), strict=True))[rank:]:
                expected[row] += share
        assert [x for result in results[num_ranks] for x in result["gradient"]] == expected

    def test_pairs_that_share_an_image_or_a_text_have_one_label(self, results: Results, num_ranks: int) -> None:
        labels = [x for result in results[num_ranks] for x in result["labels"]]
        assert labels == results[1][0]["labels"]
        groups = [{i for i, x in enumerate(labels) if x == y} for y in labels]
        assert groups[1] == {1, 5} and groups[2] == {2, 6} and groups[0] == {0}

    def test_negatives_are_never_right_and_as_hard_as_softmax_has_them(self, results: Results, num_ranks: int) -> None:
        generator = torch.Generator().manual_seed(3)
        tokens = torch.nn.functional.normalize(torch.randn(8, 3, 8, generator=generator), dim=-1)
        b = torch.nn.functional.normalize(torch.randn(8, 8, generator=generator), dim=-1)
        logits = 5 * torch.einsum("mqd,nd->mnq", tokens, b).amax(2)
        right = (worker.IMAGE_IDS[:, None] == worker.IMAGE_IDS) | (worker.TEXT_IDS[:, None] == worker.TEXT_IDS)
        for name, of_rows in (("texts", logits), ("images", logits.T)):
            expected = of_rows.masked_fill(right, -torch.inf).softmax(1)
            drawn = torch.cat([torch.tensor(r["negatives"][name]).T for r in results[num_ranks]])  # [8, draws]
            assert not right.gather(1, drawn).any()
            share = torch.stack([(drawn == j).double().mean(1) for j in range(8)], 1)
            # five standard deviations of 400 draws
            assert ((share - expected).abs() < 5 * (expected * (1 - expected) / 400).sqrt() + 1e-9).all()

    def test_where_all_is_right_nothing_is_drawn(self, results: Results, num_ranks: int) -> None:
        assert all(set(r["all the same"]) == {-1} for r in results[num_ranks])

    def test_a_step_is_that_of_one_process(self, results: Results, num_ranks: int) -> None:
        whole = results[1][0]["step"]
        for result in results[num_ranks]:
            for name, value in whole["losses"].items():
                assert result["step"]["losses"][name] == pytest.approx(value, rel=1e-6), name
            assert result["step"]["grads"].keys() == whole["grads"].keys()
            for name, grad in whole["grads"].items():
                expected = torch.tensor(grad, dtype=torch.float64)
                found = torch.tensor(result["step"]["grads"][name], dtype=torch.float64)
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8, msg=name)
