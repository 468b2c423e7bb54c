"""The average of a model's weights: formula, schedules, swapping, buffers, wrappers and files."""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from mmcore.ema import EMA, Schedule, cosine, warmed_up
from mmcore.ema.weights import unwrapped
from tests.refusals import refuses


@pytest.mark.parametrize("decay", [0.9, warmed_up(0.9), cosine(0.5, 1.0, 4)], ids=["constant", "warmed up", "cosine"])
def test_it_is_the_recurrence_in_float64_and_buffers_are_copied(decay: float | Schedule) -> None:
    model = small()
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    ema = EMA(model, decay)
    for t, weights in enumerate(trained(model, 6, ema)):
        by = decay(t) if callable(decay) else decay
        expected = {name: by * x + (1 - by) * weights[name].double() for name, x in expected.items()}
    assert ema.num_updates == 6
    for name, x in expected.items():
        torch.testing.assert_close(ema.averages[name], x.float(), rtol=1e-6, atol=1e-7)
    assert same(ema.buffer_averages, dict(model.named_buffers()))


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
            assert same(ema.averages, dict(model.named_parameters()))
            assert [p.data_ptr() for p in model.parameters()] == places
            raise KeyError
        assert same(model.state_dict(), before)

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


def test_buffers_are_averaged_where_they_are_floating_point_and_it_is_asked_for() -> None:
    model = small()
    ema = EMA(model, 0.9, buffers="average")
    expected = model[1].running_mean.clone()  # pyright: ignore
    for _ in range(3):
        model(torch.randn(8, 3))
        ema.update()
        expected = 0.9 * expected + 0.1 * model[1].running_mean  # pyright: ignore
    torch.testing.assert_close(ema.buffer_averages["1.running_mean"], expected)
    assert ema.buffer_averages["1.num_batches_tracked"] == 3


def test_a_run_that_is_resumed_goes_on_to_the_bit() -> None:
    models = [small() for _ in range(3)]
    whole, first, again = (EMA(model, warmed_up(0.9)) for model in models)
    trained(models[0], 5, whole)
    trained(models[1], 3, first)
    models[2].load_state_dict(models[1].state_dict())
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    trained(models[2], 2, again, first=3)
    assert again.num_updates == 5 and same(again.averages, whole.averages)


def test_copy_to_writes_another_model() -> None:
    model, other = small(), small().double()
    ema = EMA(model, 0.5)
    trained(model, 2, ema)
    ema.copy_to(other)
    state = {name: x.to(other.state_dict()[name].dtype) for name, x in (ema.averages | ema.buffer_averages).items()}
    assert same(other.state_dict(), state)


def test_a_model_of_transformers_has_its_tied_weight_once_and_generates_from_the_averages() -> None:
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, eos_token_id=10)
    models: list[Any] = [GPT2LMHeadModel(config).eval() for _ in range(2)]
    model, expected = models
    start = copy.deepcopy(model.state_dict())
    ema, tokens = EMA(model, 0.75), torch.tensor([[1, 2]])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    ema.update()
    assert "transformer.wte.weight" in ema.averages and "lm_head.weight" not in ema.averages
    expected.load_state_dict({n: 0.75 * start[n] + 0.25 * x for n, x in model.state_dict().items()})
    with ema.swapped():
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits)
        assert torch.equal(model.generate(tokens, max_new_tokens=4), expected.generate(tokens, max_new_tokens=4))


CHANGES: dict[str, tuple[Any, str]] = {
    "added": (lambda model: model.append(nn.Linear(2, 2)), r"got new ones, \['3.bias', '3.weight'\]"),
    "removed": (lambda model: setattr(model[2], "bias", None), r"got it without \['2.bias'\]"),
    "another shape": (lambda model: setattr(model, "2", nn.Linear(5, 3)), r"2.weight must be \[2, 5\], got \[3, 5\]"),
    "moved": (lambda model: model.to("meta"), "model's .* must be on cpu, got meta"),
    "unfrozen": (lambda model: model[0].requires_grad_(True), "0.weight must be frozen as it was, got it trained"),
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
        assert set(ema.averages) == {"1.weight", "1.bias", "2.weight", "2.bias"}
        before = copy.deepcopy(ema.averages)
        change(model)
        for _ in range(2):
            refuses(message, ema.update)
        assert ema.num_updates == 0 and same(ema.averages, before)

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


def test_bad_input_is_refused_by_name() -> None:
    model, narrow = nn.Linear(2, 2), nn.Linear(2, 3)
    refuses("^EMA: decay must be from 0 to 1, got 1.5", EMA, model, 1.5)
    refuses("^EMA: buffers must be 'copy' or 'average', got 'skip'", EMA, model, buffers="skip")
    refuses("^warmed_up: decay must be from 0 to 1, got -0.1", warmed_up, -0.1)
    refuses("^cosine: num_updates must be at least 1, got 0", cosine, 0.9, 1.0, 0)
    refuses("^EMA: decay of update 0 must be from 0 to 1, got 2.0", EMA(model, lambda t: 2.0).update)
    load = EMA(model).load_state_dict
    refuses("^EMA.load_state_dict: state must have .*, got .*0.bias", load, EMA(small()).state_dict())
    refuses(r"^EMA: weight must be \[3, 2\], got \[2, 2\]", load, EMA(narrow).state_dict())
    refuses("^EMA: model must have 0.weight, got none", EMA(small()).copy_to, model)
    model.weight.ds_id = 0  # pyright: ignore
    refuses(r"^EMA: model must be DeepSpeed's engine, got a module with \['weight'\] cut up by ZeRO-3", EMA, model)


def test_a_teacher_that_is_no_copy_of_the_model_is_refused_and_left_as_it_was() -> None:
    model, norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
    for of, teacher, message in (
        (model, nn.Linear(2, 3), r"weight must be \[2, 2\], got \[3, 2\]"),
        (model, nn.Linear(2, 2, device="meta"), "weight must be on cpu, got meta"),
        (model, model, "weight must be a copy, got the model's own"),
    ):
        refuses(f"^EMA: teacher's {message}", EMA, of, teacher=teacher)
        assert all(p.requires_grad for p in teacher.parameters())
    refuses(r"^EMA: teacher must have .* weights, got .* \['bias'\]", EMA, model, teacher=nn.Linear(2, 2, bias=False))
    bare = nn.BatchNorm1d(2, track_running_stats=False)
    refuses(r"^EMA: teacher must have the model's buffers, got \[\]", EMA, norm, teacher=bare)


def test_a_file_holds_all_by_full_names_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "ema.safetensors"
    model = nn.Sequential(*small(), nn.Linear(1, 1, bias=False), nn.Linear(2, 3).double())
    for name, dtype in (("flag", torch.bool), ("narrow", torch.float16), ("wide", torch.float64)):
        model.register_buffer(name, torch.ones(1 if name == "flag" else 3, dtype=dtype))
    ema = EMA(model, 0.9)
    ema.num_updates = 7
    ema.save(str(path))
    stored, expected = load_file(path), ema.averages | ema.buffer_averages
    assert same(stored, expected) and all(x.dtype == expected[n].dtype for n, x in stored.items())
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    # who maps the file has each tensor aligned
    assert not any((begin + header[name]["data_offsets"][0]) % x.itemsize for name, x in stored.items())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for x in (*other.parameters(), *other.buffers()):
            x.zero_()
    again = EMA(other, 0.9)
    again.load(str(path))
    assert again.num_updates == 7 and same(again.averages | again.buffer_averages, expected)


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


def test_a_file_of_another_model_or_of_another_kind_or_that_was_cut_is_refused(tmp_path: Path) -> None:
    path, ema, model = tmp_path / "ema.safetensors", EMA(nn.Linear(2, 3)), nn.Linear(2, 2)
    ema.save(path)
    refuses(r"EMA.load: weight must be \[2, 2\], got \[3, 2\]", EMA(model).load, path)
    refuses(r"must be of this model, got a difference in \['bias'\]", EMA(nn.Linear(2, 3, bias=False)).load, path)
    path.write_bytes(path.read_bytes()[:-4])
    refuses(r"path must be a whole file of \d+ bytes, got \d+ in .*ema.safetensors", ema.load, path)
    save_file({"weight": torch.zeros(3, 2)}, path)
    refuses(r"EMA.load: path must be a file of EMA.save, got .*ema.safetensors", ema.load, path)
    path.write_bytes(b"PK not a file of tensors")
    refuses(r"path must be a safetensors file, got .*ema.safetensors", ema.load, path)
    model.register_buffer("angles", torch.zeros(2, dtype=torch.complex128))
    refuses(r"angles must be of a dtype that safetensors has, got torch.complex128", EMA(model).save, path)


def small(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).to(dtype)


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Of the same names and bits."""
    return found.keys() == expected.keys() and all(torch.equal(x, expected[name]) for name, x in found.items())


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
