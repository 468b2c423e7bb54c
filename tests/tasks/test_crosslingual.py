"""Retrieval from captions in one language to those in another, on vectors whose neighbours are known."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmcore.metrics.retrieval import relevance_of
from mmcore.tasks import crosslingual
from mmcore.tasks.crosslingual import MEAN, follow, recalls
from mmcore.tasks.subject import HeldOut, Options, Subject


class AsItIs:
    def pictures(self, data: Any) -> Any:
        return data


def subject(
    languages: list[list[str]] | None, text: torch.Tensor, owner: list[int], num: int, name: str = ""
) -> Subject:
    captions, owners = [str(i) for i in range(len(text))], torch.tensor(owner)
    relevance, index = relevance_of(captions, owners, num_images=num), torch.arange(num)
    val = SimpleNamespace(languages=languages)
    data = SimpleNamespace(val=val, name=name, val_name="held-out")
    found = Subject(AsItIs(), None, None, data, torch.device("cpu"))
    vars(found)["held_out"] = HeldOut(index, captions, owners, relevance, torch.eye(num), text, None)
    return found


def test_a_caption_finds_that_of_its_picture_in_the_other_language_and_no_other(capsys: Any) -> None:
    # picture 0: en, zh; 1: en, zh; 2: en, zh, de; 3: en alone
    languages, owner = [["en", "zh"], ["en", "zh"], ["en", "zh", "de"], ["en"]], [0, 0, 1, 1, 2, 2, 2, 3]
    x = torch.eye(4)
    # zh of pictures 1 and 2 are exchanged; the en of picture 3 has no translation, so that it is not asked
    text = torch.stack([x[0], x[0], x[1], x[2], x[2], x[1], x[2], x[3]])
    found = subject(languages, text, owner, 4)
    result = recalls(found)
    assert set(result) == {(a, b) for a in ("en", "zh", "de") for b in ("en", "zh", "de") if a != b}
    assert result["en", "zh"]["R@1"] == result["zh", "en"]["R@1"] == pytest.approx(1 / 3)
    assert result["en", "zh"]["chance_R@1"] == pytest.approx(1 / 3)
    assert result["en", "de"]["R@1"] == result["de", "zh"]["R@1"] == 1  # of one candidate
    assert follow(found) == {MEAN: pytest.approx((2 / 3 + 4) / 6)}
    assert crosslingual.report(found, Options()) == [] and "  en to zh: R@1 33.3 (33.3)" in capsys.readouterr().out


@pytest.mark.parametrize("languages", [None, [["en"], ["en"]], [["en"], ["zh"]]])
def test_nothing_is_measured_of_one_language_or_of_pictures_with_one_caption(languages: Any) -> None:
    found = subject(languages, torch.eye(2), [0, 1], 2, "pairs.csv")
    assert follow(found) == {} and crosslingual.report(found, None) == []
    with pytest.raises(ValueError, match=r"pairs.csv must have held-out captions in two languages"):
        crosslingual.report(found, Options())
