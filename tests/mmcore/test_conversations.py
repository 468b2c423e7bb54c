"""LLaVA's JSON: read and checked, mixed, with images in folders and tars."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmcore.data.sources.conversations import (
    IMAGE,
    MAX_SIDE,
    BrokenField,
    Conversation,
    ConversationSet,
    Turn,
    open_conversations,
    parse_conversation,
)
from mmcore.data.sources.mixes import parse_sampling
from tests.mmcore.data_fixtures import image_bytes, write_images, write_json, write_tar
from tests.refusals import refuses


def record(*turns: Any, **rest: Any) -> dict[str, Any]:
    return {"id": "x7", "conversations": list(turns), **rest}


def by(role: Any, value: Any = "x") -> dict[str, Any]:
    return {"from": role, "value": value}


def written(folder: Path, records: list[Any], name: str = "x.json", **options: Any) -> ConversationSet:
    return open_conversations(write_json(folder / name, records), **options)


ASKED, SAID, HUMAN = by("human", f"{IMAGE}\nWhat is it?"), by("gpt", "A cat."), by("human", "And now?")


def texts(n: int, first: int = 0) -> list[dict[str, Any]]:
    """Conversations without images, answered by their number."""
    return [{"id": i, "conversations": [by("human", "?"), by("gpt", str(i))]} for i in range(first, first + n)]


def numbers(found: ConversationSet) -> list[int]:
    return [int(c.turns[-1].text) for c in found.conversations]


def test_records_become_conversations_with_their_images(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg", "sub/b.png"])
    both = f"{IMAGE} or {IMAGE}?"
    found = written(tmp_path, [
        record(by("system", "Be brief."), ASKED, SAID, HUMAN, SAID, image="a.jpg"),
        record(by("human", both), SAID, image=["a.jpg", "sub/b.png"], id=3),
        {"conversations": [HUMAN, SAID], "image": None},
    ])  # fmt: skip
    more = (Turn("user", "And now?"), Turn("assistant", "A cat."))
    asked = (Turn("user", f"{IMAGE}\nWhat is it?"), more[1])
    assert found.conversations == [
        Conversation("x7", ("a.jpg",), (Turn("system", "Be brief."), *asked, *more)),
        Conversation("3", ("a.jpg", "sub/b.png"), (Turn("user", both), more[1])),
        Conversation("2", (), more),
    ]
    assert [[i.size for i in found.raw_images(n)] for n in range(3)] == [[(20, 14)], [(20, 14)] * 2, []]
    assert found.is_multimodal() == [True, True, False] and found.lengths() == [12, 5, 4]
    assert not found.derived and not found.broken
    assert found.take([2, 0]).conversations == [found.conversations[2], found.conversations[0]]


TOO_FEW, TWICE = record(ASKED, SAID, image=["a", "b"]), record(HUMAN, HUMAN, SAID)
BROKEN = [
    (record(), "conversations", "missing, empty or not a list"),
    ({"id": 1}, "conversations", "missing, empty or not a list"),
    ([], "record", "not a JSON object"),
    (record("hi", SAID), r"conversations\[0\]", "not a JSON object"),
    (record(HUMAN, by("bot")), r"conversations\[1\]\.from='bot'", "role is not human, gpt or system"),
    (record(by(["human"])), r"conversations\[0\]\.from=\['human'\]", "role is not human, gpt or system"),
    (TWICE, r"conversations\[1\]\.from='human'", "same role in a row"),
    (record(HUMAN, SAID, SAID), r"conversations\[2\]\.from='gpt'", "same role in a row"),
    (record(SAID, HUMAN, SAID), r"conversations\[0\]\.from='gpt'", "does not begin with the human"),
    (record(by("system"), SAID), r"conversations\[1\]\.from='gpt'", "does not begin with the human"),
    (record(HUMAN, by("system"), SAID), r"conversations\[1\]\.from='system'", "system turn is not the first"),
    (record(HUMAN, SAID, HUMAN), "conversations", "the last turn is not the assistant's answer"),
    (record(ASKED, SAID), "conversations with 1 <image> for 0 images", "is not that of the images"),
    (TOO_FEW, "conversations with 1 <image> for 2 images", "is not that of the images"),
    (record(HUMAN, by("gpt", f"see {IMAGE}")), r"conversations\[1\]\.value", "outside the human's turns"),
    (record(HUMAN, by("gpt", 7)), r"conversations\[1\]\.value", "value is not text"),
    (record(HUMAN, by("gpt", "\ud800")), r"conversations\[1\]\.value", "value is not text"),
    (record(HUMAN, by("gpt", " \n")), r"conversations\[1\]\.value", "value is empty"),
    (record(ASKED, SAID, image=7), "image=7", "neither a file's name nor a list of them"),
    (record(ASKED, SAID, image=[""]), r"image=\[''\]", "neither a file's name nor a list of them"),
]


@pytest.mark.parametrize(("wrong", "field", "reason"), BROKEN)
def test_what_is_wrong_with_a_record_is_said_with_its_field(wrong: Any, field: str, reason: str) -> None:
    with pytest.raises(BrokenField, match=reason) as raised:
        parse_conversation(0, wrong)
    assert re.fullmatch(field, raised.value.field)


def test_broken_records_are_counted_logged_with_their_ids_and_stop_the_run(tmp_path: Path, caplog):
    records = [*texts(98), TOO_FEW, TWICE]
    with caplog.at_level(logging.WARNING):
        found = written(tmp_path, records, max_broken=0.02)
    assert numbers(found) == list(range(98))
    assert found.broken == {"number of <image> is not that of the images": 1, "two turns of the same role in a row": 1}
    assert [r.getMessage() for r in caplog.records] == [
        "skipped x.json, record 98 (id 'x7'), conversations with 1 <image> for 2 images: "
        "number of <image> is not that of the images",
        "skipped x.json, record 99 (id 'x7'), conversations[1].from='human': two turns of the same role in a row",
    ]
    refuses(r"2 of 100 records of .* the first is x\.json, record 98 \(id 'x7'\), conv", written, tmp_path, records)


def test_jsonl_is_read_line_by_line_and_a_damaged_line_is_one_broken_record(tmp_path: Path) -> None:
    lines = [json.dumps(r) for r in texts(3)]
    (tmp_path / "x.jsonl").write_text("\n".join([lines[0], "", '{"id": 1, "conv', "null", *lines[1:]]) + "\n")
    found = open_conversations(str(tmp_path / "x.jsonl"), max_broken=0.5)
    assert numbers(found) == [0, 1, 2] and found.broken == {"not a JSON object": 2}


def entry(setting: str) -> str:
    return f"datasets: [{{json_path: x, {setting}}}]"


@pytest.mark.parametrize(("name", "content", "message"), [
    ("x.json", "[1,", "must be JSON in UTF-8, got: Expecting value"),
    ("x.json", "{}", "must hold a list of records, got dict"),
    ("x.json", "[]", "must hold at least one conversation, got none"),
    ("x.jsonl", "\n", "must hold at least one conversation, got none"),
    ("x.txt", "", r"must be in a \.json, \.jsonl or \.yaml file, got"),
    ("x.yaml", "a: [", "must be YAML in UTF-8, got: while parsing"),
    ("x.yaml", "[]", r"must hold a list 'datasets' with at least one entry, got \[\]"),
    ("x.yaml", "datasets: []", "must hold a list 'datasets' with at least one entry"),
    ("x.yaml", "datasets: [{}]", r"datasets\[0\] must have a json_path, got \{\}"),
    ("x.yaml", entry("sampling: all"), r"datasets\[0\] must hold json_path and .*, got 'sampling'"),
    ("x.yaml", entry("sampling_strategy: 'last:3'"), r"one of all, first, end, random, got 'last:3' in .*\[0\]"),
    ("x.yaml", entry("sampling_strategy: first"), "'first:500' or 'first:10%'.* got 'first'"),
    ("x.yaml", entry("sampling_strategy: 'end:0'"), "got 'end:0'"),
    ("x.yaml", entry("sampling_strategy: 'end:0%'"), "got 'end:0%'"),
    ("x.yaml", entry("sampling_strategy: 'end:2.5'"), "got 'end:2.5'"),
    ("x.yaml", entry("sampling_strategy: 'random:101%'"), "got 'random:101%'"),
    ("x.yaml", entry("sampling_strategy: 'all:3'"), "'all' takes no amount, got 'all:3'"),
    ("x.yaml", "datasets: [!!python/object/apply:os.getcwd []]", "must be YAML"),
])  # fmt: skip
def test_files_that_hold_no_conversations_and_mixes_that_are_wrong_are_errors(tmp_path: Path, name, content, message):
    (tmp_path / name).write_text(content)
    refuses(message, open_conversations, str(tmp_path / name))


def test_files_and_folders_that_do_not_exist_are_errors(tmp_path: Path) -> None:
    for name in ("x.json", "x.yaml"):
        refuses("data must be an existing file, got", open_conversations, str(tmp_path / name))
    missing = str(tmp_path / "none")
    refuses("image_root must be an existing folder, got", written, tmp_path, texts(1), image_root=missing)
    message = r"image_root must be the folder .* none of 1 tried exists, the first is .*a\.jpg"
    refuses(message, written, tmp_path, [record(ASKED, SAID, image="a.jpg")])


def test_images_come_from_a_folder_or_from_tars_in_it(tmp_path: Path) -> None:
    images, elsewhere = tmp_path / "images", tmp_path / "json"
    write_images(images, ["loose.png"])
    write_tar(images / "a.tar", [("coco/1.png", image_bytes(1, (6, 5))), ("coco/1.txt", b"no image")])
    write_tar(images / "b.tar", [("./gqa/2.jpg", image_bytes(2, (7, 5), "JPEG"))])
    names = ["coco/1.png", "gqa/2.jpg", "loose.png", "./coco/1.png"]
    found = written(elsewhere, [record(ASKED, SAID, image=name) for name in names], image_root=str(images))
    assert [found.raw_images(i)[0].size for i in range(4)] == [(6, 5), (7, 5), (20, 14), (6, 5)]
    write_tar(images / "c.tar", [("gqa/2.jpg", b"")])
    with pytest.raises(ValueError, match=r"one image of each name, got 'gqa/2\.jpg' in .*b\.tar and .*c\.tar"):
        written(elsewhere, [record(ASKED, SAID, image="gqa/2.jpg")], image_root=str(images))
    (images / "c.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"c\.tar must be an undamaged, uncompressed tar, got"):
        written(elsewhere, [record(ASKED, SAID, image="gqa/2.jpg")], image_root=str(images))


def test_images_that_cannot_be_used_are_broken_with_their_names(tmp_path: Path) -> None:
    write_images(tmp_path, ["good.png"])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes(image_bytes(0)[:60])
    for name, size in {"dot": (1, 1), "line": (9, 1), "wide": (MAX_SIDE + 1, 2), "high": (2, MAX_SIDE)}.items():
        Image.new("L", size).save(tmp_path / f"{name}.png")
    wrong = {
        "gone.png": ("", "missing file"),
        "text.png": ("", "not an image"),
        "cut.png": ("", "damaged image"),
        "dot.png": (" of 1 x 1 pixels", "image of one pixel"),
        "line.png": (" of 9 x 1 pixels", "image of one pixel"),
        "wide.png": (" of 20001 x 2 pixels", "image wider or higher than 20,000 pixels"),
    }
    asked = by("human", IMAGE * 2)
    found = written(tmp_path, [record(asked, SAID, image=["good.png", n]) for n in [*wrong, "high.png"]])
    for i, (name, (size, reason)) in enumerate(wrong.items()):
        with pytest.raises(BrokenField) as raised:
            found.raw_images(i)
        assert (raised.value.field, raised.value.reason) == (f"image '{name}'{size}", reason)
    assert found.raw_images(6)[1].size == (2, MAX_SIDE)


@pytest.mark.parametrize(("strategy", "want"), [
    ("all", list(range(15))), ("first:10%", [0, 1]), ("first:4", [0, 1, 2, 3]), ("end:3", [12, 13, 14]),
    ("end:33.4%", [9, 10, 11, 12, 13, 14]), ("end:500", list(range(15))), ("random:100%", list(range(15))),
])  # fmt: skip
def test_a_strategy_takes_what_it_says_in_the_files_order(strategy: str, want: list[int]) -> None:
    assert parse_sampling(strategy).indices(15, np.random.default_rng(0)) == want


def test_a_mix_takes_of_each_file_what_it_says(tmp_path: Path) -> None:
    write_json(tmp_path / "sub" / "a.json", texts(10))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in texts(10, 100)))
    mix = tmp_path / "mix.yaml"
    mix.write_text(
        'datasets:\n- json_path: sub/a.json\n  sampling_strategy: "end:20%"\n'
        f"- {{json_path: {tmp_path}/b.jsonl, sampling_strategy: random:30%}}\n- json_path: sub/a.json\n"
    )
    found = [open_conversations(str(mix), seed=seed) for seed in (0, 0, 1)]
    assert numbers(found[0])[:2] == [8, 9] and numbers(found[0])[5:] == list(range(10))
    assert all(100 <= n < 110 for n in numbers(found[0])[2:5])
    assert numbers(found[0]) == numbers(found[1]) != numbers(found[2])
