"""Tables of names and settings: what rows can say, and what they refuse."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mmcore.weights.layout import Layout, leading, optional, scalar, transposed, under
from mmcore.weights.settings import Key, Settings, section, transformers_keys
from tests.refusals import refuses

LAYOUT = Layout({
    **under("blocks.{i}", "layers.{i}", {"qkv": "{q,k,v}_proj", "norm.weight": "norm", "{q,kv}.bias": "in_proj"}),
    "blocks.{i}.{q,kv}.weight": "layers.{i}.in_proj_weight", "token": leading("token", 2), "scale": scalar("scale"),
    "proj": transposed("proj"), "head": optional("head"),
}, tied={"head.weight": "token"}, unread=("ids",), older=(("module.", ""), ("old_", "layers.")))  # fmt: skip


def model() -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"token": (4,), "scale": (1,), "proj": (2, 3), "head.bias": (5,)}
    for i in (0, 11):
        shapes |= {f"blocks.{i}.qkv.weight": (6, 4), f"blocks.{i}.norm.weight": (4,)}
        shapes |= {f"blocks.{i}.{n}.weight": (r, 4) for n, r in (("q", 2), ("kv", 4))}
        shapes |= {f"blocks.{i}.{n}.bias": (r,) for n, r in (("q", 2), ("kv", 4))}
    state = {n: torch.randn(shape) for n, shape in shapes.items()}
    return {**state, "head.weight": state["token"]}


def test_a_layout_writes_what_it_reads_back() -> None:
    ours = model()
    theirs = LAYOUT.write(ours)
    layer = {"q_proj.weight": [2, 4], "k_proj.weight": [2, 4], "v_proj.weight": [2, 4], "norm": [4]}
    layer |= {"in_proj": [6], "in_proj_weight": [6, 4]}
    wanted = {f"layers.{i}.{name}": shape for i in (0, 11) for name, shape in layer.items()}
    wanted |= {"token": [1, 1, 4], "scale": [], "proj": [3, 2], "head.bias": [5]}
    assert {n: list(x.shape) for n, x in theirs.items()} == wanted
    assert torch.equal(theirs["layers.11.in_proj"], torch.cat([ours["blocks.11.q.bias"], ours["blocks.11.kv.bias"]]))
    assert all(x.is_contiguous() for x in theirs.values())
    renamed = {f"module.{n.replace('layers.', 'old_')}": x.double() for n, x in theirs.items()}
    for state in (theirs, renamed, {**theirs, "ids": torch.zeros(1), "ids.more": torch.zeros(1)}):
        found = LAYOUT.read("test", state, ours)
        assert found.keys() == ours.keys()
        assert all(torch.equal(x, ours[n]) and x.dtype == ours[n].dtype for n, x in found.items())
    found = LAYOUT.read("test", {n: x for n, x in theirs.items() if n != "head.bias"}, ours)
    assert found.keys() == ours.keys() - {"head.bias"}


@pytest.mark.parametrize(("change", "message"), [
    ({"proj": None}, "must hold every weight of the model, missing proj$"),
    ({f"layers.{i}.{x}_proj.weight": None for i in (0, 11) for x in "qk"}, "0.k_proj.weight, .* and 1 more$"),
    ({"idsx": torch.zeros(1)}, "must hold this model's weights only, got also idsx$"),
    ({"layers.5.norm": torch.zeros(4)}, "must hold this model's weights only, got also layers.5.norm$"),
    ({"proj": torch.zeros(2, 3)}, r"must hold proj of shape \[3, 2\], got \[2, 3\]$"),
    ({"token": torch.zeros(1, 5)}, r"must hold token of shape \[1, 1, 4\], got \[1, 5\]$"),
    ({"layers.0.in_proj": torch.zeros(7)}, r"must hold layers.0.in_proj of shape \[6\], got \[7\]$"),
    ({"layers.0.q_proj.weight": torch.zeros(3, 4)}, r"q_proj.weight of shape \[2, 4\], got \[3, 4\]$"),
])  # fmt: skip
def test_files_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    state = {n: x for n, x in {**LAYOUT.write(model()), **change}.items() if x is not None}
    refuses(f"^test: a transformers file .*{message}", LAYOUT.read, "test", state, model())


def test_a_weight_of_ours_without_a_row_is_an_error() -> None:
    for name in ("blocks.0.norm.bias", "blocks.x.qkv.weight", "tokens", "blocks.0"):
        with pytest.raises(KeyError, match=f"rows must have one for {name}"):
            LAYOUT.write({name: torch.zeros(1)})


@dataclass(frozen=True)
class Tower:
    width: int = 8
    depth: int = 1
    is_causal: bool = False


@dataclass(frozen=True)
class Config:
    embed_dim: int
    tower: Tower = field(default_factory=Tower)
    seed: int = 0


SETTINGS = Settings(
    {
        **section("tower", "tower_config", transformers_keys(width=16)),
        "tower.depth": Key(
            "mult", 2, lambda x, ours: x * ours["tower.width"], lambda x, ours: x // ours["tower.width"]
        ),
        "embed_dim": Key("projection_dim"),
    },
    kind=Config,
    kinds={"tower": Tower},
    model_types=("a", "b"),
    must={"tower_config.bias": True},
    written={"model_type": "a", "sum": lambda ours: ours["embed_dim"] + ours["tower.width"]},
)


def test_settings_write_what_they_read_back() -> None:
    config = Config(5, Tower(4, 12))
    raw = {"model_type": "a", "tower_config": {"hidden_size": 4}, "mult": 3, "projection_dim": 5, "sum": 9}
    assert SETTINGS.write("test", config) == raw and SETTINGS.read("test", raw) == config
    bare = {"model_type": "b", "projection_dim": 5, "tower_config": None, "else": 1}
    assert SETTINGS.read("test", bare) == Config(5, Tower(16, 32))


def test_settings_that_do_not_fit_are_refused() -> None:
    raw = SETTINGS.write("test", Config(5, Tower(4, 12)))
    for change, message in (
        ({"model_type": "c"}, "config.json must have model_type 'a' or 'b', got 'c'"),
        ({"tower_config": {"bias": False}}, "config.json must have tower_config.bias True, got False"),
        ({"projection_dim": ...}, "config.json must have projection_dim, got none"),
    ):
        refuses(f"^test: {message}$", SETTINGS.read, "test", raw | change)
    for config, message in (
        (Config(5, Tower(4, 13)), "tower.depth must be 12 to be written in config.json, got 13"),
        (Config(5, Tower(4, 12, True)), "tower.is_causal must be False to be .*, got True"),
        (Config(5, Tower(4, 12), seed=1), "seed must be 0 to be .*, got 1"),
    ):
        refuses(f"^test: {message}$", SETTINGS.write, "test", config)
