"""Tiny tokenizers of the kinds that language models have, and conversations, for the tests of chats."""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mmcore.data.sources.conversations import IMAGE, Conversation, Turn

MARKERS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant. USER: What is it? ASSISTANT: A cat.",
    "USER: Where is the dog? ASSISTANT: On the mat, as it was before.\n",
    "a photo of two dogs\nsystem\n\nuser\n\nassistant\n\nYou are a helpful assistant.",
] * 5


def llama(*, has_begin: bool = True) -> Any:
    """Llama's: SentencePiece's BPE with '▁' before a text and in place of spaces, bytes for what is unknown."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learn(learner, ["<unk>", "<s>", "</s>"], [text.replace("\n", " ") for text in TEXTS], [])
    learned = json.loads(learner.to_str())["model"]
    vocab = {token: i for token, i in learned["vocab"].items() if token != "\n"}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    merges = [(left, right) for left, right in learned["merges"]]
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(core, "<s>" if has_begin else None, "</s>")


def byte_bpe(*, begin: str | None = None, end: str | None = "<|endoftext|>", merges_all: bool = False) -> Any:
    """GPT-2's, Qwen's and Llama 3's: BPE of bytes, with the markers of chats; `merges_all` joins across words."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merges_all)
    core.decoder = decoders.ByteLevel()
    named = [token for token in (begin, end) if token]
    learn(core, [*named, *MARKERS], TEXTS, sorted(pre_tokenizers.ByteLevel.alphabet()))
    return wrapped(core, begin, end)


def learn(core: Tokenizer, special: list[str], texts: Sequence[str], alphabet: list[str]) -> None:
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=700, show_progress=False, special_tokens=special, initial_alphabet=alphabet),
    )


def wrapped(core: Tokenizer, begin: str | None, end: str | None) -> Any:
    if begin is not None:
        first = (begin, core.token_to_id(begin))
        core.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[first])
    known: Any = {"bos_token": begin, "eos_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=core, **{k: v for k, v in known.items() if v})


def conversation(num_rounds: int, *, num_images: int = 1, system: str | None = None) -> Conversation:
    """Rounds of a question and an answer; the images stand in the first question."""
    turns = [Turn("system", system)] if system else []
    for n in range(num_rounds):
        marks = IMAGE * num_images + "\n" if n == 0 and num_images else ""
        turns += [
            Turn("user", f"{marks}{('What is it?', 'Where is the dog, é?')[n % 2]}"),
            Turn("assistant", ("A cat.", "On the mat,\n\n 7 dogs.")[n % 2]),
        ]
    names = tuple(f"{i}.jpg" for i in range(num_images))
    return Conversation(f"talk-{num_rounds}", names, tuple(turns))
