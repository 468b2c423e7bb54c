"""A teacher that runs forward: its weights and buffers are the averages, in its dtypes, after every update."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmcore.ema import EMA, warmed_up
from tests.mmcore.test_ema import small, trained
from tests.refusals import refuses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_a_teacher_is_the_averages_in_its_dtype(dtype: torch.dtype, buffers: Any) -> None:
    models, teacher = [small(), small()], nn.Sequential(*small().to(dtype))
    models[0][0].requires_grad_(False)
    models[1][0].requires_grad_(False)
    with torch.no_grad():
        for p in teacher.parameters():
            p.zero_()
    frozen = {f"0.{n}": p.detach().clone() for n, p in models[0][0].named_parameters()}
    ema = EMA(models[0], 0.9, buffers=buffers, teacher=teacher)
    alone = EMA(models[1], 0.9, buffers=buffers)
    assert not any(p.requires_grad for p in teacher.parameters())
    for steps in (0, 3):
        trained(models[0], steps, ema)
        trained(models[1], steps, alone)
        expected = alone.averages | alone.buffer_averages | frozen
        for name, x in teacher.state_dict().items():
            assert torch.equal(x, expected[name].to(x.dtype)), name
        assert all(torch.equal(x, alone.averages[name]) for name, x in ema.averages.items())


def test_a_teacher_runs_what_was_loaded(tmp_path: Path) -> None:
    ema = EMA(small(), 0.9)
    trained(ema.model, 3, ema)  # pyright: ignore
    ema.save(tmp_path / "ema.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        teachers = [small().to(dtype), small().to(dtype)]
        EMA(small(), 0.9, teacher=teachers[0]).load_state_dict(ema.state_dict())
        EMA(small(), 0.9, teacher=teachers[1]).load(tmp_path / "ema.safetensors")
        for teacher in teachers:
            for name, p in teacher.named_parameters():
                assert torch.equal(p, ema.averages[name].to(dtype))
            assert torch.equal(teacher.get_buffer("1.running_mean"), ema.buffer_averages["1.running_mean"].to(dtype))


def test_a_teacher_that_changed_is_an_error() -> None:
    teacher = small()
    ema = EMA(small(), teacher=teacher)
    teacher.bfloat16()
    refuses("EMA: teacher must stay as it was given", ema.update)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_captures_apply() -> None:
    models = [small().cuda(), small().cuda()]
    teachers = [small().cuda().bfloat16() for _ in models]
    emas = [EMA(model, warmed_up(0.9), teacher=teacher) for model, teacher in zip(models, teachers, strict=True)]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        emas[0].advance()
        emas[0].apply()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            emas[0].apply()
    emas[1].update()
    for _ in range(3):
        with torch.no_grad():
            for p in (*models[0].parameters(), *models[1].parameters()):
                p.add_(1.0)
        emas[0].advance()
        graph.replay()
        emas[1].update()
    for name, x in emas[0].averages.items():
        assert torch.equal(x, emas[1].averages[name])
    for x, y in zip(teachers[0].parameters(), teachers[1].parameters(), strict=True):
        assert torch.equal(x, y)
