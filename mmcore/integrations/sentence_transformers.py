"""A loss for sentence-transformers' trainer that sees the batches of all ranks, at the memory of a chunk."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.losses import global_contrastive_loss
from mmcore.losses.cached import CachedStep, Run, cut, num_chunks, rows_of, split, unreduced
from mmcore.ops import require

OP = "GlobalRankingLoss"


class GlobalRankingLoss(nn.Module):
    """In-batch negatives of all ranks for `SentenceTransformerTrainer(..., loss=GlobalRankingLoss(model))`.

    The loss of `CachedMultipleNegativesRankingLoss(gather_across_devices=True)` there: each anchor picks its positive
    among the positives and hard negatives of all ranks, by cosines times `scale`. Unlike there the positives' gradients
    are exact over ranks, the logits are never stored, and ranks may have different numbers of rows. A batch costs the
    memory of `mini_batch_size` rows of each column (GradCache, arXiv:2101.06983), its gradient made when the trainer
    calls backward.

    Args:
        model: a SentenceTransformer, whose outputs have `sentence_embedding`; the trainer puts its wrapper here.
        scale: of the cosines; above 0.
        mini_batch_size: rows that are encoded at a time; at least 1.
        symmetric: each positive picks its anchor besides.

    Raises:
        ValueError: in forward, fewer than two columns, columns whose rows differ, flattened sentences.
    """

    uses_gradient_cache = True  # what its trainer asks a loss

    def __init__(
        self, model: nn.Module, scale: float = 20.0, mini_batch_size: int = 32, symmetric: bool = False
    ) -> None:
        super().__init__()
        require(OP, scale > 0, "scale must be above 0, got {}", scale)
        require(OP, mini_batch_size >= 1, "mini_batch_size must be at least 1, got {}", mini_batch_size)
        self.model, self.scale, self.mini_batch_size, self.symmetric = model, scale, mini_batch_size, symmetric

    def get_config_dict(self) -> dict[str, Any]:
        """For the model's card."""
        return {"scale": self.scale, "mini_batch_size": self.mini_batch_size, "symmetric": self.symmetric}

    def forward(self, sentence_features: Iterable[Mapping[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss of the tokenized columns anchor, positive, and any number of negatives; `labels` are not read."""
        columns = [dict(features) for features in sentence_features]
        require(OP, len(columns) >= 2, "sentence_features must be of anchors and positives, got {}", len(columns))
        sizes = [_num_rows(features) for features in columns]
        require(OP, len(set(sizes)) == 1, "sentence_features must have as many rows in each column, got {}", sizes)
        counts = num_chunks(sizes, self.mini_batch_size, None)
        sides = [
            [Run(partial(self._embed, features, rows, size)) for rows in split(size, count)]
            for features, size, count in zip(columns, sizes, counts, strict=True)
        ]
        step = CachedStep(sides, self._objective, [self.model])
        if step.is_whole or not torch.is_grad_enabled():
            return step.loss
        loss = step.loss.requires_grad_()
        loss.register_hook(partial(self._backward, step, _autocast(loss.device.type)))
        return loss

    def _embed(self, features: dict[str, Any], rows: slice, num_rows: int) -> Tensor:
        found = self.model(cut(features, rows, num_rows))["sentence_embedding"]
        return F.normalize(found.to(torch.promote_types(found.dtype, torch.float32)), dim=-1)

    def _objective(self, anchors: Tensor, *others: Tensor) -> Tensor:
        labels = None
        if len(others) > 1:
            rank = dist.get_rank() if dist.is_initialized() else 0
            own = torch.arange(len(anchors), device=anchors.device) + (rank << 32)
            labels = own, torch.cat([own, own.new_full((sum(map(len, others[1:])),), -1)])  # negatives are nobody's
        return global_contrastive_loss(anchors, torch.cat(others), self.scale, symmetric=self.symmetric, labels=labels)

    def _backward(self, step: CachedStep, autocast: torch.autocast, grad: Tensor) -> None:
        with torch.enable_grad(), autocast:
            step.backward(lambda x, _: (x * grad).backward(), partial(unreduced, [self.model]))


def _num_rows(features: Mapping[str, Any]) -> int:
    is_flat = "cu_seq_lens_q" in features or "offsets" in features
    require(OP, not is_flat, "sentence_features must be padded, got {}", "sentences that are flattened")
    found = next((features[name] for name in ("input_ids", "attention_mask") if name in features), None)
    return len(found) if found is not None else rows_of(features)[0]


def _autocast(kind: str) -> torch.autocast:
    """As it is now; a backward runs outside of it."""
    return torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
