"""What shows that LLaVA's stages learn: runs on scanned digits, from a tower that is trained first."""

from mmcore.recipe import Claim, Proof

TOWER = ("clip", "--data digits --val-fraction 0.2 --epochs 15 --lr 1e-3 --ema 0.99")
COMMON = "--data digits --val-fraction 0.2 --batch-size 32 --max-answer 16"
START = f"{COMMON} --vision {{0}} --llm tiny --llm-steps 60"
FIRST = ("llava-stage1", f"{START} --lr 1e-3 --epochs 4")
LONGER = ("llava-stage1", f"{START} --lr 1e-2 --epochs 15")
SECOND = ("llava-stage2", f"{COMMON} --lr 1e-3 --from {{1}} --epochs 6")

STAGE1 = Proof([TOWER, LONGER], [Claim("answer accuracy (held-out)", "answer accuracy", 0.4)])
STAGE2 = Proof([TOWER, FIRST, SECOND], [Claim("answer accuracy (held-out)", "answer accuracy", 0.7)])
