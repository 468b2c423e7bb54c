"""Prompts and answers in a language model's tokens."""

from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mmcore.data.text.prompts import PromptTokens, prompt_texts
from mmcore.parts.language import tiny_tokenizer
from tests.refusals import refuses

TEXTS = ["a photo of a cat\n", "Question: what is it? Answer: a dog\n", "two dogs\n"] * 5


def tokens(max_answer: int = 32) -> PromptTokens:
    return PromptTokens(tiny_tokenizer(TEXTS), is_encoder_decoder=False, max_answer=max_answer)


def words(*, end: bool = False) -> Any:
    """A tokenizer of whole words, which ends each text where `end` says so."""
    vocab = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "a", "cat", "what", "\n"])}
    learner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    if end:
        learner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=learner, pad_token="<pad>", eos_token="</s>")


def test_prompts_are_as_published_and_take_the_question() -> None:
    assert prompt_texts("caption", None, ["", ""]) == ["", ""]
    assert prompt_texts("caption", "a photo of", [""]) == ["a photo of"]
    assert prompt_texts("vqa", None, [" What is {it}? "]) == ["Question: What is {it}? Answer:"]
    refuses(r"--prompt must hold one \{\} for the question, got 'Q:'", prompt_texts, "vqa", "Q:", ["x"])
    refuses(r"--prompt must hold no \{\}, there is no question, got", prompt_texts, "caption", "a {}", ["x"])


def test_an_answer_follows_its_prompt_and_ends_with_a_new_line() -> None:
    known, prompts = tokens(), ["a photo of", ""]
    found, asked = known.pairs(prompts, ["a cat", " two dogs "]), known.prompts(prompts)
    for row, (prompt, text) in enumerate([("a photo of", "a photo of a cat\n"), ("", "two dogs\n")]):
        n, before = int(found.num_text[row]), int(found.num_prompt[row])
        assert known.tokenizer.decode(found.tokens[row, :n], skip_special_tokens=True) == text
        assert known.tokenizer.decode(found.tokens[row, :before], skip_special_tokens=True) == prompt
        assert found.tokens[row, n - 1] == known.end_token_id
        assert (found.tokens[row, n:] == known.tokenizer.pad_token_id).all()
        # what a model goes on from is what it learned to go on from
        assert asked.num_text[row] == before
        assert torch.equal(asked.tokens[row, asked.tokens.shape[1] - before :], found.tokens[row, :before])
    assert found.targets is None and known.prompts([""]).tokens.tolist() == [[known.tokenizer.bos_token_id]]


def test_what_is_too_long_is_cut_and_has_no_end() -> None:
    found = tokens(max_answer=2).pairs(["a photo of"], ["a cat a cat a cat"])
    assert int(found.num_text[0] - found.num_prompt[0]) == 2 and tokens().end_token_id not in found.tokens[0]


def test_text_stops_at_the_end() -> None:
    known = tokens()
    ids = known.tokenizer(["a cat\na dog", "two dogs"], add_special_tokens=False).input_ids
    width = max(map(len, ids))
    padded = torch.tensor([row + [known.tokenizer.pad_token_id] * (width - len(row)) for row in ids])
    assert known.text(padded) == ["a cat", "two dogs"]
    padded[1, 1] = known.tokenizer.eos_token_id
    assert known.text(padded)[1] == known.tokenizer.decode(padded[1, :1])


def test_an_encoder_decoder_reads_prompts_and_learns_answers_apart() -> None:
    known = PromptTokens(words(end=True), is_encoder_decoder=True, max_answer=3)
    found = known.pairs(["what", ""], ["a cat", "a cat a cat"])
    assert found.tokens.tolist() == [[5, 1], [1, 0]] and found.num_text.tolist() == [2, 1]
    assert found.targets is not None and found.targets.tolist() == [[3, 4, 1], [3, 4, 1]]
    short = known.pairs(["", ""], ["a", "a cat"]).targets
    assert short is not None and short.tolist() == [[3, 1, -100], [3, 4, 1]]
    assert known.text(torch.tensor([[3, 4, 1, 0]])) == ["a cat"]


class Bare:
    """A tokenizer of few texts."""

    pad_token_id, eos_token_id = 0, 1

    def __init__(self, **ids: list[int]) -> None:
        self.ids = ids

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=self.ids[text])


def test_a_tokenizer_that_does_not_serve_and_a_length_without_room_are_errors() -> None:
    merging = PromptTokens(Bare(**{"\n": [9], "what": [5], "what a": [7]}), is_encoder_decoder=False, max_answer=4)
    refuses("must begin with the prompt's, got others for 'what' and 'a'", merging.pairs, ["what"], ["a"])
    options = {"is_encoder_decoder": False, "max_answer": 4}
    refuses("tokenizer must have a token for a new line", PromptTokens, Bare(**{"\n": []}), **options)
    refuses("max_answer must be at least 2, got 1", tokens, max_answer=1)
