"""VLMo's forward and losses as published, on dense matrices, by the published names of weights."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


def linear(x: Tensor, state: State, at: str) -> Tensor:
    return F.linear(x, state[f"{at}.weight"], state.get(f"{at}.bias"))


def norm(x: Tensor, state: State, at: str, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{at}.weight"], state[f"{at}.bias"], eps)


def places(side: int, length: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the table for pairs of words, of patches, of all, by loops."""
    num, patches = (2 * side - 1) ** 2 + 3, torch.zeros(side**2 + 1, side**2 + 1, dtype=torch.int64)
    for i in range(side**2):
        for j in range(side**2):
            down, right = i // side - j // side + side - 1, i % side - j % side + side - 1
            patches[1 + i, 1 + j] = down * (2 * side - 1) + right
    words, last = torch.zeros(length, length, dtype=torch.int64), num + 2 * most + 2
    for i in range(length - 1):
        for j in range(length - 1):
            words[1 + i, 1 + j] = j - i + most - 2 + num + 2
    for index, end in ((patches, num), (words, last)):
        index[0, :], index[:, 0], index[0, 0] = end - 3, end - 2, end - 1
    upper = torch.cat([words, torch.full((length, len(patches)), num)], 1)
    lower = torch.cat([torch.full((len(patches), length), num + 1), patches], 1)
    return words, patches, torch.cat([upper, lower])


def block(
    x: Tensor, state: State, i: int, heads: int, seen: Tensor, bias: Tensor | None, kind: str, length: int
) -> Tensor:
    at = f"transformer.blocks.{i}"
    gamma = [state.get(f"{at}.gamma_{n}", torch.ones((), dtype=x.dtype)) for n in (1, 2)]
    y, width = norm(x, state, f"{at}.norm1"), x.shape[2]
    q_bias, v_bias = state[f"{at}.attn.q_bias"], state[f"{at}.attn.v_bias"]
    qkv = F.linear(y, state[f"{at}.attn.qkv.weight"], torch.cat([q_bias, torch.zeros_like(q_bias), v_bias]))
    q, k, v = qkv.reshape(*y.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    logits = q * (width // heads) ** -0.5 @ k.mT
    logits = logits if bias is None else logits + bias
    y = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1) @ v
    x = x + gamma[0] * linear(y.transpose(1, 2).reshape(x.shape), state, f"{at}.attn.proj")

    def expert(part: Tensor, name: str) -> Tensor:
        y = F.gelu(linear(norm(part, state, f"{at}.norm2_{name}"), state, f"{at}.mlp_{name}.fc1"))
        return part + gamma[1] * linear(y, state, f"{at}.mlp_{name}.fc2")

    if kind != "vl":
        return expert(x, {"text": "text", "image": "imag"}[kind])
    if f"{at}.mlp_vl.fc1.weight" in state:
        return expert(x, "vl")
    return torch.cat([expert(x[:, :length], "text"), expert(x[:, length:], "imag")], 1)


class Published:
    """The model with max_text_len = `length`, a table for texts of `most`, and `first` its vlffn_start_layer_index."""

    def __init__(self, state: State, heads: int, layers: int, first: int, side: int, length: int, most: int) -> None:
        self.state, self.heads, self.layers, self.first, self.length = state, heads, layers, first, length
        self.words, self.patches, self.all = places(side, length, most)

    def biases(self, index: Tensor) -> list[Tensor | None]:
        table = self.state.get("relative_position_bias_table")
        if table is None:
            return [None] * self.layers
        return list(F.embedding(index, table).permute(2, 0, 1).chunk(self.layers))

    def text_embeds(self, ids: Tensor) -> Tensor:
        at, state = "text_embeddings", self.state
        x = F.embedding(ids, state[f"{at}.word_embeddings.weight"], padding_idx=0)
        x = x + state[f"{at}.token_type_embeddings.weight"][0]
        if "transformer.pos_embed" in state:
            x = x + state[f"{at}.position_embeddings.weight"][: self.length]
        return norm(x, state, f"{at}.LayerNorm", 1e-12) + state["token_type_embeddings.weight"][0]

    def image_embeds(self, images: Tensor) -> Tensor:
        state, at = self.state, "transformer.patch_embed.proj"
        patch = state[f"{at}.weight"].shape[-1]
        x = F.conv2d(images, state[f"{at}.weight"], state[f"{at}.bias"], stride=patch).flatten(2).mT
        x = torch.cat([state["transformer.cls_token"].expand(len(x), -1, -1), x], 1)
        return x + state.get("transformer.pos_embed", 0) + state["token_type_embeddings.weight"][1]

    def run(self, x: Tensor, seen: Tensor, index: Tensor, kind: str, blocks: range) -> Tensor:
        biases = self.biases(index)
        for i in blocks:
            x = block(x, self.state, i, self.heads, seen, biases[i], kind, self.length)
        return x

    def infer(self, images: Tensor, ids: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Final states, and what the pooler makes of the first."""
        x = torch.cat([self.text_embeds(ids), self.image_embeds(images)], 1)
        seen = F.pad(seen, (0, x.shape[1] - self.length), value=True)
        x = norm(self.run(x, seen, self.all, "vl", range(self.layers)), self.state, "transformer.norm")
        return x, torch.tanh(linear(x[:, 0], self.state, "pooler.dense"))

    def alone(self, x: Tensor, seen: Tensor, index: Tensor, kind: str, name: str) -> tuple[Tensor, Tensor]:
        """infer_text and infer_image: vectors by their own experts, and by those of both."""
        lower, upper = self.run(x, seen, index, kind, range(self.first)), range(self.first, self.layers)
        found = []
        for of, head in ((kind, f"itc_{name}_proj"), ("vl", f"itc_vl_{name}_proj")):
            y = norm(self.run(lower, seen, index, of, upper), self.state, "transformer.norm")[:, 0]
            y = linear(y, self.state, f"{head}.fc")
            found.append(y / y.norm(dim=-1, keepdim=True))
        return found[0], found[1]

    def head(self, x: Tensor) -> Tensor:
        x = norm(
            F.gelu(linear(x, self.state, "mlm_score.transform.dense")),
            self.state,
            "mlm_score.transform.LayerNorm",
            1e-12,
        )
        return F.linear(x, self.state["mlm_score.decoder.weight"]) + self.state["mlm_score.bias"]

    def text_mlm(self, ids: Tensor, seen: Tensor, labels: Tensor) -> Tensor:
        x = self.run(self.text_embeds(ids), seen, self.words, "text", range(self.layers))
        logits = self.head(norm(x, self.state, "transformer.norm"))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def losses(
        self, images: Tensor, ids: Tensor, seen: Tensor, masked: Tensor, labels: Tensor, wrong: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of contrast, matching and hidden words; `wrong` are the images for each text and the texts for each image."""
        x = self.image_embeds(images)
        image = self.alone(x, torch.ones(x.shape[:2], dtype=torch.bool), self.patches, "image", "image")
        text = self.alone(self.text_embeds(ids), seen, self.words, "text", "text")
        each = []
        for i, scale in enumerate(("logit_scale", "logit_vl_scale")):
            logits, truth = self.state[scale].exp() * image[i] @ text[i].T, torch.arange(len(ids))
            each.append((F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2)
        rows = (images, ids, seen), (images[wrong[0]], ids, seen), (images, ids[wrong[1]], seen[wrong[1]])
        pooled = torch.cat([self.infer(*row)[1] for row in rows])
        is_match = torch.cat([torch.ones(len(ids)), torch.zeros(2 * len(ids))]).long()
        matching = F.cross_entropy(linear(pooled, self.state, "itm_score.fc"), is_match)
        logits = self.head(self.infer(images, masked, seen)[0][:, : self.length])
        words = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return 0.5 * (each[0] + each[1]), matching, 0.25 * words
