"""LLaVA's recipes, one a stage."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor

from mmcore import checkpoint
from mmcore.data import DataConfig, LoaderSpec, PairData, TrainLoader, open_data
from mmcore.data.loader import MapLoader
from mmcore.data.opening import ChatData, open_chats, source_kind
from mmcore.data.sources.conversations import IMAGE, ChatRecord
from mmcore.data.sources.derived_chats import DESCRIBE
from mmcore.data.text.templates import TEMPLATES, ChatTokens
from mmcore.integrations.transformers import NAME as ATTENTION
from mmcore.integrations.transformers import register
from mmcore.labels import IGNORED
from mmcore.losses import global_ratio
from mmcore.parts import language_folder
from mmcore.parts.adapters import LORA_DROPOUT, Lora
from mmcore.parts.language_weights import beside_language, end_at
from mmcore.parts.probe import check_head, why_not_packed
from mmcore.parts.tiny_lm import Said
from mmcore.parts.towers import load_tower, visual_state
from mmcore.recipe import Assets, Claim, OnLanguageModel, Proof, Purpose, Runner, Step
from mmcore.runs import check_weights, find_run, is_run, load_weights, read_frozen, read_run
from mmcore.settings import free, from_json
from mmcore.systems.llava.anyres import next_pinpoints
from mmcore.systems.llava.inputs import ChatPart, SeenChat, collate_chats, seen_chat, shown_chat
from mmcore.systems.llava.model import Llava, LlavaConfig, Trainable, learned_labels
from mmcore.systems.llava.talk import Talks
from mmcore.systems.llava.weights import HF_SETTINGS, read_llava, read_projector, save_llava
from mmcore.tasks.speaking import Answerer, Decoding
from mmcore.train.config import RunConfig
from mmcore.train.optim import OptimConfig, Rule

STAGES = "llava-stage1", "llava-stage2"
# how the names of a model's parts begin
VISION, PROJECTOR, NEWLINE, LANGUAGE = "visual.", "projector.", "image_newline", "language_model."
PROMPTS = {
    "caption": "Provide a one-sentence caption for the provided image.",
    "vqa": "{}\nAnswer the question using a single word or phrase.",
}
"""LLaVA-1.5's, of models that were trained on its data."""


class LlavaStart(NamedTuple):
    """What a model begins with."""

    config: LlavaConfig
    state: dict[str, Tensor]  # by our names, of the language model what is not as in its folder
    llm: Path  # the language model's folder


def _published(lr: float) -> OptimConfig:
    decays: dict[str, Any] = {"beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    return OptimConfig(lr=lr, warmup=10**9, warmup_share=0.03, **decays)


@dataclass(frozen=True)
class LlavaAssets(Assets):
    """The shapes of tower, projector, tiles and adapters, and the language model with its tokens."""

    shape: LlavaConfig
    lora: Lora | None
    language: language_folder.Language
    tokens: ChatTokens
    unpacked: str | None  # why each conversation has a row of its own; None = several share one

    def save(self, folder: Path) -> dict[str, Any]:
        settings = {"lora": self.lora and asdict(self.lora), "unpacked": self.unpacked}
        return {**asdict(self.shape), **settings, language_folder.LANGUAGE_MODEL: self.language.save(folder)}

    @property
    def summary(self) -> dict[str, str]:
        shape, tiles = self.shape, ", and tiles" if self.shape.has_tiles else ""
        pictures = {"image tower": shape.vision.summary, "pictures": f"{shape.preprocess.summary}{tiles}"}
        return {**pictures, "language model": self.language.summary, **HF_SETTINGS.export_summary(shape)}


@dataclass(frozen=True)
class LlavaRecipe(OnLanguageModel):
    """What both stages have in common."""

    data: DataConfig = field(default_factory=partial(DataConfig, val_fraction=0.1))
    """Which conversations."""
    max_length: int = 2048
    """Tokens of a row, those of images included."""
    pack: bool | None = field(default=None, metadata=free)
    """Several conversations stand in a row and see nothing of each other (--pack), or each has a row of its own
    (--no-pack). None = packed where the language model's logits, measured at the start, are the same either way."""
    activation_checkpointing: bool = field(default=False, metadata=free)
    """Recompute activations in the backward: less memory, about a third more time; as published."""
    max_answer: int = field(default=64, metadata=free)
    """Tokens of an answer at most when the run is measured."""
    template: str = "plain"

    tasks = ("conversation",)
    formats = ("hf",)

    def __post_init__(self) -> None:
        if self.max_answer < 1:
            raise ValueError(f"--max-answer must be at least 1, got {self.max_answer}")

    @property
    def trainable(self) -> Trainable:
        return "projector"

    @property
    def adapters(self) -> Lora | None:
        """In place of the language model's weights."""
        return None

    @property
    def learned(self) -> tuple[str, ...]:
        """How the names of the weights begin that learn, adapters aside."""
        learns = {PROJECTOR: True, NEWLINE: True, LANGUAGE: self.learns_language, VISION: self.trainable == "all"}
        return tuple(name for name in learns if learns[name])

    @property
    def learns_language(self) -> bool:
        return self.trainable != "projector" and self.adapters is None

    @property
    def is_derived(self) -> bool:
        """Whether the conversations are made of captions, questions, classes and pixels."""
        return source_kind(self.data.data) != "chats"

    @property
    def prompts(self) -> Mapping[str, str | None]:
        described = DESCRIBE.get(self.data.language, DESCRIBE["en"]) if self.is_derived else PROMPTS["caption"]
        return {"caption": described, "vqa": "{}" if self.is_derived else PROMPTS["vqa"]}

    def open_data(self) -> ChatData:
        return open_chats(self.data, seed=self.run.seed, captions_only=self.template == "plain")

    def pictures(self, data: Any) -> PairData:
        """Those that a run held out of what its conversations were made of."""
        if isinstance(data, PairData):
            return data
        if not self.is_derived:
            raise ValueError(f"--data must be given: the run was trained on conversations alone, {self.data.data}")
        return open_data(self.data, seed=self.run.seed)

    def loader(self, data: ChatData, assets: LlavaAssets, spec: LoaderSpec) -> TrainLoader:
        return MapLoader(data.train, spec, self.reader(assets), data.train.tally())

    def sample(self, assets: LlavaAssets, record: ChatRecord, rng: np.random.Generator) -> SeenChat:
        return seen_chat(record, assets.tokens, assets.shape)

    def shown(self, data: ChatData, assets: LlavaAssets) -> list[str]:
        rows = "several conversations share a row, and each has the logits that it has alone"
        if assets.unpacked is not None:
            rows = f"each conversation has a row of its own: {assets.unpacked}"
        return [rows, *shown_chat(map(data.train.record, range(len(data.train))), assets.tokens, assets.shape)]

    def collate(self, assets: LlavaAssets, samples: list[SeenChat]) -> ChatPart:
        return collate_chats(samples, assets.tokens, assets.shape, is_packed=assets.unpacked is None)

    def _checked(self, start: LlavaStart, language: language_folder.Language) -> LlavaAssets:
        """What a new run keeps; weights are compared with a model's, and the language model is measured."""
        frozen = {n: x for n, x in start.state.items() if not n.startswith(self.learned)}
        model = _with_our_attention(language.load())
        check_head("--llm", model)
        unpacked = "--no-pack was given" if self.pack is False else why_not_packed(model)
        if self.pack and unpacked:
            raise ValueError(
                f"--pack must not be given with this {model.config.model_type}, give --no-pack: {unpacked}"
            )
        assets = LlavaAssets(start.config, self.adapters, language, self._tokens(language), unpacked, frozen=frozen)
        with torch.device("meta"):
            check_weights(Llava(assets.shape, model), start.state, is_whole=False)
        return assets

    def _tokens(self, language: language_folder.Language) -> ChatTokens:
        return ChatTokens(language.tokenizer, self.template, self.max_length)

    def load_assets(
        self, folder: Path, saved: Mapping[str, Any], frozen: Mapping[str, Tensor], purpose: Purpose
    ) -> LlavaAssets:
        dtype = self.language_dtype(purpose)
        language = language_folder.language_of(folder, saved, self.moved_to, dtype, verify=purpose != "train")
        unpacked = saved.get("unpacked", "--no-pack was given" if self.pack is False else None)
        if self.pack is not None and self.pack != (unpacked is None):
            had = "--no-pack" if unpacked else "--pack"
            raise ValueError(f"{had} must be as in the run that is resumed, got the opposite")
        return LlavaAssets(*_shape(saved), language, self._tokens(language), unpacked, frozen=frozen)

    def build(self, assets: LlavaAssets) -> Llava:
        language = _with_our_attention(assets.language.load(assets.partition))
        model = Llava(assets.shape, language, trainable=self.trainable)
        load_weights(model, assets.frozen, is_whole=False)
        if assets.lora is not None:
            model.add_adapters(assets.lora)
        model.set_activation_checkpointing(self.activation_checkpointing)
        return model

    def in_use(self, model: Llava) -> Llava:
        model.merge_adapters()
        return model.eval()

    def loss(self, model: Runner, batch: ChatPart, step: Step) -> dict[str, Tensor]:
        return {"loss": global_ratio(*model("loss", *batch))}

    def weight(self, batch: ChatPart) -> Tensor:
        return (learned_labels(batch.labels, batch.position_ids) != IGNORED).sum()

    def converses(self, assets: LlavaAssets, model: Any, device: torch.device) -> Talks:
        return Talks(model, assets.tokens, assets.shape, device, self.max_answer)

    def speaks(self, assets: LlavaAssets, model: Any, device: torch.device, decoding: Decoding) -> Answerer:
        return self.converses(assets, model, device).answerer(**decoding.generate_options())

    def export(self, assets: LlavaAssets, model: Llava, folder: Path, format: str) -> None:
        end_at(model.language_model, assets.tokens.stops)
        save_llava(model, folder, tokenizer=assets.language.tokenizer)


@dataclass(frozen=True)
class LlavaStage1(LlavaRecipe):
    """Train LLaVA's projector between a frozen image tower and a frozen language model (arXiv 2310.03744, stage 1)."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=1, batch_size=32))
    optim: OptimConfig = field(default_factory=partial(_published, 1e-3))
    vision: Path | None = field(default=None, metadata=free)
    """The image tower: a run of mmcore train clip, or a CLIP or BLIP-2 of transformers or open_clip."""
    projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
    """linear = LLaVA's (arXiv 2304.08485), mlp2x_gelu = that of 1.5 and NeXT."""
    anyres: bool = False
    """Cut large images into tiles, as NeXT does."""
    template: str = "plain"
    """plain = the caption behind the image; v1, llama_3, chatml, or auto, the tokenizer's own."""

    @property
    def prompts(self) -> Mapping[str, str | None]:
        return {"caption": super().prompts["caption"]}

    def assets(self, data: ChatData) -> LlavaAssets:
        language_folder.check_llm_steps(self.llm, self.llm_steps)
        if self.vision is None:
            raise ValueError("--vision must be given: the frozen image tower")
        if self.llm is None:
            raise ValueError(f"--llm must be a language model's folder or {language_folder.TINY!r}, got nothing")
        tower = load_tower(self.vision)
        pinpoints = next_pinpoints(tower.config.image_size) if self.anyres else ()
        shape = LlavaConfig(tower.config, self.projector, pinpoints)
        language = language_folder.chosen_language(
            self.llm, partial(_said, data), seed=self.run.seed, steps=self.llm_steps
        )
        return self._checked(LlavaStart(shape, visual_state(tower), Path(self.llm)), language)


@dataclass(frozen=True)
class LlavaStage2(LlavaRecipe):
    """Train LLaVA's projector and language model on conversations (arXiv 2310.03744, stage 2)."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=1, batch_size=16))
    optim: OptimConfig = field(default_factory=partial(_published, 2e-5))
    start: Annotated[Path | None, tyro.conf.arg(name="from")] = field(default=None, metadata={**free, "flag": "from"})
    """What to start from: a run of mmcore train llava-stage1 or llava-stage2; a folder of transformers with a Llava or
    LlavaNext; or the original's mm_projector.bin, with --vision and --llm. A resumed run needs none."""
    vision: Path | None = field(default=None, metadata=free)
    """The image tower, of a CLIP, where --from is a mm_projector.bin."""
    anyres: bool = False
    """Cut large images into tiles, as NeXT does, where --from is a mm_projector.bin."""
    template: str = "v1"
    """v1 (Vicuna), llama_3, chatml, or auto, the tokenizer's own."""
    train_vision: bool = False
    """Train the image tower too, as NeXT does."""
    vision_lr: float | None = None
    """Learning rate of the image tower, with --train-vision; NeXT's 2e-6 beside --lr 1e-5. None = --lr."""
    projector_lr: float | None = None
    """Learning rate of the projector; None = --lr."""
    lora: int | None = None
    """Train adapters of this rank (peft) in place of the language model's weights; published with 128, --lr 2e-4 and
    --projector-lr 2e-5. None = train the weights."""
    lora_alpha: int | None = None
    """The adapters count alpha / rank times; None = twice the rank."""
    lora_dropout: float = LORA_DROPOUT
    """Dropout before the adapters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vision_lr", "projector_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be a positive number, got {value}")
        if self.vision_lr is not None and not self.train_vision:
            raise ValueError(f"--vision-lr has no effect without --train-vision, got {self.vision_lr}")
        if self.lora is not None and self.lora < 1:
            raise ValueError(f"--lora must be at least 1, got {self.lora}")
        if self.lora is None and self.lora_alpha is not None:
            raise ValueError(f"--lora-alpha has no effect without --lora, got {self.lora_alpha}")

    @property
    def trainable(self) -> Trainable:
        return "all" if self.train_vision else "language"

    @property
    def adapters(self) -> Lora | None:
        if self.lora is None:
            return None
        alpha = 2 * self.lora if self.lora_alpha is None else self.lora_alpha
        return Lora(self.lora, alpha, self.lora_dropout)

    @property
    def rules(self) -> tuple[Rule, ...]:
        given = {VISION: self.vision_lr, PROJECTOR: self.projector_lr, NEWLINE: self.projector_lr}
        return tuple(Rule(name, lr / self.optim.lr) for name, lr in given.items() if lr is not None)

    def _start(self) -> LlavaStart:
        """Of a run, of a folder of transformers, or of a mm_projector.bin; a ValueError of anything else, or of a flag
        that belongs to another of these."""
        path, llm = self.start, None if self.llm is None else Path(self.llm)
        if path is None:
            raise ValueError("--from must be given: a run of llava-stage1, or what else it starts from")
        if path.is_file():
            if self.vision is None or llm is None:
                raise ValueError(f"--vision and --llm must be given where --from is a projector alone, {path}")
            projector, tower = read_projector(path), load_tower(self.vision)
            pinpoints = next_pinpoints(tower.config.image_size) if self.anyres else ()
            kind = "linear" if "projector.weight" in projector else "mlp2x_gelu"
            return LlavaStart(LlavaConfig(tower.config, kind, pinpoints), visual_state(tower) | projector, llm)
        if self.vision is not None or self.anyres:
            raise ValueError(f"--vision and --anyres have no effect where --from is {path}, which has a tower")
        if is_run(path) or not path.exists():
            return _start_of_run(path, llm)
        if llm is not None:
            raise ValueError(f"--llm has no effect where --from is {path}, which has a language model, got {llm}")
        model = read_llava(path, dtype=None)
        return LlavaStart(model.config, beside_language(model), path)

    def assets(self, data: ChatData) -> LlavaAssets:
        language_folder.check_llm_steps(self.llm, self.llm_steps)
        start = self._start()
        return self._checked(start, language_folder.read_language(start.llm))

    def initial(self, assets: LlavaAssets, model: Llava) -> Mapping[str, Tensor]:
        return {n: x for n, x in self._start().state.items() if n.startswith(self.learned)}


def _with_our_attention(language: Any) -> Any:
    register()
    language.set_attn_implementation(ATTENTION)
    return language


def _shape(saved: Mapping[str, Any]) -> tuple[LlavaConfig, Lora | None]:
    """The model and its adapters as a run's config.json holds them."""
    return from_json(LlavaConfig, saved), saved["lora"] and Lora(**saved["lora"])


def _start_of_run(path: Path, llm: Path | None) -> LlavaStart:
    run = find_run(path)
    if run.recipe not in STAGES:
        raise ValueError(f"--from must be a run of {' or '.join(STAGES)}, got {path}, which is of {run.recipe}")
    config, lora = _shape(run.saved["model"])
    folder = language_folder.language_of(run.folder, run.saved["model"], llm, None).folder
    assert folder is not None
    if lora is None:
        state = dict(checkpoint.stored(run.checkpoint, run.key)) | read_frozen(run.folder)
    else:  # tied ones once
        state = {n: p.detach() for n, p in read_run(path, llm=llm).model.named_parameters()}
    return LlavaStart(config, state, folder)


def _said(data: ChatData) -> list[list[Said]]:
    """What a tiny language model learns of each picture: what is asked and answered, as stage 2 will write it."""
    template, found = TEMPLATES["v1"], []
    system = template.system.join(template.system_marks)
    for conversation in data.train.conversations:
        asked = []
        for question, answer in pairwise(conversation.turns):
            if answer.role == "assistant":
                text = question.text.replace(IMAGE, "").strip().join(template.user_marks)
                asked.append((f"{system}{text}{template.answer_mark}", answer.text))
        found.append([*asked, *(("", answer) for _, answer in asked)])
    return found


_TOWER = ("clip", "--data digits --val-fraction 0.2 --epochs 15 --lr 1e-3 --ema 0.99")
_DATA = "--data digits --val-fraction 0.2 --batch-size 32 --max-answer 16"
_ON_TOWER = f"{_DATA} --vision {{0}} --llm tiny --llm-steps 60"
_CLAIM = "answer accuracy (held-out)", "answer accuracy"
PROOF1 = Proof([_TOWER, ("llava-stage1", f"{_ON_TOWER} --lr 1e-2 --epochs 15")], [Claim(*_CLAIM, 0.4)])
_FIRST = ("llava-stage1", f"{_ON_TOWER} --lr 1e-3 --epochs 4")
_SECOND = ("llava-stage2", f"{_DATA} --lr 1e-3 --from {{1}} --epochs 6")
PROOF2 = Proof([_TOWER, _FIRST, _SECOND], [Claim(*_CLAIM, 0.7)])
