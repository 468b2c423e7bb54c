"""Losses with the signatures of open_clip and TorchMultimodal, computed by ours: exact on any number of ranks,
without a matrix of logits."""

import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmcore.losses.contrastive import global_contrastive_loss
from mmcore.losses.ranks import Header, agree, world_size_of
from mmcore.losses.sigmoid import global_sigmoid_loss
from mmcore.ops import require

DEFAULT_LOGIT_SCALE = math.log(1 / 0.07)
DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


class _InGroup(nn.Module):
    """A loss that is told its place among the ranks, and compares it with the process group's when first used."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.place, self.agreed = (rank, world_size), False

    def check_place(self, device: torch.device) -> None:
        """Raises on every rank if any was told wrongly."""
        op, size = type(self).__name__, world_size_of(None)

        def check() -> tuple[bool, Header]:
            place = (dist.get_rank() if size > 1 else 0, size)
            sentence = "rank and world_size must be those of the process group, {}, got {}"
            require(op, self.place == place, sentence, place, self.place)
            return True, Header(0, 0, {})

        if not self.agreed:
            self.agreed = check()[0] if size == 1 else agree(op, None, device, check)[0]


class ClipLoss(_InGroup):
    """`open_clip.ClipLoss` (3.x and 4.x): CLIP's loss of image and text features.

    `local_loss`, `gather_with_grad` and `cache_labels` choose there between the exact gradient and cheaper ones;
    here each choice gives the exact gradient at the least cost, and each rank the loss of the global batch.
    (There, with neither flag, encoders get 1/W of the gradient; with `local_loss` alone, a different direction;
    with `gather_with_grad`, this gradient, and with `local_loss` too the mean of the ranks' values is this one.)

    `rank` and `world_size` are as the default process group has them; 0 and 1 without one. Others, `use_horovod`, and
    whatever `global_contrastive_loss` refuses raise a ValueError.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__(rank, world_size)
        require("ClipLoss", not use_horovod, "use_horovod must be False, got {}", use_horovod)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The scalar loss, or `{"contrastive_loss": loss}`; a bias of all logits has the gradient zero."""
        self.check_place(image_features.device)
        loss = global_contrastive_loss(image_features, text_features, logit_scale)
        if isinstance(logit_bias, Tensor):
            loss = loss + 0.0 * logit_bias.sum()
        is_flag = isinstance(logit_bias, bool)  # open_clip 2's fourth argument
        require("ClipLoss", not is_flag, "logit_bias must be a number, a tensor or None, got {}", logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(_InGroup):
    """`open_clip.SigLipLoss` (3.x and 4.x): the sigmoid loss of all pairs of the global batch (arXiv:2303.15343).

    Each rank gets the loss of the global batch, of which the ranks' values are shares there; the gradients agree.
    `cache_labels` has no effect there either, `rank` and `world_size` are as in `ClipLoss`, `dist_impl` (None,
    "bidir", "shift", "reduce" or "gather") says how features travel there, and `chunk_size` (0 = all) how many rows of
    logits are held at a time; here their size decides. Raises as `ClipLoss`, and on another `dist_impl` or a
    `chunk_size` below 0.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        op = "SigLipLoss"
        super().__init__(rank, world_size)
        known = dist_impl is None or dist_impl in DIST_IMPLS
        require(op, known, "dist_impl must be None or one of {}, got {!r}", DIST_IMPLS, dist_impl)
        is_count = isinstance(chunk_size, int) and chunk_size >= 0
        require(op, is_count, "chunk_size must be a whole number of rows, or 0 for all, got {!r}", chunk_size)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The scalar loss, or `{"contrastive_loss": loss}`; without a bias it is 0."""
        self.check_place(image_features.device)
        bias = 0.0 if logit_bias is None else logit_bias
        loss = global_sigmoid_loss(image_features, text_features, logit_scale, bias)
        return {"contrastive_loss": loss} if output_dict else loss


class BackpropType(Enum):
    """`torchmultimodal.utils.distributed.BackpropType`: which ranks' losses a gradient is taken of."""

    GLOBAL = 0
    LOCAL = 1
    NONE = 2


class ContrastiveLossWithTemperature(nn.Module):
    """`torchmultimodal`'s CLIP loss with a learnable `logit_scale`, the logarithm of the multiplier: its first value or
    the parameter itself is given. It is clamped between `logit_scale_min` and `logit_scale_max`, of which one may be
    None, in place, in each forward. What is not supported raises a ValueError that names it."""

    def __init__(
        self,
        logit_scale: float | nn.Parameter = DEFAULT_LOGIT_SCALE,
        logit_scale_min: float | None = math.log(1),
        logit_scale_max: float | None = math.log(100),
    ) -> None:
        super().__init__()
        is_limited = logit_scale_min is not None or logit_scale_max is not None
        sentence = "logit_scale_min must be given where logit_scale_max is None, got {}"
        require("ContrastiveLossWithTemperature", is_limited, sentence, None)
        self.logit_scale_min, self.logit_scale_max = logit_scale_min, logit_scale_max
        if not isinstance(logit_scale, nn.Parameter):
            logit_scale = nn.Parameter(torch.tensor(float(logit_scale)))
        self.logit_scale = logit_scale

    def forward(
        self,
        embeddings_a: Tensor,
        embeddings_b: Tensor,
        backprop_type: Enum = BackpropType.GLOBAL,
        cross_entropy_kwargs: Mapping[str, Any] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The scalar loss of the global batch of features `[m, D]`.

        Args:
            backprop_type: GLOBAL, of ours or of TorchMultimodal; the others are not the loss's gradient.
            cross_entropy_kwargs: `label_smoothing` alone.
            mask: bool `[m]`, False for pairs that have no loss of their own and are the others' negatives still.
        """
        op, labels = "ContrastiveLossWithTemperature", None
        exact = backprop_type.name == BackpropType.GLOBAL.name
        require(op, exact, "backprop_type must be GLOBAL, got {}", backprop_type)
        options = dict(cross_entropy_kwargs or {})
        smoothing = options.pop("label_smoothing", 0.0)
        require(op, not options, "cross_entropy_kwargs must hold label_smoothing alone, got {}", list(options))
        with torch.no_grad():
            self.logit_scale.clamp_(self.logit_scale_min, self.logit_scale_max)
        if mask is not None:
            size = len(embeddings_a)
            fits = mask.dtype == torch.bool and list(mask.shape) == [size]
            require(op, fits, "mask must be bool [{}], got {} {}", size, mask.dtype, list(mask.shape))
            rank = dist.get_rank() if world_size_of(None) > 1 else 0
            pairs = torch.arange(size, device=mask.device) + (rank << 32)
            labels = torch.where(mask, pairs, -1), torch.where(mask, pairs, -2)  # others have no partner
        scale = self.logit_scale.exp()
        return global_contrastive_loss(embeddings_a, embeddings_b, scale, labels=labels, label_smoothing=smoothing)
