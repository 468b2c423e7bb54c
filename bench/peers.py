"""The libraries that bench measures against: which of them are here, in what version, and why the others are not."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType

import torch


@dataclass(frozen=True)
class Peer:
    """What is imported, and from which distribution; `beside` is what it is timed beside; where `needs_gpu`, a CPU has
    no path of it."""

    module: str
    distribution: str
    beside: str
    needs_gpu: bool = True


PEERS: Mapping[str, Peer] = {
    "cut_cross_entropy": Peer("cut_cross_entropy", "cut-cross-entropy", "contrastive_loss, linear_cross_entropy"),
    "flash_attn_2": Peer("flash_attn.flash_attn_interface", "flash-attn", "attention"),
    "flash_attn_3": Peer("flash_attn_interface", "flash_attn_3", "attention"),
    "flash_attn_4": Peer("flash_attn.cute", "flash-attn-4", "attention"),
    "inf_cl": Peer("inf_cl", "inf-cl", "contrastive_loss"),
    "liger": Peer("liger_kernel.transformers.fused_linear_cross_entropy", "liger-kernel", "linear_cross_entropy"),
    "open_clip": Peer("open_clip", "open_clip_torch", "clip", needs_gpu=False),
    "sentence_transformers": Peer(
        "sentence_transformers.sentence_transformer.losses",
        "sentence-transformers",
        "contrastive_loss",
        needs_gpu=False,
    ),
    "siglip-kernel": Peer("siglip_kernel", "siglip-kernel", "sigmoid_loss"),
    "timm": Peer("timm.utils.model_ema", "timm", "ema_update_", needs_gpu=False),
    "transformers": Peer("transformers", "transformers", "clip, blip2, llava, layers", needs_gpu=False),
    "xformers": Peer("xformers.ops", "xformers", "attention"),
}


def missing(name: str) -> str | None:
    """Why the peer cannot be timed here: a word that ends "NAME ..."; None where it can."""
    found = _found(name)
    return found if isinstance(found, str) else None


def load(name: str) -> ModuleType:
    """The peer's module.

    Raises:
        ImportError: it cannot be timed here.
    """
    found = _found(name)
    if isinstance(found, str):
        raise ImportError(f"{name} {found}")
    return found


@cache
def _found(name: str) -> ModuleType | str:
    peer = PEERS[name]
    if find_spec(peer.module.partition(".")[0]) is None:
        return "is not installed"
    if peer.needs_gpu and not torch.cuda.is_available():
        return "runs on GPUs only"
    try:
        return import_module(peer.module)
    # what a wheel for another torch, CUDA or Python raises; its first line is reported
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and peer.module.startswith(str(error.name)):
            return "is not installed"
        return f"cannot be imported: {str(error).splitlines()[0]}"


def facts() -> dict[str, str]:
    """By peer its version, or why it is not timed."""
    return {name: missing(name) or _version(PEERS[name].distribution) for name in PEERS}


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of an unknown version"
