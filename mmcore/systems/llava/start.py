"""What LLaVA's second stage starts from: a run, a folder of transformers, or the original's mm_projector.bin."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mmcore.parts.language_folder import language_model_folder
from mmcore.parts.towers import load_tower
from mmcore.runs import find_run, is_run
from mmcore.systems.llava.anyres import Size
from mmcore.systems.llava.model import LlavaConfig
from mmcore.systems.llava.runs import llava_of, read_llava
from mmcore.systems.llava.weights import load_llava, read_projector


class LlavaStart(NamedTuple):
    """What a model begins with.

    Args:
        config: of tower, projector and tiles.
        state: weights by our names, those of the language model where they are not as in its folder.
        llm: the language model's folder.
    """

    config: LlavaConfig
    state: dict[str, Tensor]
    llm: Path


def next_pinpoints(side: int) -> tuple[Size, ...]:
    """LLaVA-NeXT's resolutions for a tower of this image size."""
    return ((side, 2 * side), (2 * side, side), (2 * side, 2 * side), (3 * side, side), (side, 3 * side))


def llava_start(
    path: Path, *, llm: Path | None = None, vision: Path | None = None, anyres: bool = False
) -> LlavaStart:
    """Reads what the second stage starts from.

    Args:
        path: a run of either stage; a folder of transformers with a Llava or LlavaNext; or a file, the original's
            mm_projector.bin.
        llm: of a run, where its language model is now; of a mm_projector.bin, the language model.
        vision: of a mm_projector.bin, the image tower, as `load_tower` takes it.
        anyres: of a mm_projector.bin, with NeXT's tiles.

    Raises:
        ValueError: nothing of this kind; a setting that belongs to another.
    """
    if path.is_file():
        return _of_projector(path, llm, vision, anyres)
    if vision is not None or anyres:
        raise ValueError(f"--vision and --anyres have no effect where --from is {path}, which has a tower")
    if is_run(path) or not path.exists():
        return _of_run(path, llm)
    if llm is not None:
        raise ValueError(f"--llm has no effect where --from is {path}, which has a language model, got {llm}")
    model = load_llava(path, dtype=None)
    state = {n: x for n, x in model.state_dict().items() if not n.startswith("language_")}
    return LlavaStart(model.config, state, path)


def _of_run(path: Path, llm: Path | None) -> LlavaStart:
    run = find_run(path)
    read = read_llava(run)
    folder = language_model_folder(run.folder, run.saved["model"], llm)
    if read.lora is None:
        return LlavaStart(read.config, read.state, folder)
    merged = llava_of(run, llm)
    # tied ones once
    return LlavaStart(read.config, {n: p.detach() for n, p in merged.named_parameters()}, folder)


def _of_projector(file: Path, llm: Path | None, vision: Path | None, anyres: bool) -> LlavaStart:
    if vision is None or llm is None:
        raise ValueError(f"--vision and --llm must be given where --from is a projector alone, {file}")
    projector, tower = read_projector(file), load_tower(vision)
    pinpoints = next_pinpoints(tower.config.image_size) if anyres else ()
    kind = "linear" if "projector.weight" in projector else "mlp2x_gelu"
    state = {f"visual.{name}": x for name, x in tower.state.items()} | projector
    return LlavaStart(LlavaConfig(tower.config, kind, pinpoints), state, llm)
