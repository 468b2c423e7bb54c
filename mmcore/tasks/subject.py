"""A model that is measured, with what tasks share of its held-out images and captions."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmcore.data import DataConfig, EvalSet, PairData
from mmcore.data.config import EmojiStyle
from mmcore.data.opening import open_held_out
from mmcore.metrics.retrieval import Relevance, late_scores, relevance_of
from mmcore.runs import SavedRun
from mmcore.tasks.ranks import ALONE, Ranks

BATCH_SIZE = 256
OF_DATA = ("image_root", "annotations", "language", "style", "class_names", "templates")


@dataclass(frozen=True)
class Options:
    """Measure on what the run held out, or on other data."""

    data: str | None = None
    """Pictures with captions or questions: a table, a JSON file, shards or a folder of classes, all of it, or the
    combinations that every run on 'emoji' holds out; None = what the run held out."""
    image_root: str | None = None
    """Folder of the images of --data; None = that of the file."""
    language: str = "en"
    """Of 'emoji'."""
    style: EmojiStyle = "openmoji"
    """Which font draws 'emoji'."""
    class_names: str | None = None
    """Of a folder of classes: a file with a line each, or with folder and name; 'openai' = CLIP's of ImageNet."""
    templates: str | None = None
    """Of a folder of classes: a file with a caption a line, {} in place of the name; 'openai' = CLIP's 80."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if self.data is None and field.name in OF_DATA and value != field.default:
                flag = field.name.replace("_", "-")
                raise ValueError(f"--{flag} has no effect without --data, got {value!r}")

    def held_out(self, **named: Any) -> PairData | None:
        """What is measured on in place of what the run held out; `named` are further fields of a DataConfig."""
        if self.data is None:
            return None
        named |= {name: getattr(self, name) for name in OF_DATA if name not in named and hasattr(self, name)}
        return open_held_out(DataConfig(self.data, **named))


def nothing(options: Any, why: str) -> list[Path]:
    """A report without anything to measure: a ValueError where `mmcore eval` asked for one."""
    if options is not None:
        raise ValueError(why)
    return []


def joined(parts: Sequence[Any]) -> Any:
    """What was computed of images by parts: tensors, or what has a `joined` of its own, such as patches."""
    return torch.cat(list(parts)) if isinstance(parts[0], Tensor) else type(parts[0]).joined(parts)


def taken(x: Any, images: Tensor) -> Any:
    """Of some images by number, int64 [R]."""
    return x[images] if isinstance(x, Tensor) else x.take(images.tolist())


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class HeldOut:
    """Held-out images and captions as the model sees them, on the CPU."""

    index: Tensor  # [I] positions of the readable images in the held-out set
    captions: list[str]  # the N of these images
    owner: Tensor  # [N] the image of each caption, in [0, I)
    relevance: Relevance  # which caption is right for which image
    image: Any  # Tensor [I, E] unit-norm, or [I, Q, E] of which the nearest counts; None = the model embeds nothing
    text: Any  # Tensor [N, E] unit-norm, or tokens [N, T, E] for late interaction, 0 where padded
    states: Any  # [I, ...], or patches: what matching starts from; None where the model matches nothing

    @cached_property
    def scores(self) -> tuple[Tensor, Tensor]:
        """Of images and captions as each image has them, [I, N], and as each caption has them, [N, I]."""
        if self.text.ndim == 3:
            return late_scores(self.image, self.text)
        if self.image.ndim == 2:
            similarity = self.image @ self.text.T
        else:
            similarity = torch.stack([(row @ self.text.T).amax(0) for row in self.image])
        return similarity, similarity.T

    @property
    def similarity(self) -> Tensor:
        """[I, N] of images and captions."""
        return self.scores[0]


@dataclass(frozen=True)
class Subject:
    """What is measured: a model under the engine while it trains, or read back from its run."""

    recipe: Any  # whose capabilities the tasks ask for
    assets: Any
    model: Any  # the engine, or the module
    data: Any  # as `Recipe.open_data` gives it, or what is measured on in place of it
    device: torch.device
    run: SavedRun | None = None  # while it trains
    ranks: Ranks = ALONE  # that share the work
    own: Any = None  # the data with each record's own images, where those of `data` are others' (a proof's control)

    @property
    def folder(self) -> Path:
        """Where files go."""
        assert self.run is not None
        return self.run.folder

    @cached_property
    def pairs(self) -> PairData:
        """Pictures with captions or questions to measure on."""
        return self.recipe.pictures(self.data)

    @property
    def val(self) -> EvalSet:
        """The held-out images with their captions; a ValueError where there are none."""
        if self.pairs.val is None:
            raise ValueError(f"{self.pairs.name} has no held-out pairs: give --val-data or --val-fraction")
        return self.pairs.val

    @torch.no_grad()
    def texts(self, captions: list[str]) -> Tensor:
        """Unit vectors, float32 [N, E] or [N, T, E] on the CPU; each of the distinct captions is embedded once."""
        text, distinct = self.recipe.embeds(self.assets, self.model, self.device).text, list(dict.fromkeys(captions))

        def embedded(part: range) -> Tensor:
            return text([distinct[i] for i in part] or distinct[:1]).float().cpu()[: len(part)]

        row_of = {caption: row for row, caption in enumerate(distinct)}
        rows = self.ranks.shared(len(distinct), BATCH_SIZE, embedded)
        return torch.cat(rows)[[row_of[caption] for caption in captions]]

    @cached_property
    @torch.no_grad()
    def pictures(self) -> tuple[Tensor, Any, Any]:
        """Runs the model over the held-out images alone: `index`, `image` and `states` of a `HeldOut`. A model that
        embeds nothing matches images as its assets' `preprocess` makes them. Errors as of `held_out`."""
        keeps, embeds = hasattr(self.recipe, "matches"), None
        preprocess = getattr(self.assets, "preprocess", None)
        if hasattr(self.recipe, "embeds"):
            embeds = self.recipe.embeds(self.assets, self.model, self.device)
            preprocess = embeds.preprocess
        assert preprocess is not None

        def seen(images: list[Image.Image], positions: list[int]) -> tuple[list[int], Tensor | None, Any]:
            states, own, image = preprocess(images), torch.arange(len(positions)), None
            if embeds is not None:
                states = embeds.states(states.to(self.device))
                image = embeds.image(states).float().cpu()[own]
            return positions, image, taken(states.to("cpu"), own) if keeps else None

        index, image, states = zip(*self.ranks.over(self.val, BATCH_SIZE, seen), strict=True)
        places = torch.tensor([i for positions in index for i in positions])
        features = None if embeds is None else torch.cat(image)
        if features is not None:
            _check_finite("images", features)
        return places, features, joined(states) if keeps else None

    @cached_property
    @torch.no_grad()
    def held_out(self) -> HeldOut:
        """Runs the model over the held-out images and their captions; a ValueError where there are none, or too many
        broken ones, and a FloatingPointError of features that are not finite."""
        (places, features, states), val = self.pictures, self.val
        owners = [(row, caption) for row, i in enumerate(places.tolist()) for caption in val.captions[i]]
        captions = [caption for _, caption in owners]
        text = None if features is None else self.texts(captions)
        if text is not None:
            _check_finite("captions", text)
        owner = torch.tensor([row for row, _ in owners])
        relevance = relevance_of(captions, owner, num_images=len(places))
        return HeldOut(places, captions, owner, relevance, features, text, states)


def _check_finite(what: str, x: Tensor) -> None:
    if not x.isfinite().all():
        raise FloatingPointError(f"the embeddings of the held-out {what} are not finite")
