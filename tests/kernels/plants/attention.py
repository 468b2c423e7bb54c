"""Bugs to plant in the attention paths: each is one edit of a path's source, which the contract must see."""

from mmkernels.attention import blockwise, kernel, op
from mmkernels.attention.spec import BIAS, BLOCKS, CAUSAL, DROPOUT, INTERVALS, PLAIN, SEGMENTS
from tests.kernels.plants.plant import Plants

BLOCKWISE = {
    "unwritten rows": ("else part.out.transpose", "else 0 * part.out.transpose"),
    "log-sum-exp of the first piece alone": ("lse = torch.logaddexp(one.lse, other.lse)", "lse = one.lse"),
    "pieces added without their weights": ("for part in (one, other))\n", "for part in (one, one))\n"),
    "wrong factor on dq": ("dq = _product(d_logits, k).mul_(", "dq = _product(d_logits, k).mul_(1.001 * "),
    "wrong factor on dk": ("dk = (d_logits.mT @ q).mul_(", "dk = (d_logits.mT @ q).mul_(1.001 * "),
    "dk of the last piece alone": ("dx[batch, piece.cols] += part", "dx[batch, piece.cols] = part"),
    "dq of the last piece alone": ("dq[batch, rows] += found", "dq[batch, rows] = found"),
    "missing cast": (
        "return logits if bias is None",
        "logits = logits.half().to(logits.dtype)\n    return logits if bias is None",
    ),
    "gradient of the log-sum-exp lost": ("excess -= row.d_lse", "pass"),
    "another dropout in dv": ("_group_sum(dropped.mT", "_group_sum(weights.mT"),
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
KERNEL = {
    "wrong factor on dk": ("(dk * scale).to(dk_ptr", "(dk * scale * 1.001).to(dk_ptr"),
    "a split's log-sum-exp not weighed": ("weights = (lse - whole", "weights = (0 * lse - whole"),
    "one split alone": ("return (out * weights[..., None]).sum(0)", "return (out * weights[..., None])[0]"),
    "dq of one split alone": ("else dq.sum(0)", "else dq[0]"),
    "queries of the first block alone": ("end.clamp(max=num_queries)", "end.clamp(max=1)"),
    "delta lost": ("_delta(problem, out, d_out, d_lse))", "0 * _delta(problem, out, d_out, d_lse))"),
    "gradient of the log-sum-exp lost": ("HAS_DLSE=d_lse is not None", "HAS_DLSE=False"),
    "second interval lost": ('"NUM_ENDS": len(ends)', '"NUM_ENDS": min(len(ends), 2)'),
    "second segment lost": ('"HAS_SEGMENTS": len(problem.segments) == 2', '"HAS_SEGMENTS": False'),
    "slopes lost": ('"HAS_SLOPES": slopes is not None', '"HAS_SLOPES": False'),
    "another dropout": ("threshold(problem.dropout_p), 1 /", "threshold(0.9 * problem.dropout_p), 1 /"),
    "dropped weights not made up for": ("1 / (1 - problem.dropout_p)", "1.0"),
    "missing cast": ("return x if x.stride(3) == 1", "return x.half().to(x.dtype) if x.stride(3) == 1"),
}
PLANTS = Plants(
    op=op,
    paths={"blockwise": blockwise, "kernel": kernel},
    bugs={"blockwise": BLOCKWISE, "kernel": KERNEL},
    checks=tuple(
        (spec, {"B": 2, "H": 2, "Hkv": 1, "Lq": 36, "Lk": 65, "K": 16})
        for spec in (PLAIN, CAUSAL, INTERVALS, BLOCKS, BIAS, DROPOUT, SEGMENTS)
    ),
)
