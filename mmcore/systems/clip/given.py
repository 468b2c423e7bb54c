"""Towers that a run is given by --vision and --text, and what of them is locked."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mmcore.ops import require
from mmcore.parts.bert import BertConfig, read_bert
from mmcore.parts.foreign import ForeignText, ForeignVision, load_foreign_text
from mmcore.parts.image_tower import PooledTower
from mmcore.parts.padded import PaddedTokenizer, load_folder_tokenizer
from mmcore.parts.towers import load_pooled
from mmcore.systems.clip.model import CLIPConfig, TowersConfig
from mmcore.weights.files import read_json

_MAX_TEXT = 64


class GivenText(NamedTuple):
    """A text tower of a folder, with its tokenizer, and its weights by their names in a model's `text`."""

    config: BertConfig | ForeignText
    tokenizer: PaddedTokenizer
    state: dict[str, Tensor]


def check_flags(recipe: Any) -> None:
    """Raises a ValueError for flags of towers and locks that contradict each other."""
    start, num_groups = recipe.init, recipe.lock_image_unlocked_groups
    for flag, value in (("--vision", recipe.vision), ("--text", recipe.text)):
        require("clip", start is None or value is None, "{} must be left out with --init, got {}", flag, value)
    table = ("image", recipe.lock_image, recipe.vision, "--vision"), ("text", recipe.lock_text, recipe.text, "--text")
    for part, locks, tower, flag in table:
        if locks and tower is None and start is None:
            why = "a locked tower of random weights shows nothing"
            raise ValueError(f"--lock-{part} must come with {flag} or --init, got neither: {why}")
    if recipe.max_text is not None and (recipe.text is None or recipe.max_text < 2):
        raise ValueError(f"--max-text must be at least 2 and beside --text, got {recipe.max_text}")
    if not recipe.image_head and recipe.vision is None:
        raise ValueError("--no-image-head must come with --vision, got none")
    if num_groups < 0 or (num_groups and not recipe.lock_image):
        raise ValueError(f"--lock-image-unlocked-groups must be at least 0 and beside --lock-image, got {num_groups}")


def given_towers(recipe: Any) -> tuple[PooledTower | None, GivenText | None]:
    """What --vision and --text name; a ValueError where that is nothing to load."""
    vision = None if recipe.vision is None else load_pooled(recipe.vision)
    return vision, None if recipe.text is None else _load_text(recipe.text, recipe.max_text)


def _load_text(folder: Path, max_text: int | None) -> GivenText:
    settings = read_json("load_text", folder / "config.json")
    if max_text is None:
        max_text = min(_MAX_TEXT, settings.get("max_position_embeddings") or _MAX_TEXT)
    tokenizer = load_folder_tokenizer(folder, max_text)
    if settings.get("model_type") == "bert":
        config, state = read_bert(folder, max_text)
        state, pad = {f"transformer.{n}": x for n, x in state.items()}, config.pad_token_id
    else:
        config, state = load_foreign_text(folder, max_text, tokenizer.pad_token_id)
        pad = tokenizer.pad_token_id
    fits = tokenizer.vocab_size <= config.vocab_size and tokenizer.pad_token_id == pad
    wanted = f"at most {config.vocab_size} tokens, padded with {pad}, as its model"
    got = f"{tokenizer.vocab_size} and {tokenizer.pad_token_id}"
    require("clip", fits, "--text must hold a tokenizer of {}, got {} in {}", wanted, got, folder)
    return GivenText(config, tokenizer, state)


def with_towers(
    named: CLIPConfig, vision: PooledTower | None, text: GivenText | None, *, has_head: bool
) -> TowersConfig:
    """A shape with other towers."""
    config, pool = (named.vision, named.image_pool) if vision is None else vision[:2]
    embed_dim = named.embed_dim if has_head else config.width
    of_text = named.text if text is None else text.config
    return TowersConfig(embed_dim, config, of_text, named.init_log_logit_scale, pool, has_head)


def locked_names(recipe: Any, shape: TowersConfig) -> tuple[str, ...]:
    """Beginnings of the names of weights that are locked; a ValueError where all groups are to be unlocked."""
    groups = _groups(shape.vision)
    kept = groups[: len(groups) - recipe.lock_image_unlocked_groups] if recipe.lock_image else []
    what = "--lock-image-unlocked-groups must be below the {} of this tower, got {}"
    require("clip", bool(kept) or not recipe.lock_image, what, len(groups), recipe.lock_image_unlocked_groups)
    return tuple(name for group in kept for name in group) + (("text.",) if recipe.lock_text else ())


def _groups(config: Any) -> list[tuple[str, ...]]:
    if isinstance(config, ForeignVision):
        return [("visual.body.",), ("visual.proj.",)]
    layers = [f"visual.transformer.blocks.{i}." for i in range(config.num_layers)]
    first = ("visual.patch_embed.", "visual.class_embedding", "visual.norm_pre.")
    last = (layers[-1], "visual.norm_post.", "visual.head.")
    return [first, ("visual.position_embedding",), *((x,) for x in layers[:-1]), last, ("visual.proj.",)]
