"""EMA(buffers="average"): statistics are averaged; what an average would spoil is taken as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from torch.nn.utils import parametrizations, prune

from mmcore.ema import EMA
from mmcore.nn import FeatureQueue


class Holder(nn.Module):
    def __init__(self, **held: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        for name, x in held.items():
            self.register_buffer(name, x)


class Own(Holder):
    copied_buffers = ("code",)


def averaged(model: nn.Module, step: Any, times: int = 5) -> EMA:
    ema = EMA(model, 0.9, buffers="average")
    for _ in range(times):
        with torch.no_grad():
            for p in model.parameters():
                p.normal_()
        step()
        ema.update()
    return ema


def are_of_now(ema: EMA, *names: str) -> None:
    held = dict(ema.model.named_buffers())
    for name in names or held:
        assert torch.equal(ema.buffer_averages[name], held[name]), name


@pytest.mark.parametrize("spectral_norm", [nn.utils.spectral_norm, parametrizations.spectral_norm])
def test_spectral_norms_vectors_keep_their_norm(spectral_norm: Any) -> None:
    model: Any = nn.Sequential(spectral_norm(nn.Linear(6, 6)), nn.BatchNorm1d(6))
    ema = averaged(model, lambda: model(torch.randn(4, 6)))
    are_of_now(ema, *(name for name in ema.buffer_averages if name.startswith("0.")), "1.num_batches_tracked")
    assert len(ema.buffer_averages) == 5
    assert not torch.equal(ema.buffer_averages["1.running_mean"], model[1].running_mean)


def test_a_quantised_layer_keeps_its_ranges_and_scales_together() -> None:
    model = nn.Sequential(nn.Linear(3, 3), FakeQuantize(MovingAverageMinMaxObserver))
    are_of_now(averaged(model, lambda: model(torch.randn(4, 3))))


def test_a_pruned_layer_keeps_its_mask() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", 0.25)
    are_of_now(averaged(model, lambda: prune.l1_unstructured(model[0], "weight", 0.25)))


def test_a_mask_of_infinities_and_a_table_stay_what_they_are() -> None:
    mask, table = torch.full((3, 3), -torch.inf).triu(1), torch.rand(99)
    more = {"ids": torch.arange(3), "phases": torch.ones(2, dtype=torch.complex64)}
    model = Holder(mask=mask, table=table, float8=torch.ones(4).to(torch.float8_e4m3fn), **more)
    are_of_now(averaged(model, lambda: None, times=50))


def test_a_queue_and_what_a_module_names_are_copied() -> None:
    queue = FeatureQueue(4, 2)
    model = nn.Sequential(nn.Linear(1, 1), queue)
    are_of_now(averaged(model, lambda: queue.enqueue(nn.functional.normalize(torch.randn(3, 2)))))
    own: Any = Own(code=torch.zeros(3), mean=torch.zeros(3))
    ema = averaged(own, lambda: (own.code.add_(1), own.mean.add_(1)))
    are_of_now(ema, "code")
    assert (ema.buffer_averages["mean"] < own.mean).all()


def test_a_teacher_gets_the_vectors_of_now_too() -> None:
    pair: list[Any] = [parametrizations.spectral_norm(nn.Linear(6, 6)) for _ in range(2)]
    student, teacher = pair
    ema = EMA(student, 0.9, buffers="average", teacher=teacher)
    student(torch.randn(4, 6))
    ema.update()
    assert torch.equal(teacher.parametrizations.weight[0]._u, student.parametrizations.weight[0]._u)


class Cached(nn.Module):
    """Keeps a table as long as the longest input so far, as ALiBi and rotary positions do."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, length: int) -> Tensor:
        if length > len(getattr(self, "table", ())):
            self.register_buffer("table", torch.arange(float(length)), persistent=False)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * length
        return self.weight.sum() * self.table[:length].sum()


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_caches_come_grow_and_go_while_the_weights_are_averaged(buffers: Any, tmp_path: Path) -> None:
    model, teacher = Cached(), Cached().eval()
    ema = EMA(model, 0.9, buffers=buffers, teacher=teacher)
    for length in (4, 8, 2, 16):
        model(length)
        ema.update()
        teacher(length + 3)
    with ema.swapped():
        model(32)
    assert len(model.table) == 32 and set(ema.buffer_averages) == {"mean"}
    ema.save(tmp_path / "ema")
    del model.table
    again = EMA(Cached(), 0.9, buffers=buffers)
    again.load(tmp_path / "ema")
    assert torch.equal(again.buffer_averages["mean"], ema.buffer_averages["mean"])


def test_a_model_of_transformers_that_rescales_its_positions_is_averaged() -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model: Any = hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=50, max_position_embeddings=16, rope_parameters=rope, **size)  # pyright: ignore
    )
    ema = EMA(model, 0.9)
    for length in (8, 32, 8, 64):
        model(torch.ones(1, length, dtype=torch.long))
        ema.update()
    assert ema.num_updates == 4


def test_a_state_that_has_caches_still_loads() -> None:
    ema = EMA(Cached(), 0.5)
    ema.model(4)
    state = ema.state_dict()
    ema.load_state_dict(state | {"buffers": {**state["buffers"], "table": torch.arange(4.0)}})
    with pytest.raises(ValueError, match=r"state must have this model's buffers, got \['other'\]"):
        ema.load_state_dict(state | {"buffers": {**state["buffers"], "other": torch.arange(4.0)}})
