"""Conversations in batches; views and tiles of images of any resolution, to the pixel and the feature transformers'."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaNextModel
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from mmcore.data import DataConfig, LoaderSpec, Reader
from mmcore.data.loader import MapLoader
from mmcore.data.opening import open_chats
from mmcore.data.sources.conversations import IMAGE, Conversation, ConversationSet, Turn
from mmcore.labels import IMAGE_TOKEN
from mmcore.systems.llava.anyres import best_resolution, grid_shape, num_packed, num_views, pack_features, split_image
from mmcore.systems.llava.inputs import collate_chats, seen_chat, views
from mmcore.systems.llava.model import LlavaConfig
from tests.mmcore.data_fixtures import write_images, write_json
from tests.refusals import refuses
from tests.systems.llava.fixtures import PINPOINTS, VISION, Painted, chat_tokens

FLAT, TILED, TOKENS = LlavaConfig(VISION), LlavaConfig(VISION, grid_pinpoints=PINPOINTS), chat_tokens(1024)


def chats(images: list[tuple[str, ...]]) -> ConversationSet:
    found = []
    for i, names in enumerate(images):
        question = IMAGE * len(names) + " what is it?" * (i % 3 + 1)
        found.append(Conversation(f"c{i}", names, (Turn("user", question), Turn("assistant", f"dog {i}"))))
    return ConversationSet("painted", Painted((16, 16)), found, True, max_broken=0.5)


def spec(batch_size: int = 4, **more: Any) -> LoaderSpec:
    return replace(LoaderSpec(batch_size, rank=0, world_size=1, seed=0), **more)


def chat_loader(source: ConversationSet, of: LoaderSpec, *, is_packed: bool, config: LlavaConfig = FLAT) -> MapLoader:
    collate = partial(collate_chats, tokens=TOKENS, config=config, is_packed=is_packed)
    reader = Reader(lambda record, _: seen_chat(record, TOKENS, config), collate)
    return MapLoader(source, of, reader, source.tally())


def first_part(source: ConversationSet, of: LoaderSpec, *, is_packed: bool, config: LlavaConfig = FLAT) -> Any:
    return next(chat_loader(source, of, is_packed=is_packed, config=config)).parts[0]


@pytest.mark.parametrize("is_packed", [False, True])
def test_images_stand_in_the_order_of_their_places(is_packed: bool) -> None:
    source = chats([(str(10 * i % 4), str(i % 4)) if i % 2 else (str(i % 4),) for i in range(1, 9)])
    batch = first_part(source, spec(8), is_packed=is_packed)
    assert int((batch.tokens == IMAGE_TOKEN).sum()) == VISION.num_patches * len(batch.images) == 4 * 12
    red = [round(x / 60) for x in batch.images[:, 0, 0, 0].tolist()]
    wanted = []
    for row in batch.tokens:
        text = TOKENS.tokenizer.decode(row[row != IMAGE_TOKEN])
        order = [int(part.split("<")[0]) for part in text.split("dog ")[1:]]
        wanted += [int(name) for i in order for name in source.conversations[i].images]
    assert red == wanted and (batch.position_ids is not None) == is_packed and batch.image_sizes is None


def test_packed_rows_hold_what_padded_rows_hold() -> None:
    source = chats([("1",), (), ("3", "0"), (), ("2",), (), (), ("1",)])
    padded, packed = (first_part(source, spec(8), is_packed=x) for x in (False, True))
    assert len(packed.tokens) < len(padded.tokens) == 8 and packed.position_ids is not None
    pieces, rows = [], []
    for row, places, labels in zip(packed.tokens, packed.position_ids, packed.labels):
        starts = [*(places == 0).nonzero()[:, 0].tolist(), len(row)]
        pieces += [(row[a:b].tolist(), labels[a:b].tolist()) for a, b in pairwise(starts) if b > a + 1]
    for row, labels in zip(padded.tokens.tolist(), padded.labels.tolist()):
        end = max(i for i, x in enumerate(labels) if x != -100) + 1
        assert all(x == TOKENS.pad_token_id for x in row[end:])
        rows.append((row[:end], labels[:end]))
    assert sorted(pieces) == sorted(rows)


def test_tiles_take_as_many_places_as_the_model_makes_features() -> None:
    batch = first_part(chats([(str(i),) for i in range(4)]), spec(), is_packed=False, config=TILED)
    assert batch.image_sizes is not None and batch.image_sizes.tolist() == [[16, 16]] * 4
    assert len(batch.images) == 4 * TILED.num_views((16, 16))
    assert int((batch.tokens == IMAGE_TOKEN).sum()) == 4 * TILED.num_image_tokens((16, 16))


def test_a_wide_image_is_made_square_by_the_colour_of_nothing() -> None:
    seen = views(Image.new("RGB", (40, 10), (255, 255, 255)), FLAT)
    assert seen.shape == (1, 3, 16, 16) and seen[0, :, 0, 0].tolist() == [122, 116, 104] and seen[0, :, 8].min() == 255


def test_parts_of_a_batch_hold_its_conversations_in_order() -> None:
    source = chats([(str(i % 4),) if i % 2 else () for i in range(12)])
    whole = first_part(source, spec(12), is_packed=False)
    parts = next(chat_loader(source, spec(12, accum=3), is_packed=False)).parts
    assert [len(part.tokens) for part in parts] == [4, 4, 4]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    of_parts, of_whole = (
        [row[row != TOKENS.pad_token_id].tolist() for part in batch for row in part.tokens]
        for batch in (parts, [whole])
    )
    assert of_parts == of_whole
    refuses("data: accum must divide the batch of 12, got 5", spec, 12, accum=5)


def test_a_broken_image_is_replaced_and_counted() -> None:
    loader = chat_loader(chats([("broken",) if i == 3 else (str(i),) for i in range(12)]), spec(4), is_packed=False)
    ids = [i for _ in range(3) for i in next(loader).ids]
    assert "c3" not in ids and len(ids) == 12 and loader.broken == {"missing file": 1}


def test_conversations_about_one_image_are_on_one_side(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{i}.png" for i in range(10)])
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a dog"}]
    records = [{"id": str(i), "image": f"{i % 10}.png", "conversations": turns} for i in range(40)]
    data = open_chats(DataConfig(data=write_json(tmp_path / "x.json", records), val_fraction=0.2), seed=0)
    assert data.val is not None and (len(data.train), len(data.val)) == (32, 8)
    sides = [{name for c in side.conversations for name in c.images} for side in (data.train, data.val)]
    assert not sides[0] & sides[1]


def test_derived_ones_ask_for_captions_alone_where_these_are_learned() -> None:
    data = open_chats(DataConfig(), seed=0, captions_only=True)
    assert data.val is not None and data.train.derived
    assert all(len(c.turns) == 2 for side in (data.train, data.val) for c in side.conversations)
    asked = open_chats(DataConfig(), seed=0).train
    assert max(len(c.turns) for c in asked.conversations) == 6 and np.mean(asked.is_multimodal()) == 1


LARGE = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
SMALL = ((16, 32), (32, 16), (32, 32), (48, 16), (16, 48))
SIDES = st.one_of(st.integers(1, 64), st.integers(1, 20_000))


def listed(pinpoints: Any) -> list[list[int]]:
    return [list(p) for p in pinpoints]


@given(SIDES, SIDES)
@example(1, 1)
@example(1, 20_000)
@example(20_000, 1)
@settings(max_examples=300, deadline=None)
def test_the_best_resolution_is_that_of_transformers(height: int, width: int) -> None:
    size = (height, width)
    assert best_resolution(size, LARGE) == tuple(select_best_resolution(size, listed(LARGE)))
    assert num_views(size, LARGE, 336) == image_size_to_num_patches(size, listed(LARGE), 336)


def test_an_image_or_a_grid_of_nothing_and_wrong_settings_are_refused() -> None:
    for size in ((0, 5), (5, 0), (-1, 5)):
        refuses("best_resolution: size must be 1 pixel or more each way, got", best_resolution, size, LARGE)
    refuses("best_resolution: pinpoints must be one or more, got none", best_resolution, (5, 5), ())


@pytest.mark.parametrize("size", [(40, 20), (10, 30), (17, 17), (1, 1), (3, 100), (100, 3), (200, 199), (64, 64)])
def test_views_are_those_of_transformers_to_the_pixel(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=listed(SMALL),
        do_rescale=False, do_normalize=False,
    )  # fmt: skip
    expected = processor(images=image, return_tensors="pt")
    views = split_image(image, SMALL, 16)
    found = torch.stack([torch.from_numpy(np.array(view)).permute(2, 0, 1) for view in views])
    assert len(views) == num_views(size, SMALL, 16) and expected["image_sizes"].tolist() == [list(size)]
    assert torch.equal(found, expected["pixel_values"][0].to(torch.uint8))


def theirs_packed(features: torch.Tensor, size: tuple[int, int], newline: torch.Tensor) -> torch.Tensor:
    tower = SimpleNamespace(image_size=16, patch_size=4)
    model: Any = SimpleNamespace(config=SimpleNamespace(vision_config=tower, image_grid_pinpoints=listed(SMALL)))
    packed, _ = LlavaNextModel.pack_image_features(
        model, [features], torch.tensor([size]), "default", image_newline=newline
    )
    return packed[0]


@given(SIDES, SIDES)
@example(1, 1)
@example(1, 20_000)
@example(20_000, 1)
@settings(max_examples=200, deadline=None)
def test_features_are_packed_as_by_transformers_and_counted_before(height: int, width: int) -> None:
    size = (height, width)
    features = torch.arange(num_views(size, SMALL, 16) * 32.0).view(-1, 16, 2)
    newline = torch.tensor([-1.0, -2.0])
    found = pack_features(features, size, grid_shape(size, SMALL, 16), newline)
    assert len(found) == num_packed(size, SMALL, 16, 4) and torch.equal(found, theirs_packed(features, size, newline))
