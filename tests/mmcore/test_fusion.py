"""What fusion systems share: words hidden whole, answers as classes, layers that read an image."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmcore.data.text.masking import mask_tokens
from mmcore.data.text.wordpiece import WordPiece
from mmcore.parts.answers import AnswerHead, AnswerVocabulary, answer_loss
from mmcore.parts.bert import BertConfig, BertEncoder

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "##s", "cat", "dog"]


def hidden(tokens: list[int], rate: float, seed: int, *, whole: bool = True, least: bool = False) -> torch.Tensor:
    words, ids = WordPiece(VOCABULARY), torch.tensor(tokens)
    options = {"is_inner": words.is_inner(ids) if whole else None, "at_least_one": least}
    rng = np.random.default_rng(seed)
    found, labels = mask_tokens(
        ids, words.is_word(ids), rate, rng, mask_id=4, num_words=10, replace=(1.0, 0.0), **options
    )
    is_hidden = labels != -100
    assert torch.equal(found, ids.masked_fill(is_hidden, 4)) and torch.equal(labels[is_hidden], ids[is_hidden])
    return is_hidden


def test_pieces_of_a_word_are_hidden_together_and_special_tokens_never() -> None:
    tokens = [2, 5, 6, 7, 8, 5, 7, 3, 0, 0]  # [CLS] play ##ing ##s cat play ##s [SEP] [PAD] [PAD]
    rows = torch.stack([hidden(tokens, 0.3, seed) for seed in range(400)])
    assert not rows[:, [0, 7, 8, 9]].any()
    assert torch.equal(rows[:, 1], rows[:, 2]) and torch.equal(rows[:, 1], rows[:, 3])
    assert torch.equal(rows[:, 5], rows[:, 6])
    for place in (1, 4, 5):
        assert abs(float(rows[:, place].double().mean()) - 0.3) < 0.07
    apart = torch.stack([hidden(tokens, 0.3, seed, whole=False) for seed in range(100)])
    assert not torch.equal(apart[:, 1], apart[:, 2])


def test_where_none_is_drawn_one_word_is_hidden_if_there_is_any() -> None:
    tokens = [2, 5, 6, 8, 3, 0]
    rows = torch.stack([hidden(tokens, 0.0, seed, least=True) for seed in range(200)])
    counts = rows.sum(1)
    assert torch.equal(counts == 2, rows[:, 1]) and torch.equal(counts == 1, rows[:, 3]) and bool((counts > 0).all())
    assert 60 < int(rows[:, 3].sum()) < 140
    assert not hidden([2, 3, 0], 0.5, 0, least=True).any()


def test_answers_are_counted_in_their_normal_form_and_scored_by_people() -> None:
    people = [["a Dog", "dog", "dog.", "cat"], ["Cat"] * 3, ["cat", "bird"]]
    known = AnswerVocabulary.of_questions(people, least=2)
    assert known.answers == ("Cat", "a Dog")  # as most wrote them
    targets = known.targets([*people, ["fish"] * 10, [*["dog"] * 2, *["cat"] * 8]])
    expected = torch.tensor([[0.3, 0.9], [0.9, 0], [1, 0], [0, 0], [1, 0.6]])
    torch.testing.assert_close(targets, expected)
    with pytest.raises(ValueError, match="given 9 times or more, got none among 3"):
        AnswerVocabulary.of_questions(people)


def test_answers_come_from_a_file_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(["yes", "no"]))
    (tmp_path / "a.txt").write_text("yes\n\nno\n")
    for name in ("a.json", "a.txt"):
        assert AnswerVocabulary.of_file(tmp_path / name).answers == ("yes", "no")
    for text, said in (("{}", "must hold a list of strings, got dict"), ("[", "must hold JSON, got")):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            AnswerVocabulary.of_file(tmp_path / "b.json")
    with pytest.raises(ValueError, match="answers must hold each once, got 2 of 1"):
        AnswerVocabulary(["yes", "yes"])


def test_the_answers_loss_is_the_originals() -> None:
    torch.manual_seed(0)
    head, targets = AnswerHead(8, 5).double(), torch.rand(3, 5, dtype=torch.float64)
    targets[1] = 0  # a question without a known answer is still a row
    logits = head(torch.randn(3, 8, dtype=torch.float64))
    expected = F.binary_cross_entropy_with_logits(logits, targets) * 5
    torch.testing.assert_close(answer_loss(logits, targets), expected)


def test_layers_in_two_goes_are_layers_in_one_and_those_before_the_first_cross_see_no_image() -> None:
    torch.manual_seed(0)
    shape = BertConfig(30, 8, 16, 4, 2, 32, num_positions=8, image_width=12, first_cross=2)
    model, tokens, image = BertEncoder(shape), torch.randint(1, 30, (2, 5)), torch.randn(2, 3, 12)
    whole, text = model(tokens, None, image), model(tokens, layers=slice(0, 2))
    torch.testing.assert_close(model(text, None, image, layers=slice(2, None)), whole)
    torch.testing.assert_close(model(tokens, None, image, layers=slice(0, 2)), text)
    torch.testing.assert_close(model(tokens, None, model.image_keys_values(image)), whole)
    assert not torch.allclose(model(tokens), whole)
    with pytest.raises(ValueError, match=r"first_cross must be in \[0, 4\), got 4"):
        BertConfig(num_layers=4, first_cross=4)
