"""transformers' models on `mmkernels.attention`: `attn_implementation="mmkernels"`.

"eager" is what it is held to: the same mask, the same result. Written for the mask functions of transformers 5.23.
"""

from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, eager_mask
from transformers.utils.output_capturing import _active_collector

from mmcore.integrations.interval_mask import IntervalMask, Seen, seen_by
from mmcore.integrations.mask_patterns import Request, padded_keys, pattern_of
from mmcore.ops import attention, masks, require

NAME = "mmkernels"
# what transformers hands to some models' attention and `mmkernels.attention` has no counterpart of
REFUSED = ("softcap", "s_aux", "sinks", "head_mask", "indices", "block_indices", "cache")


def register() -> None:
    """Make `attn_implementation="mmkernels"` known to transformers.

    `from_pretrained` and `from_config` take it as that argument, a model as
    `model.set_attn_implementation("mmkernels")`. It gives what "eager" does, by the same masks: a query sees what the
    mask says, and all keys where there is none. transformers' "sdpa" reads `is_causal` there, which is True unless a
    module says otherwise, and runs some cross-attention causally.

    A model that does not look its attention up in transformers' `AttentionInterface` computes its own:
    `set_attn_implementation` warns of it, `from_config` does not; one with a table of its own (GIT, Falcon, GPT-J) is a
    ValueError of either `from_`.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    for name, method in _BUILDERS.items():
        setattr(PreTrainedModel, name, method)


def _explained(build: Any) -> Any:
    """A classmethod that makes a model, whose KeyError of a table without our name becomes a sentence."""

    @wraps(build.__func__)
    def explained(cls: type, *args: Any, **kwargs: Any) -> Any:
        try:
            return build.__func__(cls, *args, **kwargs)
        except KeyError as error:
            if error.args != (NAME,):
                raise
            what = f"{cls.__name__}, which looks its attention up in a table of its own"
            instead = "of a composite model name each part, as {'': 'mmkernels', 'vision_config': 'eager'}"
            raise ValueError(
                f"{NAME}: attn_implementation must be 'eager' for {what}, got {NAME!r}; {instead}"
            ) from error

    return classmethod(explained)


_BUILDERS = {name: _explained(vars(PreTrainedModel)[name]) for name in ("_from_config", "from_pretrained")}


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """`softmax(scaling q k^T + mask) v`, called by transformers: `[B, Lq, H, K]`, and None for the weights.

    Args:
        query, key, value: `[B or 1, H, Lq, K]` and `[B, Hkv, Lk, K]`; H is a multiple of Hkv; values may be
            narrower.
        attention_mask: see `seen_by`; None lets every query see every key, whatever `is_causal` says: the models
            that are causal have a mask from `attention_mask`, which leaves none out.
        position_bias: `[B or 1, H, Lq, Lk]`, added to the logits (T5).
        kwargs: what else a model hands on; ignored, as by transformers' own, but a ValueError where it asks for the
            weights, or for what `mmkernels.attention` does not have.
    """
    sentence = "{} must be None, got {} from {}, which needs attn_implementation='eager'"
    for name in REFUSED:
        given = kwargs.get(name)
        require(NAME, given is None, sentence, name, type(given).__name__, type(module).__name__)
    wants_weights = kwargs.get("output_attentions") or _weights_are_awaited()
    sentence = "output_attentions must be False, since weights are never stored (eager has them), got {}"
    require(NAME, not wants_weights, sentence, True)
    seen = None if attention_mask is None else seen_by(attention_mask, query.shape[2])
    if position_bias is not None:
        seen = _with_bias(position_bias, seen)
    width = value.shape[3]  # DeepSeek's is less than that of keys
    value = F.pad(value, (0, max(0, key.shape[3] - width)))
    out = attention(
        *(x.transpose(1, 2) for x in (query, key, value)),
        mask=None if seen is None else seen.mask,
        scale=scaling,
        dropout_p=dropout if module.training else 0.0,
        empty_rows="zero" if seen is None else seen.empty_rows,
    )
    return out[..., :width].contiguous(), None


def _weights_are_awaited() -> bool:
    """Whether transformers records weights: some models keep that from their attention, and return none in silence."""
    return not is_compiling() and any("attentions" in key for key in _active_collector.get() or ())


def _with_bias(bias: Tensor, seen: Seen | None) -> Seen:
    if seen is None:
        return Seen(masks.dense(bias), "zero")
    values = seen.mask.to_dense()
    if values.dtype == torch.bool:
        return Seen(masks.dense(bias.masked_fill(~values, -torch.inf)), seen.empty_rows)
    return Seen(masks.dense(bias + values), seen.empty_rows)


def attention_mask(**request: Any) -> Tensor | None:
    """transformers' `eager_mask`, `[B, 1, Lq, Lk]`, of which, if its pattern is known, intervals and the padding alone
    are stored; None where nothing is hidden.

    Called by transformers once per forward. It has the eager values rather than bool ones: what a model does to its
    eager mask stays right, and so does a model that adds it to its logits itself. Known are causal and bidirectional
    masks, windows, chunks and packed samples, under any padding; other patterns are the matrix that transformers
    makes, and `seen_by` finds their intervals; so are all in a graph that is compiled. On a GPU no value is read, for
    which the host would wait: what is padded there is taken to hide something, and to leave queries without a key.
    """
    where = Request(*(request[name] for name in ("q_length", "kv_length", "q_offset", "kv_offset", "device")))
    found = None if is_compiling() else pattern_of(request["mask_function"], where)
    if found is None:
        return eager_mask(**request)
    keys = request["attention_mask"]
    reads = found.device.type == "cpu"
    if keys is not None and not (reads and bool(padded_keys(keys, where).all())):
        found = found & masks.key_padding(padded_keys(keys, where), where.q_length)
    if reads:
        fewest = int(found.num_seen.min())
    else:
        is_bidirectional = request["mask_function"] is bidirectional_mask_function
        fewest = found.num_keys if keys is None and is_bidirectional else int(keys is None and where.sees_itself)
    may_skip = request.get("allow_is_causal_skip", True) or request.get("allow_is_bidirectional_skip", False)
    if may_skip and fewest == found.num_keys:
        return None
    return IntervalMask(Seen(found, "zero" if fewest else "uniform"), request["batch_size"], request["dtype"])
