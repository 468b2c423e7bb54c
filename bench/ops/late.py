"""`mmkernels.token_contrastive_loss` of tokens on both sides, late interaction, beside eager and
late-interaction-kernels; its entries in the contract test are `token_contrastive`'s."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import MODES, Case, dtype_id
from bench.harness import DEVICE, DTYPE, ON_GPU, Bench, gradient_case, of_mode
from bench.measure import gemm_flops_per_s
from bench.ops.token_contrastive import Loss, cost_of_form, features
from bench.peers import load
from bench.spec import Shape, shape_id
from mmkernels import token_contrastive_loss


def eager(tokens: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """FILIP's two means of maxima of one product."""
    products = (tokens.flatten(0, 1) @ b.flatten(0, 1).T).unflatten(0, tokens.shape[:2]).unflatten(2, b.shape[:2])
    of_rows, of_cols = products.amax(3).mean(1), products.amax(1).mean(2)  # [M, N]
    return _loss(scale * of_rows, scale * of_cols.T)


def late_interaction(tokens: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """late-interaction-kernels' sums of maxima, once a direction."""
    maxsim = load("late_interaction").maxsim
    of_rows, of_cols = maxsim(tokens, b) / tokens.shape[1], maxsim(b, tokens) / b.shape[1]
    return _loss(scale * of_rows, scale * of_cols)


def _loss(of_rows: Tensor, of_cols: Tensor) -> Tensor:
    target = torch.arange(len(of_rows), device=of_rows.device)
    return (F.cross_entropy(of_rows, target) + F.cross_entropy(of_cols, target)) / 2


CONTENDERS: dict[str, Loss] = {
    "mmkernels": token_contrastive_loss,
    "eager": eager,
    "late_interaction": late_interaction,
}
# FILIP's patches and words, and ColPali's patches and words of a question
SHAPES = (
    ({"M": 256, "Q": 196, "N": 256, "T": 32, "D": 256}, {"M": 64, "Q": 1024, "N": 64, "T": 32, "D": 128})
    if ON_GPU
    else ({"M": 32, "Q": 49, "N": 32, "T": 16, "D": 128},)
)


def operands(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    tokens, _, scale = features((shape["M"], shape["Q"], shape["N"], shape["D"]), dtype, device)
    _, b, _ = features((1, 1, shape["N"] * shape["T"], shape["D"]), dtype, device)
    return tokens, b.detach().unflatten(0, (shape["N"], shape["T"])).requires_grad_(), scale


def _case(shape: Shape, contender: str, mode: str) -> Case:
    inputs, loss = operands(shape, DTYPE, DEVICE), CONTENDERS[contender]

    def gold() -> Tensor:
        wide = [x.detach().double().requires_grad_() for x in inputs]
        return torch.autograd.grad(token_contrastive_loss(*wide), wide[0])[0]

    return gradient_case(
        f"token_contrastive_loss[late] {dtype_id(DTYPE)} {shape_id(shape)}",
        contender,
        lambda: loss(*inputs),
        inputs,
        mode,
        of_mode(mode, *cost_of_form(shape, inputs[0].element_size())),
        rate=gemm_flops_per_s(shape["M"] * shape["Q"], shape["N"] * shape["T"], shape["D"], DTYPE, DEVICE),
        gold=gold,
    )


AXES = {"shape": SHAPES, "contender": tuple(CONTENDERS), "mode": MODES}
BENCHES = (Bench("token_contrastive_loss[late]", _case, AXES, ("late_interaction",)),)
