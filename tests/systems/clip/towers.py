"""Folders of other libraries' towers, of random weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizer

from mmcore.data.text.wordpiece import train_wordpiece

BLOCK: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
}  # fmt: skip
SQUARE = {"image_size": 16, "patch_size": 4}
WORDS = ["a scan of the digit seven", "the number two written by hand", "a handwritten zero", "one five nine"]


def moved(model: Any, seed: int = 0) -> Any:
    """No weight is where it began."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model.eval()


def write(folder: Path, model: Any) -> Path:
    moved(model).save_pretrained(folder)
    return folder


def write_bert(folder: Path) -> Path:
    """A BERT and its tokenizer."""
    wordpiece = train_wordpiece(WORDS * 3, vocab_size=200)
    wordpiece.save(folder)
    tokenizer = BertTokenizer.from_pretrained(folder)
    shape = BertConfig(**BLOCK, vocab_size=len(tokenizer), max_position_embeddings=40, pad_token_id=0)
    moved(BertModel(shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
