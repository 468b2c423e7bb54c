"""A tiny LLaVA-NeXT and a tiny BLIP-2 of stage 2, and their batches, of which the last of two ranks has words alone."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mmcore.data.text.prompts import Prompted
from mmcore.labels import IMAGE_TOKEN
from mmcore.parts.adapters import Lora
from mmcore.parts.vit import VisionConfig
from mmcore.recipe import Step
from mmcore.systems.blip2.lm import BLIP2LM
from mmcore.systems.blip2.qformer import QFormerConfig
from mmcore.systems.blip2.steps import stage2_loss
from mmcore.systems.llava.inputs import ChatPart
from mmcore.systems.llava.model import Llava, LlavaConfig, Trainable
from mmcore.systems.llava.recipe import LlavaStage1
from mmcore.train.optim import OptimConfig, Rule, param_groups

B, LENGTH, VOCAB = 4, 32, 40
IMAGE = (20, 50)
OPTIM = OptimConfig(lr=1e-2, ema=0.99)
VISION = VisionConfig(image_size=16, patch_size=8, width=32, num_layers=2, num_heads=2, mlp_dim=64)


def language(is_tied: bool) -> Any:
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=is_tied, **shape))


def llava(trainable: Trainable, *, tied: bool = False, lora: bool = False) -> Llava:
    torch.manual_seed(0)
    config = LlavaConfig(VISION, grid_pinpoints=((16, 32), (32, 16)))
    found = Llava(config, language(tied), trainable=trainable)
    if lora:
        found.add_adapters(Lora(4, 8))
    return found


def blip2(dtype: torch.dtype = torch.float32) -> BLIP2LM:
    """Without dropout, so that rows of a batch do not depend on their rank."""
    torch.manual_seed(0)
    qformer = QFormerConfig(4, 24, 2, 2, 48, image_width=32, has_text=False, dropout=0.0, attention_dropout=0.0)
    return BLIP2LM(VISION, qformer, language(True).to(dtype))


def llava_batch(step: int, ranks: range, config: LlavaConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, labels, views and sizes of a share of two ranks: the first row of rank 0 has two images."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(3, VOCAB, (B, LENGTH), generator=generator)
    num_tokens, num_views = config.num_image_tokens(IMAGE), config.num_views(IMAGE)
    images = torch.randn(3 * num_views, 3, 16, 16, generator=generator)
    for row, start in ((0, 1), (0, 2 + num_tokens), (1, 0)):
        tokens[row, start : start + num_tokens] = IMAGE_TOKEN
    rows = slice(ranks.start * B // 2, ranks.stop * B // 2)
    num_images = 3 if 0 in ranks else 0
    labels = tokens.masked_fill(tokens == IMAGE_TOKEN, -100)
    sizes = torch.tensor([IMAGE] * num_images, dtype=torch.int64).view(-1, 2)
    return tokens[rows], labels[rows], images[: num_images * num_views], sizes


def llava_parts(step: int, ranks: range, config: LlavaConfig, accum: int) -> list[ChatPart]:
    """The same in parts of as many rows each."""
    tokens, labels, images, sizes = llava_batch(step, ranks, config)
    num_views, found = config.num_views(IMAGE), []
    for rows in torch.arange(len(tokens)).chunk(accum):
        before = (int((tokens[:end] == IMAGE_TOKEN).sum()) for end in (rows[0], rows[-1] + 1))
        first, last = (n // config.num_image_tokens(IMAGE) for n in before)
        views = images[first * num_views : last * num_views]
        found.append(ChatPart(tokens[rows], labels[rows], views, sizes[first:last], None))
    return found


def blip2_batch(step: int, ranks: range) -> tuple[Tensor, Prompted]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(B, 3, 16, 16, generator=generator)
    tokens = torch.randint(3, VOCAB, (B, 7), generator=generator)
    rows = slice(ranks.start * B // 2, ranks.stop * B // 2)
    num_prompt, num_text = torch.tensor([1, 2, 1, 3]), torch.tensor([7, 5, 6, 4])
    return images[rows], Prompted(tokens[rows], num_prompt[rows], num_text[rows], None)


def model_of(run: dict[str, Any]) -> Any:
    if run["system"] == "blip2":
        return blip2(getattr(torch, run.get("language", "float32")))
    return llava(run["trainable"], tied=run.get("tied", False), lora="rates" in run)


def groups_of(run: dict[str, Any], model: Any) -> list[dict[str, Any]]:
    return param_groups(model, OPTIM, [Rule(*rate) for rate in run.get("rates", {}).items()])


def loss_of(run: dict[str, Any], model: Any, step: int) -> Tensor:
    """Of the whole batch."""
    if run["system"] == "blip2":
        return stage2_loss(model, *blip2_batch(step, range(2)))
    total, count = model("loss", *llava_batch(step, range(2), model.config))
    return total / count


def backward(run: dict[str, Any], engine: Any, config: Any, step: int, rank: int) -> float:
    """A rank's share, as a recipe takes it; the loss is that of all."""
    mine = range(rank, rank + 1)
    if run["system"] == "blip2":
        loss = stage2_loss(engine, *blip2_batch(step, mine))
        engine.backward(loss)
        return loss.item()
    parts = llava_parts(step, mine, config, run.get("accum", 1))
    return float(LlavaStage1().backward(engine, parts, Step(step, run["steps"], 0))["loss"])


def answers(run: dict[str, Any], model: Any, config: Any, ranks: range) -> list[list[int]]:
    """What is generated of ranks' first batch."""
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    if run["system"] == "blip2":
        images, texts = blip2_batch(0, ranks)
        inputs = (images, texts.tokens[:, :2], torch.full((len(images),), 2))
        return model("generate", *inputs, **options, eos_token_id=2).tolist()
    tokens, _, images, sizes = llava_batch(0, ranks, config)
    num_text = torch.full((len(tokens),), tokens.shape[1])
    return model("generate", tokens, num_text, images, sizes, **options, eos_token_id=None).tolist()
