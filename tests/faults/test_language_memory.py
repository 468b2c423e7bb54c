"""What a language model takes of memory while it is loaded: a rank's share under ZeRO-3, else once, in its dtype."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.distributed.launch import run_ranks

RANKS = 2
SLACK = 48 << 20
"""Bytes of DeepSpeed, of communication and of what malloc keeps."""


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """A language model of 200 MB in bfloat16, how many weights it has, and how many a layer."""
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=8, vocab_size=1000
    )
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("llm")
    model.save_pretrained(folder)
    return folder, model.num_parameters(), sum(p.numel() for p in model.model.layers[0].parameters())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read as Linux tells it")
@pytest.mark.parametrize(("zero", "dtype"), [(3, "bfloat16"), (3, "float32"), (1, "float32")])
def test_no_rank_holds_more_than_its_share_and_a_layer(llm: tuple[Path, int, int], zero: int, dtype: str, tmp_path):
    folder, count, layer = llm
    size = getattr(torch, dtype).itemsize
    share = count * size // (RANKS if zero == 3 else 1)
    assert count * 2 > 190e6 and share > 1.5 * SLACK
    for rank, found in enumerate(run_ranks("worker_memory", RANKS, tmp_path, llm=str(folder), zero=zero, dtype=dtype)):
        assert found["is_right"] and found["reason"] is None
        assert found["loaded"] <= share + layer * size + SLACK, (rank, found)
        assert found["again"] <= layer * size + SLACK, (rank, found)
        assert found["probed"] <= count * 2 // RANKS, (rank, found)
