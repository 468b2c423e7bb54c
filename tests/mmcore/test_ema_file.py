"""Files of averages: whole, by full names, written or not at all."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmcore.ema import EMA
from tests.mmcore.ema_fixtures import small


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
    with pytest.raises(
        ValueError, match=r"angles must be of a dtype that safetensors has, got torch.complex128"
    ):
        EMA(model).save(path)


def test_a_file_that_was_cut_or_is_another_is_refused(tmp_path: Path) -> None:
    path, ema = tmp_path / "ema.safetensors", EMA(small())
    ema.save(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(
        ValueError, match=r"path must be a whole file of \d+ bytes, got \d+ in .*ema.safetensors"
    ):
        ema.load(path)
    path.write_bytes(b"PK not a file of tensors")
    with pytest.raises(ValueError, match=r"path must be a safetensors file, got .*ema.safetensors"):
        ema.load(path)
