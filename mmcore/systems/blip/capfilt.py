"""The proof of CapFilt (arXiv 2201.12086): its four steps on scanned digits, half of whose captions are wrong."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mmcore.capfilt import CapFiltConfig, capfilt
from mmcore.data import DataConfig, open_data
from mmcore.data.sources.digits import DIGIT_NAMES, DIGIT_TEMPLATES, Digits
from mmcore.recipe import Claim, Proof
from mmcore.runs import read_run
from mmcore.tasks import subject_of, task

WRONG, CLEAN = 0.5, 1 / 3
_ALL = "--val-fraction 0 --batch-size 64 --eval-every 100000 --save-every 100000"
_PRETRAIN = f"{_ALL} --queue-size 256 --queue-after 150 --teacher-momentum 0.95 --lr 2e-3 --ema 0.98 --epochs 18"
_TUNE = f"{_ALL} --lr 2e-3 --ema 0.95"
PURITY, RECALL, GAIN = "purity of kept captions", "recall of right captions", "gain in zero-shot accuracy"


def write_digits(folder: Path) -> tuple[Path, Path, dict[str, int]]:
    """Scans as PNG with JSON as LAVIS has it: web.json, half of its captions wrong, and clean.json of other scans; and
    the digit of each picture."""
    source = open_data(DataConfig(), seed=0).source
    assert isinstance(source, Digits)
    rng, digits = np.random.default_rng(0), {}
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in rng.permutation(len(source)).tolist():
        name = f"images/{source.numbers[i]}.png"
        source.raw_image(i).save(folder / name)
        digits[name] = source.classes[i]
        rows.append((name, source.classes[i], DIGIT_TEMPLATES[int(rng.integers(len(DIGIT_TEMPLATES)))]))
    num_clean = round(CLEAN * len(rows))
    is_wrong = rng.random(len(rows)) < WRONG
    is_wrong[:num_clean] = False
    others = (np.array([digit for _, digit, _ in rows]) + rng.integers(1, 10, len(rows))) % 10
    pairs = [
        {"image": name, "image_id": Path(name).stem, "caption": template.format(DIGIT_NAMES[other if wrong else digit])}
        for (name, digit, template), wrong, other in zip(rows, is_wrong, others, strict=True)
    ]
    files = folder / "clean.json", folder / "web.json"
    for file, part in zip(files, (pairs[:num_clean], pairs[num_clean:]), strict=True):
        file.write_text(json.dumps(part))
    return files[1], files[0], digits


def measured(
    root: Path, train: Callable[[Sequence[tuple[str, str]], Path], Path]
) -> tuple[Mapping[str, float], Mapping[str, Mapping[str, float]]]:
    """Figures, and those of all web captions, of as many kept by chance, and of the model that was trained on all."""
    web, clean, digits = write_digits(root / "data")
    tuned = [
        ("blip-retrieval", f"--queue-size 256 --queue-after 1000 --teacher-momentum 0.9 --epochs 84 {_TUNE}"),
        ("blip-caption", f"--min-caption 0 --epochs 20 {_TUNE}"),
    ]
    runs = [
        ("blip", f"--data {web}::{clean} {_PRETRAIN}"),
        *((x, f"--data {clean} --from {{0}} {flags}") for x, flags in tuned),
    ]
    train(runs, root)
    noisy, judge, writer = (root / f"{i}-{recipe}" for i, (recipe, _) in enumerate(runs))
    out = root / "kept"
    *_, _last = capfilt(CapFiltConfig(out, writer, judge, DataConfig(str(web))))

    def is_right(row: Mapping[str, str]) -> bool:
        digit = digits[f"images/{Path(row['image']).name}"]
        return f" {DIGIT_NAMES[digit]}" in f" {row['caption']}"

    kept, all_web = (json.loads(file.read_text()) for file in (out / "pairs.json", web))
    own = [row for row in kept if row["source"] == "web"]
    right = sum(map(is_right, all_web))
    anew = train([("blip", f"--data {out / 'pairs.json'}::{clean} {_PRETRAIN}")], root / "anew")
    data = open_data(DataConfig(), seed=0)
    accuracy = []
    for run in (noisy, anew):
        accuracy.append(task("zeroshot").follow(subject_of(read_run(run), data))["zero-shot top-1"])
    values = {
        PURITY: sum(map(is_right, kept)) / max(1, len(kept)),
        RECALL: sum(map(is_right, own)) / right,
        GAIN: accuracy[1] - accuracy[0],
    }
    return values, {"without": {PURITY: right / len(all_web), RECALL: len(own) / len(all_web)}}


PROOF = Proof(
    [],
    [
        Claim(f"{PURITY} (of {WRONG:.0%} wrong ones)", PURITY, 0.90, ceiling=0.6, control="without"),
        Claim(RECALL, RECALL, 0.80, ceiling=0.8, control="without"),
        Claim(f"{GAIN} (held-out) by what is kept", GAIN, 0.05, control=None),
    ],
    measured=measured,
)
