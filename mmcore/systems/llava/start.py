"""What LLaVA's second stage starts from: a run, a folder of transformers, or the original's mm_projector.bin."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mmcore import checkpoint
from mmcore.parts.adapters import Lora
from mmcore.parts.language_folder import language_of
from mmcore.parts.language_weights import beside_language
from mmcore.parts.towers import load_tower, visual_state
from mmcore.runs import find_run, is_run, read_frozen, read_run
from mmcore.settings import from_json
from mmcore.systems.llava.anyres import Size
from mmcore.systems.llava.model import LlavaConfig
from mmcore.systems.llava.weights import load_llava, read_projector

STAGES = "llava-stage1", "llava-stage2"


class LlavaStart(NamedTuple):
    """What a model begins with."""

    config: LlavaConfig
    state: dict[str, Tensor]  # by our names, of the language model what is not as in its folder
    llm: Path  # the language model's folder


def next_pinpoints(side: int) -> tuple[Size, ...]:
    """LLaVA-NeXT's resolutions for a tower of this image size."""
    return ((side, 2 * side), (2 * side, side), (2 * side, 2 * side), (3 * side, side), (side, 3 * side))


def llava_start(path: Path, *, llm: Path | None = None, vision: Path | None = None, anyres: bool = False) -> LlavaStart:
    """Reads what the second stage starts from: a run of either stage; a folder of transformers with a Llava or
    LlavaNext; or a file, the original's mm_projector.bin.

    `llm` is where a run's language model is now, or that of a mm_projector.bin, which needs an image tower too, as
    `load_tower` takes it, and may have NeXT's tiles. A ValueError of anything else, or a setting that belongs to
    another.
    """
    if path.is_file():
        if vision is None or llm is None:
            raise ValueError(f"--vision and --llm must be given where --from is a projector alone, {path}")
        projector, tower = read_projector(path), load_tower(vision)
        pinpoints = next_pinpoints(tower.config.image_size) if anyres else ()
        kind = "linear" if "projector.weight" in projector else "mlp2x_gelu"
        return LlavaStart(LlavaConfig(tower.config, kind, pinpoints), visual_state(tower) | projector, llm)
    if vision is not None or anyres:
        raise ValueError(f"--vision and --anyres have no effect where --from is {path}, which has a tower")
    if is_run(path) or not path.exists():
        return _of_run(path, llm)
    if llm is not None:
        raise ValueError(f"--llm has no effect where --from is {path}, which has a language model, got {llm}")
    model = load_llava(path, dtype=None)
    return LlavaStart(model.config, beside_language(model), path)


def llava_shape(saved: Mapping[str, Any]) -> tuple[LlavaConfig, Lora | None]:
    """The model and its adapters as a run's config.json holds them."""
    return from_json(LlavaConfig, saved), saved["lora"] and Lora(**saved["lora"])


def _of_run(path: Path, llm: Path | None) -> LlavaStart:
    run = find_run(path)
    if run.recipe not in STAGES:
        raise ValueError(f"--from must be a run of {' or '.join(STAGES)}, got {path}, which is of {run.recipe}")
    config, lora = llava_shape(run.saved["model"])
    folder = language_of(run.folder, run.saved["model"], llm, None).folder
    assert folder is not None
    if lora is None:
        state = dict(checkpoint.tensors(run.checkpoint, run.key)) | read_frozen(run.folder)
    else:  # tied ones once
        state = {n: p.detach() for n, p in read_run(path, llm=llm).model.named_parameters()}
    return LlavaStart(config, state, folder)
