"""A training step of LiT, FLIP, CLIPA, UniCL, ALIGN, FILIP, SLIP, DeCLIP and xCLIP beside its eager original:
transformers' model, with torch's heads where there are some, at the same weights and on the same batch, torch's fused
AdamW and an average by foreach."""

import functools
import gc
from collections import OrderedDict
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
from bench.test_clip_step import DECAY, DEVICE, LR, UPDATE_BYTES, WEIGHT_DECAY, batch, clip, eager_step
from mmcore.losses import global_contrastive_loss
from mmcore.nn import BatchNorm, FeatureQueue, interpolate_positions
from mmcore.optim import AdamWEMA
from mmcore.parts.bert import KEYS, BertConfig
from mmcore.parts.foreign import ForeignVision
from mmcore.recipe import Step
from mmcore.systems.align.model import ALIGN
from mmcore.systems.align.recipe import ALIGN_CONFIGS
from mmcore.systems.align.weights import SETTINGS, TEXT
from mmcore.systems.clip import names as clip_names
from mmcore.systems.clip.model import CLIPConfig, TowersConfig
from mmcore.systems.clip.recipe import ClipBatch
from mmcore.systems.clip.shapes import CLIP_CONFIGS
from mmcore.systems.declip.model import DeCLIP, DeclipBatch
from mmcore.systems.declip.recipe import Declip
from mmcore.systems.filip.model import FILIP
from mmcore.systems.filip.recipe import Filip
from mmcore.systems.flip.recipe import shortened
from mmcore.systems.slip.model import SLIP
from mmcore.systems.slip.recipe import Slip, SlipBatch
from mmcore.systems.xclip.model import XCLIP
from mmcore.systems.xclip.recipe import XClip

# a rank's batch on a GPU; a second or two a step on two cores
SIZE = 256 if DEVICE.type == "cuda" else 2
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
        num_tokens = min(16, config.text.context_length // 4)
        vision, text = config.vision, replace(config.text, context_length=num_tokens)
        small = replace(config, vision=replace(vision, image_size=vision.image_size // 2), text=text)
        state = dict(ours.state_dict())
        name = "visual.position_embedding"
        state[name] = interpolate_positions(state[name], small.vision.num_patches)
        state["text.position_embedding"] = state["text.position_embedding"][:num_tokens]
        ours.visual.has_any_size, theirs = True, _theirs(small, state)
        images = F.interpolate(images, small.vision.image_size, mode="bicubic", antialias=True)
        _, tokens, lengths, _, _ = shortened(ClipBatch(images, tokens, lengths), num_tokens)
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


def _head(ours: nn.Sequential) -> nn.Sequential:
    """torch's, of the same weights."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, layer in ours.named_children():
        if isinstance(layer, BatchNorm):
            layers[name] = nn.BatchNorm1d(layer.num_features)
        elif isinstance(layer, nn.Linear):
            layers[name] = nn.Linear(layer.in_features, layer.out_features)
        else:
            layers[name] = nn.ReLU()
    head = nn.Sequential(layers)
    head.load_state_dict(ours.state_dict())
    return head


def _image_states(model: Any, images: Tensor) -> Tensor:
    """Of the class token and all patches, before the projection."""
    return model.vision_model.post_layernorm(model.vision_model(images).last_hidden_state)


def filip(config: CLIPConfig, size: int) -> Pair:
    """FILIP: every token against every token of every pair."""
    torch.manual_seed(0)
    ours = FILIP(config)
    theirs = _theirs(config, ours.state_dict())
    images, tokens, lengths = batch(size, config, DEVICE)
    words = torch.arange(tokens.shape[1], device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    own = torch.arange(size, device=DEVICE)

    def our_loss() -> Tensor:
        return Filip().objective(ours(images, tokens), [], Step(0, 1, 0))["loss"]

    def their_loss() -> Tensor:
        image = F.normalize(theirs.visual_projection(_image_states(theirs, images)), dim=2)
        text = F.normalize(theirs.text_projection(theirs.text_model(input_ids=tokens).last_hidden_state), dim=2)
        cosines = torch.einsum("bqe,nte->bnqt", image, text)
        rows = cosines.masked_fill(~words[:, None], -torch.inf).amax(3).mean(2)
        cols = (cosines.amax(2) * words).sum(2) / words.sum(1)
        scale = theirs.logit_scale.exp()
        return (F.cross_entropy(scale * rows, own) + F.cross_entropy(scale * cols.T, own)) / 2

    return Pair(ours.to(DEVICE), our_loss, theirs.to(DEVICE), their_loss)


def slip(config: CLIPConfig, size: int, hidden: int) -> Pair:
    """SLIP: three passes of the image tower, of a crop and of two views."""
    torch.manual_seed(0)
    ours = SLIP(config, hidden, 256)
    clips = {n: x for n, x in ours.state_dict().items() if not n.startswith("image_mlp.")}
    theirs: Any = nn.ModuleDict({"clip": _theirs(config, clips), "mlp": _head(ours.image_mlp)})
    images, tokens, lengths = batch(size, config, DEVICE)
    views = torch.stack([images.flip(3), images.roll(1, 2)], 1)
    given, recipe, own = SlipBatch(ClipBatch(images, tokens, lengths), views), Slip(), torch.arange(size, device=DEVICE)
    itself = torch.eye(size, dtype=torch.bool, device=DEVICE)

    def our_loss() -> Tensor:
        return recipe.objective(recipe.features(ours, given), [], Step(0, 1, 0))["loss"]

    def their_loss() -> Tensor:
        features, losses = _their_features(theirs["clip"], images, tokens), []
        units = [F.normalize(theirs["mlp"](_image_states(theirs["clip"], x)[:, 0]), dim=1) for x in views.unbind(1)]
        for x, y in (units, units[::-1]):
            among = (x @ x.T / 0.1).masked_fill(itself, -torch.inf)
            losses.append(F.cross_entropy(torch.cat([x @ y.T / 0.1, among], 1), own))
        return _contrast(*features) + (losses[0] + losses[1]) / 2

    return Pair(ours.to(DEVICE), our_loss, theirs.to(DEVICE), their_loss)


def declip(config: CLIPConfig, size: int, width: int, bank_size: int) -> Pair:
    """DeCLIP: two views times two captions, the nearest of a bank, SimSiam, masked words."""
    torch.manual_seed(0)
    ours = DeCLIP(config, width, width // 2)
    heads, own = ("projector.", "predictor.", "words.", "text.mask_embedding"), torch.arange(size, device=DEVICE)
    clips = {n: x for n, x in ours.state_dict().items() if not n.startswith(heads)}
    words = nn.Linear(config.text.width, config.text.vocab_size)
    words.load_state_dict(ours.words.state_dict())
    parts = {"projector": _head(ours.projector), "predictor": _head(ours.predictor), "words": words}
    theirs: Any = nn.ModuleDict({"clip": _theirs(config, clips), **parts})
    images, tokens, _ = batch(size, config, DEVICE)
    masked, labels = tokens.clone(), torch.full_like(tokens, -100)
    masked[:, 1], labels[:, 1] = 0, tokens[:, 1]  # as another word: transformers has no token for a mask
    views, texts = (images, images.flip(3)), (masked, tokens.roll(1, 0))
    known = F.normalize(torch.randn(bank_size, config.embed_dim), dim=1).to(DEVICE)
    bank, banks = FeatureQueue(bank_size, config.embed_dim).to(DEVICE), [known]
    bank.enqueue(known)
    recipe, given = Declip(), DeclipBatch(*views, *texts, labels)

    def our_loss() -> Tensor:
        return recipe.objective(recipe.features(ours, given), [], Step(0, 1, 0, {"bank": bank}))["loss"]

    def their_loss() -> Tensor:
        clip = theirs["clip"]
        embedded = [clip.visual_projection(_image_states(clip, x)[:, 0]) for x in views]
        z = [theirs["projector"](x) for x in embedded]
        p = [theirs["predictor"](x) for x in z]
        siamese = -(F.cosine_similarity(p[0], z[1].detach()) + F.cosine_similarity(p[1], z[0].detach())).mean() / 2
        read = [clip.text_model(input_ids=x) for x in texts]
        of_words = F.cross_entropy(theirs["words"](read[0].last_hidden_state).flatten(0, 1), labels.flatten())
        a, b = (F.normalize(x, dim=1) for x in embedded)
        s, t = (F.normalize(clip.text_projection(x.pooler_output), dim=1) for x in read)
        scale, known = clip.logit_scale.exp(), banks[0]
        pairs = [(x, y) for x in (a, b) for y in (s, t)]
        near = [F.cross_entropy(scale * x @ known[(y @ known.T).argmax(1)].T, own) for x, y in pairs]
        banks[0] = torch.cat([known, t.detach(), s.detach()])[-bank_size:]
        contrast = torch.stack([_contrast(x, y, scale) for x, y in pairs]).mean()
        return 0.4 * contrast + 0.2 * (torch.stack(near).mean() + siamese + of_words)

    return Pair(ours.to(DEVICE), our_loss, theirs.to(DEVICE), their_loss)


def xclip(config: CLIPConfig, size: int, clusters: int, hidden: int) -> Pair:
    """xCLIP: assignments of both sides to clusters."""
    torch.manual_seed(0)
    ours = XCLIP(config, clusters, hidden)
    clips = {n: x for n, x in ours.state_dict().items() if not n.startswith(("image_head.", "text_head."))}
    parts = {"clip": _theirs(config, clips), "image": _head(ours.image_head), "text": _head(ours.text_head)}
    theirs: Any = nn.ModuleDict(parts)
    given, recipe = ClipBatch(*batch(size, config, DEVICE)), XClip()

    def our_loss() -> Tensor:
        return recipe.objective(recipe.features(ours, given), [], Step(0, 1, 0))["loss"]

    def their_loss() -> Tensor:
        clip = theirs["clip"]
        image = clip.visual_projection(_image_states(clip, given.images)[:, 0])
        text = clip.text_projection(clip.text_model(input_ids=given.tokens).pooler_output)
        p, q = (theirs[n](x).log_softmax(1) for n, x in (("image", image), ("text", text)))
        agreement = -(p.exp() * q + q.exp() * p).sum(1).mean() / 2
        sharp = -(p.exp() * p + q.exp() * q).sum(1).mean() / 2
        smooth = torch.stack([-torch.special.xlogy(m, m).sum() for m in (p.exp().mean(0), q.exp().mean(0))]).mean()
        contrast = _contrast(F.normalize(image, dim=1), F.normalize(text, dim=1), clip.logit_scale.exp())
        return contrast + agreement + 0.5 * sharp - 1.5 * smooth

    return Pair(ours.to(DEVICE), our_loss, theirs.to(DEVICE), their_loss)


def pair(system: str, *, is_small: bool = False, size: int = SIZE) -> Pair:
    name, size = "tiny" if is_small else shape_of(system), 6 if is_small else size
    config = CLIP_CONFIGS["tiny" if system == "align" else name]
    match system:
        case "align":
            vision, text = ALIGN_CONFIGS[name]
            if not is_small:  # a fraction of the pixels: seconds on two cores
                vision = replace(vision, image_size=96)
            return align(TowersConfig(vision.width, vision, text, has_image_proj=False), size)
        case "filip":
            return filip(config, size)
        case "slip":
            return slip(config, size, 64 if is_small else 4096)
        case "declip":
            return declip(config, size, *((64, 128) if is_small else (1024, 65_536)))
        case "xclip":  # an eighth of the published clusters and heads on two cores
            published = (4096, 512) if DEVICE.type == "cpu" else (32_768, 4096)
            return xclip(config, size, *((64, 32) if is_small else published))
        case _:
            return clip_like(system, config, size)


def step(made: Pair, contender: str) -> Callable[[], Tensor]:
    """From a batch to stepped and averaged weights."""
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


def shape_of(system: str) -> str:
    """A name of `CLIP_CONFIGS`, or of ALIGN's: the smallest that is published of a system."""
    return {"align": "base"}.get(system, "ViT-B-32" if system in ("filip", "declip", "xclip") else "ViT-B-16")


SYSTEMS = ("lit", "flip", "clipa", "unicl", "align", "filip", "slip", "declip", "xclip")
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
    made, shape = pair(system), shape_of(system)
    num_learned = sum(p.numel() for p in made.ours.parameters() if p.requires_grad)
    floor = UPDATE_BYTES * num_learned / machine_rates(device)[0]
    time_case(benchmark, device, Case(f"{system} {shape}-B{SIZE}", contender, step(made, contender), (), "step", floor))


@pytest.mark.parametrize("system", SYSTEMS)
def test_both_compute_the_same_losses(system: str) -> None:
    runs = [step(pair(system, is_small=True), contender) for contender in CONTENDERS]
    # CLIPA's positions are interpolated once there
    for _ in range(1 if system == "clipa" else 3):
        ours, theirs = (run().item() for run in runs)
        assert ours == pytest.approx(theirs, rel=2e-2 if DEVICE.type == "cuda" else 1e-3)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a claim about CPUs")
def test_half_of_the_patches_take_less_than_three_quarters_of_a_step() -> None:
    size = 4
    steps = {system: step(pair(system, size=size), "mmcore") for system in ("clip", "flip")}
    medians = paired_medians(steps, 3, DEVICE)
    print(f"a step of 16-pixel patches, {size} pairs: {medians}")
    assert medians["flip"] < 0.75 * medians["clip"]
