"""Any reader serves any recipe: pairs as conversations, conversations and questions as pairs."""

import json
from pathlib import Path

import pytest

from mmcore.data import DataConfig, open_data
from mmcore.data.opening import ChatData, open_chats, open_held_out, source_kind
from tests.mmcore.data_fixtures import fake_tokenizer, image_bytes, spec, take, train_loader, write_pairs, write_shards
from tests.mmcore.test_data_questions import write_vqa


def said(data: ChatData) -> set[tuple[str, str]]:
    return {(c.turns[0].text, c.turns[1].text) for side in (data.train, data.val) if side for c in side.conversations}


def write_chats(folder: Path, suffix: str = ".json") -> str:
    """Six conversations about an image each, one about two and one about none."""
    records = []
    for i, images in enumerate([*([f"{i}.png"] for i in range(6)), ["0.png", "1.png"], []]):
        asked = "<image>\n" * len(images) + "what?"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"answer {i}"}]
        records.append({"id": str(i), "image": images, "conversations": turns})
        for name in images:
            (folder / name).write_bytes(image_bytes(int(name[0])))
    file = folder / f"chats{suffix}"
    file.write_text(json.dumps(records) if suffix == ".json" else "\n".join(map(json.dumps, records)))
    return str(file)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_conversations_about_one_image_are_pairs(suffix: str, tmp_path: Path) -> None:
    config = DataConfig(write_chats(tmp_path, suffix), val_fraction=0.25)
    assert source_kind(config.data) == "chats"
    data = open_data(config, seed=0)
    assert data.val is not None and data.broken["not of one image"] in (1, 2)
    captions = set(data.captions()) | {text for texts in data.val.captions for text in texts}
    assert captions == {f"answer {i}" for i in range(6)}
    batch = take(train_loader(data, spec(2), fake_tokenizer), 1)[0]
    assert batch.images.shape == (2, 3, 8, 8) and set(batch.captions) <= captions
    held_out = open_held_out(config).val
    assert held_out is not None and len(held_out) == 6 and held_out.raw_image(1).size == (20, 14)


def test_a_table_is_conversations_that_end_with_its_captions(tmp_path: Path) -> None:
    table = write_pairs(tmp_path, 8)
    data = open_chats(DataConfig(table, val_fraction=0.25), seed=0)
    captions = set(open_data(DataConfig(table, val_fraction=0.0), seed=0).captions())
    assert data.val is not None and (len(data.train), len(data.val)) == (6, 2)
    assert said(data) == {("<image>\nwhat is in this image?", caption) for caption in captions}
    assert data.train.raw_images(0)[0].size == (20, 14)


def test_questions_are_conversations_with_the_answer_of_most(tmp_path: Path) -> None:
    questions, annotations = write_vqa(tmp_path, 4)
    data = open_chats(DataConfig(questions, annotations=annotations, val_fraction=0.0), seed=0)
    wanted = open_data(DataConfig(questions, annotations=annotations, val_fraction=0.0), seed=0).questions
    assert wanted is not None and data.val is None and len(data.train) == len(wanted)
    for question, conversation in zip(wanted.questions, data.train.conversations, strict=True):
        counts = {a: question.answers.count(a) for a in question.answers}
        assert conversation.turns[0].text == f"<image>\n{question.text}"
        assert counts[conversation.turns[1].text] == max(counts.values())
    assert data.train.raw_images(0)[0].size == wanted.raw_image(0).size


def test_shards_are_conversations_in_an_order_of_their_own(tmp_path: Path) -> None:
    data = open_chats(DataConfig(write_shards(tmp_path, 2, 3)), seed=0)
    assert len(data.train) == 6 and data.val is None and len(said(data)) == 6


def test_conversations_without_an_image_are_no_pairs(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}]
    (tmp_path / "x.jsonl").write_text("\n".join([json.dumps({"id": "1", "conversations": turns})] * 4))
    with pytest.raises(ValueError, match="must hold conversations about one image each, got none"):
        open_data(DataConfig(str(tmp_path / "x.jsonl"), val_fraction=0.0), seed=0)
