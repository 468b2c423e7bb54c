"""What a process of `tests.processes` has imported when it begins."""

import gc
from importlib import import_module

MODULES = (
    "matplotlib.figure",
    "peft",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
    "transformers.models.qwen2.modeling_qwen2",
    "mmcore.export",
    "mmcore.plan.command",
    "mmcore.systems.blip2.recipe",
    "mmcore.systems.clip.recipe",
    "mmcore.systems.llava.recipe",
    "mmcore.tasks.caption",
    "mmcore.tasks.command",
    "mmcore.tasks.retrieval",
    "mmcore.tasks.terminal",
    "mmcore.tasks.vqa",
    "mmcore.tasks.zeroshot",
    "mmcore.train.trainer",
)
for name in MODULES:
    import_module(name)

gc.freeze()  # DeepSpeed collects garbage for each engine, and looks at all that there is
