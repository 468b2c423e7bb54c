"""BLIP-2's recipes, one a stage."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from PIL import Image
from torch import Tensor

from mmcore import checkpoint
from mmcore.data import LoaderSpec, PairData, Preprocess, TrainLoader
from mmcore.data.collate import PairSample, collate_pairs
from mmcore.data.text.prompts import Prompted, PromptTokens, Task, prompt_texts
from mmcore.data.text.wordpiece import WordPiece, load_wordpiece, train_wordpiece
from mmcore.image_recipe import of_states
from mmcore.parts import language_folder
from mmcore.parts.language_weights import beside_language, end_at
from mmcore.parts.probe import check_head
from mmcore.parts.tiny_lm import texts_by_picture
from mmcore.parts.towers import load_tower, visual_state
from mmcore.parts.vit import Tower, VisionConfig
from mmcore.recipe import (
    Assets,
    Claim,
    Embeds,
    Matches,
    OnLanguageModel,
    OnPairs,
    Proof,
    Purpose,
    Represents,
    Runner,
    Step,
)
from mmcore.runs import find_run, is_run, load_weights, read_frozen, read_run
from mmcore.settings import free, from_json
from mmcore.systems.blip2.lm import BLIP2LM
from mmcore.systems.blip2.model import BLIP2, BLIP2Config
from mmcore.systems.blip2.qformer import QFormerConfig
from mmcore.systems.blip2.shapes import blip2_config
from mmcore.systems.blip2.steps import Pair, stage1_losses, stage2_loss
from mmcore.systems.blip2.weights import (
    PARTS_SETTINGS,
    STAGE1_SETTINGS,
    has_language_model,
    load_folder,
    save_blip2,
    save_blip2_lm,
)
from mmcore.tasks.speaking import Answerer, Decoding
from mmcore.train.optim import OptimConfig

STAGE1, STAGE2 = "blip2-stage1", "blip2-stage2"


def _published(warmup: int) -> OptimConfig:
    """arXiv 2301.12597 and LAVIS; the stages differ in their warm-up."""
    decays: dict[str, Any] = {"beta2": 0.999, "eps": 1e-8, "weight_decay": 0.05}
    return OptimConfig(lr=1e-4, min_lr=1e-5, warmup_lr=1e-6, warmup=warmup, **decays)


@dataclass(frozen=True)
class Stage1Assets(Assets):
    """The model's shape, and what makes tokens of captions."""

    shape: BLIP2Config
    wordpiece: WordPiece
    origin: str = ""  # of its words, for the reader

    @property
    def preprocess(self) -> Preprocess:
        return self.shape.vision.preprocess

    def save(self, folder: Path) -> dict[str, Any]:
        self.wordpiece.save(folder / "tokenizer")
        return asdict(self.shape)

    @property
    def summary(self) -> dict[str, str]:
        vision, tokens = self.shape.vision, f"{self.wordpiece.vocab_size} words, {self.origin}"
        pictures = {"image tower": vision.summary, "pictures": self.preprocess.summary}
        return {**pictures, "tokenizer": tokens, **STAGE1_SETTINGS.export_summary(self.shape)}


@dataclass(frozen=True)
class Blip2Stage1(OnPairs):
    """Train BLIP-2's Q-Former (arXiv 2301.12597, stage 1) on image-caption pairs: contrast, matching, captions."""

    optim: OptimConfig = field(default_factory=partial(_published, 5000))
    model: str = "tiny"
    """tiny, small (for the towers of a CLIP of that name) or ViT-g (as published)."""
    vision: Path | None = field(default=None, metadata=free)
    """The image tower: a run of mmcore train clip, or a CLIP or BLIP-2 of transformers or open_clip."""
    freeze_vision: bool = True
    """Keep the image tower as it is, as published."""
    tokenizer: Path | None = None
    """BERT's vocab.txt, or a folder with it; None = one is learned from the captions."""
    tokenizer_samples: int = field(default=1_000_000, metadata=free)
    """Of more samples than these a vocabulary is learned from a random choice."""
    max_text: int = 32
    """Tokens of a caption, [CLS] and [SEP] included."""

    accumulates = False
    tasks = ("matching", "retrieval")
    formats = ("hf",)

    @property
    def prompts(self) -> Mapping[str, str | None]:
        return {"caption": None}

    def assets(self, data: PairData) -> Stage1Assets:
        if self.vision is None and self.freeze_vision:
            what = "a frozen image tower of random weights shows nothing"
            raise ValueError(f"--vision must be given, or --no-freeze-vision: {what}")
        tower = None if self.vision is None else load_tower(self.vision)
        if self.tokenizer is not None:
            wordpiece, origin = load_wordpiece(self.tokenizer), f"of {self.tokenizer}"
        else:
            captions = data.captions(self.tokenizer_samples, self.run.seed)
            wordpiece = train_wordpiece(captions, vocab_size=blip2_config(self.model).qformer.vocab_size)
            origin = f"learned from {len(captions)} captions"
        shape = blip2_config(
            self.model,
            vision=None if tower is None else tower.config,
            vocab_size=wordpiece.vocab_size,
            pad_token_id=wordpiece.pad_token_id,
            decoder_token_id=wordpiece.decoder_token_id,
        )
        most = shape.qformer.max_text
        if not 2 <= self.max_text <= most:
            raise ValueError(f"--max-text must be from 2 to {most}, got {self.max_text}")
        frozen = visual_state(tower) if tower is not None and self.freeze_vision else {}
        return Stage1Assets(shape, wordpiece, origin, frozen=frozen)

    def load_assets(
        self, folder: Path, saved: Mapping[str, Any], frozen: Mapping[str, Tensor], purpose: Purpose
    ) -> Stage1Assets:
        return Stage1Assets(from_json(BLIP2Config, saved), load_wordpiece(folder / "tokenizer"), frozen=frozen)

    def build(self, assets: Stage1Assets) -> BLIP2:
        model = BLIP2(assets.shape, freeze_vision=self.freeze_vision)
        load_weights(model, assets.frozen, is_whole=False)
        return model

    def initial(self, assets: Stage1Assets, model: BLIP2) -> Mapping[str, Tensor]:
        return {} if self.freeze_vision or self.vision is None else visual_state(load_tower(self.vision))

    def collate(self, assets: Stage1Assets, samples: list[PairSample]) -> Pair:
        batch = collate_pairs(samples)
        texts = assets.wordpiece.padded(batch.captions, self.max_text)
        return Pair(batch.images, texts, batch.image_ids, batch.labels)

    def loss(self, model: Runner, batch: Pair, step: Step) -> dict[str, Tensor]:
        return stage1_losses(model, batch, step.generator)

    def embeds(self, assets: Stage1Assets, model: Runner, device: torch.device) -> Embeds:
        def text(captions: list[str]) -> Tensor:
            return model("encode_text", *self._texts(assets, captions, device))

        return Embeds(assets.preprocess, partial(model, "tower"), partial(model, "encode_image"), text)

    def represents(self, assets: Stage1Assets, model: Runner, device: torch.device) -> Represents:
        return of_states(assets.shape.vision, partial(model, "tower"))

    def matches(self, assets: Stage1Assets, model: Runner, device: torch.device) -> Matches:
        def scores(states: Tensor, index: Tensor, captions: list[str]) -> Tensor:
            logits = model("match", None, states, index, *self._texts(assets, captions, device))
            return logits[:, 1] - logits[:, 0]

        return scores

    def _texts(self, assets: Stage1Assets, captions: list[str], device: torch.device) -> list[Tensor]:
        return [x.to(device) for x in assets.wordpiece(captions, self.max_text)]

    def speaks(self, assets: Stage1Assets, model: BLIP2, device: torch.device, decoding: Decoding) -> Answerer:
        options = {"max_length": self.max_text - 1, "eos_token_id": assets.wordpiece.sep_token_id}

        def say(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
            pixels = assets.preprocess(images).to(device)
            ids = model.generate(pixels, **options, **decoding.options())
            return [assets.wordpiece.decode(row) for row in ids.tolist()]

        return say

    def image_tower(self, assets: Stage1Assets, model: BLIP2) -> Tower:
        return Tower(assets.shape.vision, model.visual.state_dict())

    def export(self, assets: Stage1Assets, model: BLIP2, folder: Path, format: str) -> None:
        save_blip2(model, folder)
        assets.wordpiece.save(folder)


@dataclass(frozen=True)
class Stage2Assets(Assets):
    """Shapes of tower and Q-Former, and the language model with its tokens."""

    vision: VisionConfig
    qformer: QFormerConfig
    language: language_folder.Language
    tokens: PromptTokens

    @property
    def preprocess(self) -> Preprocess:
        return self.vision.preprocess

    def save(self, folder: Path) -> dict[str, Any]:
        shapes = {"vision": asdict(self.vision), "qformer": asdict(self.qformer)}
        return {**shapes, language_folder.LANGUAGE_MODEL: self.language.save(folder)}

    @property
    def summary(self) -> dict[str, str]:
        pictures = {"image tower": self.vision.summary, "pictures": self.preprocess.summary}
        parts = {"vision": self.vision, "qformer": self.qformer}
        return {**pictures, "language model": self.language.summary, **PARTS_SETTINGS.export_summary(parts)}


def stage2_start(path: Path) -> tuple[VisionConfig, QFormerConfig, dict[str, Tensor]]:
    """What stage 2 starts from: the shapes of the tower and of the Q-Former, without text, and their weights, of a run
    of stage 1 or stage 2, or of a folder of transformers with a Blip2ForImageTextRetrieval or a
    Blip2ForConditionalGeneration; a ValueError for anything else."""
    run = find_run(path) if is_run(path) else None
    if run is not None and run.recipe not in (STAGE1, STAGE2):
        raise ValueError(f"--from must be a run of {STAGE1} or {STAGE2}, got one of {run.recipe}, {path}")
    if run is not None and run.recipe == STAGE2:
        saved = run.saved["model"]
        state = dict(checkpoint.stored(run.checkpoint, run.key)) | read_frozen(run.folder)
        return VisionConfig(**saved["vision"]), QFormerConfig(**saved["qformer"]), state
    model: Any = load_folder(path) if run is None else read_run(path).model
    return model.visual.config, replace(model.qformer.config, has_text=False), beside_language(model)


@dataclass(frozen=True)
class Blip2Stage2(OnPairs, OnLanguageModel):
    """Train BLIP-2's Q-Former in front of a frozen language model (arXiv 2301.12597, stage 2): captions, answers."""

    optim: OptimConfig = field(default_factory=partial(_published, 2000))
    start: Annotated[Path | None, tyro.conf.arg(name="from")] = field(default=None, metadata={**free, "flag": "from"})
    """What to start from: a run of mmcore train blip2-stage1 or blip2-stage2, or a folder with a BLIP-2 of
    transformers. A resumed run needs none."""
    task: Task = "caption"
    """caption = describe the image; vqa = answer the questions of --data."""
    prompt: str | None = None
    """Text before what is learned, with {} for the question; None = nothing for captions, 'Question: {} Answer:' for
    questions."""
    max_text: int = 32
    """Tokens of a caption or answer, its end included."""

    accumulates = False
    formats = ("hf",)

    @property
    def tasks(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (self.task,)

    @property
    def prompts(self) -> Mapping[str, str | None]:
        return {"caption": None, "vqa": None, self.task: self.prompt}

    def loader(self, data: PairData, assets: Any, spec: LoaderSpec) -> TrainLoader:
        make = data.question_loader if self.task == "vqa" else data.train_loader
        return make(spec, self.reader(assets))

    def assets(self, data: PairData) -> Stage2Assets:
        prompt_texts(self.task, self.prompt, [""])
        language_folder.check_llm_steps(self.llm, self.llm_steps)
        if self.start is None:
            raise ValueError(f"--from must be given: a run of {STAGE1}, or what else {STAGE2} starts from")
        vision, qformer, state = stage2_start(self.start)
        if self.llm is None:
            language = self._language_of_start(self.start)
        else:
            prompt = {"question_prompt" if self.task == "vqa" else "caption_prompt": self.prompt}
            texts = partial(texts_by_picture, data, **prompt)
            language = language_folder.chosen_language(self.llm, texts, seed=self.run.seed, steps=self.llm_steps)
        frozen = {name: x for name, x in state.items() if name.startswith("visual.")}
        assets = Stage2Assets(vision, qformer, language, self._tokens(language), frozen=frozen)
        model = self.build(assets)
        model.fitting(state)
        if not language.is_encoder_decoder:
            check_head("--llm", model.language_model)
        return assets

    def _language_of_start(self, start: Path) -> language_folder.Language:
        if has_language_model(start):
            return language_folder.read_language(start)
        run = find_run(start) if is_run(start) else None
        if run is not None and run.recipe == STAGE2:
            return language_folder.language_of(run.folder, run.saved["model"], None, None)
        raise ValueError(f"--llm must be a language model's folder or {language_folder.TINY!r}: {start} has none")

    def _tokens(self, language: language_folder.Language) -> PromptTokens:
        is_encoder_decoder = language.is_encoder_decoder
        return PromptTokens(language.tokenizer, is_encoder_decoder=is_encoder_decoder, max_answer=self.max_text)

    def load_assets(
        self, folder: Path, saved: Mapping[str, Any], frozen: Mapping[str, Tensor], purpose: Purpose
    ) -> Stage2Assets:
        dtype = self.language_dtype(purpose)
        language = language_folder.language_of(folder, saved, self.moved_to, dtype, verify=purpose != "train")
        shapes = VisionConfig(**saved["vision"]), QFormerConfig(**saved["qformer"])
        return Stage2Assets(*shapes, language, self._tokens(language), frozen=frozen)

    def build(self, assets: Stage2Assets) -> BLIP2LM:
        model = BLIP2LM(assets.vision, assets.qformer, assets.language.load(assets.partition))
        load_weights(model, assets.frozen, is_whole=False)
        return model

    def initial(self, assets: Stage2Assets, model: BLIP2LM) -> Mapping[str, Tensor]:
        assert self.start is not None
        return model.fitting(stage2_start(self.start)[2])

    def collate(self, assets: Stage2Assets, samples: list[PairSample]) -> tuple[Tensor, Prompted]:
        batch = collate_pairs(samples)
        questions = batch.questions or [""] * len(batch.captions)
        return batch.images, assets.tokens.pairs(prompt_texts(self.task, self.prompt, questions), batch.captions)

    def loss(self, model: Runner, batch: tuple[Tensor, Prompted], step: Step) -> dict[str, Tensor]:
        return {"loss": stage2_loss(model, *batch)}

    def speaks(self, assets: Stage2Assets, model: Runner, device: torch.device, decoding: Decoding) -> Answerer:
        tokens = assets.tokens
        settings = {
            "max_new_tokens": tokens.max_answer,
            "eos_token_id": sorted(tokens.stops),
            "pad_token_id": tokens.tokenizer.pad_token_id,
            **decoding.generate_options(),
        }

        def say(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
            read = (assets.preprocess(images), *tokens.prompts(prompts))
            return tokens.text(model("generate", *(x.to(device) for x in read), **settings).cpu())

        return say

    def export(self, assets: Stage2Assets, model: BLIP2LM, folder: Path, format: str) -> None:
        end_at(model.language_model, assets.tokens.stops)
        save_blip2_lm(model, folder, tokenizer=assets.language.tokenizer)


_TOWER = ("clip", "--data digits --epochs 15 --lr 1e-3 --ema 0.99")
_ON_TOWER = "--data digits --vision {0} --batch-size 64 --lr 1e-3"
_ON_STAGE1 = "--data digits --from {1} --llm tiny --task vqa --epochs 6 --batch-size 64 --lr 1e-3 --ema 0.99"
PROOF1 = Proof([_TOWER, (STAGE1, f"{_ON_TOWER} --epochs 20")], [Claim("ITM accuracy (held-out)", "ITM accuracy", 0.75)])
PROOF2 = Proof(
    [_TOWER, (STAGE1, f"{_ON_TOWER} --epochs 6"), (STAGE2, _ON_STAGE1)],
    [Claim("VQA accuracy (held-out)", "VQA accuracy", 0.5)],
)
