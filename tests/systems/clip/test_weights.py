"""CLIP's weights in other libraries' layouts: parity with transformers, open_clip's names, refusals."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmcore.systems.clip.model import CLIP, CLIPConfig, TextConfig
from mmcore.systems.clip.names import HF, HF_SETTINGS, OPEN_CLIP, OPEN_CLIP_SETTINGS
from mmcore.systems.clip.shapes import CLIP_CONFIGS, clip_config
from mmcore.systems.clip.weights import load_clip, save_clip
from tests.refusals import refuses

transformers = pytest.importorskip("transformers")


def small_config(of_both: str = "gelu", **text: object) -> CLIPConfig:
    config = clip_config("tiny")
    vision = replace(config.vision, num_layers=2, width=32, num_heads=2, mlp_dim=48, activation=of_both)
    sizes = {"vocab_size": 60, "num_layers": 2, "width": 16, "num_heads": 2, "mlp_dim": 40}
    settings = {**sizes, "activation": of_both, **text}
    return CLIPConfig(embed_dim=12, vision=vision, text=replace(config.text, **settings))


def randomized(config: CLIPConfig, seed: int = 0) -> CLIP:
    """A CLIP with no parameter at its initial 0 or 1, so that a swapped or forgotten one shows."""
    torch.manual_seed(seed)
    model = CLIP(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model


def assert_loaded(found: CLIP, expected: CLIP) -> None:
    state = found.state_dict()
    assert all(x.dtype == torch.float32 and torch.equal(x, state[n]) for n, x in expected.state_dict().items())


def captions(config: TextConfig, *, eos: int, num: int) -> Tensor:
    """[num, T] random captions of different lengths, `eos` once or, in the second row, as padding too."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, config.vocab_size - 2, (num, config.context_length), generator=generator)
    for row in range(num):
        end = 2 + row
        tokens[row, end] = eos
        tokens[row, end + 1 :] = eos if row == 1 else 0
    return tokens


def contrast(image_features: Tensor, text_features: Tensor, scale: Tensor) -> Tensor:
    logits = scale * image_features @ text_features.T
    labels = torch.arange(len(logits))
    return torch.nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize("config", [
    *(small_config(eos_token_id=eos) for eos in (2, 59, 7, None)), small_config("quick_gelu"), clip_config("tiny"),
], ids=["eos 2", "eos 59", "eos 7", "no eos", "quick_gelu", "tiny"])  # fmt: skip
def test_outputs_and_gradients_equal_transformers_and_its_own_folder_loads(config: CLIPConfig, tmp_path: Path):
    eos, size = config.text.eos_token_id, config.vision.image_size
    end = config.text.vocab_size - 1 if eos in (None, 2) else eos
    ours = randomized(config)
    save_clip(ours, tmp_path / "clip")
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "clip", attn_implementation="eager")
    images, tokens = torch.randn(2, 3, size, size), captions(config.text, eos=end, num=2)
    out = theirs(input_ids=tokens, pixel_values=images)
    b = out.image_embeds, out.text_embeds, theirs.logit_scale.exp().reshape(1)
    a = ours(images, tokens)
    for mine, other in zip(a, b):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    contrast(*a).backward()
    contrast(*b).backward()
    mine = HF.write({n: p.grad for n, p in ours.named_parameters() if p.grad is not None})
    # the gradient of a key's bias is 0 but for rounding, which scales with the largest gradient
    rounding = 1e-6 * max(g.abs().max().item() for g in mine.values())
    for key, p in theirs.named_parameters():
        assert p.grad is not None, key
        atol = max(1e-4 * p.grad.abs().max().item(), rounding)
        torch.testing.assert_close(mine[key], p.grad, atol=atol, rtol=1e-4, msg=key)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_loaded(load_clip(tmp_path / "theirs"), ours)


# open_clip's CLIP class, width 768, 12 layers, read from its source and its published ViT-B-32 files
OPEN_CLIP_B32: dict[str, tuple[int, ...]] = {
    "logit_scale": (), "positional_embedding": (77, 512), "text_projection": (512, 512),
    "token_embedding.weight": (49408, 512), "ln_final.weight": (512,), "ln_final.bias": (512,),
    "visual.class_embedding": (768,), "visual.positional_embedding": (50, 768), "visual.proj": (768, 512),
    "visual.conv1.weight": (768, 3, 32, 32), "visual.ln_pre.weight": (768,), "visual.ln_pre.bias": (768,),
    "visual.ln_post.weight": (768,), "visual.ln_post.bias": (768,),
}  # fmt: skip


def open_clip_block(d: int) -> dict[str, tuple[int, ...]]:
    shapes = {"attn.in_proj_": (3 * d, d), "attn.out_proj.": (d, d), "mlp.c_fc.": (4 * d, d), "mlp.c_proj.": (d, 4 * d)}
    norms = {f"ln_{i}.{n}": (d,) for i in (1, 2) for n in ("weight", "bias")}
    biases = {f"{n}bias": shape[:1] for n, shape in shapes.items()}
    return norms | biases | {f"{n}weight": shape for n, shape in shapes.items()}


def test_open_clip_file_has_the_names_and_shapes_of_open_clip():
    with torch.device("meta"):
        state = CLIP(clip_config("ViT-B-32")).state_dict()
    zeros = {name: torch.zeros(t.shape) for name, t in state.items()}
    wanted = dict(OPEN_CLIP_B32)
    for tower, width in (("visual.transformer", 768), ("transformer", 512)):
        for layer in range(12):
            block = open_clip_block(width)
            wanted |= {f"{tower}.resblocks.{layer}.{leaf}": shape for leaf, shape in block.items()}
    assert {name: tuple(t.shape) for name, t in OPEN_CLIP.write(zeros).items()} == wanted


def test_a_trainer_checkpoint_of_open_clip_loads_given_its_configuration(tmp_path: Path):
    config, file = small_config(), tmp_path / "epoch_3.pt"
    ours = randomized(config)
    state = {f"module.{name}": tensor for name, tensor in OPEN_CLIP.write(ours.state_dict()).items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, file)
    refuses(r"open_clip_config\.json must lie beside", load_clip, file)
    assert_loaded(load_clip(file, config=config), ours)


def test_weights_of_another_resolution_are_interpolated_and_run(tmp_path: Path):
    ours = randomized(small_config())
    save_clip(ours, tmp_path / "clip")
    larger = load_clip(tmp_path / "clip", image_size=24)
    assert larger.config.vision.image_size == 24 and larger.visual.position_embedding.shape == (37, 32)
    assert torch.equal(larger.visual.position_embedding[0], ours.visual.position_embedding[0])
    features = larger.encode_image(torch.randn(2, 3, 24, 24))
    features.sum().backward()
    assert features.shape == (2, 12) and larger.visual.position_embedding.grad is not None


def test_a_logit_scale_of_0_dimensions_loads():
    ours = CLIP(small_config())
    ours.load_state_dict({**ours.state_dict(), "logit_scale": torch.tensor(1.5)})
    assert ours.logit_scale.tolist() == [1.5]


def test_legacy_eos_position_buffers_and_half_precision_of_transformers_files_load_as_float32(tmp_path: Path):
    ours = randomized(small_config()).half().float()
    save_clip(ours, tmp_path / "clip")
    assert json.loads((tmp_path / "clip/config.json").read_text())["text_config"]["eos_token_id"] == 2
    file = tmp_path / "clip/model.safetensors"
    places = {"text_model": torch.arange(32)[None], "vision_model": torch.arange(17)[None]}
    buffers = {f"{part}.embeddings.position_ids": place for part, place in places.items()}
    save_file({n: t.half() for n, t in load_file(file).items()} | buffers, file)
    loaded = load_clip(file)
    assert_loaded(loaded, ours)
    text = loaded.config.text
    assert isinstance(text, TextConfig) and text.eos_token_id is None


def test_other_weights_can_be_saved_in_the_place_of_the_models(tmp_path: Path):
    ours = randomized(small_config())
    average = {name: tensor * 0.5 for name, tensor in ours.state_dict().items()}
    save_clip(ours, tmp_path / "clip", state_dict=average)
    back = load_clip(tmp_path / "clip").state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in average.items())
    wrong = average | {"logit_scale": torch.empty(0)}
    refuses(r"logit_scale must be \[1\], got \[0\]", save_clip, ours, tmp_path / "x", state_dict=wrong)
    del wrong["logit_scale"]
    message = "state_dict must hold the model's names, differs in logit_scale"
    refuses(message, save_clip, ours, tmp_path / "x", state_dict=wrong)


def test_an_unknown_format_is_refused_and_nothing_is_written(tmp_path: Path):
    with pytest.raises(ValueError, match="format must be one of"):
        save_clip(CLIP(small_config()), tmp_path / "other", format="onnx")  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "match"), [
    ({"norm_eps": 1e-6}, "text.norm_eps must be 1e-05 to be written in open_clip_config.json, got 1e-06"),
    ({"activation": "quick_gelu"}, "vision.activation must be 'quick_gelu' to be .*, got 'gelu'"),
    ({"eos_token_id": 7}, "text.eos_token_id must be None to be .*, got 7"),
    ({"width": 14, "mlp_dim": 61}, "text.mlp_dim must be 60 to be .*, got 61"),
])  # fmt: skip
def test_what_open_clip_cannot_express_is_refused(text: dict, match: str, tmp_path: Path):
    config = small_config(**text)
    refuses(match, save_clip, CLIP(config), tmp_path / "clip", format="open_clip")
    assert not list(tmp_path.iterdir())


class _Payload:
    def __reduce__(self):
        return (Path("pwned").touch, ())


def test_pickled_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": _Payload()}, tmp_path / "evil.pt")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"weight": _Payload()}, protocol=2))
    for file in ("evil.pt", "plain.bin"):
        refuses("must be a whole pickle of tensors and nothing else, got Unp", load_clip, tmp_path / file)
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")  # pyright: ignore
    refuses("TorchScript", load_clip, tmp_path / "script.pt")
    assert not (tmp_path / "pwned").exists()


def test_files_without_weights_are_refused_in_one_sentence(tmp_path: Path):
    (tmp_path / "cut.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.bin")
    (tmp_path / "config.json").write_text("{}")
    for file, message in (
        ("cut.pt", "must be a whole pickle of tensors and nothing else, got EOFError"),
        ("list.bin", "must hold tensors by name, got list"),
        ("nowhere", "path must be a weights file or a folder with one of model.safetensors, "),
        ("config.json", r"path must end in \.safetensors, .*, got config.json"),
    ):
        refuses(f"^load_clip: .*{message}", load_clip, tmp_path / file)


@pytest.mark.parametrize(("change", "match"), [
    ({"vision_cfg": {"timm_model_name": "convnext"}}, "this model's settings only, got also .*timm_model_name"),
    ({"vision_cfg": {}, "text_cfg": {"hf_model_name": "roberta"}}, "settings only, got also .*hf_model_name"),
    ({"vision_cfg": None}, "must hold model_cfg.vision_cfg"),
    ({"embed_dim": ...}, "must have model_cfg.embed_dim, got none"),
])  # fmt: skip
def test_open_clip_models_of_another_kind_are_refused(change: dict, match: str):
    raw = OPEN_CLIP_SETTINGS.write("test", small_config())["model_cfg"]
    refuses(match, OPEN_CLIP_SETTINGS.read, "test", {"model_cfg": {**raw, **change}})


def test_published_configurations_read_with_each_librarys_defaults():
    bare = {"model_type": "clip", "text_config": {}, "vision_config": {}}
    assert HF_SETTINGS.read("test", bare) == replace(CLIP_CONFIGS["ViT-B-32-quickgelu"], init_log_logit_scale=2.6592)
    theirs = {"embed_dim": 512, "vision_cfg": {"patch_size": 16}, "text_cfg": {}}
    expected = CLIP_CONFIGS["ViT-B-16"]
    assert OPEN_CLIP_SETTINGS.read("test", theirs) == replace(expected, text=replace(expected.text, eos_token_id=None))
