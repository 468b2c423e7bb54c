"""ALBEF that answers questions: a decoder of its own behind the layers that read images."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmcore.data.text.wordpiece import WordPiece
from mmcore.fusion_recipe import FusionAssets
from mmcore.ops import masks
from mmcore.parts.bert import BertEncoder
from mmcore.parts.text_decoder import TextDecoder
from mmcore.parts.text_head import HEAD, TextHead
from mmcore.parts.timm_vit import tower_rows
from mmcore.parts.vit import ViT
from mmcore.recipe import Claim, Proof
from mmcore.settings import from_json
from mmcore.systems.albef.answers import SaysAnswers
from mmcore.systems.albef.model import ALBEFConfig
from mmcore.systems.albef.recipe import fitted, published, read_start
from mmcore.systems.albef.shapes import ALBEF_CONFIGS
from mmcore.systems.albef.weights import FUSION
from mmcore.train.config import RunConfig
from mmcore.train.optim import OptimConfig
from mmcore.weights.files import read_folder, read_json, save_folder
from mmcore.weights.layout import Layout, under
from mmcore.weights.pictures import with_pictures, write_pictures


class AnswersInWords(nn.Module):
    """Mixin of a model whose `reader` gives what writes answers; `answer_smoothing` is of the labels of their words."""

    answer_smoothing = 0.0

    def reader(self, images: Tensor, tokens: Tensor, num_text: Tensor) -> TextDecoder:
        """What answers are written by, of images [B, 3, S, S], or their states, and questions int64 [B, T]."""
        raise NotImplementedError

    def first_token(self, tokens: Tensor) -> Tensor:
        """What answers to questions [B, T] begin with, [B, 1]."""
        return tokens[:, :1]

    def answers(
        self, images: Tensor, tokens: Tensor, num_text: Tensor, owner: Tensor, answers: Tensor, num_answer: Tensor
    ) -> Tensor:
        """The losses [R] of answers int64 [R, T'] to the questions `owner` [R], each summed over its tokens."""
        begun = torch.cat([self.first_token(tokens)[:1].expand(len(answers), 1), answers[:, 1:]], 1)
        writer = self.reader(images, tokens, num_text).of_rows(owner)
        return writer.of_each(begun, num_answer, label_smoothing=self.answer_smoothing)

    def say(self, images: Tensor, tokens: Tensor, num_text: Tensor, **options: Any) -> Tensor:
        """Answers, int64 [B, T'], see `TextDecoder.generate`."""
        return self.reader(images, tokens, num_text).generate(self.first_token(tokens), **options)

    def rank(
        self, images: Tensor, tokens: Tensor, num_text: Tensor, answers: Tensor, num_answer: Tensor, top_k: int
    ) -> Tensor:
        """The number of the likeliest answer to each question, see `TextDecoder.rank`."""
        begun = torch.cat([self.first_token(tokens)[:1].expand(len(answers), 1), answers[:, 1:]], 1)
        return self.reader(images, tokens, num_text).rank(begun, num_answer, top_k)


class ALBEFVQA(AnswersInWords):
    """`visual` and `text`, which read image and question, and `decoder`, which reads what they made of both; it has as
    many layers as read images in `text`."""

    def __init__(self, config: ALBEFConfig) -> None:
        super().__init__()
        self.config, text = config, config.text
        self.visual = ViT(config.vision)
        self.text = BertEncoder(text)
        layers = text.num_layers - text.first_cross
        self.decoder = BertEncoder(replace(text, num_layers=layers, first_cross=0, image_width=text.width))
        self.decoder_head = TextHead(self.decoder.word_embedding, norm_eps=text.norm_eps)

    def forward(self, task: str, *inputs: Any, **options: Any) -> Any:
        """A method by its name."""
        return getattr(self, task)(*inputs, **options)

    def reader(self, images: Tensor, tokens: Tensor, num_text: Tensor) -> TextDecoder:
        length = tokens.shape[1]
        read = self.visual(images) if images.ndim == 4 else images
        states = self.text(tokens, masks.lengths(num_text, length, length), read)
        return TextDecoder(self.decoder, self.decoder_head, self.decoder.image_keys_values(states), num_text)


@dataclass(frozen=True)
class AlbefVqa(SaysAnswers):
    """Train ALBEF to answer questions (arXiv 2107.07651) in words, from a run of albef or a published file."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=8, batch_size=32))
    optim: OptimConfig = field(default_factory=partial(published, lr=2e-5, min_lr=1e-6, warmup=1000))
    max_text: int = 25
    """Tokens of a question, [CLS] and [SEP] included."""
    rank: int | None = 128
    """Answer with the likeliest of known answers: of so many that begin most likely, by their whole probability, 128 as
    published; None = word by word, see --decode of mmcore eval vqa."""

    shapes = ALBEF_CONFIGS
    kind = ALBEFVQA
    formats = ("albef",)

    def fitted(self, shape: ALBEFConfig, wordpiece: WordPiece) -> ALBEFConfig:
        return fitted(self.sized(shape), wordpiece)

    def read_start(self, path: Path) -> tuple[Any, WordPiece | None, dict[str, Tensor]]:
        return read_start(path) or super().read_start(path)

    def started(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return with_decoder(state)

    def export(self, assets: FusionAssets, model: ALBEFVQA, folder: Path, format: str) -> None:
        save_albef_vqa(model, folder)
        assets.wordpiece.save(folder)


def with_decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an `ALBEF` for an `ALBEFVQA`, whose decoder begins as the words, the head and the layers that read
    images, as published; those of an `ALBEFVQA` as they are."""
    if any(name.startswith("decoder.") for name in state):
        return dict(state)
    first = min(int(name.split(".")[2]) for name in state if name.startswith("text.blocks.") and ".cross." in name)
    found = dict(state)
    for name, x in state.items():
        part, _, rest = name.partition(".")
        if part == "text_head":
            found[f"decoder_head.{rest}"] = x
        elif part == "text" and not rest.startswith("blocks."):
            found[f"decoder.{rest}"] = x
        elif part == "text":
            _, number, rest = rest.split(".", 2)
            if int(number) >= first:
                found[f"decoder.blocks.{int(number) - first}.{rest}"] = x
    return found


_LAYOUT = Layout(
    {
        **under("visual", "visual_encoder", tower_rows("class")),
        **under("text", "text_encoder", FUSION),
        **under("decoder", "text_decoder.bert", FUSION),
        **under("decoder_head", "text_decoder.cls.predictions", HEAD),
    },
    tied={"decoder_head.weight": "decoder.word_embedding.weight"},
    unread=("text_decoder.cls.predictions.decoder",),
    what="a file of ALBEF's answers",
)
_KIND = "albef-vqa"


def load_albef_vqa(folder: Path | str, *, dtype: torch.dtype | None = None) -> ALBEFVQA:
    """The model in a folder that `save_albef_vqa` wrote, float32 on the CPU, whatever `dtype` is."""
    op, folder = "load_albef_vqa", Path(folder)
    config = from_json(ALBEFConfig, read_json(op, folder / "config.json"))
    model = ALBEFVQA(replace(config, vision=with_pictures(op, folder, config.vision)))
    model.load_state_dict(_LAYOUT.read(op, read_folder(op, folder), model.state_dict()))
    return model


def save_albef_vqa(model: ALBEFVQA, folder: Path | str) -> None:
    """Writes a new folder whose model.safetensors has the names of the published model of answers."""
    config, preprocess = {"model_type": _KIND, **asdict(model.config)}, model.config.vision.preprocess
    tensors, at = _LAYOUT.write(model.state_dict()), "text_decoder.cls.predictions"
    words = tensors["text_decoder.bert.embeddings.word_embeddings.weight"]
    tensors |= {f"{at}.decoder.weight": words.clone(), f"{at}.decoder.bias": tensors[f"{at}.bias"].clone()}
    save_folder("save_albef_vqa", folder, config, tensors, lambda staged: write_pictures(staged, preprocess))


_START = (
    "albef",
    "--data digits --batch-size 64 --queue-size 256 --queue-after 150 --teacher-momentum 0.95 --lr 2e-3 --epochs 16",
)
PROOF = Proof(
    [_START, ("albef-vqa", "--data digits --from {0} --batch-size 64 --epochs 8 --lr 1e-3 --ema 0.98")],
    [Claim("VQA accuracy (held-out)", "VQA accuracy", 0.80)],
)
