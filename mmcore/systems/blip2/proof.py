"""What shows that BLIP-2's stages learn: runs on scanned digits, from a tower that is trained first."""

from mmcore.recipe import Claim, Proof

TOWER = ("clip", "--data digits --epochs 15 --lr 1e-3 --ema 0.99")
COMMON = "--data digits --vision {0} --batch-size 64 --lr 1e-3"
FIRST = ("blip2-stage1", f"{COMMON} --epochs 6")
LONGER = ("blip2-stage1", f"{COMMON} --epochs 20")
SECOND = (
    "blip2-stage2",
    "--data digits --from {1} --llm tiny --task vqa --epochs 6 --batch-size 64 --lr 1e-3 --ema 0.99",
)

STAGE1 = Proof([TOWER, LONGER], [Claim("ITM accuracy (held-out)", "ITM accuracy", 0.75)])
STAGE2 = Proof([TOWER, FIRST, SECOND], [Claim("VQA accuracy (held-out)", "VQA accuracy", 0.5)])
