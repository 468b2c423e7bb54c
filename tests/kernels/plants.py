"""Bugs to plant, which the contract must see, by what is changed and not by its text."""

from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType

from bench.ops import linear_cross_entropy as words
from bench.ops import maxsim as late
from bench.ops import sigmoid as pairs
from bench.ops import token_contrastive as tokens
from bench.ops.adamw import AVERAGED
from bench.ops.attention import BIAS, BLOCKS, CAUSAL, DROPOUT, INTERVALS, PADDED, PLAIN, SEGMENTS
from bench.ops.contrastive import LOSS, UNSEEN, VARIANTS
from bench.ops.distill import SPECS as DISTILL
from bench.ops.ema import EMA, SHADOWED
from bench.ops.ewc import EWC, FISHER
from bench.ops.norm import CLIP, NORM
from bench.ops.packnet import MASKS
from bench.ops.statistics import STATS
from bench.spec import OpSpec, Shape
from mmkernels.attention import op as attention
from mmkernels.contrastive import op as contrastive
from mmkernels.distill import op as distill
from mmkernels.multi_tensor import paths as multi_tensor
from mmkernels.multi_tensor.table import CHUNK
from mmkernels.sigmoid import op as sigmoid
from mmkernels.token_contrastive import op as token_contrastive
from tests.kernels.planting import Bug


@dataclass(frozen=True)
class Op:
    """What must turn red: the contract of specs and shapes, in float32 and bfloat16.

    Attributes:
        module: of the op, which holds each path under the path's name.
        checks: specs and shapes.
        cases: the data; if none, each spec's plainest.
    """

    module: ModuleType
    checks: tuple[tuple[OpSpec, Shape], ...]
    cases: tuple[str, ...] = ()


HEADS, PAIR = {"B": 2, "H": 2, "Hkv": 1, "Lq": 36, "Lk": 65, "K": 16}, {"N": 2, "L": CHUNK + 40}
OPS = {
    "attention": Op(
        attention, tuple((x, HEADS) for x in (PLAIN, CAUSAL, INTERVALS, BLOCKS, BIAS, DROPOUT, SEGMENTS, PADDED))
    ),
    "contrastive": Op(
        contrastive,
        (
            (STATS, STATS.shapes[1]),
            *((x, x.shapes[-1]) for x in (STATS, LOSS, VARIANTS[-1])),
            # of these a shift serves, in bfloat16
            *((replace(x, cases=("cone",)), x.shapes[-1]) for x in (STATS, LOSS, UNSEEN)),
            (UNSEEN, UNSEEN.shapes[-1]),
        ),
    ),
    "distill": Op(distill, tuple((x, shape) for x in DISTILL for shape in x.shapes[1:]), ("plain", "sharp")),
    "linear_cross_entropy": Op(
        import_module("mmkernels.linear_cross_entropy.op"),
        tuple((x, x.shapes[-1]) for x in (words.PLAIN, words.BIAS, words.SMOOTHING_Z, words.ROWS)),
    ),
    "maxsim": Op(
        import_module("mmkernels.maxsim.op"),
        (
            (late.PLAIN, {"B": 2, "Lq": 3, "N": 2, "Ld": 20, "D": 20}),
            (late.PLAIN, late.PLAIN.shapes[1]),
            (late.MASKED, late.MASKED.shapes[2]),
            (replace(late.PLAIN, cases=("ties",)), late.PLAIN.shapes[1]),
        ),
    ),
    "adamw_update": Op(multi_tensor, ((AVERAGED, {"N": 2, "L": 500}),)),
    "apply_masks": Op(multi_tensor, ((MASKS, PAIR),), ("bool", "owners")),
    "ema_update": Op(multi_tensor, ((EMA, {"N": 3, "L": CHUNK + 40}), (SHADOWED, {"N": 2, "L": 50}))),
    "ewc": Op(multi_tensor, ((FISHER, {"N": 2, "L": 50}), (EWC, PAIR))),
    "norm": Op(multi_tensor, ((NORM, PAIR), (CLIP, {"N": 1, "L": 3})), ("clipped", "kept")),
    "sigmoid": Op(
        sigmoid,
        ((pairs.LABELS, pairs.LABELS.shapes[1]), *((x, x.shapes[-1]) for x in (pairs.LOSS, pairs.ROWS, pairs.LABELS))),
    ),
    "token_contrastive": Op(
        token_contrastive,
        (
            (tokens.STATS, tokens.STATS.shapes[-1]),
            (replace(tokens.STATS, cases=("ties",)), tokens.STATS.shapes[-2]),
            (tokens.RECTANGLE, tokens.RECTANGLE.shapes[0]),
            *((tokens.LOSS, shape) for shape in tokens.LOSS.shapes),
        ),
    ),
    # which has one path: every device runs it
    "late": Op(token_contrastive, ((tokens.LATE_STATS, tokens.LATE_STATS.shapes[0]),), tokens.LATE_STATS.cases),
}


def bugs(path: str) -> dict[str, dict[str, Bug]]:
    """By op, by name."""
    found: dict[str, dict[str, Bug]] = {}
    op = of = ""
    for line in TABLE.replace("\\\n", "").strip().splitlines():
        if line.startswith("# "):
            op, of = line[2:].split()
        elif of in (path, "late"):
            name, _, bug = line.partition(": ")
            place, _, reads = bug.partition(" -> ")
            function, _, target = place.partition(" ")
            found.setdefault(op, {})[name] = Bug(function, target, reads)
    return found


# an op and a path, then its bugs: their names, where they are, and what is read there
TABLE = r"""
# attention blockwise
unwritten rows: attention_fwd transpose -> 0 * _
log-sum-exp of the first piece alone: _combined logaddexp -> _0
wrong factor on dk: _tile_backward scale@1 -> 1.001 * _
dq of the last piece alone: attention_bwd dq += -> =
missing cast: _logits _product -> _.half().float()
gradient of the log-sum-exp lost: _tile_backward d_lse@1 -> 0 * _
another dropout in dv: _tile_backward dropped@1 -> weights
causal corner left open: _logits triu_ -> _self.triu_(2)
a group's heads not summed: _group_sum sum -> _self[:, :, 0]
a bias of the first tile's rows: _tile_backward d_logits@2 -> 2 * _
# attention kernel
wrong factor on dk: _attention_bwd_k_kernel scale@1 -> 1.001 * _
one split alone: _combined sum -> _self[0]
dq of one split alone: _query_gradient sum -> _self[0]
queries of the first block alone: _spans num_queries@2 -> 1
gradient of the log-sum-exp lost: _rows d_lse@2 -> None
padding of keys lost: _arguments keys -> None
padding of keys lost in dk: _attention_bwd_k_kernel where@4 -> _1
second interval lost: _arguments len@2 -> min(_, 2)
another dropout: _numbers dropout_p -> 0.9 * _
missing cast: _operand x@4 -> _.half().to(_.dtype)
# contrastive blockwise
wrong factor on da: contrastive_bwd mul_ -> _.mul_(1.001)
unwritten column: _tiles num_cols -> _ - 1
missing cast: contrastive_fwd _cosines -> _.half().float()
the teacher's expectation of its own logits: contrastive_fwd cosines@1 -> of_teacher
positive counted twice: _grad_tile positives -> None
positives of the first tile taken for all: contrastive_fwd start -> 0
positives' gradient of b lost: contrastive_bwd db@2 -> None
what is not seen counted: contrastive_fwd exclude@3 -> None
gradient of what is not seen: _grad_tile exclude@2 -> None
# contrastive kernel
wrong factor on da: contrastive_bwd mul_ -> _.mul_(1.001)
wrong factor on a pair's da: _contrastive_pairs_grad_kernel factor -> 1.001 * _
unwritten tile: _contrastive_fwd_kernel tiles@3 -> _ - 1
missing cast: _contrastive_fwd_kernel product -> _.to(tl.float16).to(tl.float32)
rows outside counted in column sums: _contrastive_fwd_kernel where@2 -> _1
rows outside counted under a shift: _contrastive_fwd_kernel where@5 -> shift + tl.zeros([BLOCK_M], tl.float32)
columns outside counted under a shift: _contrastive_fwd_kernel where@1 -> _1
sums not rescaled to the new maximum: _merged shares -> 1.0
a positive's columns left out of a pair's loss: _contrastive_combine_kernel col_lse@2 -> positive
positive counted twice: _contrastive_bwd_kernel where@1 -> _2
positive counted twice under a shift: _contrastive_bwd_kernel where@4 -> _2
gradient's unit not taken back: contrastive_bwd unit -> 1
natural units of the weights taken for binary ones: _contrastive_weights_kernel per_nat -> 1.0
second chunk's rows those of the first: _products rows@1 -> slice(0, _.stop - _.start)
teacher's share of dL/dS lost: _contrastive_bwd_kernel _softmaxes@1 -> 0 * _
what is not seen counted: _contrastive_fwd_kernel _seen@0 -> _0
what is not seen counted under a shift: _contrastive_fwd_kernel _seen@3 -> _0
gradient of what is not seen: _contrastive_bwd_kernel _seen@0 -> _0
gradient of what is not seen under a shift: _contrastive_bwd_kernel _seen@1 -> _0
# distill blockwise
student's temperature taken for the teacher's: _forward 1@1 -> 0
centre ignored in forward: _forward center -> None
wrong factor on the gradient: _backward scale@1 -> 1.001 * _
last rows left out: _blocks len@1 -> _ - 1
missing cast: _forward _shifted -> _.half().float()
upstream gradient ignored: _backward grad -> torch.ones_like(_)
# distill kernel
teacher's temperature ignored in forward: _distillation_loss_fwd_kernel teacher_temp -> 1
centre ignored in forward: _distillation_loss_fwd_kernel HAS_CENTER -> False
sums not rescaled to the new maximum: _fold exp@1 -> 1
cross of a split not moved: _combined moved -> 0
one class left out of a split: _distillation_loss_fwd_kernel last_n@1 -> _ - 1
wrong factor on the gradient: _distillation_loss_bwd_kernel student_temp@1 -> 1
missing cast: _distillation_loss_fwd_kernel load@2 -> _.to(tl.float16)
unwritten column: _distillation_loss_bwd_kernel mask_n@3 -> offs_n < C - 1
# linear_cross_entropy blockwise
wrong factor on dh: add_targets coef -> 0.5 * _
unwritten column: _fold len@2 -> _ - cols
missing cast: _fold matmul_nt -> _.bfloat16().float()
target counted twice: linear_cross_entropy_fwd of_part@1 -> _ - (1 << 40)
a later chunk overwrites dw: _accumulate first_row -> 0
half of the z-loss's gradient lost: coefficients z_loss -> _ / 2
first tile's bias in every tile: _fold of_cols@1 -> slice(tile.shape[1])
a repeated target counted once: _add_rows index_add_ -> _self.index_copy_(_0, _1, _2)
# linear_cross_entropy kernel
wrong factor on dh: linear_cross_entropy_fwd 1@3 -> 2
bias left out of the logits: _linear_cross_entropy_fwd_kernel load@4 -> 0 * _
unwritten column: _linear_cross_entropy_fwd_kernel mask_v@4 -> offs_v < V - 1
missing cast: _linear_cross_entropy_fwd_kernel grad@1 -> _.to(tl.float16)
smoothing left out of the target's gradient: _linear_cross_entropy_fwd_kernel smoothing@1 -> 0.0
half of the z-loss's gradient lost: _linear_cross_entropy_fwd_kernel 2 -> 1
sums not rescaled to the new maximum: _linear_cross_entropy_fwd_kernel exp -> 1
target counted twice: _linear_cross_entropy_fwd_kernel where@1 -> _2
gradient's unit not taken back: linear_cross_entropy_fwd div_ -> _self
a later chunk overwrites dw: linear_cross_entropy_fwd float@1 -> 0.0
second chunk's targets forgotten: linear_cross_entropy_fwd rows@1 -> slice(len(hidden[_]))
# maxsim blockwise
missing cast: maxsim_fwd matmul_nt -> _.half().float()
unwritten document: _tiles len@1 -> _ - 1
masked tokens counted: maxsim_fwd masked_fill_ -> _self
a masked document's place kept: maxsim_fwd masked_fill -> _self
places of the first document in all: maxsim_bwd first -> 0 * _
a query's weight for another's tokens: maxsim_bwd repeat_interleave -> _self.repeat(1, num_each)
documents' gradient thrown away: maxsim_bwd dd@1 -> 0 * _
# maxsim kernel
missing cast: _maxsim_fwd_kernel dot -> _.to(tl.float16).to(tl.float32)
missing cast of wide tokens: _maxsim_fwd_kernel dot_tile -> _.to(tl.float16).to(tl.float32)
masked tokens counted: _fold_tile HAS_MASK -> False
tokens beyond the end counted: _fold_tile where -> _1
the last best taken: _fold_tile > -> >=
the last of a tile's best taken: _fold_tile min -> tl.max(tl.where(products == tile_max[:, None], offs_t, -1), 1)
wide tokens cut: _maxsim_fwd_kernel D -> BLOCK_D
one split's documents alone: _of_queries sum -> _self[0]
a query's weight for another's tokens: _maxsim_bwd_q_kernel offs_b -> offs_m % B
unwritten column: _maxsim_bwd_d_kernel offs_d@2 -> _ + 1
first document's gradient in all: _maxsim_bwd_d_kernel place@2 -> 0
gradient's unit not taken back: _maxsim_bwd_d_kernel unit@1 -> 1.0
# adamw_update blockwise
no weight decay: adamw_update_ keep -> 1
the new moment of the old gradient: adamw_update_ grad -> param
no root: adamw_update_ sqrt -> _self
no bias correction: adamw_update_ root -> 1
no clamp: adamw_update_ clamp -> _self
an average of the old: adamw_update_ p@3 -> g
# adamw_update kernel
no weight decay: _adamw_chunk keep -> 1
no root: _adamw_chunk sqrt_rn -> _0
no bias correction: _adamw_chunk root -> 1
no clamp: _adamw_chunk high -> 1e9
an average of the gradient: _adamw_chunk p@6 -> g
copies of the average: _adamw_chunk p@5 -> m
# apply_masks blockwise
nothing goes: apply_masks_ masked_fill_ -> pass
the first owner goes: apply_masks_ < -> <=
the last owner goes: apply_masks_ > -> >=
later owners stay: apply_masks_ last -> 255
# apply_masks kernel
nothing goes: _apply_masks_chunk where -> _2
the first owner goes: _apply_masks_chunk < -> <=
the last owner goes: _apply_masks_chunk > -> >=
later owners stay: _apply_masks_chunk last_owner -> 255
every chunk is kept: _apply_masks_chunk max -> 0
elements of the tensor's first: _apply_masks_chunk first@1 -> 0
# ema_update blockwise
wrong factor: ema_update_ weight -> 1.01 * _
unwritten part: parts_of 0@1 -> PART
missing cast: ema_update_ target@1 -> _.half()
a shadow of the source: ema_update_ mean@2 -> source
first tensor alone: parts_of number -> 0
# ema_update kernel
wrong factor: _mean weight@1 -> 1.01 * _
unwritten part: _store n -> _ - 1
missing cast: _store x -> _.to(tl.float16)
a shadow of the source: _ema_chunk mean@2 -> source
one kind alone: _walk kind -> 9
first chunk alone: _address first -> 0
# norm blockwise
no squares: squares square -> _self
last part alone: squares total += -> =
no bound: clip_ clamp -> _self
clipped twice: clip_ factor@2 -> _ * _
what is clipped is kept: clip_ 1@1 -> factor + (factor == 1)
# norm kernel
all chunks in one place: _squares_chunk program_id -> 0
a scale that is not undone: _squares_chunk size -> 1
no bound: _clip_kernel where -> _2
clipped twice: _clip_chunk factor -> _ * _
what is clipped is kept: _clip_kernel != -> ==
# ewc blockwise
nothing fades: fisher_accumulate_ decay -> 1
no squares of gradients: fisher_accumulate_ g -> 1
missing cast: ewc_penalty_fwd param -> _.half()
no strength in the gradient: ewc_penalty_bwd factor -> torch.ones_like(_)
a gradient towards zero: ewc_penalty_bwd anchor -> 0 * _
# ewc kernel
nothing fades: _fisher_accumulate_chunk decay -> 1
no squares of gradients: _fisher_accumulate_chunk grad -> 1
all chunks in one place: _ewc_penalty_fwd_chunk program_id -> 0
no strength in the gradient: _ewc_penalty_bwd_chunk factor -> 1
a gradient towards zero: _ewc_penalty_bwd_chunk anchor -> 0
a gradient in place of the anchor: _ewc_penalty_bwd_chunk 3 -> 1
# sigmoid blockwise
wrong factor on da and db: sigmoid_fwd mul_@2 -> pass
unwritten columns: sigmoid_fwd len@4 -> _ - 1
missing cast: sigmoid_fwd matmul_nt -> _.half().float()
row's labels of another tile: sigmoid_fwd of_rows@1 -> slice(_.stop - r)
da of the last tile alone: sigmoid_fwd da += -> =
upstream gradient ignored: sigmoid_fwd coef@2 -> torch.ones_like(_)
scale gets the bias's gradient: sigmoid_fwd dscale -> dbias.clone()
# sigmoid kernel
wrong factor on da: _sigmoid_bwd_kernel factor -> 1.001 * _
gradient's unit not taken back: _sigmoid_bwd_kernel UNIT -> 2.0
missing cast: _sigmoid_fwd_kernel product -> _.to(tl.float16).to(tl.float32)
unwritten tile: _sigmoid_fwd_kernel tiles_m@1 -> _ - 1
columns outside counted: _sigmoid_fwd_kernel where@2 -> _1
positive counted twice: _sigmoid_fwd_kernel inside@1 -> (offs_n < N)[None, :]
labels cut to 32 bits: _label_ids searchsorted -> x.int()
second chunk's rows those of the first: sigmoid_fwd rows@1 -> slice(0, _.stop - _.start)
db of the last chunk alone: sigmoid_fwd addmm_fp32_@1 -> addmm_fp32_(db, grad.T, a_part, beta=0.0)
a large logit's excess forgotten: _part_of_tile maximum -> 0.0 * _
# token_contrastive blockwise
wrong factor on gradients: token_contrastive_bwd mul_ -> pass
last column left out: tiles num_cols@1 -> _ - 1
missing cast: best_tokens matmul_nt -> _.half().float()
positive's gradient lost: _add_positives weight -> 0 * _
gradient to the last of the best: first_best arange -> _.flip(0)
gradient to another row's token: places stride -> 0
rows' labels ignored: add_row_weights row_matched -> 0 * _
masked tokens compete: best_tokens masked_fill_ -> pass
# token_contrastive kernel
wrong factor on dtokens: token_contrastive_bwd factor -> unit
wrong factor on db: token_contrastive_bwd mul_ -> pass
unwritten column: _token_contrastive_combine_kernel mask_n -> offs < N - 1
missing cast: _token_contrastive_fwd_kernel best@2 -> _.to(tl.float16).to(tl.float32)
rows outside counted in column sums: _token_contrastive_fwd_kernel inside -> (offs_n < N)[:, None]
sums not rescaled to the common maximum: _merged shares -> 1
sums not rescaled to a new maximum: _merged shrink -> 1
gradient to the last of the best: _best_tokens min -> \
tl.minimum(tl.max(tl.where(products == largest[:, :, None], offs_q[None, None, :], 0), 2), Q - 1)
a later block of tokens wins ties: _best_tokens > -> >=
gradient's unit not taken back: token_contrastive_bwd unit@1 -> 1
second chunk's rows forgotten: token_contrastive_bwd of_rows -> _self
a program's second tile left out: _token_contrastive_fwd_kernel num_programs -> tiles
columns' totals of the last rows alone: _joined sum -> _self[-1]
masked tokens compete: _best_tokens != -> >=
tokens beyond the last compete: _best_tokens IS_WHOLE -> True
# late late
wrong factor on gradients: token_contrastive_bwd mul_ -> pass
rows' maximum over the wrong tokens: _tile amax@2 -> _self.amin(_0)
masked tokens count in the mean: _tile counts_q@1 -> 1.0 * tokens_mask[:, :, None]
masked tokens compete: _tile masked_fill_ -> _self.abs()
columns' positives ignored: token_contrastive_fwd add_cols -> pass
gradient to another row's token: _add_cols shape -> (0, 0)
"""
