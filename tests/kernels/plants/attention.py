"""Bugs to plant in the attention paths: each is one edit of a path's source, which the contract must see."""

from mmkernels.attention import blockwise, kernel, op
from mmkernels.attention.spec import BIAS, BLOCKS, CAUSAL, DROPOUT, INTERVALS, PLAIN, SEGMENTS
from tests.kernels.plants.plant import Plants

BLOCKWISE = {
    "unwritten rows": ("out[batch, rows] = part.out", "out[batch, rows] = 0 * part.out"),
    "log-sum-exp of the first piece alone": ("lse = torch.logaddexp(one.lse, other.lse)", "lse = one.lse"),
    "pieces added without their weights": ("for part in (one, other))\n", "for part in (one, one))\n"),
    "wrong factor on dq": ("dq = _product(d_logits, k).mul_(", "dq = _product(d_logits, k).mul_(1.001 * "),
    "wrong factor on dk": ("dk = (d_logits.mT @ q).mul_(", "dk = (d_logits.mT @ q).mul_(1.001 * "),
    "dk of the last piece alone": ("dx[batch, piece.inside] += part", "dx[batch, piece.inside] = part"),
    "dq of the last piece alone": ("dq[batch, rows] += found", "dq[batch, rows] = found"),
    "second segment's gradient to the first": (
        "zip(dkv[piece.segment], (found",
        "zip(dkv[0], (found",
    ),
    "missing cast": (
        "return logits if bias is None",
        "logits = logits.half().to(logits.dtype)\n    return logits if bias is None",
    ),
    "gradient of the log-sum-exp lost": ("excess -= row.d_lse", "pass"),
    "another dropout in dv": ("dv = _drop_(problem, piece, weights).mT", "dv = weights.mT"),
    "another share dropped": ("problem.seed, problem.dropout_p", "problem.seed, 0.9 * problem.dropout_p"),
    "causal corner left open": ("device=q.device).triu_(1)", "device=q.device).triu_(2)"),
    "a group's heads not summed": (
        "x.unflatten(1, (num_heads, -1)).sum(2)",
        "x.unflatten(1, (num_heads, -1))[:, :, 0]",
    ),
    "empty rows without a log-sum-exp": (
        "(bias == -torch.inf).all(3), -torch.inf",
        "(bias == -torch.inf).all(3), 0.0",
    ),
    "a bias of the first tile's rows": ("d_logits)\n\n\ndef _add", "2 * d_logits)\n\n\ndef _add"),
}
PLANTS = Plants(
    op=op,
    paths={"blockwise": blockwise, "kernel": kernel},
    bugs={"blockwise": BLOCKWISE, "kernel": {}},
    checks=tuple(
        (spec, {"B": 2, "H": 4, "Hkv": 2, "Lq": 33, "Lk": 65, "K": 16})
        for spec in (PLAIN, CAUSAL, INTERVALS, BLOCKS, BIAS, DROPOUT, SEGMENTS)
    ),
)
