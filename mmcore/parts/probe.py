"""What is measured of a language model before a run begins, on a few tokens: where its logits come from, and whether
conversations that share a row see each other."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmcore.checkpoint import mapped
from mmcore.ops import require

LENGTHS = 5, 7
"""Tokens of the two conversations of the probe."""


@torch.no_grad()
def check_head(op: str, model: Any) -> None:
    """Raise a ValueError unless logits are W x + b of the last states: some models scale or cap them, which the fused
    loss does not."""
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    with _read_as_it_runs(model):
        head, states = model.get_output_embeddings(), model.base_model(input_ids=tokens).last_hidden_state
        expected, found = model(input_ids=tokens).logits.float(), head(states).float()
    what = "model must have logits W x + b of its last states, got others from a {}"
    require(op, torch.allclose(found, expected, rtol=1e-3, atol=1e-3), what, model.config.model_type)


@torch.no_grad()
def why_not_packed(model: Any) -> str | None:
    """Why conversations must not share a row of this causal model, with the attention that it is trained with; None
    where each has the logits that it has alone, wherever it stands."""
    if not takes_positions(model):
        return "it takes no position_ids, by which they are told apart"
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    places = [torch.arange(n) for n in LENGTHS]
    first, text = (place * 3 % embed.num_embeddings for place in places)

    def logits(tokens: Tensor, **positions: Tensor) -> Tensor:
        states = model.base_model(inputs_embeds=embed(tokens[None]), use_cache=False, **positions).last_hidden_state
        return head(states[0, -len(text) :]).float()

    with _read_as_it_runs(model):
        alone = logits(text)
        behind, behind_other = (
            logits(torch.cat([before, text]), position_ids=torch.cat(places)[None])
            for before in (first, (first + 1) % embed.num_embeddings)
        )
    eps = torch.finfo(model.dtype).eps
    # behind another text of the same length nothing is rounded otherwise, and alone much is
    leak, shift = (float((behind - x).norm() / x.norm()) for x in (behind_other, alone))
    if leak <= max(1e-5, eps / 4) and shift <= max(1e-4, 4 * eps):
        return None
    return f"its logits of a probe differ by {100 * max(leak, shift):.2g} % where another conversation stands before"


def takes_positions(model: Any) -> bool:
    """Whether a model can be told where a document begins."""
    known = inspect.signature(model.base_model.forward).parameters
    return "position_ids" in known


@contextmanager
def _read_as_it_runs(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and of weights that are mapped from files no more than a module's at a time in memory."""

    def map_anew(module: Any, *_: Any) -> None:
        for p in module.parameters(recurse=False):
            place, *origin = getattr(p, "origin", (None,))
            if place == p.data_ptr():
                p.data = mapped(*origin)
                p.origin = p.data_ptr(), *origin

    hooks = [module.register_forward_hook(map_anew) for module in model.modules()]
    mode = model.training
    model.eval()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.train(mode)
