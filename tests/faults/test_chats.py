"""Conversations that are no dialogue about images: read as what they are, or left out by name."""

from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mmcore.data.broken import BrokenRecord
from mmcore.data.sources.conversations import BrokenField, Conversation, Turn, parse_conversation
from mmcore.data.transforms.images import pad_to_square
from tests.mmcore.test_templates import auto

SAID = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a dog"}]


@pytest.mark.parametrize("record", [
    {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\nwhat?"}, SAID[1]]},
    {"conversations": [{"from": "human", "value": "<video>\nwhat?"}, SAID[1]]},
    {"audio": ["a.wav"], "conversations": [{"from": "human", "value": "what?"}, SAID[1]]},
    {"image": "a.png", "video": "a.mp4", "conversations": SAID},
])  # fmt: skip
def test_videos_and_sounds_are_refused_by_name(record: dict[str, Any]) -> None:
    with pytest.raises(BrokenRecord, match=r"neither text nor .*video"):
        parse_conversation(0, record)


@pytest.mark.parametrize("name", ["Video", "video_path", "audio_file", "sound", "speech_url", "frames"])
def test_other_media_are_refused_by_whatever_name(name: str) -> None:
    with pytest.raises(BrokenField, match="neither text nor images: video or audio") as error:
        parse_conversation(0, {name: "a.bin", "conversations": [{"from": "human", "value": "what?"}, SAID[1]]})
    assert error.value.field == name
    assert parse_conversation(
        0, {name: 8, "image": "a.png", "conversations": SAID}
    ).images  # a number of them names none


@pytest.mark.parametrize(
    "mark",
    ["<VIDEO>", "<sound>", "<speech>", "<|video_pad|>", "<|AUDIO|>", "<|image_pad|>", "<image_1>", "<ImageHere>"],
)
def test_the_marks_of_other_models_do_not_train_as_text(mark: str) -> None:
    record = {"conversations": [{"from": "human", "value": f"what? {mark}"}, SAID[1]]}
    with pytest.raises(BrokenField, match="neither text nor <image>") as error:
        parse_conversation(0, record)
    assert error.value.field == mark


@pytest.mark.parametrize("name", ["image_path", "image_file", "img", "picture"])
def test_an_image_under_another_name_is_refused_by_it(name: str) -> None:
    said = [{"from": "human", "value": "what?"}, SAID[1]]
    with pytest.raises(BrokenRecord, match="image under another name than image"):
        parse_conversation(0, {name: "a.png", "conversations": said})
    assert parse_conversation(0, {name: "", "image_id": 7, "conversations": said}).images == ()
    assert parse_conversation(0, {name: "a.png", "image": "a.png", "conversations": SAID}).images == ("a.png",)


def test_images_may_be_named_in_the_plural_and_need_their_marks() -> None:
    assert parse_conversation(0, {"images": ["a.png"], "conversations": SAID}).images == ("a.png",)
    with pytest.raises(BrokenRecord, match="number of <image> is not that of the images"):
        parse_conversation(0, {"images": ["a.png"], "conversations": [{"from": "human", "value": "what?"}, SAID[1]]})
    with pytest.raises(BrokenRecord, match="images under two names"):
        parse_conversation(0, {"image": "a.png", "images": ["a.png"], "conversations": SAID})


@pytest.mark.parametrize("weight", [{"weight": 0}, {"loss": False}, {"train": False}, {"weight": 0.5}])
def test_an_answer_that_is_not_to_be_learned_is_refused(weight: dict[str, Any]) -> None:
    said = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a dog"}]
    with pytest.raises(BrokenRecord, match="answers with a weight of their own"):
        parse_conversation(0, {"conversations": [said[0], said[1] | weight, *said]})
    assert parse_conversation(0, {"conversations": [said[0], said[1] | {"weight": 1}]})


def test_a_system_prompt_beside_the_turns_is_one_of_them() -> None:
    for name in ("system", "system_prompt", "system_message"):
        record = {"image": "a.png", name: "be brief", "conversations": SAID}
        assert parse_conversation(0, record).turns[0] == Turn("system", "be brief")
    record["conversations"] = [{"from": "system", "value": "be kind"}, *SAID]
    with pytest.raises(BrokenRecord, match="two system turns"):
        parse_conversation(0, record)
    with pytest.raises(BrokenRecord, match="tools are not put into the prompt"):
        parse_conversation(0, {"tools": "[{}]", "conversations": SAID[1:]})


@pytest.mark.parametrize(("way", "reason"), [
    ("raise_exception('no system turns')", "no system turns"), ("m.content + 1", "can only concatenate"),
    ("1 // 0", "division"), ("m.content.parts.text", "no attribute"), ("messages[9].content", "no element 9"),
])  # fmt: skip
def test_a_conversation_that_the_template_refuses_is_a_broken_record(way: str, reason: str) -> None:
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ " + way + " }}{% endif %}"
    template += "<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    turns = (Turn("user", "what?"), Turn("assistant", "that"))
    assert len(auto(template).sample(Conversation("1", (), turns)).tokens) > 2
    with pytest.raises(BrokenRecord, match=f"refuses a conversation: .*{reason}"):
        auto(template).sample(Conversation("2", (), (Turn("system", "be brief"), *turns)))


@pytest.mark.parametrize("size", [(40, 37), (37, 40), (41, 37), (42, 37), (43, 37), (44, 37), (1, 4), (7, 7)])
def test_square_padding_is_transformers_to_the_pixel(size: tuple[int, int]) -> None:
    image = Image.effect_noise(size, 90).convert("RGB")
    theirs = LlavaImageProcessorPil().pad_to_square(np.asarray(image).transpose(2, 0, 1), (122, 116, 104))
    ours = np.asarray(pad_to_square(image, (122, 116, 104))).transpose(2, 0, 1)
    assert np.array_equal(ours, theirs)
