"""ALBEF's computation by its published names, in plain products and dense matrices."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(x: Tensor, state: State, name: str, eps: float) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def vit(state: State, images: Tensor, heads: int, start: str = "visual_encoder") -> Tensor:
    """timm's, with its fused q, k and v."""
    patch = state[f"{start}.patch_embed.proj.weight"]
    x = F.conv2d(images, patch, state[f"{start}.patch_embed.proj.bias"], stride=patch.shape[-1]).flatten(2).mT
    x = torch.cat([state[f"{start}.cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{start}.pos_embed"]
    layer = 0
    while f"{start}.blocks.{layer}.norm1.weight" in state:
        at = f"{start}.blocks.{layer}"
        q, k, v = linear(norm(x, state, f"{at}.norm1", 1e-6), state, f"{at}.attn.qkv").chunk(3, -1)
        x = x + linear(attend(q, k, v, heads), state, f"{at}.attn.proj")
        x = x + linear(
            F.gelu(linear(norm(x, state, f"{at}.norm2", 1e-6), state, f"{at}.mlp.fc1")), state, f"{at}.mlp.fc2"
        )
        layer += 1
    return norm(x, state, f"{start}.norm", 1e-6)


def bert_layer(
    x: Tensor, state: State, at: str, heads: int, seen: Tensor, read: Tensor | None, seen_read: Tensor | None = None
) -> Tensor:
    """A post-LN layer; `read` is what its cross-attention reads, if it has one."""

    def attention(x: Tensor, at: str, of: Tensor, seen: Tensor | None) -> Tensor:
        q, k, v = (linear(y, state, f"{at}.self.{name}") for y, name in ((x, "query"), (of, "key"), (of, "value")))
        out = linear(attend(q, k, v, heads, seen), state, f"{at}.output.dense")
        return norm(x + out, state, f"{at}.output.LayerNorm", 1e-12)

    x = attention(x, f"{at}.attention", x, seen)
    if read is not None and f"{at}.crossattention.self.query.weight" in state:
        x = attention(x, f"{at}.crossattention", read, seen_read)
    y = linear(F.gelu(linear(x, state, f"{at}.intermediate.dense")), state, f"{at}.output.dense")
    return norm(x + y, state, f"{at}.output.LayerNorm", 1e-12)


def bert(
    state: State,
    x: Tensor,
    num_text: Tensor,
    heads: int,
    read: Tensor | None,
    layers: range,
    start: str = "text_encoder.bert",
) -> Tensor:
    """Layers of tokens or of states."""
    if not x.is_floating_point():
        at = f"{start}.embeddings"
        x = state[f"{at}.word_embeddings.weight"][x] + state[f"{at}.position_embeddings.weight"][: x.shape[1]]
        x = norm(x + state[f"{at}.token_type_embeddings.weight"][0], state, f"{at}.LayerNorm", 1e-12)
    seen = (torch.arange(x.shape[1]) < num_text[:, None])[:, None, None]
    for i in layers:
        x = bert_layer(x, state, f"{start}.encoder.layer.{i}", heads, seen, read)
    return x


def head(state: State, x: Tensor) -> Tensor:
    at = "text_encoder.cls.predictions"
    x = norm(F.gelu(linear(x, state, f"{at}.transform.dense")), state, f"{at}.transform.LayerNorm", 1e-12)
    return x @ state["text_encoder.bert.embeddings.word_embeddings.weight"].T + state[f"{at}.bias"]


def pretraining_losses(state: State, taught: State, batch: Mapping[str, Any], heads: int, layers: int) -> list[Tensor]:
    """Contrast, matching and words, with negatives that are given; `taught` are the momentum model's weights."""
    images, tokens, num_text, alpha = (batch[x] for x in ("images", "tokens", "num_text", "alpha"))
    size, temp, alone, fused = len(images), state["temp"], range(layers // 2), range(layers // 2, layers)

    def towers(state: State) -> tuple[Tensor, ...]:
        seen, words = vit(state, images, heads), bert(state, tokens, num_text, heads, None, alone)
        features = (linear(x[:, 0], state, f"{n}_proj") for x, n in ((seen, "vision"), (words, "text")))
        return seen, words, *(F.normalize(x, dim=-1) for x in features)

    seen, words, image, text = towers(state)
    seen_m, _, image_m, text_m = (x.detach() for x in towers(taught))
    contrast = torch.zeros((), dtype=images.dtype)
    for own, own_m, other_m, queue in (
        (image, image_m, text_m, batch["texts"]),
        (text, text_m, image_m, batch["images queue"]),
    ):
        everyone = torch.cat([other_m, queue])
        right = torch.eye(size, len(everyone), dtype=images.dtype) if batch["right"] is None else batch["right"]
        targets = alpha * (own_m @ everyone.T / temp.detach()).softmax(1) + (1 - alpha) * right
        contrast = contrast - ((own @ everyone.T / temp).log_softmax(1) * targets).sum(1).mean() / 2
    wrong_images, wrong_texts = batch["negatives"]
    read = torch.cat([seen, seen[wrong_images], seen])
    texts, lengths = (
        torch.cat([words, words, words[wrong_texts]]),
        torch.cat([num_text, num_text, num_text[wrong_texts]]),
    )
    matched = linear(bert(state, texts, lengths, heads, read, fused)[:, 0], state, "itm_head")
    matching = F.cross_entropy(matched, (torch.arange(3 * size) < size).long())
    is_hidden = batch["labels"] >= 0
    logits, logits_m = (
        head(s, bert(s, batch["masked"], num_text, heads, x, range(layers)))[is_hidden]
        for s, x in ((state, seen), (taught, seen_m))
    )
    soft = -(logits.log_softmax(-1) * logits_m.detach().softmax(-1)).sum(-1).mean()
    return [contrast, matching, (1 - alpha) * F.cross_entropy(logits, batch["labels"][is_hidden]) + alpha * soft]
