"""A training step of LiT, FLIP, CLIPA, UniCL and ALIGN beside its eager original: transformers' model at the same
weights and on the same batch, torch's fused AdamW and an average by foreach."""

import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AlignConfig, AlignModel, CLIPModel
from transformers import CLIPConfig as TransformersConfig

from bench.case import Case, time_case
from bench.measure import machine_rates, paired_medians
from bench.test_clip_step import DECAY, DEVICE, LR, SIZE, UPDATE_BYTES, WEIGHT_DECAY, batch, clip, eager_step
from mmcore.losses import global_contrastive_loss
from mmcore.nn import interpolate_positions
from mmcore.optim import AdamWEMA
from mmcore.parts.bert import KEYS, BertConfig
from mmcore.parts.foreign import ForeignVision
from mmcore.systems.align.model import ALIGN
from mmcore.systems.align.recipe import ALIGN_CONFIGS
from mmcore.systems.align.weights import SETTINGS, TEXT
from mmcore.systems.clip import names as clip_names
from mmcore.systems.clip.model import CLIPConfig, TowersConfig
from mmcore.systems.clip.recipe import ClipBatch
from mmcore.systems.clip.shapes import CLIP_CONFIGS
from mmcore.systems.flip.recipe import shortened

CONFIG = CLIP_CONFIGS["ViT-B-16"]
Loss = Callable[[], Tensor]


class Pair(NamedTuple):
    """Two models of the same weights and their losses of the same batch."""

    ours: nn.Module
    our_loss: Loss
    theirs: nn.Module
    their_loss: Loss


def _theirs(config: CLIPConfig, state: Mapping[str, Tensor]) -> Any:
    model = CLIPModel(TransformersConfig(**clip_names.HF_SETTINGS.write("bench", config)))
    model.load_state_dict(clip_names.HF.write(state))
    return model.train()


def _contrast(image: Tensor, text: Tensor, scale: Tensor, **options: Any) -> Tensor:
    logits, target = scale * image @ text.T, torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, target, **options) + F.cross_entropy(logits.T, target, **options)) / 2


def _labelled(image: Tensor, text: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    """UniCL's, as it is written."""
    logits, same = scale * image @ text.T, (labels[:, None] == labels).float()
    sides = ((x.log_softmax(1) * same).sum(1) / same.sum(1) for x in (logits, logits.T))
    return -torch.stack([x.mean() for x in sides]).mean()


def _their_features(model: Any, images: Tensor, tokens: Tensor, kept: Tensor | None = None) -> Any:
    vision = model.vision_model
    x = vision.embeddings(images)
    if kept is not None:
        x = torch.cat([x[:, :1], x[:, 1:].gather(1, kept[..., None].expand(-1, -1, x.shape[2]))], 1)
    pooled = vision.post_layernorm(vision.encoder(inputs_embeds=vision.pre_layrnorm(x)).last_hidden_state[:, 0])
    text = model.text_projection(model.text_model(input_ids=tokens).pooler_output)
    return F.normalize(model.visual_projection(pooled), dim=1), F.normalize(text, dim=1), model.logit_scale.exp()


def clip_like(system: str, config: CLIPConfig, size: int) -> Pair:
    """LiT, FLIP, CLIPA or UniCL, or "clip" itself."""
    images, tokens, lengths = batch(size, config, torch.device("cpu"))
    ours, kept = clip(config), None
    theirs, labels = _theirs(config, ours.state_dict()), torch.arange(size).to(DEVICE) // 2
    if system == "lit":
        for tower in (ours.visual, theirs.vision_model, theirs.visual_projection):
            tower.requires_grad_(False)
    if system == "flip":
        count = config.vision.num_patches
        kept = torch.stack([torch.randperm(count)[: count // 2].sort().values for _ in range(size)]).to(DEVICE)
    if system == "clipa":
        vision, text = config.vision, replace(config.text, context_length=8)
        small = replace(config, vision=replace(vision, image_size=vision.image_size // 2), text=text)
        state = dict(ours.state_dict())
        name = "visual.position_embedding"
        state[name] = interpolate_positions(state[name], small.vision.num_patches)
        state["text.position_embedding"] = state["text.position_embedding"][:8]
        ours.visual.has_any_size, theirs = True, _theirs(small, state)
        images = F.interpolate(images, small.vision.image_size, mode="bicubic", antialias=True)
        _, tokens, lengths, _, _ = shortened(ClipBatch(images, tokens, lengths), 8)
    images, tokens = images.to(DEVICE), tokens.to(DEVICE)
    of_labels = {"labels": (labels, labels)} if system == "unicl" else {}

    def our_loss() -> Tensor:
        return global_contrastive_loss(*ours(images, tokens, lengths, kept), **of_labels)

    def their_loss() -> Tensor:
        features = _their_features(theirs, images, tokens, kept)
        return _labelled(*features, labels=labels) if system == "unicl" else _contrast(*features)

    return Pair(ours.to(DEVICE), our_loss, theirs.to(DEVICE), their_loss)


def align(config: TowersConfig, size: int) -> Pair:
    """ALIGN: the image module is the same."""
    torch.manual_seed(0)
    vision, text = config.vision, config.text
    assert isinstance(vision, ForeignVision) and isinstance(text, BertConfig)
    settings = SETTINGS.write("bench", {n: x for n, x in vars(text).items() if n in KEYS})
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    theirs: Any = AlignModel(
        AlignConfig(vision_config=vision.settings, text_config=settings, projection_dim=config.embed_dim)
    ).train()
    ours = ALIGN(config).train()
    state = theirs.state_dict()
    words = {n: x for n, x in ours.state_dict().items() if not n.startswith("visual.")}
    made = TEXT.read("bench", {n: x for n, x in state.items() if not n.startswith("vision_model.")}, words)
    made |= {n.replace("vision_model.", "visual.body."): x for n, x in state.items() if n.startswith("vision_model.")}
    ours.load_state_dict(made)
    images = torch.randn(size, 3, vision.image_size, vision.image_size).to(DEVICE)
    lengths = [8 + i % 8 for i in range(size)]
    tokens = torch.zeros(size, text.context_length, dtype=torch.int64)
    for i, length in enumerate(lengths):
        tokens[i, :length] = torch.randint(1, text.vocab_size, (length,))
    tokens = tokens.to(DEVICE)

    def our_loss() -> Tensor:
        return global_contrastive_loss(*ours(images, tokens, lengths), label_smoothing=0.1)

    def their_loss() -> Tensor:
        out = theirs(input_ids=tokens, pixel_values=images, attention_mask=(tokens > 0).long())
        return _contrast(out.image_embeds, out.text_embeds, 1 / theirs.temperature, label_smoothing=0.1)

    return Pair(ours.to(DEVICE), our_loss, theirs.to(DEVICE), their_loss)


def pair(system: str, *, is_small: bool = False) -> Pair:
    if system == "align":
        vision, text = ALIGN_CONFIGS["tiny" if is_small else "base"]
        if not is_small:  # a fraction of the pixels: seconds on two cores
            vision = replace(vision, image_size=96)
        return align(TowersConfig(vision.width, vision, text, has_image_proj=False), 6 if is_small else SIZE)
    return clip_like(system, CLIP_CONFIGS["tiny"] if is_small else CONFIG, 6 if is_small else SIZE)


def step(system: str, contender: str, *, is_small: bool = False) -> Callable[[], Tensor]:
    """From a batch to stepped and averaged weights."""
    made = pair(system, is_small=is_small)
    if contender != "mmcore":
        learned = nn.ParameterList(p for p in made.theirs.parameters() if p.requires_grad)
        return functools.partial(eager_step(learned, lambda *_: made.their_loss(), DEVICE, fused=True), *[None] * 3)
    learned = [p for p in made.ours.parameters() if p.requires_grad]
    optimizer = AdamWEMA(learned, lr=LR, weight_decay=WEIGHT_DECAY, ema=DECAY)

    def run() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss = made.our_loss()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


SYSTEMS = ("lit", "flip", "clipa", "unicl", "align")
CONTENDERS = ("mmcore", "transformers, AdamW(fused), EMA by foreach")


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    """The last contender's weights are gone before the next one's are made."""
    yield
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_two_towers_step(benchmark: Any, device: torch.device, system: str, contender: str) -> None:
    made, shape = pair(system).ours, "base" if system == "align" else "ViT-B-16"
    num_learned = sum(p.numel() for p in made.parameters() if p.requires_grad)
    floor = UPDATE_BYTES * num_learned / machine_rates(device)[0]
    time_case(
        benchmark, device, Case(f"{system} {shape}-B{SIZE}", contender, step(system, contender), (), "step", floor)
    )


@pytest.mark.parametrize("system", SYSTEMS)
def test_both_compute_the_same_losses(system: str) -> None:
    runs = [step(system, contender, is_small=True) for contender in CONTENDERS]
    # CLIPA's positions are interpolated once there
    for _ in range(1 if system == "clipa" else 3):
        ours, theirs = (run().item() for run in runs)
        assert ours == pytest.approx(theirs, rel=2e-2 if DEVICE.type == "cuda" else 1e-3)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a claim about CPUs")
def test_half_of_the_patches_take_less_than_three_quarters_of_a_step() -> None:
    medians = paired_medians({system: step(system, "mmcore") for system in ("clip", "flip")}, 3, DEVICE)
    print(f"a step of {CONFIG.vision.patch_size}-pixel patches, {SIZE} pairs: {medians}")
    assert medians["flip"] < 0.75 * medians["clip"]
