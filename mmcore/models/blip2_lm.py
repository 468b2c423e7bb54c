"""BLIP-2's second stage: what a Q-Former reads of an image, as the first tokens of a frozen language model."""

from typing import Any

import torch
from torch import Tensor, nn

from mmcore.models.blip2 import BLIP2, IGNORED
from mmcore.models.qformer import QFormer, QFormerConfig
from mmcore.models.vit import VisionConfig, ViT
from mmcore.ops import linear_cross_entropy, require


class BLIP2LM(nn.Module):
    """An image tower and a language model, both frozen, and a Q-Former and a projection between them, which learn
    (arXiv:2301.12597).

    Args:
        vision: shape of the tower.
        qformer: shape of the Q-Former, without text.
        language_model: a causal or an encoder-decoder model of transformers: OPT, Llama, Qwen, T5.
    """

    def __init__(self, vision: VisionConfig, qformer: QFormerConfig, language_model: Any) -> None:
        super().__init__()
        require("BLIP2LM", not qformer.has_text, "qformer must be without text, got has_text {}", True)
        self.visual = ViT(vision).requires_grad_(False)
        self.norm_vision = nn.LayerNorm(vision.width, eps=vision.norm_eps)
        self.qformer = QFormer(qformer)
        width = language_model.get_input_embeddings().embedding_dim
        self.language_projection = nn.Linear(qformer.width, width)
        self.language_model: Any = language_model.requires_grad_(False)

    def load_stage1(self, blip2: BLIP2) -> None:
        """Takes tower and Q-Former of stage 1, the text's share of it left out.

        Raises:
            ValueError: other shapes.
        """
        ours, theirs = self.state_dict(), blip2.state_dict()
        names = [n for n in ours if not n.startswith(("language_model.", "language_projection."))]
        differ = [n for n in names if n not in theirs or theirs[n].shape != ours[n].shape]
        require("BLIP2LM", not differ, "blip2 must be of these shapes, got others in {}", differ[:3])
        self.load_state_dict({name: theirs[name] for name in names}, strict=False)

    def train(self, mode: bool = True) -> "BLIP2LM":
        """The tower and the language model stay in evaluation mode."""
        super().train(mode)
        self.visual.eval()
        self.language_model.eval()
        return self

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        num_prompt: Tensor,
        num_text: Tensor,
        targets: Tensor | None = None,
        has_image: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The cross-entropy of the answers, summed, and how many tokens these have.

        Args:
            images: [B, 3, S, S]; of anything for rows without one.
            tokens: int64 [B, T], padded on the right: prompt and answer of a causal model, the prompt of an
                encoder-decoder.
            num_prompt: int64 [B], how many are the prompt's: they are not learned.
            num_text: int64 [B], how many are no padding.
            targets: int64 [B, T'], -100 where there is none: the answers that an encoder-decoder's decoder learns.
            has_image: bool [B]; a row without an image does not see what the Q-Former made of it, but every module
                runs, as ZeRO-3 wants it of every rank. None = all have one.
        """
        prefix = self.prefix(images)
        embedded, seen = self._inputs(prefix, tokens, num_text, has_image)
        if self.language_model.config.is_encoder_decoder:
            require(
                "BLIP2LM", targets is not None, "targets must be given to an encoder-decoder, got {}", None
            )
            assert targets is not None
            found = self.language_model(inputs_embeds=embedded, attention_mask=seen, labels=targets)
            count = (targets != IGNORED).sum()
            return found.loss * count, count
        states = self.language_model.base_model(inputs_embeds=embedded, attention_mask=seen).last_hidden_state
        place = torch.arange(tokens.shape[1], device=tokens.device)
        is_answer = (place >= num_prompt[:, None]) & (place < num_text[:, None])
        labels = tokens.masked_fill(~is_answer, IGNORED)
        # the state before a token predicts it
        states = states[:, prefix.shape[1] - 1 : -1]
        head = self.language_model.get_output_embeddings()
        loss = linear_cross_entropy(
            states.flatten(0, 1), head.weight, labels.flatten(), bias=head.bias, reduction="sum"
        )
        return loss, is_answer.sum()

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
        embedded, seen = self._inputs(self.prefix(images), tokens, num_text, None, is_left=is_causal)
        return self.language_model.generate(inputs_embeds=embedded, attention_mask=seen, **options)

    def _inputs(
        self,
        prefix: Tensor,
        tokens: Tensor,
        num_text: Tensor,
        has_image: Tensor | None,
        *,
        is_left: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """What the language model reads, [B, Q + T, D], and which of it is there."""
        text = self.language_model.get_input_embeddings()(tokens)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        first = tokens.shape[1] - num_text[:, None] if is_left else 0
        is_text = (place >= first) & (place < first + num_text[:, None])
        shape = prefix.shape[:2]
        is_prefix = is_text.new_ones(shape) if has_image is None else has_image[:, None].expand(shape)
        return torch.cat([prefix.to(text.dtype), text], 1), torch.cat([is_prefix, is_text], 1).long()
