"""transformers' dual encoders on our losses, exact over the batches of all ranks."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmcore.losses import global_contrastive_loss, global_sigmoid_loss
from mmcore.ops import require

OP = "use_global_loss"


def use_global_loss(model: nn.Module) -> None:
    """Have a CLIP or SigLIP of transformers return the loss of the batches of all ranks, where its own sees a rank's.

    Call it on the model before it is wrapped, handed to Trainer or to DeepSpeed. From then on `model(...,
    return_loss=True).loss` is `global_contrastive_loss` of `image_embeds` and `text_embeds`, or `global_sigmoid_loss`
    where the model has a `logit_bias`: the same on every rank, and the mean of the ranks' gradients is the gradient
    of one process on the whole batch. On one rank it is the model's own loss. `logits_per_image` stay those of the
    rank's own pairs. Each accumulation step of Trainer is a batch of its own.

    CLIP's `logit_scale` is 0-d, which DeepSpeed 0.19 does not take: it becomes a parameter of shape [1], so make
    optimizers afterwards. `state_dict` and `save_pretrained` write it 0-d as before, and either form loads. (Where
    Trainer gathers the weights of ZeRO-3 itself, its file holds `[1]`.)

    The model is of CLIP's form, with `logit_scale`, the logarithm of the multiplier, and unit-norm `image_embeds` and
    `text_embeds` among its outputs: CLIPModel, ChineseCLIPModel, AltCLIPModel, MetaClip2Model, BlipModel, SiglipModel.

    Raises:
        ValueError: a model without a `logit_scale`; in forward, `return_dict=False`, and whatever the loss refuses.
    """
    scale = getattr(model, "logit_scale", None)
    is_scale = isinstance(scale, nn.Parameter) and scale.numel() == 1
    require(OP, is_scale, "model must have a parameter logit_scale, got {}", type(model).__name__)
    assert scale is not None
    if scale.ndim == 0:
        model.logit_scale = nn.Parameter(scale.detach().reshape(1), requires_grad=scale.requires_grad)
        model.register_state_dict_post_hook(partial(_reshape, ()))
        model.register_load_state_dict_pre_hook(partial(_reshape, (1,)))
    model.register_forward_hook(_replace_loss)


def _replace_loss(model: nn.Module, _: Any, output: Any) -> None:
    require(OP, not isinstance(output, tuple), "return_dict must be True, got {}", False)
    if output.loss is None:
        return
    assert isinstance(model.logit_scale, Tensor)
    features = output.image_embeds, output.text_embeds
    scale, bias = _widened(model.logit_scale).exp(), getattr(model, "logit_bias", None)
    if bias is None:
        output.loss = global_contrastive_loss(*features, scale)
    else:
        output.loss = global_sigmoid_loss(*features, scale, _widened(bias))


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _reshape(shape: tuple[int, ...], _: nn.Module, state: dict[str, Tensor], prefix: str, *_args: Any) -> None:
    """Of the scale in a state dict that is written or read."""
    key = prefix + "logit_scale"
    # of ZeRO-3's parts a rank holds one element or none
    if key in state and state[key].numel() == 1:
        state[key] = state[key].reshape(torch.Size(shape))
