"""Questions and answers in turn: what is streamed, what is remembered, what is refused."""

from contextlib import closing
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcore.data.sources.conversations import IMAGE, Conversation, ConversationSet, Turn
from mmcore.data.sources.questions import NO_IMAGE
from mmcore.data.text.templates import ChatTokens
from mmcore.labels import IMAGE_TOKEN
from mmcore.systems.llava.dialogue import Dialogue
from mmcore.systems.llava.inputs import generate_inputs, prompt_of, see
from mmcore.systems.llava.talk import Talks
from mmcore.tasks.talks import Sampling
from tests.refusals import refuses
from tests.systems.llava.fixtures import VISION, Painted, Saying, chat_tokens, ids_of, image, llava, tokenizer

CPU = torch.device("cpu")


@pytest.mark.parametrize("has_tiles", [False, True])
def test_greedy_answers_are_those_of_replies_and_of_generate(has_tiles: bool) -> None:
    model, tokens = llava(has_tiles=has_tiles), chat_tokens()
    dialogue = Dialogue(model, tokens, sampling=Sampling(max_new_tokens=12))
    said: list[Turn] = []
    for n, shown in enumerate([(1, 2), (), (3,)]):
        pieces = list(dialogue.ask(f"what is it, {n}?", [image(i) for i in shown]))
        assert len(pieces) > 1 and all(pieces)
        said += [Turn("user", f"{IMAGE}\n" * len(shown) + f"what is it, {n}?"), Turn("assistant", "".join(pieces))]
    assert dialogue.turns == said
    talk = Conversation("talk", ("1", "2", "3"), tuple(said))
    chats = ConversationSet("painted", Painted(), [talk], False)
    found = Talks(model, tokens, model.config, CPU).replies(chats, max_new_tokens=12)
    assert [reply.said for reply in found] == [turn.text for turn in said[1::2]]
    prompt = prompt_of(tokens, model.config, said[:-1], [see(image(i), model.config) for i in (1, 2, 3)])
    inputs = generate_inputs([prompt], tokens.pad_token_id, model.config, CPU)
    whole = model.generate(*inputs, **Sampling(max_new_tokens=12).options(tokens))
    assert tokens.text(whole[0]) == said[-1].text


def test_each_question_is_read_with_all_that_was_said_and_shown_before() -> None:
    model, tokens = llava(), chat_tokens()
    answers = ["a dog", "a cat, I think", "no"]
    saying = Saying(model, [[*ids_of(tokens, f" {text}"), tokens.tokenizer.eos_token_id] for text in answers])
    dialogue = Dialogue(model, tokens, system="Be brief.")
    for n, shown in enumerate([1, 0, 2]):
        assert "".join(dialogue.ask(f"what, {n}?", [image(n)] * shown)) == answers[n]
    for (before, seen, _), (after, _, _) in pairwise(saying.read):
        assert torch.equal(after[: len(before)], before) and len(after) > len(before)
        assert int((before == IMAGE_TOKEN).sum()) == len(seen) * VISION.num_patches
    last, seen, _ = saying.read[-1]
    assert len(seen) == 3 and int((last == IMAGE_TOKEN).sum()) == 3 * VISION.num_patches
    written = tokens.tokenizer.decode(last[last != IMAGE_TOKEN])
    assert written.startswith("<s>Be brief. USER: ") and "a dog</s>USER: what, 1? ASSISTANT:" in written
    dialogue.reset()
    assert dialogue.turns == [Turn("system", "Be brief.")] and not dialogue.images


def test_no_piece_has_part_of_a_character_and_all_together_are_the_answer() -> None:
    model, tokens = llava(), chat_tokens()
    text = "naïve 狗 🐕‍🦺 fin"
    saying = Saying(model, [[*ids_of(tokens, f" {text}\n\n"), *ids_of(tokens, "狗")[:2]]])
    pieces = list(Dialogue(model, tokens).ask("what?"))
    assert saying.num_said > len(pieces) > 4 and all("\ufffd" not in piece for piece in pieces[:-1])
    assert "".join(pieces[:-1]) == text and pieces[-1] == "\n\n\ufffd"


def test_an_answer_that_is_cut_is_remembered_as_said() -> None:
    model, tokens = llava(positions=256), chat_tokens()
    words = ids_of(tokens, " a dog, a cat and a bird")
    end = tokens.tokenizer.eos_token_id
    saying = Saying(model, [words * 100, [*words[:3], end], [*words[:4], end], words * 100])
    dialogue = Dialogue(model, tokens, sampling=Sampling(max_new_tokens=4))
    for was_cut, length in ((True, 4), (False, 3), (True, 4)):
        answer = "".join(dialogue.ask("what?"))
        assert answer == tokens.tokenizer.decode(words[:length]).strip()
        assert dialogue.turns[-1] == Turn("assistant", answer) and dialogue.was_cut == was_cut
    dialogue = Dialogue(model, tokens)
    list(dialogue.ask("what?"))
    assert dialogue.was_cut and saying.num_said == 256 - len(saying.read[-1][0]) + 12


def test_an_answer_that_is_stopped_ends_at_once_and_is_remembered_as_far_as_it_was_told() -> None:
    model, tokens = llava(), chat_tokens()
    forward, calls = model.language_model.forward, []
    model.language_model.forward = lambda *a, **k: (calls.append(1), forward(*a, **k))[1]
    dialogue = Dialogue(model, tokens, sampling=Sampling(max_new_tokens=400))
    with closing(dialogue.ask("what?", [image(1)])) as pieces:
        first = next(pieces)
    assert 0 < len(calls) < 100 and dialogue.turns[-1] == Turn("assistant", first) and len(dialogue.images) == 1
    assert not dialogue.was_cut
    calls.clear()
    dialogue.ask("and now?", [image(2)]).close()
    assert not calls and len(dialogue.turns) == 2 and len(dialogue.images) == 1


def test_what_fails_while_an_answer_is_made_is_raised_and_forgotten() -> None:
    model, tokens = llava(), chat_tokens()

    def fail(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("out of memory")

    model.generate = fail  # pyright: ignore[reportAttributeAccessIssue]
    dialogue = Dialogue(model, tokens)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(dialogue.ask("what?", [image(1)]))
    assert not dialogue.turns and not dialogue.images


def test_marks_that_a_model_spells_out_are_read_as_nothing_by_later_questions() -> None:
    model, tokens = llava(), chat_tokens()
    spelled = [i for x in (" a <im", "age> dog </", "s> <<image>image>!") for i in ids_of(tokens, x)]
    Saying(model, [[*spelled, tokens.tokenizer.eos_token_id], ids_of(tokens, " no")])
    dialogue = Dialogue(model, tokens)
    assert "".join(dialogue.ask("what?", [image(1)])) == "a <image> dog </s> <<image>image>!"
    assert dialogue.turns[-1].text == "a  dog  !" and "".join(dialogue.ask("and now?")) == "no"


def test_what_is_drawn_follows_the_seed_and_temperature_and_top_p_reach_the_model() -> None:
    model, tokens = llava(), chat_tokens()

    def said(seed: int = 0, **options: Any) -> str:
        torch.manual_seed(seed)
        return "".join(Dialogue(model, tokens, sampling=Sampling(max_new_tokens=8, **options)).ask("what?"))

    assert said(0, temperature=2.0) == said(0, temperature=2.0) != said(1, temperature=2.0)
    assert said(temperature=2.0, top_p=1e-6) == said()


def test_settings_out_of_range_are_errors() -> None:
    refuses("--temperature must be 0 or more, got -1", Sampling, temperature=-1)
    refuses("--temperature must be 0 or more, got nan", Sampling, temperature=float("nan"))
    refuses(r"--top-p must be in \(0, 1\], got 0", Sampling, temperature=1, top_p=0)
    refuses("--top-p has no effect without a --temperature above 0, got 0.9", Sampling, top_p=0.9)
    refuses("--max-new-tokens must be at least 1, got 0", Sampling, max_new_tokens=0)
    plain = ChatTokens(tokenizer(), "plain", 256)
    refuses("template that reads questions, got 'plain'", Dialogue, llava(), plain)


@pytest.mark.parametrize(("question", "message"), [
    (" \n", "a question must be text"), ("\ud83d?", "a question must be text"),
    ("what is in <image>?", "a question must not hold <image>"),
    ("what is </s>?", "a special token of the tokenizer in a text"), ("what? " * 200, "takes 573 of 512 tokens"),
])  # fmt: skip
def test_a_question_that_cannot_be_read_is_an_error_and_changes_nothing(question: str, message: str) -> None:
    model, tokens = llava(), chat_tokens()
    dialogue = Dialogue(model, tokens, sampling=Sampling(max_new_tokens=4))
    first = "".join(dialogue.ask("what?", [image(1)]))
    before = (list(dialogue.turns), list(dialogue.images))
    refuses(message, dialogue.ask, question, [image(2)])
    assert (dialogue.turns, dialogue.images) == before
    dialogue.reset()
    assert "".join(dialogue.ask("what?", [image(1)])) == first


def test_a_question_without_an_image_is_asked_without_one() -> None:
    model, tokens = llava(), chat_tokens()
    talks = Talks(model, tokens, model.config, CPU)
    say = talks.answerer(max_new_tokens=6)
    talk = Conversation("talk", (), (Turn("user", "what?"), Turn("assistant", "")))
    alone = talks.replies(ConversationSet("none", Painted(), [talk], False), max_new_tokens=6)[0].said
    assert say([image(1), NO_IMAGE], ["what?"] * 2)[1] == say([NO_IMAGE], ["what?"])[0] == alone
