"""LLaVA under lmms-eval: `lmms-eval --model mmcore_llava --model_args pretrained=RUN --tasks ...`.

Where mmcore is installed, lmms-eval finds it by the entry point `lmms_eval.models`. Written for lmms-eval 0.7.3, which
nothing here imports until it asks.
"""

import importlib
import importlib.util
from typing import Any

NAME = "mmcore_llava"


def manifest() -> Any:
    """The name and the class behind it, as lmms-eval's registry takes them."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise ModuleNotFoundError(f"{NAME} needs lmms-eval, which is not installed: pip install lmms-eval")
    kind = importlib.import_module("lmms_eval.models.registry_v2").ModelManifest
    return kind(model_id=NAME, simple_class_path=f"{__name__}.model.MmcoreLlava")


def register() -> None:
    """Makes the name known where mmcore runs from its sources and has no entry point."""
    found = manifest()
    importlib.import_module("lmms_eval.models").MODEL_REGISTRY_V2.register_manifest(found, overwrite=True)
