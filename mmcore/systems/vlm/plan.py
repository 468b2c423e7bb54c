"""A model of transformers that reads images as a plan sees it."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoConfig, AutoModelForImageTextToText

from mmcore.ops import require
from mmcore.parts.adapters import LORA_DROPOUT, Lora
from mmcore.plan import pieces
from mmcore.plan.demand import Built
from mmcore.plan.job import Job, MicroBatchPlan, Piece, Setting, numbers
from mmcore.systems.vlm.model import ReadingModel
from mmcore.systems.vlm.weights import tiny


def reading_config(start: str) -> Any:
    """The configuration in a folder of transformers, or of the tiny model; a ValueError of anything else."""
    if start == "tiny":
        return tiny(["a"], 0)[0].config
    is_there = (Path(start) / "config.json").is_file()
    require(pieces.OP, is_there, "--from must be tiny or a folder with a config.json, got {}", start)
    config = AutoConfig.from_pretrained(start, local_files_only=True, trust_remote_code=False)
    what = "--from must be of an image-text-to-text model, got {}"
    require(pieces.OP, type(config) in AutoModelForImageTextToText._model_mapping, what, config.model_type)
    return config


@dataclass(frozen=True)
class VlmPlan(MicroBatchPlan):
    """Plan a run of mmcore train vlm: its language model whole, of its image tower the weights alone."""

    start: str = "tiny"
    """A folder with the config.json of an image-text-to-text model of transformers, or tiny; no weights are read."""
    tokens: int = 2048
    """Tokens of a row, those of images included."""
    lora: int | None = None
    """Train adapters of this rank, as --lora of mmcore train vlm."""

    def job(self) -> Job:
        require(pieces.OP, self.tokens >= 2, "--tokens must be at least 2, got {}", self.tokens)
        config, lora = (
            reading_config(self.start),
            None if self.lora is None else Lora(self.lora, 2 * self.lora, LORA_DROPOUT),
        )

        def made(num_layers: int | None, dtype: torch.dtype, setting: Setting | None = None) -> ReadingModel:
            shape = deepcopy(config)
            text = shape.get_text_config()
            if num_layers is not None:
                text.num_hidden_layers = num_layers
                if getattr(text, "layer_types", None):
                    text.layer_types = text.layer_types[:num_layers]
            body = AutoModelForImageTextToText.from_config(shape, dtype=dtype)
            body.set_attn_implementation(pieces.ATTENTION)
            if setting is not None and setting.activation_checkpointing:
                body.gradient_checkpointing_enable({"use_reentrant": False})
            model = ReadingModel(body)
            if lora is not None:
                model.add_adapters(lora)
            return model.train()

        def build(num_layers: int, samples: int, setting: Setting) -> Built:
            dtype = torch.bfloat16 if lora is not None and setting.precision != "fp32" else setting.dtype
            if lora is None:
                model = made(num_layers, dtype, setting)
            else:  # peft moves its weights, which fake ones refuse
                with unset_fake_temporarily(), torch.device("meta"):
                    model = made(num_layers, dtype, setting)
                model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype))
            text, head = model.body.get_decoder(), model.language_head
            width = model.body.get_input_embeddings().weight.shape[1]
            embedded = torch.empty(samples, self.tokens, width, dtype=dtype, requires_grad=True)
            labels = torch.empty(samples, self.tokens - 1, dtype=torch.int64)

            def forward() -> list[Tensor]:
                states = text(inputs_embeds=embedded, use_cache=False).last_hidden_state
                return [head(states[:, :-1], labels)]

            return Built([*text.parameters(), *head.parameters()], forward)

        with torch.device("meta"):
            of_model = numbers(made(None, torch.float32))
        name = f"{config.model_type} of {self.start}" + ("" if lora is None else f" with adapters of rank {lora.rank}")
        layers = config.get_text_config().num_hidden_layers
        return Job(
            name,
            (Piece("language model", layers, build),),
            of_model.trained,
            3 * 8 * self.tokens,
            frozen_low=of_model.frozen,
            small=of_model.small,
            levers=("accum", "activation_checkpointing", "zero"),
        )
