"""BLIP-2's second stage: what a Q-Former reads of an image, as the first tokens of a frozen language model."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.labels import IGNORED
from mmcore.nn import Linear
from mmcore.ops import accumulator, require
from mmcore.parts.decoding import in_step
from mmcore.parts.language import LanguageHead, whole
from mmcore.parts.vit import VisionConfig, ViT
from mmcore.systems.blip2.qformer import QFormer, QFormerConfig


class BLIP2LM(nn.Module):
    """An image tower and a causal or an encoder-decoder model of transformers (OPT, Llama, Qwen, T5), both frozen, and
    a Q-Former, without text, and a projection between them, which learn (arXiv:2301.12597)."""

    def __init__(self, vision: VisionConfig, qformer: QFormerConfig, language_model: Any) -> None:
        super().__init__()
        require("BLIP2LM", not qformer.has_text, "qformer must be without text, got has_text {}", True)
        self.visual = ViT(vision).requires_grad_(False)
        self.norm_vision = nn.LayerNorm(vision.width, eps=vision.norm_eps)
        self.qformer = QFormer(qformer)
        embedding = language_model.get_input_embeddings()
        self.language_projection = Linear(qformer.width, embedding.embedding_dim)
        # as large as the tokens beside it; what it projects is a LayerNorm's
        with whole(embedding.weight) as weight:
            std = weight.float().std().item() * qformer.width**-0.5
        nn.init.normal_(self.language_projection.weight, std=std)
        nn.init.zeros_(self.language_projection.bias)
        self.language_model: Any = language_model.requires_grad_(False)
        self.language_head = LanguageHead(language_model.get_output_embeddings())

    def fitting(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the state of a `BLIP2` or a `BLIP2LM` this model's tower and Q-Former, and its projection if that has the
        language model's width; a ValueError for weights that are missing or of other shapes."""
        ours = {n: x.shape for n, x in self.state_dict().items() if not n.startswith("language_")}
        projection = self.language_projection.state_dict(prefix="language_projection.").items()
        ours |= {n: x.shape for n, x in projection if n in state and state[n].shape == x.shape}
        differ = [n for n, shape in ours.items() if n not in state or state[n].shape != shape]
        require("BLIP2LM", not differ, "state must have this model's weights, got a difference in {}", differ[:3])
        return {name: state[name] for name in ours}

    def train(self, mode: bool = True) -> "BLIP2LM":
        """The tower and the language model stay in evaluation mode."""
        super().train(mode)
        self.visual.eval()
        self.language_model.eval()
        return self

    def forward(self, task: str, *inputs: Any, **options: Any) -> Any:
        """`loss` or `generate` by name: under ZeRO-3 parameters are whole only inside a forward."""
        return getattr(self, task)(*inputs, **options)

    def loss(
        self, images: Tensor, tokens: Tensor, num_prompt: Tensor, num_text: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The cross-entropy of the answers, summed, and how many tokens these have.

        Args:
            images: [B, 3, S, S].
            tokens: int64 [B, T], padded on the right: prompt and answer of a causal model, the prompt of an
                encoder-decoder.
            num_prompt: int64 [B], how many are the prompt's: they are not learned.
            num_text: int64 [B], how many are no padding.
            targets: int64 [B, T'], -100 where there is none: the answers that an encoder-decoder's decoder learns.
        """
        prefix = self.prefix(images)
        embedded, seen = self._inputs(prefix, tokens, num_text)
        if self.language_model.config.is_encoder_decoder:
            require("BLIP2LM", targets is not None, "targets must be given to an encoder-decoder, got {}", None)
            assert targets is not None
            found = self.language_model(inputs_embeds=embedded, attention_mask=seen, labels=targets)
            logits, labels = found.logits.flatten(0, 1), targets.flatten()
            logits = logits.to(accumulator(logits.dtype))
            loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            return loss, (labels != IGNORED).sum()
        states = self.language_model.base_model(inputs_embeds=embedded, attention_mask=seen).last_hidden_state
        place = torch.arange(tokens.shape[1], device=tokens.device)
        is_answer = (place >= num_prompt[:, None]) & (place < num_text[:, None])
        labels = tokens.masked_fill(~is_answer, IGNORED)
        # the state before a token predicts it
        states = states[:, prefix.shape[1] - 1 : -1]
        return self.language_head(states, labels), is_answer.sum()

    def prefix(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] to [B, Q, D], tokens of the language model's width."""
        with torch.no_grad():
            states = self.visual(images)
        return self.language_projection(self.qformer(self.norm_vision(states)))

    @torch.no_grad()
    def generate(self, images: Tensor, tokens: Tensor, num_text: Tensor, **options: Any) -> Tensor:
        """Token ids that the language model goes on with, by `transformers`' `generate` and its options.

        Args:
            images: [B, 3, S, S].
            tokens: int64 [B, T], prompts, padded on the left for a causal model.
            num_text: int64 [B], how many are no padding.
        """
        is_causal = not self.language_model.config.is_encoder_decoder
        embedded, seen = self._inputs(self.prefix(images), tokens, num_text, is_left=is_causal)
        options = in_step(self.language_model) | options
        return self.language_model.generate(inputs_embeds=embedded, attention_mask=seen, **options)

    def _inputs(
        self, prefix: Tensor, tokens: Tensor, num_text: Tensor, *, is_left: bool = False
    ) -> tuple[Tensor, Tensor]:
        """What the language model reads, [B, Q + T, D], and which of it is there."""
        text = self.language_model.get_input_embeddings()(tokens)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        first = tokens.shape[1] - num_text[:, None] if is_left else 0
        is_text = (place >= first) & (place < first + num_text[:, None])
        is_prefix = is_text.new_ones(prefix.shape[:2])
        return torch.cat([prefix.to(text.dtype), text], 1), torch.cat([is_prefix, is_text], 1).long()
