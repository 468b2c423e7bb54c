"""`mmcore plan` against the modules that it counts: parameters, FLOP, what a forward leaves to its backward."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.plan_models import Trained, TrainedClip, TrainedLlava
from mmcore.integrations.transformers import NAME as ATTENTION
from mmcore.integrations.transformers import register
from mmcore.labels import IMAGE_TOKEN
from mmcore.parts.adapters import Lora
from mmcore.plan.hardware import GPUS
from mmcore.plan.job import Job, Setting
from mmcore.plan.memory import rank_loss
from mmcore.plan.pieces import LLMS, language_config, language_model
from mmcore.plan.step import step
from mmcore.systems.blip2.lm import BLIP2LM
from mmcore.systems.blip2.model import BLIP2
from mmcore.systems.blip2.plan import blip2_stage1_job, blip2_stage2_job
from mmcore.systems.blip2.shapes import blip2_config
from mmcore.systems.clip.model import CLIP
from mmcore.systems.clip.plan import clip_job
from mmcore.systems.clip.shapes import clip_config
from mmcore.systems.llava.model import Llava, LlavaConfig
from mmcore.systems.llava.plan import llava_job
from tests.mmcore.nn_fixtures import kept_bytes

# Of the checkpoints on the hub, as their safetensors have them.
PUBLISHED = {
    "vicuna-7b": 6_738_415_616, "vicuna-13b": 13_015_864_320, "llama-3-8b": 8_030_261_248, "qwen2-0.5b": 494_032_768,
    "qwen2-7b": 7_615_616_512, "opt-2.7b": 2_651_596_800, "opt-6.7b": 6_658_473_984,
}  # fmt: skip
FEW = 3
LORA = Lora(8, 16, 0.05)


def planned(job: Job, setting: Setting, samples: int) -> float:
    return sum(piece.of(samples).kept for piece in job.counted(setting))


@pytest.fixture(scope="module")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The config.json of a small Qwen."""
    folder = tmp_path_factory.mktemp("llm")
    config = language_config("qwen2-0.5b")
    small = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "vocab_size": 512}
    shape = config.to_dict() | small | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    type(config).from_dict(shape).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", LLMS)
def test_language_models_have_the_parameters_of_their_checkpoints(name: str) -> None:
    with torch.device("meta"):
        model = language_model(language_config(name), torch.float32)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_parameters_are_those_of_the_models(tiny_llm: str) -> None:
    def language() -> Any:
        # on the CPU: BLIP-2's projection looks at the embedding
        return language_model(language_config(tiny_llm), torch.float32)

    config, whole = blip2_config("tiny"), clip_config("tiny").vision
    shape = LlavaConfig(replace(whole, num_layers=whole.num_layers - 1))
    adapted = Llava(shape, language(), trainable="language")
    adapted.add_adapters(LORA)
    stage2 = BLIP2LM(config.vision, replace(config.qformer, has_text=False), language())
    with torch.device("meta"):
        clip, stage1 = CLIP(clip_config("ViT-L-14")), BLIP2(blip2_config("ViT-g"))
    for job, model in (
        (clip_job("ViT-L-14"), clip),
        (blip2_stage1_job("ViT-g", 32), stage1),
        (blip2_stage2_job("tiny", tiny_llm, 8), stage2),
        (llava_job(1, "tiny", tiny_llm), Llava(shape, language(), trainable="projector")),
        (llava_job(2, "tiny", tiny_llm), Llava(shape, language(), trainable="language")),
        (llava_job(2, "tiny", tiny_llm, lora=LORA), adapted),
    ):
        learned, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad is x) for x in (True, False))
        assert (job.trained, job.parameters - job.trained) == (learned, frozen), job.name
        assert job.small == sum(p.numel() for p in model.parameters() if p.numel() <= 100_000), job.name


@pytest.mark.parametrize(
    ("precision", "checkpointing"), [("fp32", False), ("amp_bf16", False), ("amp_bf16", True), ("bf16", False)]
)
def test_clip_leaves_what_autograd_saves(precision: Any, checkpointing: bool) -> None:
    model = CLIP(clip_config("tiny"))
    if precision == "bf16":
        model.to(torch.bfloat16)
    model.set_activation_checkpointing(checkpointing)
    # captions as long as the context, which is what a plan takes them for
    images, tokens = torch.randn(FEW, 3, 16, 16), torch.randint(1, 999, (FEW, 32))
    tokens[:, -1] = 999
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "amp_bf16"):
        found, _ = kept_bytes(model, lambda: model(images, tokens))
    setting = Setting(FEW, 1, precision=precision, activation_checkpointing=checkpointing)
    assert planned(clip_job("tiny"), setting, FEW) == pytest.approx(found, rel=1e-4)


def test_blip2_leaves_what_autograd_saves() -> None:
    model, length = BLIP2(blip2_config("tiny")).train(), 8
    images, tokens = torch.randn(FEW, 3, 16, 16), torch.randint(2, 1000, (FEW, length))
    num_text = torch.full((FEW,), length)

    def forward() -> object:
        pairs = model.pairs(images, tokens, num_text)
        index = torch.arange(FEW).repeat(3)
        rows = tokens.repeat(3, 1), num_text.repeat(3)
        return pairs, model.match(pairs.keys_values, pairs.tower[:0], index, *rows)

    with torch.autocast("cpu", torch.bfloat16):
        found, _ = kept_bytes(model, forward)
    setting = Setting(FEW, 1)
    assert planned(blip2_stage1_job("tiny", length), setting, FEW) == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("stage", [1, 2])
def test_llava_leaves_what_autograd_saves(stage: Any, checkpointing: bool, tiny_llm: str) -> None:
    register()
    whole, length = clip_config("tiny").vision, 48
    config = LlavaConfig(replace(whole, num_layers=whole.num_layers - 1))
    dtype = torch.bfloat16 if stage == 1 else torch.float32
    language = language_model(language_config(tiny_llm), dtype)
    language.set_attn_implementation(ATTENTION)
    model = Llava(config, language, trainable="projector" if stage == 1 else "language").train()
    model.set_activation_checkpointing(checkpointing)
    tokens = torch.randint(2, 500, (FEW, length))
    tokens[:, 1 : 1 + config.vision.num_patches] = IMAGE_TOKEN
    labels, images = tokens.clamp(min=0), torch.randn(FEW, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = kept_bytes(model, lambda: model("loss", tokens, labels, images))
    job = llava_job(stage, "tiny", tiny_llm, num_tokens=length)
    setting = Setting(FEW, 1, activation_checkpointing=checkpointing)
    # of which tokens are an image's, and which are embedded, the plan knows nothing
    assert planned(job, setting, FEW) == pytest.approx(found, rel=3e-3)


class Bare:
    """What a recipe's backward needs of the engine, without DeepSpeed."""

    device = torch.device("cpu")

    def __init__(self, model: torch.nn.Module) -> None:
        self.module = model

    def __call__(self, *inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.module(*inputs)

    def place(self, batch: Any) -> Any:
        return batch

    def accumulate(self) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        loss.backward()


def attention_flops(sizes: list[tuple[int, int, int]], products: int) -> int:
    """Of samples, by layers, tokens and width."""
    return sum(layers * products * 2 * length**2 * width for layers, length, width in sizes)


def llava_rest(trained: TrainedLlava, setting: Setting) -> int:
    """FLOP of a sample's attention and last layer: torch's counter knows neither here. A tower that is frozen has a
    forward alone; the language model passes gradients on though it is frozen."""
    is_again = setting.activation_checkpointing
    vision, language, length = trained.config.vision, trained.language, trained.num_tokens
    tower = vision.num_layers, vision.num_patches + 1, vision.width
    passed = 7 + 2 * is_again
    total = attention_flops([tower], passed if trained.trainable == "all" else 2)
    total += attention_flops([(trained.num_layers, length, trained.width)], passed)
    products = 2 if trained.trainable == "projector" or trained.lora is not None else 3
    return total + products * 2 * (length - 1) * trained.width * language.vocab_size


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize(
    ("trainable", "lora"), [("projector", None), ("language", None), ("all", None), ("language", LORA), ("all", LORA)]
)
def test_flops_of_llavas_step_are_those_of_torchs_counter(
    trainable: Any, lora: Lora | None, accum: int, checkpointing: bool
) -> None:
    trained = TrainedLlava(128, 2, trainable, 64, lora)
    setting = Setting(2 * accum, 1, accum=accum, activation_checkpointing=checkpointing)
    rest = setting.per_rank * llava_rest(trained, setting)
    found = step(trained.job(), setting, GPUS["h200"]).flops
    assert found == pytest.approx(torch_flops(trained, setting) + rest, rel=1e-3)


@pytest.mark.parametrize("accum", [1, 2])
def test_flops_of_clips_step_are_those_of_torchs_counter(accum: int) -> None:
    """Accumulated, with a forward for the features before that for the gradient."""
    trained, setting = TrainedClip(128, 2), Setting(2 * accum, 1, accum=accum)
    vision, text = trained.config.vision, trained.config.text
    sizes = [(2, vision.num_patches + 1, vision.width), (2, text.context_length, text.width)]
    rest = setting.per_rank * attention_flops(sizes, 7 if accum == 1 else 9)
    job, gpu = trained.job(), GPUS["h200"]
    of_loss = rank_loss(job, setting, gpu)
    assert of_loss is not None
    found = step(job, setting, gpu).flops - of_loss.cost.flops
    assert found == pytest.approx(torch_flops(trained, setting) + rest, rel=1e-3)


def torch_flops(trained: Trained, setting: Setting) -> int:
    """Of a recipe's backward as it runs."""
    engine: Any = Bare(trained.model(setting))
    batch = trained.batch(setting)
    with FlopCounterMode(display=False) as counted:
        trained.backward(engine, batch, setting)
    return counted.get_total_flops()
