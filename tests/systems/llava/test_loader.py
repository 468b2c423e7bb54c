"""Conversations in batches: what of an image goes where, in which order, and on again after a stop."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmcore.data import LoaderSpec
from mmcore.data.broken import BrokenRecord
from mmcore.data.chats import ChatConfig, open_chats
from mmcore.data.sources.conversations import IMAGE, Conversation, ConversationSet, Turn
from mmcore.data.text.templates import ChatTokens
from mmcore.labels import IMAGE_TOKEN
from mmcore.parts.language import tiny_tokenizer
from mmcore.parts.vit import VisionConfig
from mmcore.systems.llava.loader import ChatTrainBatch, chat_loader, views
from mmcore.systems.llava.model import LlavaConfig
from tests.mmcore.data_fixtures import image_bytes

VISION = VisionConfig(image_size=16, patch_size=8, width=8, num_layers=1, num_heads=1, mlp_dim=8)
FLAT, TILED = LlavaConfig(VISION), LlavaConfig(VISION, grid_pinpoints=((16, 32), (32, 16), (32, 32)))


def tokens(max_length: int = 1024) -> ChatTokens:
    return ChatTokens(tiny_tokenizer(["USER: what is it? ASSISTANT: a dog"] * 4), "v1", max_length)


class Painted:
    """Images whose colour is in their name; 'broken' is none."""

    def named_image(self, name: str) -> Image.Image:
        if name == "broken":
            raise BrokenRecord("missing file")
        return Image.new("RGB", (16, 16), (int(name), 0, 0))


def chats(images: list[tuple[str, ...]]) -> ConversationSet:
    found = []
    for i, names in enumerate(images):
        question = IMAGE * len(names) + " what is it?" * (i % 3 + 1)
        found.append(Conversation(f"c{i}", names, (Turn("user", question), Turn("assistant", f"dog {i}"))))
    return ConversationSet("painted", Painted(), found, True, max_broken=0.5)


def spec(batch_size: int = 4, **more: Any) -> LoaderSpec:
    return replace(LoaderSpec(image_size=16, batch_size=batch_size, rank=0, world_size=1, seed=0), **more)


def take(
    source: ConversationSet, of: LoaderSpec, steps: int, *, is_packed: bool, config: LlavaConfig = FLAT
) -> list[ChatTrainBatch]:
    loader = chat_loader(source, of, tokens(), config, is_packed=is_packed)
    return [next(loader) for _ in range(steps)]


@pytest.mark.parametrize("is_packed", [False, True])
def test_images_stand_in_the_order_of_their_places(is_packed: bool) -> None:
    source = chats([(str(10 * i), str(10 * i + 5)) if i % 2 else (str(10 * i),) for i in range(1, 9)])
    batch = take(source, spec(8), 1, is_packed=is_packed)[0].parts[0]
    assert int((batch.tokens == IMAGE_TOKEN).sum()) == VISION.num_patches * len(batch.images) == 4 * 12
    red = [round(float(x)) for x in (batch.images[:, 0, 0, 0] * 0.26862954 + 0.48145466) * 255]
    wanted, known = [], tokens()
    for row in batch.tokens:
        text = known.tokenizer.decode(row[row != IMAGE_TOKEN])
        order = [int(part.split("<")[0]) for part in text.split("dog ")[1:]]
        wanted += [int(name) for i in order for name in source.conversations[i].images]
    assert red == wanted
    assert (batch.position_ids is not None) == is_packed and batch.image_sizes is None


def test_packed_rows_hold_what_padded_rows_hold() -> None:
    source = chats([("10",), (), ("30", "40"), (), ("50",), (), (), ("60",)])
    padded, packed = (take(source, spec(8), 1, is_packed=x)[0].parts[0] for x in (False, True))
    assert len(packed.tokens) < len(padded.tokens) == 8
    assert packed.position_ids is not None
    pieces = []
    for row, places, labels in zip(packed.tokens, packed.position_ids, packed.labels):
        starts = [*(places == 0).nonzero()[:, 0].tolist(), len(row)]
        pieces += [(row[a:b].tolist(), labels[a:b].tolist()) for a, b in pairwise(starts) if b > a + 1]
    pad = tokens().pad_token_id
    rows = []
    for row, labels in zip(padded.tokens.tolist(), padded.labels.tolist()):
        end = max(i for i, x in enumerate(labels) if x != -100) + 1
        assert all(x == pad for x in row[end:])
        rows.append((row[:end], labels[:end]))
    assert sorted(pieces) == sorted(rows)


def test_tiles_take_as_many_places_as_the_model_makes_features() -> None:
    source = chats([(str(10 * i),) for i in range(1, 5)])
    batch = take(source, spec(), 1, is_packed=False, config=TILED)[0].parts[0]
    assert batch.image_sizes is not None and batch.image_sizes.tolist() == [[16, 16]] * 4
    assert len(batch.images) == 4 * TILED.num_views((16, 16))
    assert int((batch.tokens == IMAGE_TOKEN).sum()) == 4 * TILED.num_image_tokens((16, 16))


def test_a_wide_image_is_made_square_by_the_colour_of_nothing() -> None:
    seen = views(Image.new("RGB", (40, 10), (255, 255, 255)), FLAT)
    assert seen.shape == (1, 3, 16, 16)
    assert seen[0, :, 0].abs().max() < 0.02 and seen[0, :, 8].min() > 1


def test_parts_of_a_batch_hold_its_conversations_in_order() -> None:
    source = chats([(str(10 * i),) if i % 2 else () for i in range(12)])
    whole = take(source, spec(12), 1, is_packed=False)[0].parts[0]
    loader = chat_loader(source, spec(12), tokens(), FLAT, is_packed=False, accum=3)
    parts = next(loader).parts
    assert [len(part.tokens) for part in parts] == [4, 4, 4]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    rows = [row[row != tokens().pad_token_id].tolist() for part in parts for row in part.tokens]
    assert rows == [row[row != tokens().pad_token_id].tolist() for row in whole.tokens]
    with pytest.raises(ValueError, match="chat_loader: accum must divide the batch of 12, got 5"):
        chat_loader(source, spec(12), tokens(), FLAT, is_packed=False, accum=5)


def test_a_loader_goes_on_where_it_stopped_and_ranks_share_a_step() -> None:
    source = chats([(str(i),) if i % 3 else () for i in range(40)])
    whole = take(source, spec(8), 10, is_packed=True)
    loader = chat_loader(source, spec(8), tokens(), FLAT, is_packed=True)
    for _ in range(6):
        next(loader)
    again = chat_loader(source, spec(8), tokens(), FLAT, is_packed=True)
    again.load_state_dict(loader.state_dict())
    for expected in whole[6:]:
        found = next(again)
        assert found.ids == expected.ids and found.epoch == expected.epoch
        for one, other in zip(found.parts, expected.parts, strict=True):
            assert torch.equal(one.tokens, other.tokens) and torch.equal(one.images, other.images)
    assert sorted(i for batch in whole[:5] for i in batch.ids) == sorted(c.id for c in source.conversations)
    ranks = [take(source, spec(4, rank=r, world_size=2), 1, is_packed=False)[0].ids for r in range(2)]
    assert not set(ranks[0]) & set(ranks[1])


def test_a_broken_image_is_replaced_and_counted() -> None:
    source = chats([("broken",) if i == 3 else (str(i),) for i in range(12)])
    loader = chat_loader(source, spec(4), tokens(), FLAT, is_packed=False)
    ids = [i for _ in range(3) for i in next(loader).ids]
    assert "c3" not in ids and len(ids) == 12 and loader.broken == {"missing file": 1}


def test_conversations_about_one_image_are_on_one_side(tmp_path: Path) -> None:
    names = [f"{i % 10}.png" for i in range(40)]
    for name in set(names):
        (tmp_path / name).write_bytes(image_bytes(int(name[0]), kind="PNG"))
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a dog"}]
    records = [{"id": str(i), "image": name, "conversations": turns} for i, name in enumerate(names)]
    (tmp_path / "x.json").write_text(json.dumps(records))
    data = open_chats(ChatConfig(data=str(tmp_path / "x.json"), val_fraction=0.2), seed=0)
    assert data.val is not None and (len(data.train), len(data.val)) == (32, 8)
    sides = [{name for c in side.conversations for name in c.images} for side in (data.train, data.val)]
    assert not sides[0] & sides[1]


def test_derived_ones_ask_for_captions_alone_where_these_are_learned() -> None:
    data = open_chats(ChatConfig(), seed=0, captions_only=True)
    assert data.val is not None and data.train.derived
    assert all(len(c.turns) == 2 for side in (data.train, data.val) for c in side.conversations)
    asked = open_chats(ChatConfig(), seed=0).train
    assert max(len(c.turns) for c in asked.conversations) == 6 and np.mean(asked.is_multimodal()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, "--val-fraction must be a share, got 1.0"),
        ({"max_broken": -0.1}, "--max-broken must be a share"),
        ({"workers": -1}, "--workers must be at least 0, got -1"),
        ({"image_root": "x"}, "--image-root has no effect on 'digits'"),
    ],
)
def test_a_wrong_setting_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatConfig(**options)
