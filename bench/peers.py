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
    """A library.

    Attributes:
        module: what is imported.
        distribution: what is installed for it.
        beside: what it is timed beside.
        needs_gpu: whether a CPU has no path of it.
        read: the version whose signature the call here follows; "" of what has not changed in years.
        needs: a module that it imports in a call alone.
    """

    module: str
    distribution: str
    beside: str
    needs_gpu: bool = True
    read: str = ""
    needs: str = ""


LCE = "linear_cross_entropy"
PEERS: Mapping[str, Peer] = {
    "cudnn": Peer("cudnn.flex_attention", "nvidia-cudnn-frontend", "attention", read="1.32.0"),
    "cut_cross_entropy": Peer("cut_cross_entropy", "cut-cross-entropy", f"contrastive_loss, {LCE}", read="25.1.1"),
    "flash_attn_2": Peer("flash_attn.flash_attn_interface", "flash-attn", "attention", read="commit 0053002"),
    "flash_attn_3": Peer("flash_attn_interface", "flash_attn_3", "attention", read="commit c082294"),
    "flash_attn_4": Peer("flash_attn.cute", "flash-attn-4", "attention", read="4.0.0b36"),
    "flashmask": Peer("paddle", "paddlepaddle-gpu", "attention", read="documentation of 3.3"),
    "flex_flash": Peer("flash_attn.cute", "flash-attn-4", "attention", read="4.0.0b36 under torch 2.13"),
    "inf_cl": Peer("inf_cl", "inf-cl", "contrastive_loss", read="1.2.1"),
    "late_interaction": Peer(
        "late_interaction_kernels", "late-interaction-kernels", "token_contrastive_loss", read="0.4.5"
    ),
    "liger": Peer("liger_kernel.functional", "liger-kernel", LCE, read="0.8.5"),
    "liger_cute": Peer("liger_kernel.functional", "liger-kernel", LCE, read="0.8.5", needs="cutlass"),
    "open_clip": Peer("open_clip", "open_clip_torch", "clip", needs_gpu=False),
    "quack": Peer("quack.linear_cross_entropy", "quack-kernels", LCE, read="0.6.5"),
    "sentence_transformers": Peer(
        "sentence_transformers.sentence_transformer.losses",
        "sentence-transformers",
        "contrastive_loss",
        needs_gpu=False,
    ),
    "siglip-kernel": Peer("siglip_kernel", "siglip-kernel", "sigmoid_loss", read="0.1.2"),
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
    if peer.needs and find_spec(peer.needs) is None:
        return f"needs {peer.needs}, which is not installed"
    try:
        return import_module(peer.module)
    # what a wheel for another torch, CUDA or Python raises; its first line is reported
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and peer.module.startswith(str(error.name)):
            return "is not installed"
        return f"cannot be imported: {str(error).splitlines()[0]}"


def facts() -> dict[str, str]:
    """By peer its version, or why it is not timed, and the version whose signature was read."""
    found = {name: missing(name) or _version(PEERS[name].distribution) for name in PEERS}
    return {
        name: fact + (f" ({PEERS[name].read} was read)" if PEERS[name].read else "") for name, fact in found.items()
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of an unknown version"
