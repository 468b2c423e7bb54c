"""One recipe for every image-text-to-text model of transformers."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from mmcore.data import DataConfig, LoaderSpec, PairData, TrainLoader, open_data
from mmcore.data.broken import BrokenRecord
from mmcore.data.loader import MapLoader
from mmcore.data.opening import ChatData, open_chats, source_kind
from mmcore.data.sources.conversations import IMAGE, ChatRecord, Turn
from mmcore.data.sources.derived_chats import DESCRIBE
from mmcore.labels import IGNORED
from mmcore.losses import global_ratio
from mmcore.parts.adapters import LORA_DROPOUT, Lora
from mmcore.parts.language import dtypes_of, fingerprint
from mmcore.recipe import Assets, Claim, Proof, Purpose, Recipe, Runner, Step
from mmcore.settings import free
from mmcore.systems.vlm.model import ReadingModel
from mmcore.systems.vlm.reading import ReadBatch, ReadChat, Reader, collate, packed
from mmcore.systems.vlm.talk import Talks
from mmcore.systems.vlm.weights import load_body, load_processor, tiny
from mmcore.tasks.speaking import Answerer, Decoding
from mmcore.train.config import RunConfig
from mmcore.train.optim import OptimConfig, Rule

TINY = "tiny"
MODEL = "model"
"""Of a run's folder, the folder of a model that was made for it."""
_published = partial(OptimConfig, lr=1e-5, beta2=0.999, eps=1e-8, weight_decay=0.0, warmup=10**9, warmup_share=0.03)
PROBED = 3
"""Conversations that packing is tried with."""


@dataclass(frozen=True)
class VlmAssets(Assets):
    """The folder of a model, or a tiny one, and its processor."""

    folder: Path | None  # None = it was made here, and no run's folder has it yet
    reader: Reader
    lora: Lora | None
    unpacked: str | None  # why each conversation has a row of its own; None = several share one
    dtype: torch.dtype | None = None  # None = as it is stored
    body: Any = None  # that of a tiny one

    def load(self) -> Any:
        """The model, in evaluation mode on the CPU."""
        if self.body is not None:
            return self.body
        assert self.folder is not None
        body = load_body(self.folder, None)
        if self.dtype is not None:
            dtype_of = dtypes_of(body, self.dtype)
            for p in body.parameters():
                p.data = p.data.to(dtype_of(p))
        return body

    def save(self, folder: Path) -> dict[str, Any]:
        if self.folder is None:
            self.body.save_pretrained(folder / MODEL)
            self.reader.processor.save_pretrained(folder / MODEL)
        kept = MODEL if self.folder is None else str(self.folder)
        files = fingerprint(self.folder or folder / MODEL)
        return {"folder": kept, "files": files, "lora": self.lora and asdict(self.lora), "unpacked": self.unpacked}

    @property
    def summary(self) -> dict[str, str]:
        where = self.folder or "a tiny Idefics 3, made from nothing"
        return {"model": f"of {where}", "tokens": f"{len(self.reader.tokenizer)}"}


@dataclass(frozen=True)
class Vlm(Recipe):
    """Train any image-text-to-text model of transformers (Qwen-VL, InternVL, Gemma 3, SmolVLM and others) on
    conversations, with its own processor and chat template."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=1, batch_size=16))
    optim: OptimConfig = field(default_factory=_published)
    data: DataConfig = field(default_factory=partial(DataConfig, val_fraction=0.1))
    """Which conversations."""
    start: Annotated[str | None, tyro.conf.arg(name="from")] = field(default=None, metadata={**free, "flag": "from"})
    """A folder of transformers with a model and its processor, or 'tiny', an Idefics 3 of a million parameters from
    nothing; None = that of the run that is resumed, which may be given where it has moved."""
    max_length: int = 2048
    """Tokens of a conversation, those of images included."""
    max_pixels: int | None = None
    """Larger images are made smaller, where the processor bounds them by pixels, as Qwen's; None = the processor's."""
    pack: bool | None = field(default=None, metadata=free)
    """Several conversations stand in a row and see nothing of each other (--pack), or each has a row of its own
    (--no-pack). None = packed where the model's states, measured at the start, are the same either way."""
    freeze: tuple[str, ...] = ()
    """Regular expressions; weights of whose names one finds a part do not learn, such as 'visual|vision'."""
    part_lr: tuple[str, ...] = ()
    """PREFIX=LR, the learning rate of weights whose names, in transformers, begin so, such as model.visual=2e-6."""
    lora: int | None = None
    """Train adapters of this rank (peft) beside the language model's linear layers in place of all weights."""
    lora_alpha: int | None = None
    """The adapters count alpha / rank times; None = twice the rank."""
    lora_dropout: float = LORA_DROPOUT
    """Dropout before the adapters."""
    activation_checkpointing: bool = field(default=False, metadata=free)
    """Recompute activations in the backward: less memory, about a third more time."""
    max_answer: int = field(default=64, metadata=free)
    """Tokens of an answer at most when the run is measured."""

    tasks = ("conversation",)
    formats = ("hf",)

    def __post_init__(self) -> None:
        if self.max_answer < 1:
            raise ValueError(f"--max-answer must be at least 1, got {self.max_answer}")
        if self.lora is not None and self.lora < 1:
            raise ValueError(f"--lora must be at least 1, got {self.lora}")
        if self.lora is None and self.lora_alpha is not None:
            raise ValueError(f"--lora-alpha has no effect without --lora, got {self.lora_alpha}")
        if self.lora is not None and self.freeze:
            raise ValueError(f"--freeze has no effect with --lora, which freezes all weights, got {self.freeze}")

    @property
    def adapters(self) -> Lora | None:
        if self.lora is None:
            return None
        return Lora(self.lora, self.lora_alpha or 2 * self.lora, self.lora_dropout)

    @property
    def patterns(self) -> list[re.Pattern[str]]:
        try:
            return [re.compile(x) for x in self.freeze]
        except re.error as error:
            raise ValueError(f"--freeze must be regular expressions, got {self.freeze}: {error}") from None

    @property
    def rules(self) -> tuple[Rule, ...]:
        found = []
        for given in self.part_lr:
            name, _, value = given.partition("=")
            try:
                lr = float(value)
            except ValueError:
                lr = math.nan
            if not name or not 0 < lr < math.inf:
                raise ValueError(f"--part-lr must be PREFIX=LR with a positive rate, got {given!r}")
            found.append(Rule(f"body.{name}", lr / self.optim.lr))
        return tuple(found)

    @property
    def is_derived(self) -> bool:
        """Whether the conversations are made of captions, questions, classes and pixels."""
        return source_kind(self.data.data) != "chats"

    @property
    def prompts(self) -> Mapping[str, str | None]:
        return {"caption": DESCRIBE.get(self.data.language, DESCRIBE["en"]), "vqa": "{}"}

    def open_data(self) -> ChatData:
        return open_chats(self.data, seed=self.run.seed)

    def pictures(self, data: Any) -> PairData:
        """Those that a run held out of what its conversations were made of."""
        if isinstance(data, PairData):
            return data
        if not self.is_derived:
            raise ValueError(f"--data must be given: the run was trained on conversations alone, {self.data.data}")
        return open_data(self.data, seed=self.run.seed)

    def loader(self, data: ChatData, assets: VlmAssets, spec: LoaderSpec) -> TrainLoader:
        return MapLoader(data.train, spec, self.reader(assets), data.train.tally())

    def sample(self, assets: VlmAssets, record: ChatRecord, rng: np.random.Generator) -> ReadChat:
        return assets.reader.read(record.conversation, record.images())

    def collate(self, assets: VlmAssets, samples: list[ReadChat]) -> ReadBatch:
        reader = assets.reader
        if not any("pixel_values" in x.inputs for x in samples):  # ZeRO-3 wants every rank to run the tower
            samples = [*samples, _blank(reader)]
        if assets.unpacked is None:
            return packed(samples, reader.pad_token_id, reader.max_length)
        return collate(samples, reader.pad_token_id)

    def shown(self, data: ChatData, assets: VlmAssets) -> list[str]:
        rows = "several conversations share a row, and each has the states that it has alone"
        if assets.unpacked is not None:
            rows = f"each conversation has a row of its own: {assets.unpacked}"
        first = _some(data, assets.reader, 1)
        return [rows, *(f"learned of the first record, between {{{{ and }}}}: {assets.reader.shown(x)}" for x in first)]

    # model

    def assets(self, data: ChatData) -> VlmAssets:
        if self.start is None:
            raise ValueError(f"--from must be a folder of an image-text-to-text model or {TINY!r}, got nothing")
        _ = self.rules, self.patterns  # a mistake is told before the run begins
        folder, body = Path(self.start).resolve(), None
        if self.start == TINY:
            what = "--max-pixels has no effect with --from tiny, got {}"
            if self.max_pixels is not None:
                raise ValueError(what.format(self.max_pixels))
            texts = [turn.text for chat in data.train.conversations for turn in chat.turns]
            (body, processor), folder = tiny(texts, self.run.seed), None
        else:
            processor = load_processor(folder, self.max_pixels)
        reader = Reader(processor, self.max_length)
        assets = VlmAssets(folder, reader, self.adapters, None, self.dtype("train"), body)
        model = ReadingModel(assets.load())
        named = [name for name, _ in model.body.named_parameters()]
        for pattern in self.patterns:
            if not any(pattern.search(name) for name in named):
                raise ValueError(f"--freeze must find names of weights, got {pattern.pattern!r}, which finds none")
        unpacked = "--no-pack was given" if self.pack is False else why_not_packed(model, _some(data, reader, PROBED))
        if self.pack and unpacked:
            raise ValueError(f"--pack must not be given with this {model.body.config.model_type}: {unpacked}")
        return VlmAssets(
            folder, reader, self.adapters, unpacked, assets.dtype, model.body if body is not None else None
        )

    def dtype(self, purpose: Purpose) -> torch.dtype | None:
        """Of the model's weights: as they are stored, where they are exported; while they learn, float32 but under an
        engine that keeps a master of its own."""
        if purpose == "export":
            return None
        if purpose == "use":
            return torch.bfloat16 if torch.cuda.is_available() else torch.float32
        is_wide = self.precision == "fp32" or (self.lora is None and self.precision != "bf16")
        return torch.float32 if is_wide else torch.bfloat16

    def load_assets(
        self, folder: Path, saved: Mapping[str, Any], frozen: Mapping[str, Tensor], purpose: Purpose
    ) -> VlmAssets:
        given = None if self.start in (None, TINY) else Path(self.start)
        where = folder / saved["folder"] if given is None else given
        if not where.is_dir():
            raise ValueError(f"the model of {folder} must be in {where}, which is gone: say where by --from")
        files = saved["files"] if purpose == "train" else fingerprint(where)
        differ = sorted(n for n in saved["files"].keys() | files.keys() if saved["files"].get(n) != files.get(n))
        if differ:
            what = f"the model of {folder} must be the one that it was trained from"
            raise ValueError(f"{what}, got {where}, which differs in {', '.join(differ[:3])}")
        if self.pack is not None and self.pack != (saved["unpacked"] is None):
            had = "--no-pack" if saved["unpacked"] else "--pack"
            raise ValueError(f"{had} must be as in the run that is resumed, got the opposite")
        reader = Reader(load_processor(where, self.max_pixels), self.max_length)
        lora = saved["lora"] and Lora(**saved["lora"])
        return VlmAssets(where, reader, lora, saved["unpacked"], self.dtype(purpose))

    def build(self, assets: VlmAssets) -> ReadingModel:
        body = assets.load()
        if self.activation_checkpointing:
            body.gradient_checkpointing_enable({"use_reentrant": False})
        model = ReadingModel(body)
        model.freeze(self.patterns)
        if assets.lora is not None:
            model.add_adapters(assets.lora)
        return model

    def in_use(self, model: ReadingModel) -> ReadingModel:
        model.merge_adapters()
        return model.eval()

    # steps

    def loss(self, model: Runner, batch: ReadBatch, step: Step) -> dict[str, Tensor]:
        total, count = model("loss", batch.inputs, batch.labels)
        seen, tokens = _num_seen(batch.inputs), batch.inputs["input_ids"]
        padding = global_ratio((tokens.numel() - seen).float(), torch.tensor(tokens.numel(), device=tokens.device))
        return {"loss": global_ratio(total, count), "padding": padding}

    def weight(self, batch: ReadBatch) -> Tensor:
        return (batch.labels[:, 1:] != IGNORED).sum()

    # capabilities

    def converses(self, assets: VlmAssets, model: Any, device: torch.device) -> Talks:
        return Talks(model, assets.reader, device, self.max_answer)

    def speaks(self, assets: VlmAssets, model: Any, device: torch.device, decoding: Decoding) -> Answerer:
        return self.converses(assets, model, device).answerer(**decoding.generate_options())

    def export(self, assets: VlmAssets, model: ReadingModel, folder: Path, format: str) -> None:
        if folder.exists():
            raise ValueError(f"OUT must be a new folder, got {folder}")
        ends = sorted(assets.reader.stops)
        model.body.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        model.body.save_pretrained(folder)
        assets.reader.processor.save_pretrained(folder)


def _num_seen(inputs: Mapping[str, Tensor]) -> Tensor:
    """Tokens that are no padding."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"].sum()
    # of packed rows a padding's position is 0, as the first of a conversation; those follow another 0
    places = inputs["position_ids"]
    is_padding = (places[:, 1:] == 0) & (places[:, :-1] == 0)
    return places.numel() - is_padding.sum()


def _some(data: ChatData, reader: Reader, count: int) -> list[ReadChat]:
    """What the first records become, as many as are not broken, of a hundred."""
    found: list[ReadChat] = []
    for i in range(min(100, len(data.train))):
        try:
            record = data.train.record(i)
            found.append(reader.read(record.conversation, record.images()))
        except BrokenRecord:
            continue
        if len(found) == count:
            break
    return found


def _blank(reader: Reader) -> ReadChat:
    """A conversation about nothing of which nothing is learned."""
    return reader.prompt([Turn("user", IMAGE)], [Image.new("RGB", (32, 32))])


@torch.no_grad()
def why_not_packed(model: ReadingModel, chats: Sequence[ReadChat]) -> str | None:
    """Why conversations must not share a row of this model; None where each has the states that it has alone."""
    if len(chats) < 2:
        return "there are too few conversations to try it with"
    body = model.body.eval()

    def states(batch: ReadBatch) -> Tensor:
        return body.model(**batch.inputs, use_cache=False).last_hidden_state.float()

    try:
        total = sum(len(chat.labels) for chat in chats)
        together = states(packed(chats, 0, total))[0]
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"it refuses a packed row: {str(error).splitlines()[0]}"
    order = sorted(range(len(chats)), key=lambda i: -len(chats[i].labels))  # as `pack` has them
    alone = torch.cat([states(collate([chats[i]], 0))[0] for i in order])
    differs = float((together - alone).norm() / alone.norm())
    if differs <= max(1e-4, 4 * torch.finfo(body.dtype).eps):
        return None
    return f"its states differ by {100 * differs:.2g} % where other conversations stand before"


PROOF = Proof(
    [("vlm", "--data digits --val-fraction 0.2 --from tiny --batch-size 32 --epochs 12 --lr 1e-3 --max-answer 16")],
    [Claim("answer accuracy (held-out)", "answer accuracy", 0.7)],
)
