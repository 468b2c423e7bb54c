"""What a process of `tests.processes` has imported when it begins."""

from importlib import import_module

MODULES = (
    "matplotlib.figure",
    "peft",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
    "transformers.models.qwen2.modeling_qwen2",
    "mmcore.chat",
    "mmcore.cli",
    "mmcore.models.adapters",
    "mmcore.train.blip2_stage1",
    "mmcore.train.blip2_stage2",
    "mmcore.train.clip",
    "mmcore.train.llava",
)
for name in MODULES:
    import_module(name)
