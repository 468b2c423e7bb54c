"""`python -m bench towers [NAME ...]`: the image towers of all recipes that have one, or of some, trained by their own
settings on the same pictures, as many of them, and measured alike; written into the JSON that docs/towers.md shows."""

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from datetime import date
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from mmcore.errors import did_you_mean
from mmcore.image_recipe import CLASS_TOKEN, PATCH_MEAN
from mmcore.launch import parse
from mmcore.runs import read_run
from mmcore.systems import entries
from mmcore.tasks import features, subject_of

FILE = Path(__file__).parent / "results" / "cpu-2core" / "towers.json"
DATA = "scattered"
IMAGES = 76_800
"""That each tower sees, however many views of them: 53 epochs."""
UNTRAINED = "untrained"
# of a proof's flags those that say what is trained on, how long, and what is measured on the way
_OWN = ("--data", "--inverted", "--language", "--languages-apart", "--label-classes", "--epochs", "--steps")


def known() -> list[str]:
    """The recipes whose image tower can be measured, and that have a proof to take settings from."""
    proofs, recipes = entries("PROOFS"), entries("RECIPES")
    return [name for name in proofs if name in recipes and hasattr(recipes[name].load(), "represents")]


def grouped(flags: str) -> list[list[str]]:
    """A command line's flags, each with its values."""
    words = flags.split()
    starts = [i for i, word in enumerate(words) if word.startswith("--")]
    return [words[i:j] for i, j in zip(starts, [*starts[1:], len(words)], strict=True)]


def flags_of(flags: str, *, is_last: bool) -> list[str]:
    """Of a run of a proof, on the data of all towers; the last run is as long as those of the others."""
    groups = grouped(flags)
    left_out = _OWN if is_last else _OWN[:-2]
    words = [word for group in groups if group[0] not in left_out for word in group]
    words += ["--data", DATA, "--eval-every", "1000000", "--save-every", "1000000"]
    if is_last:
        batch = next((int(group[1]) for group in groups if group[0] == "--batch-size"), 256)
        words += ["--steps", str(IMAGES // batch)]
    return words


def runs_of(name: str) -> list[tuple[str, list[str]]]:
    """Recipes and flags of the runs that a tower takes, the last of them its own; "{0}" is the folder of the first."""
    if name == UNTRAINED:
        return [("vit", ["--data", DATA, "--steps", "1", "--lr", "1e-9", "--min-lr", "0", "--warmup-lr", "0"])]
    runs = entries("PROOFS")[name].load().runs
    return [(recipe, flags_of(flags, is_last=i == len(runs) - 1)) for i, (recipe, flags) in enumerate(runs)]


def measured(name: str, root: Path) -> dict[str, Any]:
    """Trains a tower and returns its row: what it learned from, how it is read, the accuracies of each kind of feature,
    and the seconds of a processor that training took."""
    train, folders, began = import_module("mmcore.train.trainer").train, [], time.process_time()
    for i, (recipe, words) in enumerate(runs_of(name)):
        words = [*(word.format(*folders) for word in words), "--out", str(root / f"{i}-{recipe}")]
        with redirect_stderr(StringIO()):
            folders.append(train(recipe, parse(recipe, words, f"bench towers {recipe}"), is_quiet=True))
    seconds = time.process_time() - began
    trained: Any = read_run(folders[-1])
    found = features.follow(subject_of(trained))
    names = trained.recipe.represents(trained.assets, trained.model, torch.device("cpu")).names
    kinds = {"k-NN": "k-NN accuracy", "probe": "linear probe accuracy"}
    figures = {of: {kind: round(found[features.figure(what, of)], 4) for kind, what in kinds.items()} for of in names}
    read, recipe = names[0], trained.recipe
    if len(names) > 1:
        pooled = getattr(recipe, "pooled_tower", None)
        is_class = pooled is not None and pooled(trained.assets, trained.model).pool == "class"
        read = CLASS_TOKEN if is_class else PATCH_MEAN
    source = (
        "captions" if hasattr(recipe, "embeds") else "classes" if hasattr(recipe, "classifies") else "pictures alone"
    )
    return {
        "learned from": "nothing" if name == UNTRAINED else source,
        "read": None if name == UNTRAINED else read,
        "figures": figures,
        "seconds": round(seconds, 1),
    }


def main(arguments: Sequence[str], file: Path = FILE) -> int:
    """Measures the towers that are named, or all; raises ValueError for a name that has none."""
    names = [UNTRAINED, *known()]
    for name in arguments:
        if name not in names:
            hint = did_you_mean(name, names)
            raise ValueError(f"bench towers: NAME must be one of {', '.join(names)}, got {name!r}{hint}")
    document: dict[str, Any] = json.loads(file.read_text()) if file.is_file() and arguments else {"rows": {}}
    for name in arguments or names:
        with tempfile.TemporaryDirectory() as folder:
            row = measured(name, Path(folder))
        print(name, json.dumps(row), flush=True)
        document["rows"][name] = row
        document |= {
            "data": DATA,
            "images": IMAGES,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }
        document |= {"date": date.today().isoformat()}
        file.write_text(json.dumps(document, indent=1) + "\n")  # as far as it has come
    return 0
