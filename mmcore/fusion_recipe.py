"""What recipes of models that read an image and a text together have in common: ViLT, LXMERT, ALBEF, BLIP."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor, nn

from mmcore.data import LoaderSpec, PairData, TrainLoader
from mmcore.data.collate import PairSample, collate_pairs, pair_sample
from mmcore.data.text.masking import mask_tokens
from mmcore.data.text.wordpiece import WordPiece, load_wordpiece, train_wordpiece
from mmcore.errors import did_you_mean
from mmcore.ops import require
from mmcore.parts.answers import AnswerVocabulary, answer_loss
from mmcore.parts.vit import Tower
from mmcore.recipe import Matches, OnPairs, Runner, Step, VisionAssets
from mmcore.runs import is_run, read_run
from mmcore.settings import free, from_json
from mmcore.tasks.cloze import Completes
from mmcore.tasks.speaking import Answerer, Decoding


@dataclass(frozen=True)
class FusionAssets(VisionAssets):
    """The shape of a model, what makes tokens of texts, and of a classifier of questions its answers."""

    wordpiece: WordPiece
    origin: str = ""  # of its words, for the reader
    answers: tuple[str, ...] = ()

    @cached_property
    def vocabulary(self) -> AnswerVocabulary:
        """The answers with their normal forms, which are made once."""
        return AnswerVocabulary(self.answers)

    def save(self, folder: Path) -> dict[str, Any]:
        self.wordpiece.save(folder / "tokenizer")
        return {**super().save(folder), **({"answers": list(self.answers)} if self.answers else {})}

    @property
    def summary(self) -> dict[str, str]:
        found = {**super().summary, "tokenizer": f"{self.wordpiece.vocab_size} words, {self.origin}"}
        return {**found, "answers": str(len(self.answers))} if self.answers else found


class FusionSample(NamedTuple):
    """A pair, and what masks are drawn by."""

    pair: PairSample
    seed: int
    answers: tuple[str, ...] = ()


class FusionBatch(NamedTuple):
    """Pairs of one rank, their texts padded to one length on all ranks."""

    images: Any  # uint8 [B, 3, S, S], or as `FusionRecipe.joined` makes them
    tokens: Tensor  # int64 [B, T], [CLS], text, [SEP]
    num_text: Tensor  # int64 [B], how many are no padding
    masked: Tensor  # int64 [B, T], with some hidden
    labels: Tensor  # int64 [B, T], what was there, -100 elsewhere
    image_ids: Tensor  # int64 [B], equal for equal images on all ranks
    text_ids: Tensor  # int64 [B], equal for equal captions on all ranks


@dataclass(frozen=True)
class FusionRecipe(OnPairs):
    """Mixin: trains a model that reads images and texts together, on BERT's WordPiece.

    `shapes[model]`, or that of `--from`, fitted to a vocabulary by `fitted`, is the model's shape, a dataclass with a
    `vision`; `kind(shape)` makes the model, whose `forward` takes a method's name first (under ZeRO-3 weights are whole
    only inside of it): `model("match", states, image_index, tokens, num_text)` to logits of no and yes [R, 2] and
    `model("words", states, tokens, num_text)` to logits [B, T, V] where it has these tasks.
    """

    model: str = "tiny"
    """A shape by its name; with --from it is that one's."""
    start: Annotated[Path | None, tyro.conf.arg(name="from")] = field(default=None, metadata={**free, "flag": "from"})
    """What to start from: a run of the same system, or a folder of its model as others publish it. A resumed run needs
    none."""
    tokenizer: Path | None = field(default=None, metadata=free)
    """BERT's vocab.txt, or a folder with it; None = that of --from, or one is learned from the captions."""
    tokenizer_samples: int = field(default=1_000_000, metadata=free)
    """Of more samples than these a vocabulary is learned from a random choice."""
    max_text: int = 32
    """Tokens of a text, [CLS] and [SEP] included."""
    activation_checkpointing: bool = field(default=False, metadata=free)
    """Recompute activations in the backward: less memory, about a third more time."""

    shapes: ClassVar[Mapping[str, Any]]
    """By their names."""
    kind: ClassVar[Callable[[Any], nn.Module]]
    """The model, made of a shape."""
    mask_rate: ClassVar[float] = 0.0
    """Share of the words that are hidden; 0 = none."""
    whole_words: ClassVar[bool] = False
    """Whether the pieces of a word are hidden together."""
    hides_some: ClassVar[bool] = False
    """Whether at least one word of each text is hidden."""
    accumulates = False

    @property
    def name(self) -> str:
        """For messages, as on the command line."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", type(self).__name__).lower()

    # assets

    def fitted(self, shape: Any, wordpiece: WordPiece) -> Any:
        """A shape for a vocabulary; a subclass says where its size stands."""
        raise NotImplementedError

    def read_start(self, path: Path) -> tuple[Any, WordPiece | None, dict[str, Tensor]]:
        """The shape, the tokenizer and the weights of --from; a ValueError of what this recipe does not start from. A
        subclass adds folders."""
        require(self.name, is_run(path), "--from must be a run of this system, got {}", path)
        trained = read_run(path)
        fits = isinstance(trained.recipe, FusionRecipe) and type(trained.recipe).kind_of_start() == self.kind_of_start()
        require(self.name, fits, "--from must be a run of this system, got one of {}", trained.run.recipe)
        assets: Any = trained.assets
        return assets.shape, assets.wordpiece, dict(trained.model.state_dict())

    @classmethod
    def kind_of_start(cls) -> str:
        """Recipes of one of these start from each other's runs: the package of the system."""
        return cls.__module__.rpartition(".")[0]

    def assets(self, data: PairData) -> FusionAssets:
        shape, wordpiece, origin = None, None, ""
        if self.start is not None:
            shape, wordpiece, _ = self.read_start(self.start)
            origin = f"of {self.start}"
        else:
            known = self.shapes
            hint = did_you_mean(self.model, known)
            named = self.model in known
            require(self.name, named, "--model must be one of {}, got {!r}{}", ", ".join(known), self.model, hint)
            shape = known[self.model]
        if self.tokenizer is not None:
            given = load_wordpiece(self.tokenizer)
            fits = wordpiece is None or given.words == wordpiece.words
            what = "--tokenizer must be left out, or that of --from {}, got another, {}"
            require(self.name, fits, what, self.start, self.tokenizer)
            wordpiece, origin = given, f"of {self.tokenizer}"
        elif wordpiece is None:
            require(self.name, self.start is None, "--tokenizer must be given: {} has none, got None", self.start)
            texts = self.texts(data)
            wordpiece, origin = train_wordpiece(texts, vocab_size=self.most_words), f"learned from {len(texts)} texts"
        has_mask = self.mask_rate == 0 or wordpiece.mask_token_id is not None
        require(self.name, has_mask, "--tokenizer must have [MASK], got a vocabulary of {}", wordpiece.vocab_size)
        require(self.name, self.max_text >= 2, "--max-text must be at least 2, got {}", self.max_text)
        return FusionAssets(self.fitted(shape, wordpiece), wordpiece, origin)

    @property
    def most_words(self) -> int:
        """Of a vocabulary that is learned."""
        return 1024 if self.model == "tiny" else 30522

    def texts(self, data: PairData) -> Sequence[str]:
        """What a vocabulary is learned from."""
        return data.captions(self.tokenizer_samples, self.run.seed)

    def load_assets(self, folder: Path, saved: Mapping[str, Any], frozen: Any, purpose: Any) -> FusionAssets:
        kind = type(next(iter(self.shapes.values())))
        answers, wordpiece = tuple(saved.get("answers", ())), load_wordpiece(folder / "tokenizer")
        return FusionAssets(from_json(kind, saved), wordpiece, answers=answers, frozen=frozen)

    def build(self, assets: FusionAssets) -> Any:
        model: Any = type(self).kind(assets.shape)
        for module in model.modules():
            if hasattr(module, "activation_checkpointing"):
                module.activation_checkpointing = self.activation_checkpointing
        return model

    def initial(self, assets: FusionAssets, model: Any) -> Mapping[str, Tensor]:
        if self.start is None:
            return {}
        ours = model.state_dict()
        state = self.read_start(self.start)[2]
        return {name: x for name, x in state.items() if name in ours and x.shape == ours[name].shape}

    # batches

    def sample(self, assets: FusionAssets, record: Any, rng: np.random.Generator) -> FusionSample:  # pyright: ignore[reportIncompatibleMethodOverride]
        pair = pair_sample(record, rng, assets.preprocess)
        return FusionSample(pair, int(rng.integers(2**62)), record.answers)

    def collate(self, assets: FusionAssets, samples: list[FusionSample]) -> Any:
        batch = collate_pairs([x.pair for x in samples], stack=self.joined)
        tokens, num_text = assets.wordpiece.padded(batch.captions, self.max_text)
        hidden = [self.hidden(assets, row, x.seed) for row, x in zip(tokens, samples, strict=True)]
        masked, labels = (torch.stack(x) for x in zip(*hidden, strict=True))
        return FusionBatch(batch.images, tokens, num_text, masked, labels, batch.image_ids, batch.labels)

    def view(self, assets: Any, image: Image.Image, rng: np.random.Generator) -> Any:
        """What is trained on of an image that no source has a view of."""
        return assets.preprocess([image])[0]

    def joined(self, images: list[Any]) -> Any:
        """Images of samples as those of a batch."""
        return torch.stack(images)

    def hidden(self, assets: FusionAssets, tokens: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Tokens [T] of a text with some hidden, and what was there."""
        if self.mask_rate == 0:
            return tokens, torch.full_like(tokens, -100)
        words, rng = assets.wordpiece, np.random.default_rng(seed)
        inner = words.is_inner(tokens) if self.whole_words else None
        options = {"mask_id": words.mask_token_id, "num_words": words.vocab_size - 1, "is_inner": inner}
        options["at_least_one"] = self.hides_some
        return mask_tokens(tokens, words.is_word(tokens), self.mask_rate, rng, **options)

    # capabilities

    def padded(self, assets: FusionAssets, texts: Sequence[str], device: torch.device) -> list[Tensor]:
        """Tokens [B, T] of texts and their numbers [B]."""
        return [x.to(device) for x in assets.wordpiece(texts, self.max_text)]

    def image_tower(self, assets: FusionAssets, model: Any) -> Tower:
        return Tower(assets.shape.vision, model.visual.state_dict()).bare


@dataclass(frozen=True)
class MatchesPairs(FusionRecipe):
    """Mixin: the model tells whether texts match images."""

    def matches(self, assets: FusionAssets, model: Runner, device: torch.device) -> Matches:
        def scores(states: Tensor, index: Tensor, captions: list[str]) -> Tensor:
            logits = model("match", states, index, *self.padded(assets, captions, device))
            return logits[:, 1] - logits[:, 0]

        return scores


@dataclass(frozen=True)
class CompletesTexts(FusionRecipe):
    """Mixin: the model tells a text's hidden words; 15 % of them are hidden in training."""

    mask_rate: ClassVar[float] = 0.15

    def completes(self, assets: FusionAssets, model: Runner, device: torch.device) -> Completes:
        words = assets.wordpiece
        is_word = words.is_word(torch.arange(words.vocab_size)).to(device)

        def complete(images: Sequence[Image.Image], before: Sequence[str], behind: Sequence[str]) -> list[str]:
            rows, places = [], []
            for first, second in zip(before, behind, strict=True):
                left, right = (words([x], self.max_text).tokens[0].tolist()[1:-1] for x in (first, second))
                left, right = left[: self.max_text - 3], right[: max(0, self.max_text - 3 - len(left))]
                rows.append([words.cls_token_id, *left, words.mask_token_id, *right, words.sep_token_id])
                places.append(1 + len(left))
            num_text = torch.tensor([len(row) for row in rows], device=device)
            tokens = torch.full((len(rows), int(num_text.max())), words.pad_token_id)
            for row, ids in zip(tokens, rows, strict=True):
                row[: len(ids)] = torch.tensor(ids)
            pixels = assets.preprocess(images).to(device)
            logits = model("words", pixels, tokens.to(device), num_text)
            chosen = logits[torch.arange(len(rows), device=device), torch.tensor(places, device=device)].float()
            best = chosen.masked_fill(~is_word[: chosen.shape[1]], -torch.inf).argmax(1)
            return [words.words[i] for i in best.tolist()]

        return complete


class AnswerBatch(NamedTuple):
    """Questions about images."""

    images: Any  # uint8 [B, 3, S, S], or as `FusionRecipe.joined` makes them
    tokens: Tensor  # int64 [B, T]
    num_text: Any  # int64 [B], or a list, which no device has to be waited for
    targets: Tensor  # float32 [B, A], see `AnswerVocabulary.targets`


@dataclass(frozen=True)
class SaysAnswers(FusionRecipe):
    """Mixin: the model tells answers apart, `model("answer", images, tokens, num_text)` to logits [B, A]."""

    def speaks(self, assets: FusionAssets, model: Runner, device: torch.device, decoding: Decoding) -> Answerer:
        is_greedy = decoding.decode == "greedy"
        require(self.name, is_greedy, "--decode has no effect on a classifier, got {}", decoding.decode)

        def say(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
            pixels = assets.preprocess(images).to(device)
            logits = model("answer", pixels, *self.padded(assets, prompts, device))
            return [assets.answers[i] for i in logits.argmax(1).tolist()]

        return say


@dataclass(frozen=True)
class AnswersQuestions(SaysAnswers):
    """Mixin: the model is a classifier of questions about images; its shape has `num_answers`."""

    answers: Path | None = field(default=None, metadata=free)
    """The classifier's answers: a JSON list, such as LXMERT's trainval_label2ans.json, or a file with one a line; None
    = those of --data that are given --least-answers times."""
    least_answers: int = 9
    """How often an answer is given, over all training questions, to be one of the classifier's; 9 as published."""

    tasks = ("vqa",)

    @property
    def prompts(self) -> Mapping[str, str | None]:
        return {"vqa": "{}"}

    def loader(self, data: PairData, assets: Any, spec: LoaderSpec) -> TrainLoader:
        return data.question_loader(spec, self.reader(assets))

    def texts(self, data: PairData) -> Sequence[str]:
        assert data.questions is not None
        return [q.text for q in data.questions.questions]

    def assets(self, data: PairData) -> FusionAssets:
        asked = data.questions
        require(self.name, asked is not None, "--data must have questions, got {}", data.name)
        assert asked is not None
        if self.answers is not None:
            known = AnswerVocabulary.of_file(self.answers)
        else:
            people = (question.answers for question in asked.questions)
            known = AnswerVocabulary.of_questions(people, self.least_answers)
        found = super().assets(data)
        return replace(found, shape=replace(found.shape, num_answers=len(known)), answers=known.answers)

    def collate(self, assets: FusionAssets, samples: list[FusionSample]) -> AnswerBatch:
        batch = collate_pairs([x.pair for x in samples], stack=self.joined)
        assert batch.questions is not None
        targets = assets.vocabulary.targets([x.answers for x in samples])
        tokens, num_text = assets.wordpiece.padded(batch.questions, self.max_text)
        return AnswerBatch(batch.images, tokens, num_text, targets)

    def loss(self, model: Runner, batch: AnswerBatch, step: Step) -> dict[str, Tensor]:
        logits = model("answer", batch.images, batch.tokens, batch.num_text)
        return {"loss": answer_loss(logits, batch.targets)}
