"""All of a source as what a model is measured on."""

from dataclasses import replace

from mmcore.data.config import DataConfig
from mmcore.data.pair_data import PairData
from mmcore.data.pairs import open_data, source_kind
from mmcore.data.sources.emoji import Emoji
from mmcore.data.sources.files import FilePairs
from mmcore.data.sources.shards import open_held_out_shards


def open_held_out(config: DataConfig) -> PairData:
    """The pairs or questions that `config.data` names, none of them split off; of 'emoji' the combinations that every
    run holds out or, of a style that draws no combinations, every drawing.

    Args:
        config: `data`, and what belongs to it; not 'digits' or 'stamps', which a run splits itself.

    Raises:
        ValueError: as `open_data`, and for 'digits' or 'stamps'.
    """
    kind = source_kind(config.data)
    if kind in ("digits", "stamps"):
        raise ValueError(f"--data must be a file or shards, of which all is held out, or emoji, got {config.data!r}")
    if kind == "shards":
        val = open_held_out_shards(config)
        return PairData(config.data, len(val), None, val, config.max_broken)
    data = open_data(config if kind == "emoji" else replace(config, val_fraction=0.0), seed=0)
    pairs = data.source
    if data.val is not None:
        return data
    if pairs is None:
        return replace(data, val_questions=data.questions)
    assert isinstance(pairs, FilePairs | Emoji)
    return replace(data, val=pairs.held_out(config.max_broken))
