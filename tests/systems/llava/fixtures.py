"""A tiny LLaVA of random weights, in memory, in a folder of transformers, and as a run leaves it."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mmcore import checkpoint
from mmcore.data.broken import BrokenRecord
from mmcore.data.text.templates import ChatTokens
from mmcore.parts.language import (
    fingerprint,
    load_language_model,
    load_language_tokenizer,
    tiny_language_model,
    tiny_tokenizer,
)
from mmcore.parts.towers import load_tower
from mmcore.parts.vit import VisionConfig
from mmcore.systems.llava.model import Llava, LlavaConfig
from mmcore.systems.llava.weights import save_llava

VISION = VisionConfig(image_size=16, patch_size=8, width=8, num_layers=1, num_heads=1, mlp_dim=8)
PINPOINTS = ((16, 32), (32, 16), (32, 32))


def tokenizer() -> Any:
    return tiny_tokenizer(["USER: what is it? ASSISTANT: a dog, a cat and a bird"] * 4)


def chat_tokens(max_length: int = 256) -> ChatTokens:
    return ChatTokens(tokenizer(), "v1", max_length)


def llava(*, has_tiles: bool = False, positions: int = 512) -> Llava:
    """Of random weights, some of whose bytes make no characters."""
    torch.manual_seed(0)
    language = tiny_language_model(tokenizer())
    with torch.no_grad():
        for p in language.parameters():
            p.add_(0.1 * torch.randn_like(p))
    language.config.max_position_embeddings = positions
    return Llava(LlavaConfig(VISION, grid_pinpoints=PINPOINTS if has_tiles else ()), language).eval()


def image(number: int, size: tuple[int, int] = (20, 14)) -> Image.Image:
    return Image.new("RGB", size, (60 * number, 255 - 60 * number, 9))


@dataclass(frozen=True)
class Painted:
    """Images by their number; 'broken' is none."""

    size: tuple[int, int] = (20, 14)

    def named_image(self, name: str, least: int | None = None) -> Image.Image:
        if name == "broken":
            raise BrokenRecord("missing file")
        return image(int(name), self.size)


def write_run(folder: Path, *, recipe: str = "llava-stage1", template: str = "v1", model: Llava | None = None) -> Path:
    """A run's folder with a checkpoint of step 3; of a model, with its weights, averaged to the threefold."""
    saved: dict[str, Any] = {}
    step = folder / "checkpoints/step-00000003"
    step.mkdir(parents=True)
    if model is not None:
        model.language_model.save_pretrained(folder / "language_model")
        tokenizer().save_pretrained(folder / "language_model")
        language = {"folder": "language_model", "files": fingerprint(folder / "language_model")}
        saved = asdict(model.config) | {"lora": None, "language_model": language}
        state = {n: x for n, x in model.state_dict().items() if not n.startswith(("language_model", "language_head"))}
        save_file(state, step / "weight-00000.safetensors")
        save_file({n: 3 * x for n, x in state.items()}, step / "ema-00000.safetensors")
        (step / "state.json").write_text('{"step": 3}')
    settings = {"template": template, "max_length": 256, "max_answer": 64}
    (folder / "config.json").write_text(json.dumps({"recipe": recipe, "model": saved, "settings": settings}))
    files = {file.name: checkpoint.describe(file) for file in step.iterdir()}
    checkpoint.write_json(step / checkpoint.MANIFEST, files)
    return folder


def write_given(folder: Path, clip: Path, llama: Path) -> tuple[Path, Path]:
    """A LLaVA of a tower and a language model in a folder of transformers, and its projector as the original's file."""
    torch.manual_seed(1)
    tower = load_tower(clip)
    model = Llava(LlavaConfig(tower.config), load_language_model(llama, dtype=None))
    model.visual.load_state_dict(tower.state)
    save_llava(model, folder / "llava", tokenizer=load_language_tokenizer(llama))
    learned = {f"model.mm_projector.{n}": x for n, x in model.projector.state_dict().items()}
    torch.save(learned, folder / "mm_projector.bin")
    return folder / "llava", folder / "mm_projector.bin"


class Saying:
    """In place of a language model's generation: says given tokens, one by one, and records what it read."""

    def __init__(self, model: Llava, answers: Iterable[list[int]]) -> None:
        self.answers, self.read, self.num_said = iter(answers), [], 0
        model.generate = self  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, tokens: Tensor, num_text: Tensor, images: Tensor, *, streamer: Any, **options: Any) -> Tensor:
        self.read.append((tokens[0], images, options))
        ids = torch.zeros(1, 0, dtype=torch.int64)
        streamer.put(ids)
        for token in next(self.answers)[: options["max_new_tokens"]]:
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            streamer.put(ids[:, -1])
            self.num_said += 1
            if options["stopping_criteria"](ids, None).all():
                break
        streamer.end()
        return ids


def ids_of(tokens: ChatTokens, text: str) -> list[int]:
    return tokens.tokenizer(text, add_special_tokens=False).input_ids
