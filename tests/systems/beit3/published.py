"""BEiT-3 as published: torchscale's model, without fairscale and timm, which it pins to old versions and needs little
of; and the same on dense matrices by its names, where torchscale is not there."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

Peer = Literal["transcript", "torchscale"]


@contextmanager
def stubbed() -> Iterator[None]:
    """In float64 torchscale's softmax and GELU are computed in float32 else."""

    def wrapped(module: Any, *_: Any, **__: Any) -> Any:
        return module

    def softmax(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
        return x.softmax(dim)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fairscale", "fairscale.nn", "timm", "timm.models", "timm.models.layers"):
            module: Any = ModuleType(name)
            module.checkpoint_wrapper = module.wrap = module.drop_path = wrapped
            if name not in sys.modules:
                patch.setitem(sys.modules, name, module)
        patch.setattr(torch.Tensor, "float", lambda x: x)
        patch.setattr(torch.nn.functional, "softmax", softmax)
        yield


def encoder(peer: Peer, state: Mapping[str, Tensor], **settings: Any) -> Any:
    """The model in float64 with these weights; skips the test where torchscale is not there."""
    if peer == "transcript":
        return Transcript(state, settings["encoder_attention_heads"], settings["encoder_layers"])
    how = "pip install --no-deps torchscale==0.3.0"
    pytest.importorskip("torchscale", reason=f"torchscale 0.3.0 is not installed: {how}")
    from torchscale.architecture.config import EncoderConfig  # noqa: PLC0415 (under the stubs)
    from torchscale.model.BEiT3 import BEiT3  # noqa: PLC0415

    options = {"multiway": True, "layernorm_embedding": False, "normalize_output": True, "no_output_layer": True}
    model = BEiT3(EncoderConfig(**{**options, **settings})).double().eval()
    model.load_state_dict(state)
    return model


class Transcript:
    """torchscale's BEiT3 of these weights, each expert on its part of the tokens."""

    def __init__(self, state: Mapping[str, Tensor], heads: int, layers: int) -> None:
        self.state = {name: x.clone().requires_grad_() for name, x in state.items()}
        self.heads, self.layers = heads, layers

    def named_parameters(self) -> Any:
        return self.state.items()

    def _each(self, x: Tensor, split: int, at: str, *, is_norm: bool = False) -> Tensor:
        """By the weights of A before the split, by those of B behind it."""
        parts = []
        for letter, part in zip("AB", (x[:, :split], x[:, split:]), strict=True):
            name = at.format(letter)
            weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
            parts.append(F.layer_norm(part, weight.shape, weight, bias) if is_norm else F.linear(part, weight, bias))
        return torch.cat(parts, 1)

    def _image(self, images: Tensor, masked: Tensor | None) -> Tensor:
        state, at = self.state, "vision_embed"
        patch = state[f"{at}.proj.weight"].shape[-1]
        x = F.conv2d(images, state[f"{at}.proj.weight"], state[f"{at}.proj.bias"], stride=patch).flatten(2).mT
        if masked is not None:
            w = masked[:, :, None].to(x.dtype)
            x = x * (1 - w) + state[f"{at}.mask_token"] * w
        return torch.cat([state[f"{at}.cls_token"].expand(len(x), -1, -1), x], 1)

    def __call__(
        self,
        textual_tokens: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        text_padding_position: Tensor | None = None,
        attn_mask: Tensor | None = None,
        vision_masked_position: Tensor | None = None,
    ) -> dict[str, Tensor]:
        state, parts, split = self.state, [], 0
        if visual_tokens is not None:
            parts.append(self._image(visual_tokens, vision_masked_position))
            split = parts[0].shape[1]
            parts[0] = parts[0] + state["encoder.embed_positions.A.weight"][2 : 2 + split]
        if textual_tokens is not None:
            places = state["encoder.embed_positions.B.weight"][2 : 2 + textual_tokens.shape[1]]
            parts.append(F.embedding(textual_tokens, state["text_embed.weight"]) + places)
        x = torch.cat(parts, 1)
        hidden = torch.zeros(x.shape[:2], dtype=torch.bool)
        if text_padding_position is not None:
            hidden[:, split:] = text_padding_position
        x = x * (~hidden)[:, :, None]
        for i in range(self.layers):
            at = f"encoder.layers.{i}"
            y = self._each(x, split, f"{at}.self_attn_layer_norm.{{}}", is_norm=True)
            q, k, v = (
                self._each(y, split, f"{at}.self_attn.{n}_proj.{{}}").unflatten(2, (self.heads, -1)).transpose(1, 2)
                for n in "qkv"
            )
            logits = q @ k.mT / q.shape[-1] ** 0.5
            if attn_mask is not None:
                logits = logits - 1e8 * attn_mask
            y = logits.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1) @ v
            y = self._each(y.transpose(1, 2).flatten(2), split, f"{at}.self_attn.inner_attn_ln.{{}}", is_norm=True)
            x = x + self._each(y, split, f"{at}.self_attn.out_proj.{{}}")
            y = self._each(x, split, f"{at}.final_layer_norm.{{}}", is_norm=True)
            y = F.gelu(self._each(y, split, f"{at}.ffn.{{}}.fc1"))
            y = self._each(y, split, f"{at}.ffn.{{}}.ffn_layernorm", is_norm=True)
            x = x + self._each(y, split, f"{at}.ffn.{{}}.fc2")
        if "encoder.layer_norm.A.weight" in state:
            x = self._each(x, split, "encoder.layer_norm.{}", is_norm=True)
        return {"encoder_out": x}
