"""Which patch a word takes, on vectors whose neighbours are known, and of FILIP with a tokenizer."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmcore.data import Preprocess
from mmcore.data.text.tokenizer import train_tokenizer
from mmcore.systems.filip.model import FILIP
from mmcore.systems.filip.recipe import Filip
from mmcore.tasks import TASKS, alignment
from mmcore.tasks.alignment import Aligns
from mmcore.tasks.subject import Subject
from mmcore.two_towers import PairAssets
from tests.systems.clip.test_weights import small_config

WORDS = {"a corner": [1, 0], "東 x": [4, 2]}
"""Of each word, the part of an image that it is: 0 the whole, then four patches."""


class Known:
    def pictures(self, data: Any) -> Any:
        return data

    def aligns(self, *_: Any) -> Aligns:
        def words(caption: str) -> tuple[list[str], Tensor]:
            return caption.split(), torch.eye(5)[WORDS[caption]]

        return Aligns(Preprocess(8), 1, lambda images: torch.eye(5).expand(len(images), 5, 5), words)


def subject(folder: Path, val: Any) -> Subject:
    captions, index = ["a corner", "東 x", "a corner"], torch.tensor([3, 1, 0])
    run: Any = SimpleNamespace(folder=folder)
    data = SimpleNamespace(val=val, name="two captions")
    found = Subject(Known(), None, None, data, torch.device("cpu"), run)
    vars(found)["held_out"] = SimpleNamespace(captions=captions, owner=torch.arange(3), index=index)
    return found


def test_a_word_takes_its_nearest_patch_or_the_whole_image_and_it_is_drawn(tmp_path: Path) -> None:
    val: Any = SimpleNamespace(raw_image=lambda i: Image.new("RGB", (9, 9), (40 * i, 0, 0)))
    given = subject(tmp_path, val)
    first, second = alignment.alignments(given)
    assert first.words == ["a", "corner"] and first.is_whole.tolist() == [False, True]
    assert first.image[0, 0].tolist() == [120, 0, 0] and second.image[0, 0].tolist() == [40, 0, 0]
    assert first.cosines[0].argmax() == 0 and [int(x.argmax()) for x in second.cosines] == [3, 1]
    assert second.cosines.shape == (2, 2, 2) and not second.is_whole.any()
    assert alignment.follow(given) == {} and alignment.report(given, None) == [tmp_path / "alignment.png"]
    assert min(Image.open(tmp_path / "alignment.png").size) > 200


def test_without_held_out_pairs_a_run_goes_without_and_a_user_is_told(tmp_path: Path) -> None:
    assert alignment.report(subject(tmp_path, None), None) == []
    with pytest.raises(ValueError, match="two captions has no held-out pairs: give --val-data or --val-fraction"):
        alignment.report(subject(tmp_path, None), object())


def test_filips_words_are_the_captions_tokens_in_their_order() -> None:
    texts = ["a photo of a dog", "a photo of a Café"]
    tokenizer = train_tokenizer(texts * 3, vocab_size=600, context_length=8)
    text = replace(small_config().text, vocab_size=600, context_length=8, eos_token_id=tokenizer.eos_token_id)
    shape = replace(small_config(), text=text)
    torch.manual_seed(0)
    model = FILIP(shape).eval()
    able = Filip().aligns(PairAssets(shape, tokenizer), model, torch.device("cpu"))
    for caption in (*texts, "a" * 30, ""):
        pieces, vectors = able.words(caption)
        assert len(pieces) == len(vectors) <= 6 and "".join(pieces) in caption.replace(" ", "")
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(pieces)))
    assert able.words(texts[1])[0][0] == "a" and "".join(able.words(texts[1])[0]).startswith("aphotoofaC")
    assert able.image(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).shape == (2, able.num_whole + 16, 12)
    assert TASKS["alignment"] == "aligns" and "alignment" in Filip.tasks
