"""A batch of pictures, read, augmented and collated, beside Pillow's bare decode and resize; one core."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.case import Case, time_case
from mmcore.data import DataConfig, LoaderSpec, Preprocess, Reader, TrainLoader, collate_pairs, open_data, pair_sample

BATCH, SIZE = 256, 224
SHAPES = {"photo": (500, 375), "large": (2048, 1536)}
MOST = 1.3
"""Times the bare decode and resize, as `--claims` asserts."""


def pictures(folder: Path, size: tuple[int, int]) -> list[Path]:
    """As many JPEG files as a batch has: smooth, with some noise, as photographs are."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.jpg" for i in range(BATCH)]
    for i, path in enumerate(paths):
        if i >= 8:  # eight pictures, many files
            path.write_bytes(paths[i % 8].read_bytes())
            continue
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        noise = rng.integers(-8, 9, (*size[::-1], 3))
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def bare(paths: list[Path]) -> None:
    for path in paths:
        Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def loader(folder: Path, paths: list[Path], workers: int = 0) -> TrainLoader:
    rows = [f"{path.name}\tcaption {i}" for i, path in enumerate(paths)]
    (folder / "pairs.tsv").write_text("\n".join(["filepath\ttitle", *rows]))
    data = open_data(DataConfig(str(folder / "pairs.tsv"), val_fraction=0.0), seed=0)
    wanted = Preprocess(SIZE)
    reader = Reader(lambda record, rng: pair_sample(record, rng, wanted), collate_pairs)
    return data.train_loader(LoaderSpec(BATCH, 0, 1, 0, workers), reader)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("contender", ["mmkernels", "pillow"])
def test_input(benchmark, device: torch.device, contender: str, shape: str, tmp_path: Path) -> None:
    paths = pictures(tmp_path, SHAPES[shape])
    batches = loader(tmp_path, paths)
    call = (lambda: next(batches)) if contender == "mmkernels" else (lambda: bare(paths))
    began = time.perf_counter()
    bare(paths)
    floor_s = time.perf_counter() - began
    time_case(benchmark, device, Case(f"input {BATCH} x {shape} to {SIZE} px", contender, call, (), "step", floor_s))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_takes_little_more_than_its_decoding(shape: str, tmp_path: Path) -> None:
    paths = pictures(tmp_path, SHAPES[shape])
    batches, ratios = loader(tmp_path, paths), []
    for _ in range(5):
        began = time.process_time()
        bare(paths)
        between = time.process_time()
        next(batches)
        ratios.append((time.process_time() - between) / (between - began))
    print(shape, [round(ratio, 3) for ratio in ratios])
    assert np.median(ratios) <= MOST, ratios
