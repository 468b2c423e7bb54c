"""What all systems' folders of weights have in common: there and back to the bit, and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from mmcore.checkpoint import write_json
from mmcore.labels import IMAGE_TOKEN
from mmcore.parts.language_weights import LANGUAGE
from mmcore.systems.blip2.lm import BLIP2LM
from mmcore.systems.blip2.model import BLIP2, BLIP2Config
from mmcore.systems.blip2.weights import load_blip2, load_blip2_lm, save_blip2, save_blip2_lm
from mmcore.systems.clip.weights import load_clip, save_clip
from mmcore.systems.llava.model import Llava
from mmcore.systems.llava.weights import hf_layout, load_llava, save_llava
from mmcore.systems.siglip.model import SigLIP
from mmcore.systems.siglip.shapes import siglip_config
from mmcore.systems.siglip.weights import load_siglip, save_siglip
from tests.refusals import refuses
from tests.systems.blip2 import test_lm as blip2_lm
from tests.systems.blip2 import test_model as blip2
from tests.systems.blip2.test_lm import VOCAB
from tests.systems.clip.test_weights import randomized, small_config
from tests.systems.llava.test_model import KINDS, SIZE, TEXTS, ours_float


class System(NamedTuple):
    build: Callable[[], Any]
    save: Callable[..., None]
    load: Callable[..., Any]


SYSTEMS = {
    "clip": System(lambda: randomized(small_config()), save_clip, load_clip),
    "open_clip": System(lambda: randomized(small_config()), partial(save_clip, format="open_clip"), load_clip),
    "siglip": System(lambda: SigLIP(siglip_config("tiny")), save_siglip, load_siglip),
    "blip2": System(lambda: blip2.ours_of(blip2.hf_model(torch.float32)), save_blip2, load_blip2),
}
for name in blip2_lm.MODELS:
    SYSTEMS[f"blip2-{name}"] = System(partial(blip2_lm.ours_float, name), save_blip2_lm, load_blip2_lm)
for kind, name in product(KINDS, TEXTS):
    SYSTEMS[f"{kind}-{name}"] = System(partial(ours_float, name, kind), save_llava, load_llava)


def shapes(model: torch.nn.Module) -> list[Any]:
    configs = [getattr(module, "config", None) for module in model.modules()]
    language = getattr(model, "language_model", None)
    ours = [config for config in configs if type(config).__module__.startswith("mmcore.")]
    return ours if language is None else [*ours, language.config.vocab_size]


def ties(model: torch.nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return [x for x in names.values() if len(x) > 1]


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    state = expected.state_dict()
    assert found.state_dict().keys() == state.keys()
    for name, x in found.state_dict().items():
        assert x.dtype == state[name].dtype and torch.equal(x, state[name]), name
    assert shapes(found) == shapes(expected) and ties(found) == ties(expected)


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_is_saved_loads_again_to_the_bit_and_is_written_again_to_the_byte(name: str, tmp_path: Path) -> None:
    build, save, load = SYSTEMS[name]
    ours = build()
    save(ours, tmp_path / "a" / "ours")
    again = load(tmp_path / "a" / "ours")
    assert_same(again, ours)
    assert again.training
    (file,) = (tmp_path / "a" / "ours").glob("*.safetensors")
    assert all(len(load_file(file).keys() & set(names)) <= 1 for names in ties(ours))
    save(again, tmp_path / "b")
    refuses(r"^save_\w+: folder must not exist yet, got .*/b$", save, ours, tmp_path / "b")
    # transformers tells more of a language model that was read from a file
    kept = "*.safetensors" if hasattr(ours, "language_model") else "*"
    files = {file.name: file.read_bytes() for file in (tmp_path / "a" / "ours").glob(kept)}
    assert files and {file.name: file.read_bytes() for file in (tmp_path / "b").glob(kept)} == files
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a", "b"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where a system's weights lie, not to be changed."""
    root = tmp_path_factory.mktemp("saved")

    def folder_of(name: str) -> Path:
        if not (root / name).exists():
            SYSTEMS[name].save(SYSTEMS[name].build(), root / name)
        return root / name

    return folder_of


def weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return edit


def without(name: str) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors.pop(name))


def shaped(name: str, *shape: int) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors.update({name: torch.zeros(shape)}))


def settings(**changed: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (file,) = folder.glob("*config.json") if not (folder / "config.json").exists() else [folder / "config.json"]
        write_json(file, json.loads(file.read_text()) | changed)

    return edit


KEY = "text_model.encoder.layers.1.self_attn.k_proj.weight"
WHOLE = "must hold every weight of the model, missing"
LINEAR = "multi_modal_projector.linear_1.bias"
NORM = "language_model.model.norm.weight"
LAYER = "vision_feature_layer must be one of the tower's 2, got"
REFUSED: list[tuple[str, Callable[[Path], object], str]] = [
    ("clip", without(KEY), f"a transformers file {WHOLE} {KEY}"),
    ("clip", shaped("extra.weight", 1), "must hold this model's weights only, got also extra.weight"),
    ("clip", shaped("text_projection.weight", 12, 17), r"text_projection.weight of shape \[12, 16\], got \[12, 17\]"),
    ("clip", weights(lambda tensors: tensors.clear()), "must hold CLIP weights of .* open_clip, got neither's names"),
    ("clip", settings(model_type="bert"), "config.json must have model_type 'clip', got 'bert'"),
    ("clip", settings(text_config={"attention_dropout": 0.1}), "text_config.attention_dropout 0, got 0.1"),
    ("siglip", without("logit_bias"), f"{WHOLE} logit_bias"),
    ("siglip", settings(model_type="clip"), "must have model_type 'siglip' or 'siglip2', got 'clip'"),
    ("open_clip", without("ln_final.bias"), f"an open_clip file {WHOLE} ln_final.bias"),
    ("open_clip", shaped("text_projection", 15, 12), r"text_projection of shape \[16, 12\], got \[15, 12\]"),
    ("blip2", without("itm_head.bias"), f"{WHOLE} itm_head.bias"),
    ("blip2-llama", without("language_projection.bias"), f"{WHOLE} language_projection.bias"),
    ("blip2-llama", shaped("query_tokens", 1, 3, 32), r"query_tokens of shape \[1, 4, 32\], got \[1, 3, 32\]"),
    ("blip2-llama", without(NORM), "every weight of the language model, missing .'model.norm.weight'"),
    ("blip2-llama", shaped("language_model.extra", 1), "this language model's weights only, got also .'extra'"),
    ("blip2-llama", shaped(NORM, 1), "of text_config's shapes, got others in .*model.norm.weight"),
    ("blip2-llama", settings(model_type="clip"), "config.json must have model_type 'blip-2', got 'clip'"),
    ("blip2-llama", settings(text_config={"model_type": "vit"}), "text_config must be .* model, got 'vit'"),
    ("llava-llama", without(LINEAR), f"{WHOLE} {LINEAR}"),
    ("llava-llama", settings(model_type="clip"), "must have model_type 'llava' or 'llava_next', got 'clip'"),
    ("llava-llama", settings(text_config={"model_type": "t5"}), "must be .* causal language model, got 't5'"),
    ("llava-llama", settings(vision_config={"model_type": "x"}), "model_type 'clip_vision_model', got 'x'"),
    ("llava-llama", settings(projector_hidden_act="relu"), "must have projector_hidden_act 'gelu', got 'relu'"),
    ("llava-llama", settings(vision_feature_select_strategy="full"), "must have .* 'default', got 'full'"),
    ("llava-llama", settings(multimodal_projector_bias=False), "must have .*_bias True, got False"),
    ("llava-llama", settings(vision_feature_layer=9), f"{LAYER} 9"),
    ("llava-llama", settings(vision_feature_layer=[-2, -1]), LAYER),
    ("llava_next-llama", without("image_newline"), f"{WHOLE} image_newline"),
    ("llava_next-llama", shaped("image_newline", 3), r"image_newline of shape \[24\], got \[3\]"),
]
MODEL = "model.safetensors"
DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda x: (x / "config.json").write_text("{"), ".*config.json must hold JSON, got"),
    (lambda x: (x / "config.json").write_text("[]"), ".*config.json must hold a JSON object, got list"),
    (lambda x: (x / "config.json").unlink(), "(folder must hold config.json, got|config.json must lie beside)"),
    (lambda x: (x / MODEL).write_bytes(b"short"), "must be a whole safetensors file, got"),
    (lambda x: (x / MODEL).write_bytes((x / MODEL).read_bytes()[:5000]), "must be a whole safetensors file, got"),
    # a pickle, which CLIP reads and others do not
    (lambda x: (x / MODEL).rename(x / "pytorch_model.bin"), r"(folder must hold \*.safet|must be a whole pickle)"),
    (shutil.rmtree, ".*/copy$"),
]
REFUSED += [(name, *x) for name in ("clip", "blip2", "blip2-llama", "llava-llama") for x in DAMAGES]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_a_folder_that_does_not_fit_is_refused_in_one_sentence(
    name: str, change: Callable[[Path], object], message: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved(name), folder)
    change(folder)
    load = SYSTEMS[name].load
    with pytest.raises(ValueError, match=rf"^load\w*: .*{message}") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_language_model_is_refused(saved: Callable[[str], Path]) -> None:
    refuses(r"^load_blip2_lm: folder must hold a language model, got .*blip2", load_blip2_lm, saved("blip2"))


def test_models_that_transformers_lacks_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    blip, llava = blip2_lm.ours_float("opt"), ours_float("llama")
    eva, clip = blip.visual.config, replace(llava.config.vision, activation="gelu")
    narrow = OPTForCausalLM(OPTConfig(**{**blip2_lm.MODELS["opt"].to_dict(), "word_embed_proj_dim": 12}))
    of_clip = replace(blip.qformer.config, image_width=clip.width)
    stage1 = BLIP2Config(clip, replace(of_clip, has_text=True), decoder_token_id=0)
    linear, norm = Llava(replace(llava.config, projector="linear"), llava.language_model), "vision.has_norm_pre must be"
    table: list[tuple[Any, torch.nn.Module, str]] = [
        (save_blip2_lm, BLIP2LM(eva, blip.qformer.config, narrow), "embeddings must be as wide as .*, 24, got 12"),
        (save_blip2_lm, BLIP2LM(clip, of_clip, blip.language_model), f"{norm} False to be written .* True"),
        (save_blip2, BLIP2(stage1), f"{norm} False to be written .* True"),
        (save_llava, Llava(replace(llava.config, vision=eva), llava.language_model), f"{norm} True to be .* False"),
        (save_llava, linear, "projector must be 'mlp2x_gelu' to be written in config.json, got 'linear'"),
    ]
    for save, model, message in table:
        refuses(f"^{save.__name__}: {message}", save, model, tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-llama", "llava-llama", "llava_next-qwen"])
def test_a_language_model_of_bfloat16_stays_it_to_the_bit(name: str, tmp_path: Path) -> None:
    build, save, load = SYSTEMS[name]
    ours = build()
    ours.language_model.bfloat16()
    save(ours, tmp_path / "ours")
    for dtype in (torch.bfloat16, None):
        assert_same(load(tmp_path / "ours", dtype=dtype), ours)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    again = load(tmp_path / "ours")
    state = hf_layout().renamed(theirs.state_dict())
    for found in (again, theirs):
        assert {p.dtype for p in found.parameters()} == {torch.float32}
    for n, x in ours.language_model.state_dict().items():
        assert torch.equal(again.language_model.state_dict()[n], x.float()), n
        assert torch.equal(state[LANGUAGE + n][: len(x)], x.float()), n


PROMPTS = ["Question: what is it? Answer:", "Question: how many? Answer:"]


def tokenizer_of(specials: list[str], num_tokens: int) -> PreTrainedTokenizerFast:
    words = [*PROMPTS, *(f"word{i}" for i in range(num_tokens))]
    tokenizer = Tokenizer(WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.train_from_iterator(
        words, WordLevelTrainer(vocab_size=num_tokens, special_tokens=specials, show_progress=False)
    )
    start = ("<s>", specials.index("<s>"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[start])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("num_tokens", [VOCAB - 5, VOCAB])
@pytest.mark.parametrize("name", [*(f"blip2-{x}" for x in blip2_lm.MODELS), "llava-llama", "llava_next-llama"])
def test_with_its_processor_transformers_answers_as_ours(name: str, num_tokens: int, tmp_path: Path) -> None:
    (kind, text), (build, save, load) = name.split("-"), SYSTEMS[name]
    ours = build()
    specials = ["<pad>", "</s>", "<s>", "<unk>"] if text == "t5" else ["<unk>", "<pad>", "<s>", "</s>"]
    tokenizer = tokenizer_of(specials, num_tokens)
    save(ours, tmp_path / "ours", tokenizer=tokenizer)
    assert len(tokenizer) == num_tokens
    theirs: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").eval()
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "ours")
    names = {"blip2": "Blip2Processor", "llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor"}
    assert type(processor).__name__ == names[kind] and theirs.config.image_token_index == num_tokens
    assert theirs.get_input_embeddings().num_embeddings == max(VOCAB, num_tokens + 1)
    images = [Image.fromarray(x) for x in torch.randint(0, 256, (2, 40, 50, 3), dtype=torch.uint8).numpy()]
    asked = PROMPTS if kind == "blip2" else [f"<image> {prompt}" for prompt in PROMPTS]
    inputs = processor(images=images, text=asked, padding=True, return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False}
    answers = theirs.generate(**inputs, **options)
    if kind == "blip2":
        side = "right" if text == "t5" else "left"
        prompts = tokenizer(PROMPTS, padding=True, padding_side=side, return_tensors="pt")
        read = inputs["pixel_values"], prompts["input_ids"], prompts["attention_mask"].sum(1)
    else:
        tokens, num_text = inputs["input_ids"], inputs["attention_mask"].sum(1)
        views = inputs["pixel_values"].reshape(-1, 3, SIZE, SIZE)
        read = tokens.masked_fill(tokens == num_tokens, IMAGE_TOKEN), num_text, views, inputs.get("image_sizes")
    expected = ours.generate(*read, **options)
    assert torch.equal(answers[:, -expected.shape[1] :], expected)
    assert_same(load(tmp_path / "ours"), ours)
