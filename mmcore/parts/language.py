"""Language models of transformers, from folders; and a tiny one, to be trained from nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from mmcore.checkpoint import describe
from mmcore.ops import linear_cross_entropy, require
from mmcore.systems import entries
from mmcore.weights.files import LOCAL, read_json

disable_progress_bar()  # of each shard that is read; a run has a bar of its own

PAD, START, END = "<pad>", "<s>", "</s>"


def load_language_model(folder: Path, *, dtype: torch.dtype | None) -> Any:
    """Loads a language model, causal or encoder-decoder, in evaluation mode on the CPU, in a dtype or as it is stored,
    from a folder of transformers with safetensors; of a larger model that is known here, such as a
    Blip2ForConditionalGeneration or a Llava, its language model. A ValueError without such a folder, of files that
    transformers does not load, of weights that are missing, and of logits that are not the last layer's, W x + b."""
    op, systems = "load_language_model", entries("FOLDERS")
    kind = str(read_json(op, folder / "config.json").get("model_type"))
    if kind in systems:
        whole = systems[kind].load()(folder, dtype=dtype)
        require(op, hasattr(whole, "language_model"), "folder must hold a language model, got a {} in {}", kind, folder)
        model = whole.language_model
    else:
        model = _from_transformers(op, folder, dtype)
    if not model.config.is_encoder_decoder:
        check_head(op, model)
    return model.eval()


def _from_transformers(op: str, folder: Path, dtype: torch.dtype | None) -> Any:
    # pickles are not read
    require(op, any(folder.glob("*.safetensors")), "folder must hold *.safetensors, got {}", folder)
    options = {**LOCAL, "use_safetensors": True, "output_loading_info": True}
    try:
        config = AutoConfig.from_pretrained(folder, **LOCAL)
        kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model, info = kind.from_pretrained(folder, dtype="auto" if dtype is None else dtype, **options)
    except (OSError, SafetensorError, ValueError, RuntimeError, ImportError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{op}: folder must hold a language model, got {folder}: {why}") from error
    missing = sorted(info["missing_keys"])[:3]
    require(op, not missing, "folder must hold every weight of the model, missing {}", ", ".join(missing))
    return model


def load_language_tokenizer(folder: Path) -> Any:
    """The tokenizer beside a language model, which pads by its end of text if by nothing else; a ValueError without
    either."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
    except (OSError, ValueError, ImportError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"load_language_tokenizer: folder must hold a tokenizer, got {folder}: {why}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    ends = tokenizer.pad_token_id is not None and tokenizer.eos_token_id is not None
    require("load_language_tokenizer", ends, "folder's tokenizer must have an end of text, got {} without", folder)
    return tokenizer


def fingerprint(folder: Path) -> dict[str, Any]:
    """Size and SHA-256 of each file that makes the model and its tokenizer."""
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (".json", ".safetensors", ".model", ".txt")]
    return {p.name: describe(p) for p in files}


def tiny_tokenizer(texts: Sequence[str], *, vocab_size: int = 1024) -> Any:
    """A byte-level BPE learned from one or more texts; the same texts give the same one."""
    require("tiny_tokenizer", len(texts) > 0, "texts must hold at least one string, got {}", "none")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"special_tokens": [PAD, START, END], "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, **options)
    learner.train_from_iterator(texts, trainer, length=len(texts))
    # a text begins with a token that the model knows to begin a text, whatever comes before that
    start = (START, learner.token_to_id(START))
    learner.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[start])
    return PreTrainedTokenizerFast(tokenizer_object=learner, pad_token=PAD, bos_token=START, eos_token=END)


def tiny_language_model(tokenizer: Any) -> LlamaForCausalLM:
    """A Llama of a million parameters, untrained."""
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    return LlamaForCausalLM(LlamaConfig(**shape, **sizes, **ids, tie_word_embeddings=True))


class LanguageHead(nn.Module):
    """A language model's last layer and the cross-entropy behind it; its weights are that layer's own, which ZeRO-3
    gathers for either."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias

    def forward(self, states: Tensor, labels: Tensor) -> Tensor:
        """The sum over [B, T, D] states whose int64 [B, T] labels are not -100: []."""
        states, labels = states.flatten(0, 1), labels.flatten()
        return linear_cross_entropy(states, self.weight, labels, bias=self.bias, reduction="sum")


@torch.no_grad()
def check_head(op: str, model: Any) -> None:
    """Raise a ValueError unless logits are W x + b of the last states: some models scale or cap them, which the fused
    loss does not."""
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    model.eval()
    head, states = model.get_output_embeddings(), model.base_model(input_ids=tokens).last_hidden_state
    expected = model(input_ids=tokens).logits
    same = torch.allclose(head(states).float(), expected.float(), rtol=1e-3, atol=1e-3)
    require(
        op, same, "model must have logits W x + b of its last states, got others from a {}", model.config.model_type
    )
