"""Language models of transformers, from folders; and a tiny one, to be trained from nothing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from mmcore.checkpoint import describe
from mmcore.ops import linear_cross_entropy, require
from mmcore.systems import entries
from mmcore.weights.files import LOCAL, read_folder, read_json

disable_progress_bar()  # of each shard that is read; a run has a bar of its own

PAD, START, END = "<pad>", "<s>", "</s>"


def load_language_model(folder: Path, *, dtype: torch.dtype | None) -> Any:
    """Loads a language model, causal or encoder-decoder, in evaluation mode on the CPU, in a dtype or as it is stored,
    from a folder of transformers with safetensors; of a larger model that is known here, such as a
    Blip2ForConditionalGeneration or a Llava, its language model. A ValueError without such a folder, of files that
    transformers does not load, and of weights that are missing.

    As it is stored, weights are mapped from their files, as of `mmcore.checkpoint.Stored`.
    """
    op, systems = "load_language_model", entries("FOLDERS")
    kind = str(read_json(op, folder / "config.json").get("model_type"))
    if kind in systems:
        whole = systems[kind].load()(folder, dtype=None)
        require(op, hasattr(whole, "language_model"), "folder must hold a language model, got a {} in {}", kind, folder)
        model = whole.language_model
    else:
        model = _from_transformers(op, folder)
    if dtype is not None:
        dtype_of = dtypes_of(model, dtype)
        for p in model.parameters():
            p.data = p.data.to(dtype_of(p))
    return model.eval()


def dtypes_of(model: Any, dtype: torch.dtype) -> Callable[[Tensor], torch.dtype]:
    """Of a language model's weights in `dtype`: those that have another than the model, such as a router's bias in
    float32, keep theirs."""
    own = model.dtype
    return lambda p: dtype if p.dtype == own else p.dtype


def _from_transformers(op: str, folder: Path) -> Any:
    def refused(error: Exception) -> ValueError:
        why = str(error).splitlines()[0]
        return ValueError(f"{op}: folder must hold a language model, got {folder}: {why}")

    try:
        config = AutoConfig.from_pretrained(folder, **LOCAL)
    except (OSError, ValueError) as error:
        raise refused(error) from error
    kinds: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    if config.is_encoder_decoder:
        kinds = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    is_known = type(config) in kinds
    require(op, is_known, "folder must hold a language model, got a {} in {}", config.model_type, folder)
    state = read_folder(op, folder)  # pickles are not read
    options = {"state_dict": state, "dtype": "auto", "output_loading_info": True}
    try:
        model, info = kinds[type(config)].from_pretrained(None, config=config, **options)
    except (OSError, SafetensorError, RuntimeError, ImportError) as error:
        raise refused(error) from error
    missing = sorted(info["missing_keys"])[:3]
    require(op, not missing, "folder must hold every weight of the model, missing {}", ", ".join(missing))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return with_origins(model, state)


def with_origins(model: Any, state: Mapping[str, Any]) -> Any:
    """A model of whose weights those that are mapped tensors of `state` know it: `origin` is where they lie in memory,
    and the tensor's."""
    origins = {x.data_ptr(): x.origin for x in state.values() if hasattr(x, "origin")}
    for p in model.parameters():
        if p.data_ptr() in origins:
            p.origin = p.data_ptr(), *origins[p.data_ptr()]
    return model


@contextmanager
def whole(weight: Any) -> Iterator[Tensor]:
    """A weight, gathered for as long as the block lasts where ZeRO-3 has split it. Collective."""
    if not hasattr(weight, "ds_id"):
        yield weight.detach()
        return
    weight.all_gather()
    yield weight.detach()
    weight.partition()


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
