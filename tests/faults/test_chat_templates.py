"""`--template auto`: what is learned is what the model must say, whatever a tokenizer's chat template writes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import chat_template_utils

from mmcore.data.broken import BrokenRecord
from mmcore.data.sources.conversations import Conversation, Turn
from mmcore.data.text.templates import AUTO, ChatTokens
from mmcore.labels import IGNORED
from mmcore.parts.language import tiny_language_model
from mmcore.parts.language_folder import Language
from mmcore.parts.vit import VisionConfig
from mmcore.systems.llava.model import LlavaConfig
from mmcore.systems.llava.recipe import LlavaAssets, LlavaStage2
from tests.mmcore.chat_fixtures import byte_bpe, conversation, llama
from tests.mmcore.test_templates import learned
from tests.refusals import refuses

EACH = "{% for m in messages %}"
END = "{% endfor %}"
ROLE = "<|im_start|>{{ m.role }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LAST_THINKS = (
    "{% if m.role == 'assistant' and loop.last %}<think>\n{% if '</think>' in m.content %}"
    "{{ m.content.split('</think>')[0].split('<think>')[-1] | trim }}{% endif %}{{ '\n</think>\n\n' }}{% endif %}"
)
SAID = "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}"
DATED = "<|im_start|>system\nToday: {{ strftime_now('%d %b %Y') }}<|im_end|>\n"
CASES: dict[str, tuple[str, str, str]] = {  # the template; what is learned before and behind each answer
    "qwen3": (EACH + ROLE + LAST_THINKS + SAID + "<|im_end|>\n" + END + PROMPT, "", "<|im_end|>"),
    "qwen3 without a generation prompt": (EACH + ROLE + LAST_THINKS + SAID + "<|im_end|>\n" + END, "", "<|im_end|>"),
    "qwen2.5": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        f"{EACH}{ROLE}{{{{ m.content }}}}<|im_end|>\n{END}{PROMPT}", "", "<|im_end|>",
    ),
    "nemotron": (
        EACH + ROLE + "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n"
        + END + PROMPT,
        "", "<|im_end|>",
    ),
    "qwen3.5": (
        "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('No user query.') }}"
        "{% endif %}" + EACH + ROLE + LAST_THINKS + SAID + "<|im_end|>\n" + END
        + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}", "", "<|im_end|>",
    ),
    "deepseek-v3.1": (
        EACH + "{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|></think>" + SAID
        + "<|eot|>{% endif %}" + END + "{% if add_generation_prompt %}<|Assistant|><think>{% endif %}", "", "<|eot|>",
    ),
    "deepseek-r1": (
        EACH + "{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>" + SAID + "<|eot|>{% endif %}"
        + END + "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}", "", "<|eot|>",
    ),
    "gemma": (
        EACH + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        + "<end_of_turn>\n" + END + "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "", "<end_of_turn>",
    ),
    "mistral": (
        EACH + "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}" + END,
        " ", "<|endoftext|>",
    ),
    "llama-2": (
        EACH + "{{ '<s>[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + ' ' + eos_token }}"
        + END,
        " ", " <|endoftext|>",
    ),
    "phi-3": (
        EACH + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n" + END
        + "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}", "", "<|end|>",
    ),
    "harmony": (
        EACH + "<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}" + END
        + "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "", "<|end|>",
    ),
    "a date": (DATED + EACH + ROLE + "{{ m.content }}<|im_end|>\n" + END + PROMPT, "", "<|im_end|>"),
    "a space at the end of the prompt": (
        EACH + "{{ m.role | upper }}: {{ m.content }}{{ eos_token if m.role == 'assistant' else ' ' }}" + END
        + "{{ 'ASSISTANT: ' if add_generation_prompt }}", " ", "<|endoftext|>",
    ),
    "a new line that the prompt leaves out": (
        EACH + ROLE + "{{ m.content }}<|im_end|>\n" + END
        + "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}",
        "\n", "<|im_end|>",
    ),
    "generation marks": (
        EACH + ROLE + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}" + END + PROMPT, "", "<|im_end|>",
    ),
    "generation marks around a header and no end": (
        EACH + "{% if m.role == 'assistant' %}{% generation %}" + ROLE + "<think>\n{{ m.content }}{% endgeneration %}"
        "{% else %}" + ROLE + "{{ m.content }}{% endif %}<|im_end|>\n" + END + PROMPT, "<think>\n", "<|im_end|>",
    ),
    "generation marks around a header after which the prompt thinks": (
        EACH + "{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}{% generation %}<|Assistant|>" + SAID
        + "<|eot|>{% endgeneration %}{% endif %}" + END
        + "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}", "", "<|eot|>",
    ),
    "lists of texts and images": (
        EACH + ROLE + "{% for x in m.content | selectattr('type', 'equalto', 'text') %}{{ x.text }}{% endfor %}"
        + "<|im_end|>\n" + END + PROMPT, "", "<|im_end|>",
    ),
}  # fmt: skip


def auto(template: str, tokenizer: Any = None) -> ChatTokens:
    tokenizer = tokenizer or byte_bpe()
    special = set(re.findall(r"<\|\w+\|>|<\w+_of_turn>|</?s>", template)) | {"<|user|>", "<|assistant|>"}
    tokenizer.add_tokens(sorted(special - {"<s>"}), special_tokens=True)
    tokenizer.chat_template = template
    return ChatTokens(tokenizer, AUTO, 999)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_rounds", [1, 3])
def test_answers_and_their_ends_are_learned_of_any_template(name: str, num_rounds: int) -> None:
    template, lead, end = CASES[name]
    chat = auto(template)
    talk = conversation(num_rounds)
    found = chat.sample(talk)
    answers = [turn.text for turn in talk.turns if turn.role == "assistant"]
    wanted = [f"{lead}{answer}{end}" for answer in answers]
    if name == "harmony":
        wanted[-1] = wanted[-1].replace("<|end|>", "<|return|>")
    assert learned(chat, found) == wanted
    # what is given is what training gives before the last answer
    prompt = chat.prompt(talk.turns[:-1])
    assert torch.equal(prompt, found.tokens[: len(prompt)]) and found.labels[len(prompt)] != IGNORED
    assert (found.labels[len(prompt) :] != IGNORED).sum() == len(chat._ids(wanted[-1]))
    assert set(chat._ids(wanted[-1])[-1:]) <= chat.stops and not chat.stops & set(chat._ids(wanted[-1])[:-1])


@pytest.mark.parametrize("name", CASES)
def test_a_sample_is_the_text_that_the_template_writes(name: str) -> None:
    chat = auto(CASES[name][0])
    turns = conversation(2, num_images=0).turns
    is_list = name.startswith("lists")
    messages = [
        {"role": x.role, "content": [{"type": "text", "text": x.text}] if is_list else x.text} for x in turns
    ]  # fmt: skip
    whole = chat.tokenizer.apply_chat_template(messages, tokenize=False)
    whole = re.sub(r"Today: [^<]*<", "Today: 26 Jul 2024<", whole)
    assert chat.tokenizer.decode(chat.sample(Conversation("x", (), turns)).tokens) == whole


def test_an_empty_think_is_given_at_inference_as_in_training() -> None:
    chat = auto(CASES["qwen3"][0])
    text = chat.tokenizer.decode(chat.prompt([Turn("user", "What?")]))
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    # DeepSeek's prompt opens one that no answer in training has
    chat = auto(CASES["deepseek-r1"][0])
    assert chat.tokenizer.decode(chat.prompt([Turn("user", "What?")])).lower().endswith("what?<|assistant|>")


def test_thinking_that_a_template_leaves_out_is_not_learned_and_what_it_rewrites_is_broken() -> None:
    thought = "<think>\nIt purrs.\n</think>\n\nA cat."
    turns = (Turn("user", "What?"), Turn("assistant", thought), Turn("user", "Sure?"), Turn("assistant", "Yes."))
    chat = auto(CASES["deepseek-r1"][0])
    assert learned(chat, chat.sample(Conversation("x", (), turns))) == ["A cat.<|eot|>", "Yes.<|eot|>"]
    qwen = auto(CASES["qwen3"][0])
    assert learned(qwen, qwen.sample(Conversation("x", (), turns))) == ["A cat.<|im_end|>", "Yes.<|im_end|>"]
    with pytest.raises(BrokenRecord, match=r"rewrites what was said.*--template chatml would keep it"):
        qwen.sample(Conversation("x", (), turns[:2]))


def test_a_date_in_a_template_is_the_same_on_every_day(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, talk = auto(CASES["a date"][0]), conversation(1)
    before = chat.sample(talk).tokens

    class Later(chat_template_utils.datetime):  # pyright: ignore
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2031, 1, 2)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    assert torch.equal(chat.sample(talk).tokens, before)


def test_turns_that_a_template_marks_as_not_generated_are_not_learned() -> None:
    template = (
        EACH + ROLE + "{% if loop.last and m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}" + END + PROMPT
    )
    chat = auto(template)
    assert learned(chat, chat.sample(conversation(2))) == ["On the mat,\n\n 7 dogs.<|im_end|>"]


def test_templates_that_do_not_end_answers_say_what_to_take() -> None:
    spaced = EACH + "{{ m.role | upper }}: {{ m.content }} " + END
    for template in (spaced, EACH + ROLE + "{{ m.content }}" + END):
        refuses("must write an end of an answer, got none.*choose --template v1, llama_3 or chatml", auto, template)
    once = EACH + "{{ m.role | upper }}: {{ m.content }}\n{{ eos_token if loop.last }}" + END
    chat = auto(once.replace("\n{{ eos", "{{ eos"))
    assert learned(chat, chat.sample(conversation(1))) == [" A cat.<|endoftext|>"]
    with pytest.raises(BrokenRecord, match="ends the last of several answers alone"):
        chat.sample(conversation(2))


def test_a_sample_is_shown_with_its_learned_parts_and_their_borders() -> None:
    chat = auto(CASES["qwen3"][0])
    whole, *borders = chat.shown(chat.sample(conversation(2)))
    assert whole.startswith(
        "<|im_start|>user\\n<image>\\nWhat is it?<|im_end|>\\n<|im_start|>assistant\\n{{A cat.<|im_end|>}}"
    )
    assert "<think>\\n\\n</think>\\n\\n{{On the mat" in whole and whole.endswith("<|im_end|>}}\\n")
    assert len(borders) == 2 and re.fullmatch(
        r"\S+ Ċ \{\{ A Ġcat \.\.\. \. <\|im_end\|> \}\} Ċ <\|im_start\|>", borders[0]
    )
    long = Conversation("x", (), (Turn("user", "why " * 500), Turn("assistant", "so " * 500)))
    whole = ChatTokens(llama(), "v1", 9999).shown(ChatTokens(llama(), "v1", 9999).sample(long))[0]
    assert len(whole) < 400 and whole.endswith("so so</s>}}") and whole.count(" ... ") == 2


def test_an_exported_model_ends_where_a_chats_answers_do(tmp_path: Path) -> None:
    tokenizer = byte_bpe()
    tokenizer.pad_token = tokenizer.eos_token
    language = Language(tokenizer, None, tiny_language_model(tokenizer))
    shape = LlavaConfig(VisionConfig(image_size=16, patch_size=8, width=16, num_layers=1, num_heads=2))
    recipe = LlavaStage2(template="chatml")
    assets = LlavaAssets(shape, None, language, ChatTokens(tokenizer, "chatml", 99), None)
    recipe.export(assets, recipe.in_use(recipe.build(assets)), tmp_path / "out", "hf")
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    ends = sorted([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")])
    assert written["eos_token_id"] == ends
