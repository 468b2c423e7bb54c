"""What a system says of its training, once, for train, eval, chat, export, plan and prove: the contract of a recipe."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmcore.data import DataConfig, LoaderSpec, PairData, Preprocess, Reader, TrainLoader, open_data
from mmcore.data.collate import PairSample, pair_sample
from mmcore.proof import Claim as Claim
from mmcore.proof import Proof as Proof
from mmcore.settings import free
from mmcore.train.accumulate import cached_backward, plain_backward
from mmcore.train.config import EngineConfig, Precision, RunConfig
from mmcore.train.deepspeed_json import deepspeed_config
from mmcore.train.optim import OptimConfig, Rule

Purpose = Literal["train", "use", "export"]
"""What assets are read for, which decides the dtype of a language model among them."""


class Runner(Protocol):
    """A model as a recipe runs it: under the engine, or bare."""

    def __call__(self, *inputs: Any, **options: Any) -> Any: ...


@dataclass(frozen=True)
class Assets:
    """What a run keeps in its folder beside the checkpoints: the model's shape, a tokenizer, weights that do not learn.

    Args:
        frozen: weights that do not learn, by their names in the model; written once.
        partition: under ZeRO-3, what `build` may hand a large part of the model to, before others hold it: its weights
            become rank 0's, split among ranks one at a time, each in the dtype that the function given beside it says.
    """

    frozen: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    partition: Callable[[Any, Callable[[Tensor], torch.dtype]], None] | None = field(default=None, kw_only=True)

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes all but `frozen` into a run's folder; returns what its config.json knows of them."""
        raise NotImplementedError

    @property
    def summary(self) -> dict[str, str]:
        """For the reader, by what it is of: what towers, pictures and tokens are like, wherever that came from."""
        return {}


@dataclass(frozen=True)
class VisionAssets(Assets):
    """The shape of a model, a dataclass whose `vision` is the `VisionConfig` of its image tower, and which says what it
    wants of an image where that is not what the tower does."""

    shape: Any

    @property
    def preprocess(self) -> Any:
        return (self.shape if hasattr(self.shape, "preprocess") else self.shape.vision).preprocess

    def save(self, folder: Path) -> dict[str, Any]:
        return asdict(self.shape)

    @property
    def summary(self) -> dict[str, str]:
        return {"image tower": self.shape.vision.summary, "pictures": self.preprocess.summary}


@dataclass
class Step:
    """A step under way.

    Args:
        number: steps done before it.
        total: steps of the run.
        seed: of this step and rank; torch is seeded by it before the loss is computed.
        companions: see `Recipe.companions`.
    """

    number: int
    total: int
    seed: int
    companions: Mapping[str, nn.Module] = field(default_factory=dict)

    @cached_property
    def generator(self) -> torch.Generator:
        """Random numbers of this step and rank, on the CPU."""
        return torch.Generator().manual_seed(self.seed)

    @cached_property
    def rng(self) -> np.random.Generator:
        """Random numbers of this step and rank, numpy's, for what is decided on the host."""
        return np.random.default_rng(self.seed)


@dataclass(frozen=True)
class Embeds:
    """Images and texts in one space.

    Args:
        preprocess: what it wants of an image.
        states: uint8 [B, 3, S, S] to what of images is computed once, [B, ...].
        image: states to unit vectors, [B, E], or [B, Q, E] of which the nearest counts.
        text: B texts to unit vectors [B, E]; or [B, T, E], zeros where padded, for late interaction with [B, Q, E].
    """

    preprocess: Preprocess
    states: Callable[[Tensor], Tensor]
    image: Callable[[Tensor], Tensor]
    text: Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class Represents:
    """Images as vectors that a classifier reads, one kind or several.

    Args:
        preprocess: what it wants of an image.
        names: of each kind, such as "class token".
        compute: uint8 [B, 3, S, S] to [B, D] of each kind.
    """

    preprocess: Preprocess
    names: tuple[str, ...]
    compute: Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Classifies:
    """Images as one of some classes.

    Args:
        preprocess: what it wants of an image.
        classes: their names, in the order of the logits.
        logits: uint8 [B, 3, S, S] to [B, C].
    """

    preprocess: Preprocess
    classes: tuple[str, ...]
    logits: Callable[[Tensor], Tensor]


Matches = Callable[[Tensor, Tensor, list[str]], Tensor]
"""States of images (see `Embeds`) [N, ...], which of them each text is compared with, int64 [R], and R texts to scores
[R], above 0 where they belong together."""


@dataclass(frozen=True)
class Recipe(ABC):
    """A frozen dataclass whose fields are the flags of the command line. A subclass is a system's recipe, built from
    mixins such as `OnPairs`; its docstring's first line is what `mmcore train --help` shows.

    A run begins with `assets` on rank 0, which checks whatever a user can get wrong before anything is written; every
    process then reads them back by `load_assets`, and `build` is the one builder of the model.

    A capability is a method that tasks and commands look for, and that a subclass may have:
    - `embeds(assets, model, device) -> Embeds`: images and texts to unit vectors; zeroshot, retrieval.
    - `aligns(assets, model, device) -> Aligns`: patches and words to unit vectors; alignment.
    - `matches(assets, model, device) -> Matches`: pairs to scores; matching, and retrieval that is re-ranked or, where
      nothing is embedded, by that alone, its states being what `assets.preprocess` makes of images.
    - `completes(assets, model, device) -> Completes`: images and texts around a missing word to that word; cloze.
    - `speaks(assets, model, device, decoding) -> Answerer`: images and prompts to texts; caption, vqa.
    - `judges(assets, model, device) -> Judges`: two images and a sentence to whether it is true; reasoning.
    - `samples(assets, model, device, top_p, seed)`: images and numbers to captions drawn by these; `mmcore capfilt`.
    - `converses(assets, model, device) -> Converses`: dialogues about images; conversation, `mmcore chat`.
    - `agrees(assets, model, device) -> Agrees`: patches, masked and seen, to prototypes; agreement.
    - `projects(assets, model, device) -> Callable[[Tensor], Tensor]`: images to what a head makes of them; projection.
    - `represents(assets, model, device) -> Represents`: images to vectors; features.
    - `classifies(assets, model, device) -> Classifies`: images to logits of classes; classification.
    - `reconstructs(assets, model, device) -> Reconstructs`: images from some of their patches; reconstruction.
    - `export(assets, model, folder, format)`: `mmcore export`.
    - `image_tower(assets, model) -> Tower`: what `--vision RUN` of other recipes starts from.
    """

    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    tasks: ClassVar[tuple[str, ...]] = ()
    """What it is measured by, the first of which the progress bar shows; names of modules in mmcore.tasks."""
    least: ClassVar[Mapping[str, float]] = {}
    """Figures of these tasks by their names; a run that is below one after its warm-up has collapsed, and stops."""
    accumulates: ClassVar[bool] = True
    """Whether a step may come in micro-batches, --accum."""
    stages: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)
    """ZeRO stages that it trains under; stage 3 cuts up weights, which a momentum teacher has to follow whole."""
    training_only: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the names of weights that nothing but training needs, which an export leaves out."""
    measured: ClassVar[Literal["weight", "teacher"]] = "weight"
    """What a finished run is measured and exported by where it kept no average: its weights, or those of the companion
    "teacher", a `MomentumEncoder`."""
    formats: ClassVar[tuple[str, ...]] = ()
    """Of `export`, the first of them the default; none = there is no export."""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """How some weights are trained that are not as all others; the first that fits a name."""
        return ()

    @property
    def prompts(self) -> Mapping[str, str | None]:
        """Of a model that speaks: what it can be asked, caption or vqa, and the text before it (`prompt_texts`)."""
        return {}

    # data

    @abstractmethod
    def open_data(self) -> Any:
        """The records to train on and those held out; has a `name` and `num_train`."""

    @abstractmethod
    def loader(self, data: Any, assets: Any, spec: LoaderSpec) -> TrainLoader:
        """Endless batches for one rank; `self.reader(assets)` is what records become."""

    @abstractmethod
    def sample(self, assets: Any, record: Any, rng: np.random.Generator) -> Any:
        """Views, masks, tokens of a record: a pure function of it and the random numbers; raises BrokenRecord."""

    @abstractmethod
    def collate(self, assets: Any, samples: list[Any]) -> Any:
        """A micro-batch."""

    def shown(self, data: Any, assets: Any) -> Sequence[str]:
        """Lines that are printed at the start, on rank 0: what is learned of a record."""
        return ()

    def pictures(self, data: Any) -> PairData:
        """Of the data, the pictures with captions or questions that tasks measure on."""
        return data

    # model

    @abstractmethod
    def assets(self, data: Any) -> Any:
        """What a new run keeps; on rank 0. Raises ValueError for whatever a user can get wrong."""

    @abstractmethod
    def load_assets(
        self, folder: Path, saved: Mapping[str, Any], frozen: Mapping[str, Tensor], purpose: Purpose
    ) -> Any:
        """What a run keeps in its folder, read back: `saved` by `Assets.save`, `frozen` as `Assets.frozen`."""

    @abstractmethod
    def build(self, assets: Any) -> nn.Module:
        """The model with the weights of `assets.frozen`, the others new; what learns has `requires_grad`."""

    def prepare(self, data: Any, assets: Any, rank: int, world_size: int) -> None:  # noqa: B027 (a hook, not a duty)
        """What is made before the first step of a run or of its continuation, on every rank alike, such as features of
        a tower that does not learn."""

    def initial(self, assets: Any, model: Any) -> Mapping[str, Tensor]:
        """Weights that a new run's model starts from, by name; the others stay as `build` made them."""
        return {}

    def in_use(self, model: Any) -> nn.Module:
        """A trained model made ready for everything but training, such as adapters merged into weights."""
        return model.eval()

    # steps

    @abstractmethod
    def loss(self, model: Runner, batch: Any, step: Step) -> dict[str, Tensor]:
        """Of a micro-batch, on every rank alike: losses by name, their sum as "loss", each exact over all ranks."""

    def weight(self, batch: Any) -> float | Tensor:
        """How much a micro-batch counts in the mean over those of a step, such as the tokens it learns."""
        return 1.0

    def backward(self, model: Any, parts: Sequence[Any], step: Step) -> dict[str, Tensor]:
        """Makes the gradient of a step's micro-batches, returns its losses, detached."""
        return plain_backward(self, model, parts, step)

    def companions(self, model: Any) -> Mapping[str, nn.Module]:
        """What goes along with the model outside of the engine and without gradients, by name: a momentum teacher
        (`MomentumEncoder(model.deepspeed, decay)`), a queue, a centre. Saved, and resumed to the bit."""
        return {}

    def after_step(self, model: Any, step: Step) -> None:  # noqa: B027 (a hook, not a duty)
        """Behind each optimizer step: moves a teacher, for example."""

    # what follows

    def reader(self, assets: Any) -> Reader:
        """What records become."""
        return Reader(partial(self.sample, assets), partial(self.collate, assets))

    @property
    def per_rank(self) -> int:
        """Samples a rank and optimizer step."""
        return self.run.batch_size * self.run.accum

    @property
    def precision(self) -> Precision:
        """What --precision and --deepspeed say together."""
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        return deepspeed_config(self.engine, self.optim, batch_size=self.per_rank, world_size=world_size)[1]

    def spec(self, rank: int, world_size: int) -> LoaderSpec:
        """How a rank reads the data."""
        workers = getattr(getattr(self, "data", None), "workers", None)
        return LoaderSpec(self.per_rank, rank, world_size, self.run.seed, workers, self.run.accum)


@dataclass(frozen=True)
class OnPairs(Recipe):
    """Mixin: trains on image-caption pairs. `assets` has `preprocess`, what the model wants of an image."""

    data: DataConfig = field(default_factory=DataConfig)

    def open_data(self) -> PairData:
        return open_data(self.data, seed=self.run.seed)

    def loader(self, data: PairData, assets: Any, spec: LoaderSpec) -> TrainLoader:
        return data.train_loader(spec, self.reader(assets))

    def sample(self, assets: Any, record: Any, rng: np.random.Generator) -> PairSample:
        return pair_sample(record, rng, assets.preprocess)


@dataclass(frozen=True)
class OnLanguageModel(Recipe):
    """Mixin: part of the model is a language model of transformers, from a folder or trained first."""

    llm: str | None = field(default=None, metadata=free)
    """The language model: a folder of transformers (OPT, Llama, Vicuna, Qwen, T5; safetensors), or 'tiny', one that is
    trained from nothing on the texts of --data first; None = that of --from, or of the run that is resumed."""
    llm_steps: int | None = field(default=None, metadata=free)
    """Steps that --llm tiny is trained for first; None = 400."""

    @property
    def learns_language(self) -> bool:
        """Whether its weights learn, adapters aside."""
        return False

    def language_dtype(self, purpose: Purpose) -> torch.dtype | None:
        """Of the language model's weights: as they are stored, where they are exported; while they learn, float32 but
        under an engine that keeps a master of its own."""
        if purpose == "export":
            return None
        if purpose == "use":
            return torch.bfloat16 if torch.cuda.is_available() else torch.float32
        precision = self.precision
        is_wide = precision == "fp32" or (self.learns_language and precision != "bf16")
        return torch.float32 if is_wide else torch.bfloat16

    @property
    def moved_to(self) -> Path | None:
        """Where --llm says that the run's language model is now."""
        return None if self.llm in (None, "tiny") else Path(self.llm)


@dataclass(frozen=True)
class Contrastive(Recipe):
    """Mixin: the loss is of all samples of a step at once, however many micro-batches they come in (GradCache,
    arXiv:2101.06983): `features` of each, then `objective` of all. A micro-batch is run twice, with the same
    random numbers of torch."""

    @abstractmethod
    def features(self, model: Runner, batch: Any) -> tuple[Tensor, ...]:
        """Of a micro-batch: rows [B, ...] of two or more axes, and numbers of the model, [1], such as its scale."""

    @abstractmethod
    def objective(self, features: tuple[Tensor, ...], parts: Sequence[Any], step: Step) -> dict[str, Tensor]:
        """The losses of the rows of all micro-batches, joined."""

    def loss(self, model: Runner, batch: Any, step: Step) -> dict[str, Tensor]:
        return self.objective(self.features(model, batch), [batch], step)

    def backward(self, model: Any, parts: Sequence[Any], step: Step) -> dict[str, Tensor]:
        return cached_backward(self, model, parts, step)
