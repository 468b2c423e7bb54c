"""Any image-text-to-text model of transformers: what a processor makes of a conversation, its loss, and its flags."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmcore.data.broken import BrokenRecord
from mmcore.data.sources.conversations import Conversation, Turn
from mmcore.labels import IGNORED
from mmcore.launch import parse
from mmcore.parts.adapters import Lora
from mmcore.systems.vlm.model import ReadingModel
from mmcore.systems.vlm.reading import ReadChat, Reader, collate, packed
from mmcore.systems.vlm.recipe import Vlm, VlmAssets, why_not_packed
from mmcore.systems.vlm.talk import Talks
from mmcore.systems.vlm.weights import load_reading_model, tiny
from tests.mmcore.integrations.reading_models import MODELS
from tests.refusals import refuses
from tests.systems.vlm.processors import PROCESSORS

ASKED = Conversation(
    "a", ("1.png", "2.png"),
    (
        Turn("user", "<image>\nwhich digit is written here?"), Turn("assistant", "seven"),
        Turn("user", "and <image> here?"), Turn("assistant", "odd"),
    ),
)  # fmt: skip
TEXT_ALONE = Conversation("b", (), (Turn("user", "is this digit even?"), Turn("assistant", "odd")))


def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in ((24, 40), (16, 16))]


@pytest.fixture(scope="module")
def made() -> Iterator[tuple[ReadingModel, Reader]]:
    texts = [turn.text for turn in (*ASKED.turns, *TEXT_ALONE.turns)]
    body, processor = tiny(texts, 0)
    yield ReadingModel(body).eval(), Reader(processor, 512)


@pytest.mark.parametrize("name", PROCESSORS)
def test_answers_and_their_ends_are_learned_of_what_the_processor_itself_makes(name: str) -> None:
    processor = PROCESSORS[name]()
    reader = Reader(processor, 1024)
    read = reader.read(ASKED, images())
    assert reader.tokenizer.decode(read.labels[read.labels != IGNORED]) == "seven<|im_end|>odd<|im_end|>"
    messages, shown = [], iter(images())
    for turn in ASKED.turns:
        parts = [part for part in re.split("(<image>)", turn.text) if part.strip()]
        content = [
            {"type": "image", "image": next(shown)} if x == "<image>" else {"type": "text", "text": x.strip("\n")}
            for x in parts
        ]
        messages.append({"role": turn.role, "content": content})
    theirs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert theirs.keys() == read.inputs.keys()
    for key, x in read.inputs.items():
        assert torch.equal(x, theirs[key]), key
    prompt = reader.prompt(ASKED.turns[:3], images())
    length = len(prompt.labels)
    assert torch.equal(read.inputs["input_ids"][0, :length], prompt.inputs["input_ids"][0])
    assert read.labels[length] != IGNORED and (read.labels[length - 1] == IGNORED)
    assert "{{odd<|im_end|>}}" in reader.shown(read)
    assert {reader.tokenizer.convert_tokens_to_ids("<|im_end|>"), reader.tokenizer.eos_token_id} == reader.stops


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_and_every_gradient_are_transformers_own(name: str) -> None:
    torch.manual_seed(0)
    body, inputs = MODELS[name]()
    body.train().double().set_attn_implementation("eager")
    inputs = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    labels = inputs["input_ids"].clone()
    labels[:, :12] = IGNORED
    theirs = body(**inputs, labels=labels)
    theirs.loss.backward()
    expected = {n: p.grad.clone() for n, p in body.named_parameters() if p.grad is not None}
    body.zero_grad()
    total, count = ReadingModel(body)("loss", inputs, labels)
    (total / count).backward()
    # transformers computes its softmax and its loss in float32
    torch.testing.assert_close(total / count, theirs.loss.double(), rtol=1e-6, atol=1e-6)
    largest = max(float(x.abs().max()) for x in expected.values())
    for key, p in body.named_parameters():
        if key in expected:
            torch.testing.assert_close(p.grad, expected[key], rtol=1e-4, atol=1e-6 * largest, msg=key)
        else:
            assert p.grad is None or not p.grad.any()


def test_conversations_in_a_row_have_the_losses_that_they_have_alone(made: tuple[ReadingModel, Reader]) -> None:
    model, reader = made
    chats = [reader.read(ASKED, images()), reader.read(TEXT_ALONE, []), reader.read(ASKED, images()[::-1])]
    alone = [model.loss(*collate([x], reader.pad_token_id)) for x in chats]
    for batch in (packed(chats, reader.pad_token_id, 512), collate(chats, reader.pad_token_id)):
        total, count = model.loss(*batch)
        torch.testing.assert_close(total, torch.stack([x for x, _ in alone]).sum(), rtol=1e-5, atol=0)
        assert count == sum(n for _, n in alone)
    assert why_not_packed(model, chats) is None
    told = model.body.model.forward
    model.body.model.forward = lambda position_ids=None, **inputs: told(**inputs)  # as a model that knows no documents
    assert "where other conversations stand before" in str(why_not_packed(model, chats))
    del model.body.model.forward
    assert why_not_packed(model, chats[:1]) == "there are too few conversations to try it with"


def test_what_is_too_long_is_cut_but_no_image_is(made: tuple[ReadingModel, Reader]) -> None:
    _, reader = made
    whole = reader.read(ASKED, images())
    cut = Reader(reader.processor, len(whole.labels) - 1).read(ASKED, images())
    assert torch.equal(cut.labels, whole.labels[:-1]) and cut.inputs["attention_mask"].shape == (1, len(cut.labels))
    first = len(reader.prompt(ASKED.turns[:1], images()).labels)
    for most, why in ((first + 4, "an image that does not fit into"), (first - 2, "an image that does not fit into")):
        with pytest.raises(BrokenRecord, match=why):
            Reader(reader.processor, most).read(ASKED, images())
    with pytest.raises(BrokenRecord, match="no answer within 5 tokens"):
        Reader(reader.processor, 5).read(TEXT_ALONE, [])
    marked = Conversation("c", (), (Turn("user", "a</s>"), Turn("assistant", "b")))
    with pytest.raises(BrokenRecord, match="a special token of the tokenizer in a text"):
        reader.read(marked, [])


def test_a_batch_of_texts_alone_runs_the_tower_and_learns_the_same(made: tuple[ReadingModel, Reader]) -> None:
    model, reader = made
    for unpacked in (None, "so"):
        batch = Vlm().collate(VlmAssets(None, reader, None, unpacked), [reader.read(TEXT_ALONE, [])])
        assert len(batch.inputs["pixel_values"]) == 1
        expected, count = model.loss(*collate([reader.read(TEXT_ALONE, [])], reader.pad_token_id))
        total, found = model.loss(*batch)
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
        assert found == count


def test_answers_in_a_batch_are_those_alone_and_a_dialogue_reads_its_own(made: tuple[ReadingModel, Reader]) -> None:
    model, reader = made
    talks = Talks(model, reader, torch.device("cpu"), max_answer=5)
    prompts = [reader.prompt(ASKED.turns[:1], images()), reader.prompt(TEXT_ALONE.turns[:1], [])]
    together = talks.said(prompts)
    for prompt, row in zip(prompts, together, strict=True):
        assert talks.said([prompt])[0] == row[: len(talks.said([prompt])[0])]
    dialogue = talks.dialogue()
    first = "".join(dialogue.ask("which digit?", images()[:1]))
    assert dialogue.turns[-1] == Turn("assistant", reader.without_marks(first)) and len(dialogue.images) == 1
    refuses("a question must be text", next, dialogue.ask(" "))


def test_groups_learn_or_not_by_their_names(made: tuple[ReadingModel, Reader]) -> None:
    body, _ = tiny(["a b"], 1)
    model = ReadingModel(body)
    model.freeze(Vlm(freeze=("vision",)).patterns)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns and not any("vision" in name for name in learns)
    rules = Vlm(part_lr=("model.connector=2e-6",)).rules
    assert rules[0].prefix == "body.model.connector" and rules[0].lr_scale == pytest.approx(0.2)
    adapted = ReadingModel(tiny(["a b"], 1)[0])
    before = {n: x.clone() for n, x in adapted.body.state_dict().items()}
    adapted.add_adapters(Lora(2, 4))
    learns = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert learns and all(".lora_" in name and "text_model" in name for name in learns)
    adapted.merge_adapters()
    assert all(torch.equal(x, before[n]) for n, x in adapted.body.state_dict().items())


def test_larger_images_are_made_smaller_where_the_processor_can(tmp_path: Path) -> None:
    from mmcore.systems.vlm.weights import load_processor  # noqa: PLC0415

    PROCESSORS["Qwen2.5-VL"]().save_pretrained(tmp_path)
    many, few = (Reader(load_processor(tmp_path, x), 1024).read(ASKED, images()) for x in (None, 300))
    assert len(few.labels) < len(many.labels)
    refuses("--max-pixels must be at least 64, got 10", load_processor, tmp_path, 10)


def test_what_a_user_gets_wrong_is_a_sentence(made: tuple[ReadingModel, Reader], tmp_path: Path) -> None:
    _, reader = made
    data = parse("vlm", ["--data", "digits", "--from", "tiny"], "vlm").open_data()
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "--from must be a folder of an image-text-to-text model or 'tiny', got nothing"),
        ({"start": "nowhere"}, "--from must hold a processor, got .*nowhere"),
        ({"start": "tiny", "max_pixels": 9}, "--max-pixels has no effect with --from tiny, got 9"),
        ({"start": "tiny", "freeze": ("(",)}, "--freeze must be regular expressions"),
        ({"start": "tiny", "freeze": ("towerr",)}, "--freeze must find names of weights, got 'towerr'"),
        ({"start": "tiny", "part_lr": ("model",)}, "--part-lr must be PREFIX=LR with a positive rate, got 'model'"),
        ({"start": "tiny", "max_length": 1}, "--max-length must be at least 2, got 1"),
    )
    for options, message in wrong:
        refuses(message, Vlm(**options).assets, data)
    for options, message in (
        ({"lora": 0}, "--lora must be at least 1"), ({"lora_alpha": 4}, "--lora-alpha has no effect without --lora"),
        ({"lora": 2, "freeze": ("a",)}, "--freeze has no effect with --lora"), ({"max_answer": 0}, "--max-answer must"),
    ):  # fmt: skip
        refuses(message, Vlm, **options)
    bare = reader.processor
    template, bare.chat_template = bare.chat_template, None
    refuses("--from must have a chat template, got none", Reader, bare, 9)
    bare.chat_template = template


def test_what_is_exported_is_what_transformers_loads(made: tuple[ReadingModel, Reader], tmp_path: Path) -> None:
    import transformers as hf  # noqa: PLC0415

    model, reader = made
    Vlm().export(VlmAssets(None, reader, None, None), model, tmp_path / "out", "hf")
    refuses(
        "OUT must be a new folder", Vlm().export, VlmAssets(None, reader, None, None), model, tmp_path / "out", "hf"
    )
    theirs: Any = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", attn_implementation="eager")
    processor = hf.AutoProcessor.from_pretrained(tmp_path / "out")
    read, again = reader.read(ASKED, images()), Reader(processor, 512).read(ASKED, images())
    assert all(torch.equal(x, again.inputs[k]) for k, x in read.inputs.items())
    with torch.no_grad():
        logits: Tensor = theirs(**read.inputs).logits
        torch.testing.assert_close(model.body(**read.inputs).logits, logits, rtol=1e-4, atol=1e-5)
    assert load_reading_model(tmp_path / "out").state_dict().keys() == model.state_dict().keys()


def test_a_conversation_is_padded_on_either_side(made: tuple[ReadingModel, Reader]) -> None:
    _, reader = made
    chats: list[ReadChat] = [reader.read(ASKED, images()), reader.read(TEXT_ALONE, [])]
    for to_left in (False, True):
        batch = collate(chats, reader.pad_token_id, to_left=to_left)
        seen = batch.inputs["attention_mask"].bool()
        for row, chat in enumerate(chats):
            assert torch.equal(batch.inputs["input_ids"][row][seen[row]], chat.inputs["input_ids"][0])
            assert torch.equal(batch.labels[row][seen[row]], chat.labels)
        assert bool(seen[:, -1].all()) == to_left
