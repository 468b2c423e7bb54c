"""SimVLM's recipes: pretraining on captions and texts, and answers to questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmcore.data import LoaderSpec, PairData, TrainLoader
from mmcore.data.collate import collate_pairs
from mmcore.data.text.wordpiece import WordPiece, load_wordpiece
from mmcore.fusion_recipe import FusionAssets, FusionRecipe, FusionSample
from mmcore.losses import global_ratio
from mmcore.ops import require
from mmcore.recipe import Claim, Proof, Runner, Step
from mmcore.runs import is_run
from mmcore.settings import once
from mmcore.systems.simvlm.model import SimVLM, SimVLMConfig
from mmcore.systems.simvlm.shapes import SIMVLM_CONFIGS
from mmcore.systems.simvlm.weights import load_simvlm, save_simvlm
from mmcore.tasks.caption import NAMED
from mmcore.tasks.speaking import Answerer, Decoding
from mmcore.train.optim import OptimConfig

_published = partial(OptimConfig, lr=5e-4, beta2=0.999, weight_decay=0.01, schedule="linear", warmup_share=0.02)


class Prefixed(NamedTuple):
    """Texts with a prefix, as `SimVLM.states` takes them."""

    tokens: Tensor
    num_text: Tensor
    num_prefix: Tensor
    sizes: tuple[int, int]

    @property
    def num_learned(self) -> int:
        return int((self.num_text - self.num_prefix).sum())


class SimBatch(NamedTuple):
    """Images uint8 [B, 3, S, S] with their texts, and texts alone, which all micro-batches have or none."""

    images: Tensor
    texts: Prefixed
    alone: Prefixed | None


@cache
def _lines(file: Path) -> tuple[str, ...]:
    """Of a file of texts, those that are not blank."""
    require("simvlm", file.is_file(), "--text-data must be a file with a text a line, got {}", file)
    try:
        found = tuple(x for line in file.read_text(encoding="utf-8-sig").splitlines() if (x := line.strip()))
    except UnicodeDecodeError as error:
        raise ValueError(f"simvlm: --text-data must be UTF-8, got {file}: {error}") from error
    require("simvlm", bool(found), "--text-data must hold at least one text, got none in {}", file)
    return found


def prefixed(tokens: Tensor, num_text: Tensor, num_prefix: Tensor) -> Prefixed:
    """Texts on the host, with the sizes of the longest parts."""
    sizes = int(num_prefix.max()), max(1, int((num_text - num_prefix).max()))
    return Prefixed(tokens[:, : int(num_text.max())], num_text, num_prefix, sizes)


@dataclass(frozen=True)
class Simvlm(FusionRecipe):
    """Train SimVLM (arXiv 2108.10904) on image-caption pairs, and texts: the words behind a prefix, drawn at random."""

    optim: OptimConfig = field(default_factory=_published)
    one_stack: bool = field(default=False, metadata=once)
    """One stack of layers, whose prefix sees itself and whose rest is causal, in place of an encoder and a decoder."""
    text_data: Path | None = None
    """A file with a text a line, of which some are learned beside the pairs, without an image."""
    text_share: float = 0.125
    """With --text-data, texts a pair, an eighth as published: each pair brings one with this probability."""

    shapes = SIMVLM_CONFIGS
    kind = SimVLM
    tasks = ("caption",)
    formats = ("simvlm",)
    accumulates = True

    @property
    def prompts(self) -> Mapping[str, str | None]:
        return {"caption": None}

    # assets

    def fitted(self, shape: SimVLMConfig, wordpiece: WordPiece) -> SimVLMConfig:
        if self.start is not None:
            most = shape.text.context_length
            require(
                self.name, self.max_text <= most, "--max-text must be at most {} of --from, got {}", most, self.max_text
            )
            is_same = not self.one_stack or not shape.has_decoder
            require(self.name, is_same, "--one-stack must be left out with --from, which has a decoder, got {}", True)
            return shape
        text = replace(shape.text, vocab_size=wordpiece.vocab_size, context_length=self.max_text)
        return replace(shape, text=text, has_decoder=not self.one_stack)

    def read_start(self, path: Path) -> tuple[Any, WordPiece | None, dict[str, Tensor]]:
        if is_run(path):
            return super().read_start(path)
        model = load_simvlm(path)
        return model.config, load_wordpiece(path), model.state_dict()

    def texts(self, data: PairData) -> Sequence[str]:
        alone = () if self.text_data is None else _lines(self.text_data)
        return [*super().texts(data), *alone[: self.tokenizer_samples]]

    def assets(self, data: PairData) -> FusionAssets:
        require(self.name, self.max_text >= 3, "--max-text must be at least 3, got {}", self.max_text)
        require(self.name, 0 < self.text_share <= 1, "--text-share must be in (0, 1], got {}", self.text_share)
        is_default = self.text_data is not None or self.text_share == type(self).text_share
        require(self.name, is_default, "--text-share has no effect without --text-data, got {}", self.text_share)
        if self.text_data is not None:
            _lines(self.text_data)
        return super().assets(data)

    # batches

    def collate(self, assets: FusionAssets, samples: list[FusionSample]) -> SimBatch:
        batch = collate_pairs([x.pair for x in samples])
        seeds = [x.seed for x in samples]
        alone = None if self.text_data is None else self.alone(assets, _lines(self.text_data), seeds)
        return SimBatch(batch.images, self.prefixed(assets, batch.captions, batch.questions, seeds), alone)

    def prefixed(
        self, assets: FusionAssets, texts: list[str], questions: list[str] | None, seeds: Sequence[int]
    ) -> Prefixed:
        """Texts of images and where their prefix ends."""
        return self.drawn(assets, texts, seeds)

    def alone(self, assets: FusionAssets, lines: Sequence[str], seeds: Sequence[int]) -> Prefixed:
        """The texts that some of the pairs bring along, each for itself, so that they are the same for any number of
        ranks and micro-batches; where none does, one of which nothing is learned: all ranks have as many forwards."""
        rngs = [np.random.default_rng((seed, 1)) for seed in seeds]
        found = [
            (lines[int(rng.integers(len(lines)))], seed)
            for rng, seed in zip(rngs, seeds, strict=True)
            if rng.random() < self.text_share
        ]
        if found:
            return self.drawn(assets, *zip(*found, strict=True))
        tokens, num_text = assets.wordpiece(lines[:1], self.max_text)
        return prefixed(tokens, num_text, num_text)

    def drawn(self, assets: FusionAssets, texts: Sequence[str], seeds: Sequence[int]) -> Prefixed:
        """Each with a prefix of a random length, that leaves a token at least: its words, and what ends it."""
        tokens, num_text = assets.wordpiece(texts, self.max_text)
        lengths = [
            np.random.default_rng(seed).integers(1, num) for seed, num in zip(seeds, num_text.tolist(), strict=True)
        ]
        return prefixed(tokens, num_text, torch.tensor(lengths, dtype=torch.int64))

    # steps

    def loss(self, model: Runner, batch: SimBatch, step: Step) -> dict[str, Tensor]:
        total, count = model("loss", batch.images, *batch.texts)
        if batch.alone is None:
            return {"loss": global_ratio(total, count)}
        of_texts, num_texts = model("loss", None, *batch.alone)
        parts = {"pairs": global_ratio(total.detach(), count), "texts": global_ratio(of_texts.detach(), num_texts)}
        return {"loss": global_ratio(total + of_texts, count + num_texts), **parts}

    def weight(self, batch: SimBatch) -> float:
        return batch.texts.num_learned + (0 if batch.alone is None else batch.alone.num_learned)

    # what follows

    def speaks(self, assets: FusionAssets, model: Runner, device: torch.device, decoding: Decoding) -> Answerer:
        words, most = assets.wordpiece, assets.shape.text.context_length
        ends = {"eos_token_id": words.sep_token_id, "pad_token_id": words.pad_token_id}

        def say(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
            tokens, num_text = words(prompts, self.max_text)
            tokens, num_prefix = tokens[:, : int(num_text.max()) - 1], num_text - 1
            options = {"max_length": most - tokens.shape[1], **ends, **decoding.options()}
            inputs = assets.preprocess(images).to(device), tokens.to(device), num_prefix.to(device)
            return [words.decode(row) for row in model("generate", *inputs, **options).tolist()]

        return say

    def export(self, assets: FusionAssets, model: SimVLM, folder: Path, format: str) -> None:
        save_simvlm(model, folder)
        assets.wordpiece.save(folder)


@dataclass(frozen=True)
class SimvlmVqa(Simvlm):
    """Fine-tune SimVLM on questions about images: the question is the prefix, the answer what is learned."""

    tasks = ("vqa",)

    @property
    def prompts(self) -> Mapping[str, str | None]:
        return {"vqa": "{}"}

    def loader(self, data: PairData, assets: Any, spec: LoaderSpec) -> TrainLoader:
        return data.question_loader(spec, self.reader(assets))

    def texts(self, data: PairData) -> Sequence[str]:
        asked = data.questions
        require(self.name, asked is not None, "--data must have questions, got {}", data.name)
        assert asked is not None
        return [text for q in asked.questions for text in (q.text, *q.answers)]

    def prefixed(
        self, assets: FusionAssets, texts: list[str], questions: list[str] | None, seeds: Sequence[int]
    ) -> Prefixed:
        assert questions is not None
        words, most = assets.wordpiece, self.max_text
        answers, num_answer = words(texts, 1 + most // 2)
        asked, num_asked = words(questions, most)
        num_answer -= 1  # without the start
        num_prefix = torch.minimum(num_asked - 1, most - num_answer)  # without the end; an answer is not cut for it
        tokens = torch.full((len(texts), most), words.pad_token_id)
        for row, (before, after) in enumerate(zip(num_prefix.tolist(), num_answer.tolist(), strict=True)):
            tokens[row, :before], tokens[row, before : before + after] = (
                asked[row, :before],
                answers[row, 1 : 1 + after],
            )
        return prefixed(tokens, num_prefix + num_answer, num_prefix)


_DIGITS = "--data digits --model tiny --batch-size 128 --lr 1e-3 --ema 0.99"
PROOF = Proof([("simvlm", f"{_DIGITS} --epochs 24")], [Claim("captions that name the class (held-out)", NAMED, 0.85)])
PROOF_VQA = Proof(
    [("simvlm", f"{_DIGITS} --epochs 16"), ("simvlm-vqa", f"{_DIGITS} --from {{0}} --epochs 8")],
    [Claim("VQA accuracy (held-out)", "VQA accuracy", 0.75)],
)
