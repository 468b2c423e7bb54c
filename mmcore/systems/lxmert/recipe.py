"""LXMERT's recipe: hidden words and regions, matching, and answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmcore.data import LoaderSpec, PairData, TrainLoader
from mmcore.data.collate import PairSample
from mmcore.data.regions import DetectorRows, Objects, Regions, mask_regions
from mmcore.data.sources.base import PairSource, stable_hash
from mmcore.data.sources.mixed import Mixed
from mmcore.data.text.wordpiece import WordPiece, load_wordpiece
from mmcore.data.transforms.images import to_pixels
from mmcore.fusion_recipe import CompletesTexts, FusionAssets, FusionRecipe, FusionSample, MatchesPairs, SaysAnswers
from mmcore.losses import global_ratio, matching_loss
from mmcore.ops import require
from mmcore.parts.answers import AnswerVocabulary
from mmcore.parts.vit import tower_summary
from mmcore.recipe import Claim, Proof, Runner, Step
from mmcore.runs import is_run
from mmcore.settings import free, from_json
from mmcore.systems.lxmert.model import LXMERT, Learned
from mmcore.systems.lxmert.shapes import LXMERT_CONFIGS, LxmertConfig
from mmcore.systems.lxmert.weights import load_lxmert, save_lxmert
from mmcore.systems.vilt.recipe import matched_images
from mmcore.train.optim import OptimConfig

PUBLISHED = partial(
    OptimConfig, lr=1e-4, beta2=0.999, eps=1e-6, weight_decay=0.01, schedule="linear", warmup_share=0.05
)
REGION_WEIGHT = 6.67
REGION_RATE = 0.15
NUM_OBJECTS, NUM_ATTRIBUTES = 1600, 400
"""Of Visual Genome's, that bottom-up attention tells apart."""


@dataclass(frozen=True)
class LxmertAssets(FusionAssets):
    """A model's shape, tokenizer and answers, and where its regions come from."""

    rows: DetectorRows | None = None

    @property
    def preprocess(self) -> Any:
        found = self.rows or self.shape.grid
        assert found is not None
        return found

    @property
    def summary(self) -> dict[str, str]:
        shape: LxmertConfig = self.shape
        layers = (
            f"{shape.text.num_layers} layers of words, {shape.region_layers} of regions, {shape.cross_layers} of both"
        )
        found = {"layers": f"{layers}; {tower_summary(shape.text)}", "regions": self.preprocess.summary}
        found["tokenizer"] = f"{self.wordpiece.vocab_size} words, {self.origin}"
        return {**found, "answers": str(len(self.answers))} if self.answers else found


class LxmertBatch(NamedTuple):
    """Arguments of `LXMERT.pretrain`, which texts are about their image, which regions are hidden, and the answer to
    each, -1 where there is none."""

    regions: Regions
    features: Tensor
    tokens: Tensor
    num_text: Tensor
    hidden: Tensor
    wanted: Tensor
    is_match: Tensor
    is_hidden: Tensor
    answer: Tensor


@dataclass(frozen=True)
class OnLxmert(FusionRecipe):
    """Mixin: the model is an LXMERT, of regions."""

    optim: OptimConfig = field(default_factory=PUBLISHED)
    model: str = "tiny"
    """tiny, or base (as published, on a grid of 6 x 6 cells where there is no --regions); with --from it is that
    one's."""
    max_text: int = 20
    """Tokens of a text, [CLS] and [SEP] included."""
    regions: Path | None = field(default=None, metadata=free)
    """Rows of a detector by the names of the pictures' files: a folder with an .npz each, or .tsv files as LXMERT
    publishes them; None = the cells of a grid."""
    max_regions: int = 36
    """Of a picture, of --regions: the first ones."""

    shapes = LXMERT_CONFIGS
    kind = LXMERT
    formats = ("hf",)
    accumulates = True

    def fitted(self, shape: LxmertConfig, wordpiece: WordPiece) -> LxmertConfig:
        num, text = wordpiece.vocab_size - 1, shape.text  # without what begins a text to generate
        if self.start is None:
            text = replace(text, vocab_size=num, pad_token_id=wordpiece.pad_token_id)
        what = "--tokenizer must have at most {} words, got {}"
        require(self.name, num <= text.vocab_size, what, text.vocab_size, num)
        most = text.num_positions
        require(self.name, self.max_text <= most, "--max-text must be at most {}, got {}", most, self.max_text)
        return replace(shape, text=text, head="pretraining", num_answers=0)

    def assets(self, data: Any) -> LxmertAssets:
        require(self.name, self.max_regions >= 1, "--max-regions must be at least 1, got {}", self.max_regions)
        rows = self.rows()
        found = super().assets(data)
        shape: LxmertConfig = found.shape
        if rows is not None:
            is_same = self.start is None or shape.feature_width == rows.width
            what = "--regions must have the {} features that --from {} was trained on, got {}"
            require(self.name, is_same, what, shape.feature_width, self.start, rows.width)
            shape = replace(shape, feature_width=rows.width, image_size=0, cell_size=0)
            if self.start is None and rows.has_objects:
                shape = replace(shape, num_objects=NUM_OBJECTS, num_attributes=NUM_ATTRIBUTES)
        has_grid = shape.image_size > 0
        require(self.name, has_grid or rows is not None, "--regions must be given with --from {}, got None", self.start)
        return LxmertAssets(**{**vars(found), "shape": shape, "rows": rows})

    def rows(self) -> DetectorRows | None:
        """Of --regions."""
        if self.regions is not None:
            require(self.name, self.regions.exists(), "--regions must be a folder or a file, got {}", self.regions)
            return DetectorRows.open(self.regions, self.max_regions)
        default = type(self)().max_regions
        is_used = self.max_regions == default
        require(self.name, is_used, "--max-regions has no effect without --regions, got {}", self.max_regions)
        return None

    def load_assets(self, folder: Path, saved: Mapping[str, Any], frozen: Any, purpose: Any) -> LxmertAssets:
        shape, wordpiece = from_json(LxmertConfig, saved), load_wordpiece(folder / "tokenizer")
        answers = tuple(saved.get("answers", ()))
        return LxmertAssets(shape, wordpiece, answers=answers, frozen=frozen, rows=self.rows())

    def read_start(self, path: Path) -> tuple[Any, WordPiece | None, dict[str, Tensor]]:
        if is_run(path):
            return super().read_start(path)
        model = load_lxmert(path)
        has_words = any((path / name).is_file() for name in ("vocab.txt", "tokenizer.json"))
        return model.config, load_wordpiece(path) if has_words else None, dict(model.state_dict())

    # batches

    def sample(self, assets: Any, record: Any, rng: np.random.Generator) -> FusionSample:
        caption = record.caption(rng)
        grid = assets.shape.grid
        if assets.rows is not None or grid is None:
            regions: Any = assets.preprocess.of_picture(record.image)
        else:
            image: Image.Image = record.augment(grid.square, rng)
            regions = grid.cells(to_pixels(image)[None])
        pair = PairSample(regions, caption, record.label(caption), record.image_id, record.question)
        return FusionSample(pair, int(rng.integers(2**62)), record.answers)

    def joined(self, images: list[Regions]) -> Regions:
        return Regions.joined(images)

    # what follows

    def image_tower(self, assets: FusionAssets, model: Any) -> Any:
        raise ValueError("--vision must be of a model with an image tower, got one of lxmert, which reads regions")

    def export(self, assets: FusionAssets, model: LXMERT, folder: Path, format: str) -> None:
        save_lxmert(model, folder, assets.answers)
        assets.wordpiece.save(folder)


@dataclass(frozen=True)
class Lxmert(OnLxmert, CompletesTexts, MatchesPairs, SaysAnswers):
    """Train LXMERT (arXiv 1908.07490) on image-caption pairs: hidden words and regions, matching and, of questions,
    answers."""

    with_questions: bool = False
    """Learn from the questions of --data too, each a text whose answer is told from it and the regions."""
    answers: Path | None = field(default=None, metadata=free)
    """Of --with-questions, the answers: a JSON list, such as LXMERT's trainval_label2ans.json, or a file with one a
    line; None = those that are given --least-answers times."""
    least_answers: int = 9
    """How often an answer is given, over all training questions, to be told."""

    @property
    def tasks(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("matching", "cloze", *(("vqa",) if self.with_questions else ()))

    @property
    def prompts(self) -> Mapping[str, str | None]:
        return {"vqa": "{}"} if self.with_questions else {}

    def loader(self, data: PairData, assets: Any, spec: LoaderSpec) -> TrainLoader:
        if not self.with_questions:
            return super().loader(data, assets, spec)
        assert data.questions is not None
        sources: list[PairSource] = [x for x in (data.source, data.questions) if isinstance(x, PairSource)]
        both = Mixed(sources)
        return replace(data, source=both, num_train=len(both), drawn=False).train_loader(spec, self.reader(assets))

    def texts(self, data: PairData) -> Sequence[str]:
        asked = [] if data.questions is None or not self.with_questions else [q.text for q in data.questions.questions]
        return [*asked, *([] if data.source is None and asked else super().texts(data))]

    def assets(self, data: PairData) -> LxmertAssets:
        found = super().assets(data)
        if not self.with_questions:
            for name in ("answers", "least_answers"):
                is_used = getattr(self, name) == getattr(type(self)(), name)
                flag = name.replace("_", "-")
                require(
                    self.name, is_used, "--{} has no effect without --with-questions, got {}", flag, getattr(self, name)
                )
            return found
        asked = data.questions
        require(self.name, asked is not None, "--data must have questions, got {}", data.name)
        assert asked is not None
        if self.answers is not None:
            known = AnswerVocabulary.of_file(self.answers)
        else:
            known = AnswerVocabulary.of_questions((q.answers for q in asked.questions), self.least_answers)
        return replace(found, shape=replace(found.shape, num_answers=len(known)), answers=known.answers)

    def collate(self, assets: Any, samples: list[FusionSample]) -> LxmertBatch:
        texts = [x.pair.question or x.pair.caption for x in samples]
        told = [x._replace(pair=x.pair._replace(caption=text)) for x, text in zip(samples, texts, strict=True)]
        rngs = [np.random.default_rng([x.seed, 1]) for x in samples]
        # another image's text in the place of half of them, and then its words are hidden
        ids = [stable_hash(x.pair.question) if x.pair.question else x.pair.label for x in samples]
        index = matched_images([x.pair.image_id for x in samples], ids, rngs)
        shown = [x._replace(pair=x.pair._replace(caption=texts[i])) for x, i in zip(told, index, strict=True)]
        batch = super().collate(assets, shown)
        labels = batch.labels.flatten()
        places = (labels != -100).nonzero()[:, 0]
        features, is_hidden = mask_regions(batch.images, REGION_RATE, rngs)
        is_match = torch.tensor(index) == torch.arange(len(index))
        answer = torch.full((len(samples),), -1)
        if assets.answers:
            targets = assets.vocabulary.targets([x.answers for x in samples])
            for row, (scores, rng) in enumerate(zip(targets.numpy(), rngs, strict=True)):
                if scores.any() and is_match[row]:
                    answer[row] = int(rng.choice(len(scores), p=scores / scores.sum(dtype=np.float64)))
        inputs = features, batch.masked, batch.num_text, places, labels[places]
        return LxmertBatch(batch.images, *inputs, is_match, is_hidden, answer)

    def loss(self, model: Runner, batch: LxmertBatch, step: Step) -> dict[str, Tensor]:
        learned: Learned = model("pretrain", *batch[:6])
        device, regions = learned.match.device, batch.regions
        seen = torch.arange(regions.features.shape[1], device=device) < regions.counts.to(device)[:, None]
        parts = {
            "words": global_ratio(learned.words, torch.tensor(len(batch.wanted), device=device)),
            "matching": matching_loss(learned.match, batch.is_match.to(device)),
            "regions": REGION_WEIGHT * global_ratio(region_losses(learned, regions, batch.is_hidden, seen), seen.sum()),
        }
        if learned.answers is not None:
            answer = batch.answer.to(device)
            total = F.cross_entropy(learned.answers.float(), answer, reduction="sum", ignore_index=-1)
            parts["answers"] = global_ratio(total, (answer >= 0).sum())
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}


def region_losses(learned: Learned, regions: Regions, is_hidden: Tensor, seen: Tensor) -> Tensor:
    """Summed over the regions that are no padding: the error of the features of those that were hidden, and of all, as
    sure as the detector is, the cross-entropies of objects and attributes."""
    device = learned.features.device
    target = regions.features.to(device, learned.features.dtype)
    error = F.smooth_l1_loss(learned.features, target, reduction="none").mean(2)
    total = (error * (is_hidden.to(device) & seen)).sum()
    known: Objects | None = regions.objects
    if known is None or learned.objects is None or learned.attributes is None:
        return total
    for logits, label, score in (
        (learned.objects, known.objects, known.object_scores),
        (learned.attributes, known.attributes, known.attribute_scores),
    ):
        rows = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        found = F.cross_entropy(rows, label.to(device).flatten(), reduction="none", ignore_index=-1)
        total = total + (found.view(label.shape) * score.to(device) * seen).sum()
    return total


FLAGS = "--data digits --model tiny --batch-size 64 --beta2 0.98 --lr 1e-3"
READING = ("lxmert", f"{FLAGS} --with-questions --epochs 13 --schedule const-cooldown --ema 0.99")
"""Pixels of cells say nothing of classes, unlike a detector's features; questions teach the most about them."""
PROOF = Proof([READING], [Claim("VQA accuracy (held-out)", "VQA accuracy", 0.75)])
