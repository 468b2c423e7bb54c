"""What a process of `tests.processes` has imported when it begins."""

from importlib import import_module

MODULES = (
    "matplotlib.figure",
    "peft",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
    "transformers.models.qwen2.modeling_qwen2",
    "mmcore.tasks.terminal",
    "mmcore.cli",
    "mmcore.parts.adapters",
    "mmcore.systems.blip2.stage1",
    "mmcore.systems.blip2.stage2",
    "mmcore.systems.clip.recipe",
    "mmcore.systems.llava.recipe",
)
for name in MODULES:
    import_module(name)
