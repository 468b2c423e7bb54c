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

ASKED = {"from": "human", "value": f"{IMAGE}\nWhat is it?"}
SAID = {"from": "gpt", "value": "A cat."}


def record(*turns: Any, **rest: Any) -> dict[str, Any]:
    return {"id": "x7", "conversations": list(turns), **rest}


def written(folder: Path, records: list[Any], name: str = "x.json", **options: Any) -> ConversationSet:
    return open_conversations(write_json(folder / name, records), **options)


def texts(n: int, first: int = 0) -> list[dict[str, Any]]:
    """Conversations without images, answered by their number."""
    return [
        {"id": i, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": str(i)}]}
        for i in range(first, first + n)
    ]


def numbers(found: ConversationSet) -> list[int]:
    return [int(c.turns[-1].text) for c in found.conversations]


def test_records_become_conversations_with_their_images(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg", "sub/b.png"])
    system = {"from": "system", "value": "Be brief."}
    more = [{"from": "human", "value": "And now?"}, SAID]
    both = {"from": "human", "value": f"{IMAGE} or {IMAGE}?"}
    found = written(tmp_path, [
        record(system, ASKED, SAID, *more, image="a.jpg"),
        record(both, SAID, image=["a.jpg", "sub/b.png"], id=3),
        {"conversations": more, "image": None},
    ])  # fmt: skip
    assert found.conversations == [
        Conversation(
            "x7",
            ("a.jpg",),
            (
                Turn("system", "Be brief."),
                Turn("user", f"{IMAGE}\nWhat is it?"),
                Turn("assistant", "A cat."),
                Turn("user", "And now?"),
                Turn("assistant", "A cat."),
            ),
        ),
        Conversation("3", ("a.jpg", "sub/b.png"), (Turn("user", both["value"]), Turn("assistant", "A cat."))),
        Conversation("2", (), (Turn("user", "And now?"), Turn("assistant", "A cat."))),
    ]
    assert [[i.size for i in found.raw_images(n)] for n in range(3)] == [[(20, 14)], [(20, 14)] * 2, []]
    assert found.is_multimodal() == [True, True, False] and found.lengths() == [12, 5, 4]
    assert not found.derived and not found.broken
    assert found.take([2, 0]).conversations == [found.conversations[2], found.conversations[0]]


HUMAN = {"from": "human", "value": "And?"}
BROKEN = {
    "empty": (record(), "conversations", "missing, empty or not a list"),
    "missing": ({"id": 1}, "conversations", "missing, empty or not a list"),
    "list": ([], "record", "not a JSON object"),
    "turn": (record("hi", SAID), r"conversations\[0\]", "not a JSON object"),
    "role": (
        record(HUMAN, {"from": "bot", "value": "x"}),
        r"conversations\[1\]\.from='bot'",
        "role is not human, gpt or system",
    ),
    "unhashable role": (
        record({"from": ["human"], "value": "x"}),
        r"conversations\[0\]\.from=\['human'\]",
        "role is not human, gpt or system",
    ),
    "twice": (record(HUMAN, HUMAN, SAID), r"conversations\[1\]\.from='human'", "same role in a row"),
    "answered twice": (record(HUMAN, SAID, SAID), r"conversations\[2\]\.from='gpt'", "same role in a row"),
    "first": (record(SAID, HUMAN, SAID), r"conversations\[0\]\.from='gpt'", "does not begin with the human"),
    "system then gpt": (
        record({"from": "system", "value": "x"}, SAID),
        r"conversations\[1\]\.from='gpt'",
        "does not begin with the human",
    ),
    "late system": (
        record(HUMAN, {"from": "system", "value": "x"}, SAID),
        r"conversations\[1\]\.from='system'",
        "system turn is not the first",
    ),
    "last": (record(HUMAN, SAID, HUMAN), "conversations", "the last turn is not the assistant's answer"),
    "too many": (record(ASKED, SAID), "conversations with 1 <image> for 0 images", "is not that of the images"),
    "too few": (
        record(ASKED, SAID, image=["a", "b"]),
        "conversations with 1 <image> for 2 images",
        "is not that of the images",
    ),
    "said": (
        record(HUMAN, {"from": "gpt", "value": f"see {IMAGE}"}),
        r"conversations\[1\]\.value",
        "outside the human's turns",
    ),
    "number": (record(HUMAN, {"from": "gpt", "value": 7}), r"conversations\[1\]\.value", "value is not text"),
    "surrogate": (record(HUMAN, {"from": "gpt", "value": "\ud800"}), r"conversations\[1\]\.value", "value is not text"),
    "blank": (record(HUMAN, {"from": "gpt", "value": " \n"}), r"conversations\[1\]\.value", "value is empty"),
    "image": (record(ASKED, SAID, image=7), "image=7", "neither a file's name nor a list of them"),
    "no name": (record(ASKED, SAID, image=[""]), r"image=\[''\]", "neither a file's name nor a list of them"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_with_a_record_is_said_with_its_field(case: str) -> None:
    wrong, field, reason = BROKEN[case]
    with pytest.raises(BrokenField, match=reason) as raised:
        parse_conversation(0, wrong)
    assert re.fullmatch(field, raised.value.field)


def test_broken_records_are_counted_logged_with_their_ids_and_stop_the_run(tmp_path: Path, caplog):
    records = [*texts(98), BROKEN["too few"][0], BROKEN["twice"][0]]
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
    with pytest.raises(ValueError, match="image_root must be an existing folder, got"):
        written(tmp_path, texts(1), image_root=str(tmp_path / "none"))
    refuses(
        r"image_root must be the folder .* none of 1 tried exists, the first is .*a\.jpg",
        written,
        tmp_path,
        [record(ASKED, SAID, image="a.jpg")],
    )


def test_images_come_from_a_folder_or_from_tars_in_it(tmp_path: Path) -> None:
    images, elsewhere = tmp_path / "images", tmp_path / "json"
    images.mkdir()
    elsewhere.mkdir()
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
    (tmp_path / "dot.png").write_bytes(image_bytes(0, (1, 1)))
    (tmp_path / "line.png").write_bytes(image_bytes(0, (9, 1)))
    Image.new("L", (MAX_SIDE + 1, 2)).save(tmp_path / "wide.png")
    Image.new("L", (2, MAX_SIDE)).save(tmp_path / "high.png")
    wrong = {
        "gone.png": ("image 'gone.png'", "missing file"),
        "text.png": ("image 'text.png'", "not an image"),
        "cut.png": ("image 'cut.png'", "damaged image"),
        "dot.png": ("image 'dot.png' of 1 x 1 pixels", "image of one pixel"),
        "line.png": ("image 'line.png' of 9 x 1 pixels", "image of one pixel"),
        "wide.png": ("image 'wide.png' of 20001 x 2 pixels", "image wider or higher than 20,000 pixels"),
    }
    asked = {"from": "human", "value": IMAGE * 2}
    found = written(tmp_path, [record(asked, SAID, image=["good.png", n]) for n in [*wrong, "high.png"]])
    for i, (field, reason) in enumerate(wrong.values()):
        with pytest.raises(BrokenField) as raised:
            found.raw_images(i)
        assert (raised.value.field, raised.value.reason) == (field, reason)
    assert found.raw_images(6)[1].size == (2, MAX_SIDE)


@pytest.mark.parametrize(("strategy", "want"), [
    ("all", list(range(15))), ("first:10%", [0, 1]), ("first:4", [0, 1, 2, 3]), ("end:3", [12, 13, 14]),
    ("end:33.4%", [9, 10, 11, 12, 13, 14]), ("end:500", list(range(15))), ("random:100%", list(range(15))),
])  # fmt: skip
def test_a_strategy_takes_what_it_says_in_the_files_order(strategy: str, want: list[int]) -> None:
    assert parse_sampling(strategy).indices(15, np.random.default_rng(0)) == want


def test_random_records_are_drawn_by_the_seed_each_once() -> None:
    draw = [parse_sampling("random:20%").indices(50, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2] and all(len(set(d)) == 10 and d == sorted(d) for d in draw)
    drawn = {i for seed in range(60) for i in parse_sampling("random:5").indices(50, np.random.default_rng(seed))}
    assert drawn == set(range(50))


def test_a_mix_takes_of_each_file_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
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
