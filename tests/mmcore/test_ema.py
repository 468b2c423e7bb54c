"""The average of a model's weights: formula, schedules, swapping, buffers, wrappers and files."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmcore.ema import EMA, Schedule, cosine, warmed_up
from mmcore.ema.weights import unwrapped


@pytest.mark.parametrize("decay", [0.9, warmed_up(0.9), cosine(0.5, 1.0, 4)], ids=["constant", "warmed up", "cosine"])
def test_it_is_the_recurrence_in_float64(decay: float | Schedule) -> None:
    model = small()
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    ema = EMA(model, decay)
    for t, weights in enumerate(trained(model, 6, ema)):
        by = decay(t) if callable(decay) else decay
        expected = {name: by * x + (1 - by) * weights[name].double() for name, x in expected.items()}
    assert ema.num_updates == 6
    for name, x in expected.items():
        torch.testing.assert_close(ema.averages[name], x.float(), rtol=1e-6, atol=1e-7)


def test_the_schedules_are_the_published_ones() -> None:
    warm = warmed_up(0.999)
    assert [warm(0), warm(8)] == [0.1, 0.5] and warm(10**6) == 0.999
    dino = cosine(0.996, 1.0, 100)
    assert dino(0) == pytest.approx(0.996) and dino(100) == dino(500) == 1.0 and dino(50) == pytest.approx(0.998)
    assert dino(10) == pytest.approx(1 - 0.004 * (math.cos(math.pi / 10) + 1) / 2)


def test_bfloat16_weights_have_float32_averages_that_do_not_stall() -> None:
    model = nn.Linear(4, 4, bias=False).bfloat16()
    ema = EMA(model, 0.9999)
    start = ema.averages["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    for _ in range(100):
        ema.update()
    moved = (ema.averages["weight"] - start) / (model.weight.float() - start)
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - 0.9999**100), rtol=1e-3, atol=0)
    with ema.swapped():
        assert torch.equal(model.weight, ema.averages["weight"].bfloat16())


class TestSwapping:
    def test_it_puts_the_averages_in_place_and_brings_all_back_even_after_an_error(self) -> None:
        model = small()
        ema = EMA(model, 0.5)
        trained(model, 3, ema)
        before, places = copy.deepcopy(model.state_dict()), [p.data_ptr() for p in model.parameters()]
        with pytest.raises(KeyError), ema.swapped():
            for name, p in model.named_parameters():
                assert torch.equal(p, ema.averages[name])
            assert [p.data_ptr() for p in model.parameters()] == places
            raise KeyError
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())

    def test_an_update_within_is_an_error_and_one_behind_is_not(self) -> None:
        ema = EMA(small(), 0.5)
        with pytest.raises(ValueError, match=r"EMA: update must be outside of swapped\(\)"), ema.swapped():
            ema.update()
        ema.update()
        assert ema.num_updates == 1

    def test_a_compiled_model_runs_on_the_averages_without_a_new_graph(self) -> None:
        model = nn.Linear(3, 2)
        graphs: list[Any] = []

        def backend(graph: Any, _: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        compiled: Any = torch.compile(model, backend=backend)
        x, ema = torch.randn(4, 3), EMA(compiled, 0.0)
        with torch.no_grad():
            compiled(x)
            model.weight.add_(1.0)
            ema.update()
            model.weight.add_(1.0)
            expected = nn.functional.linear(x, model.weight - 1.0, model.bias)
            with ema.swapped():
                torch.testing.assert_close(compiled(x), expected)
        assert len(graphs) == 1 and set(ema.averages) == {"weight", "bias"}

    def test_copy_to_writes_another_model(self) -> None:
        model, other = small(), small().double()
        ema = EMA(model, 0.5)
        trained(model, 2, ema)
        ema.copy_to(other)
        for name, p in other.named_parameters():
            assert torch.equal(p, ema.averages[name].double())
        assert torch.equal(other[1].running_mean, model[1].running_mean.double())  # pyright: ignore


class TestBuffers:
    def test_are_copied(self) -> None:
        model = small()
        ema = EMA(model, 0.9)
        trained(model, 3, ema)
        for name, x in model.named_buffers():
            assert torch.equal(ema.buffer_averages[name], x)

    def test_or_averaged_where_they_are_floating_point(self) -> None:
        model = small()
        ema = EMA(model, 0.9, buffers="average")
        expected = model[1].running_mean.clone()  # pyright: ignore
        for _ in range(3):
            model(torch.randn(8, 3))
            ema.update()
            expected = 0.9 * expected + 0.1 * model[1].running_mean  # pyright: ignore
        torch.testing.assert_close(ema.buffer_averages["1.running_mean"], expected)
        assert ema.buffer_averages["1.num_batches_tracked"] == 3


def test_frozen_weights_have_no_average() -> None:
    model = small()
    model[0].requires_grad_(False)
    assert set(EMA(model).averages) == {"1.weight", "1.bias", "2.weight", "2.bias"}


def test_a_run_that_is_resumed_goes_on_to_the_bit() -> None:
    models = [small(), small()]
    whole, first = EMA(models[0], warmed_up(0.9)), EMA(models[1], warmed_up(0.9))
    trained(models[0], 5, whole)
    trained(models[1], 3, first)
    state, weights = copy.deepcopy(first.state_dict()), copy.deepcopy(models[1].state_dict())
    model = small()
    model.load_state_dict(weights)
    again = EMA(model, warmed_up(0.9))
    again.load_state_dict(state)
    trained(model, 2, again, first=3)
    assert again.num_updates == 5 and all(torch.equal(x, whole.averages[name]) for name, x in again.averages.items())


CHANGES: dict[str, tuple[Any, str]] = {
    "added": (lambda model: model.append(nn.Linear(2, 2)), r"got new ones, \['3.bias', '3.weight'\]"),
    "removed": (lambda model: setattr(model[2], "bias", None), r"got it without \['2.bias'\]"),
    "another shape": (
        lambda model: setattr(model, "2", nn.Linear(5, 3)),
        r"model's 2.weight must be \[2, 5\], got \[3, 5\]",
    ),
    "moved": (lambda model: model.to("meta"), "model's .* must be on cpu, got meta"),
    "unfrozen": (
        lambda model: model[0].weight.requires_grad_(True),
        "model's 0.weight must be frozen as it was, got it trained",
    ),
    "a buffer removed": (lambda model: setattr(model, "1", nn.Identity()), r"got it without \['1.bias', "),
}


class TestAModelThatChanged:
    """Is an error before anything is averaged or counted, never a silent miss."""

    @pytest.mark.parametrize("case", CHANGES)
    def test_is_an_error_by_name(self, case: str) -> None:
        change, message = CHANGES[case]
        model = small()
        model[0].requires_grad_(False)
        ema = EMA(model, 0.5)
        before = {name: x.clone() for name, x in ema.averages.items()}
        change(model)
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                ema.update()
        assert ema.num_updates == 0 and all(torch.equal(x, before[name]) for name, x in ema.averages.items())

    def test_is_followed_where_the_new_tensors_serve_as_well(self) -> None:
        model = small()
        ema = EMA(model, 0.5)
        ema.update()
        with torch.no_grad():
            model[2].weight = nn.Parameter(model[2].weight + 2.0)  # pyright: ignore
        model[1].running_mean = model[1].running_mean + 1.0  # pyright: ignore
        ema.update()
        torch.testing.assert_close(ema.averages["2.weight"], model[2].weight - 1.0)
        assert torch.equal(ema.buffer_averages["1.running_mean"], torch.ones(5))
        model.double()
        ema.update()
        assert ema.averages["2.weight"].dtype == torch.float32


def test_apply_reads_anew_the_decay_that_advance_wrote() -> None:
    model = nn.Linear(2, 2, bias=False)
    ema, decays = EMA(model, cosine(0.0, 0.5, 1)), []
    with torch.no_grad():
        model.weight.fill_(1.0)
        ema.advance()
        ema.averages["weight"].zero_()
        ema.apply()
        decays.append(1 - ema.averages["weight"][0, 0].item())
        ema.advance()
        for _ in range(2):  # a graph that is replayed
            ema.averages["weight"].zero_()
            ema.apply()
            decays.append(1 - ema.averages["weight"][0, 0].item())
    assert decays == [0.0, 0.5, 0.5] and ema.num_updates == 2


REFUSED: dict[str, tuple[Any, str]] = {
    "decay": (lambda: EMA(small(), 1.5), "EMA: decay must be from 0 to 1, got 1.5"),
    "buffers": (lambda: EMA(small(), buffers="skip"), "EMA: buffers must be 'copy' or 'average', got 'skip'"),  # pyright: ignore
    "warm-up": (lambda: warmed_up(-0.1), "warmed_up: decay must be from 0 to 1, got -0.1"),
    "cosine": (lambda: cosine(0.9, 1.0, 0), "cosine: num_updates must be at least 1, got 0"),
    "a schedule that strays": (
        lambda: EMA(small(), lambda t: 2.0).update(),
        "EMA: decay of update 0 must be from 0 to 1, got 2.0",
    ),
    "state": (
        lambda: EMA(nn.Linear(2, 2)).load_state_dict(EMA(small()).state_dict()),
        "EMA.load_state_dict: state must have this model's averages, got .*'0.bias', '0.weight'",
    ),
    "shape": (
        lambda: EMA(nn.Linear(2, 2)).load_state_dict(EMA(nn.Linear(2, 3)).state_dict()),
        r"EMA: weight must be \[3, 2\], got \[2, 2\]",
    ),
    "a teacher of another shape": (
        lambda: EMA(nn.Linear(2, 2), teacher=nn.Linear(2, 3)),
        r"EMA: teacher's weight must be \[2, 2\], got \[3, 2\]",
    ),
    "a teacher of other names": (
        lambda: EMA(nn.Linear(2, 2), teacher=nn.Linear(2, 2, bias=False)),
        r"EMA: teacher must have the model's weights, got a difference in \['bias'\]",
    ),
    "a teacher of other buffers": (
        lambda: EMA(nn.BatchNorm1d(2), teacher=nn.BatchNorm1d(2, track_running_stats=False)),
        r"EMA: teacher must have the model's buffers, got \[\]",
    ),
    "a teacher elsewhere": (
        lambda: EMA(nn.Linear(2, 2), teacher=nn.Linear(2, 2, device="meta")),
        "EMA: teacher's weight must be on cpu, got meta",
    ),
    "the model itself": (
        lambda: (model := nn.Linear(2, 2), EMA(model, teacher=model)),
        "EMA: teacher's weight must be a copy, got the model's own",
    ),
    "another model": (lambda: EMA(small()).copy_to(nn.Linear(2, 2)), "EMA: model must have 0.weight, got none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_weights_cut_up_by_zero_3_are_refused() -> None:
    model = nn.Linear(2, 2)
    model.weight.ds_id = 0  # pyright: ignore
    with pytest.raises(
        ValueError, match=r"EMA: model must be DeepSpeed's engine, got a module with \['weight'\] cut up by ZeRO-3"
    ):
        EMA(model)


def test_a_file_holds_all_by_full_names_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    path, model = (
        tmp_path / "ema.safetensors",
        nn.Sequential(*small(), nn.Linear(1, 1, bias=False), nn.Linear(2, 3).double()),
    )
    model.register_buffer("flag", torch.tensor(True))
    model.register_buffer("narrow", torch.ones(3, dtype=torch.float16))
    model.register_buffer("wide", torch.ones(3, dtype=torch.float64))
    ema = EMA(model, 0.9)
    ema.num_updates = 7
    ema.save(str(path))
    stored = load_file(path)
    expected = ema.averages | ema.buffer_averages
    assert stored.keys() == expected.keys()
    assert all(torch.equal(x, expected[n]) and x.dtype == expected[n].dtype for n, x in stored.items())
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    # who maps the file has each tensor aligned
    for name, x in stored.items():
        assert (begin + header[name]["data_offsets"][0]) % x.itemsize == 0
    other = copy.deepcopy(model)
    with torch.no_grad():
        for x in (*other.parameters(), *other.buffers()):
            x.zero_()
    again = EMA(other, 0.9)
    again.load(str(path))
    assert again.num_updates == 7
    loaded = again.averages | again.buffer_averages
    assert all(torch.equal(x, expected[n]) for n, x in loaded.items())


def test_a_file_is_the_old_one_where_writing_was_cut_short(tmp_path: Path) -> None:
    path, ema = tmp_path / "ema.safetensors", EMA(small())
    ema.save(path)
    before = path.read_bytes()

    def cut(names: Any) -> Any:
        yield from names
        raise KeyboardInterrupt

    with torch.no_grad():
        ema.averages["0.weight"].add_(1.0)
    ema.gathered = lambda: cut([("0.weight", ema.averages["0.weight"])])  # pyright: ignore
    with pytest.raises(KeyboardInterrupt):
        ema.save(path)
    assert path.read_bytes() == before


def test_a_file_of_another_model_or_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ema.safetensors"
    EMA(nn.Linear(2, 3)).save(path)
    with pytest.raises(ValueError, match=r"EMA.load: weight must be \[2, 2\], got \[3, 2\]"):
        EMA(nn.Linear(2, 2)).load(path)
    with pytest.raises(ValueError, match=r"must be of this model, got a difference in \['bias'\]"):
        EMA(nn.Linear(2, 3, bias=False)).load(path)
    save_file({"weight": torch.zeros(3, 2)}, path)
    with pytest.raises(ValueError, match=r"EMA.load: path must be a file of EMA.save, got .*ema.safetensors"):
        EMA(nn.Linear(2, 3, bias=False)).load(path)
    model = nn.Linear(2, 2)
    model.register_buffer("angles", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"angles must be of a dtype that safetensors has, got torch.complex128"):
        EMA(model).save(path)


def test_a_file_that_was_cut_or_is_another_is_refused(tmp_path: Path) -> None:
    path, ema = tmp_path / "ema.safetensors", EMA(small())
    ema.save(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"path must be a whole file of \d+ bytes, got \d+ in .*ema.safetensors"):
        ema.load(path)
    path.write_bytes(b"PK not a file of tensors")
    with pytest.raises(ValueError, match=r"path must be a safetensors file, got .*ema.safetensors"):
        ema.load(path)


def small(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).to(dtype)


def trained(model: nn.Module, steps: int, ema: EMA, first: int = 0) -> list[dict[str, Tensor]]:
    """The weights after each of some noisy steps."""
    seen = []
    for step in range(first, first + steps):
        torch.manual_seed(step)
        model(torch.randn(8, 3, dtype=next(model.parameters()).dtype))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        ema.update()
        seen.append({name: p.detach().clone() for name, p in unwrapped(model).named_parameters()})
    return seen
