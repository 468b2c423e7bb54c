"""Features of images on disk, by the images' ids: of an encoder that does not change, computed once for many epochs and
runs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save
from torch import Tensor

from mmcore.checkpoint import Stored, write_file, write_json
from mmcore.ops import require

KEY = "key.json"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights and their names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        found.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class FeatureCache:
    """A folder of features, each file of which is written whole or not at all; what was not written is computed again.

    Args:
        folder: of one key, made where it is missing.
        key: what features depend on, as JSON; None = whatever the folder has.

    Raises:
        ValueError: a folder with features of another key, or with other files.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any] | None = None) -> None:
        self.folder, file = folder, folder / KEY
        self._places: dict[int, tuple[Tensor, int]] = {}
        self._seen: set[Path] = set()
        if key is not None:
            wanted = json.loads(json.dumps(key))
            is_new = not folder.exists() or not any(folder.iterdir())
            require("feature_cache", is_new or file.is_file(), "folder must be new or a cache's, got {}", folder)
            if file.is_file():
                found = json.loads(file.read_text())
                differ = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
                what = "--feature-cache must hold features of this tower, pictures and data, got others in {} ({})"
                require("feature_cache", not differ, what, folder, ", ".join(differ))
            else:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(file, wanted)
        self.refresh()

    def refresh(self) -> None:
        """Sees what other processes have written."""
        for file in sorted(set(self.folder.glob("part-*.safetensors")) - self._seen):
            stored = Stored([file])
            features = stored["features"]  # mapped
            for row, image in enumerate(stored["ids"].tolist()):
                self._places.setdefault(image, (features, row))
            self._seen.add(file)

    def __contains__(self, image: int) -> bool:
        return image in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, image: int) -> Tensor:
        """The features of an image, [D] float32; a KeyError where there are none."""
        features, row = self._places[image]
        return features[row].clone()

    def add(self, images: Sequence[int], features: Tensor) -> None:
        """Writes features [N, D] of N images into a file of their own."""
        data = save({"ids": torch.tensor(images, dtype=torch.int64), "features": features.float().cpu().contiguous()})
        write_file(self.folder / f"part-{uuid4().hex}.safetensors", data)
