"""ViT against transformers' ViTForImageClassification and timm's, through files both ways; what it is trained with."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from mmcore.data import DataConfig, EvalSet, open_data
from mmcore.data.transforms.augment import changed, erased, rand_augment
from mmcore.launch import parse
from mmcore.nn import interpolate_positions
from mmcore.parts.image_tower import ImagePool, PooledTower
from mmcore.parts.timm_vit import is_timm
from mmcore.parts.towers import load_pooled, load_tower
from mmcore.parts.vit import VisionConfig
from mmcore.recipe import Classifies, Step
from mmcore.systems.vit import start
from mmcore.systems.vit.mixing import Mix, draw
from mmcore.systems.vit.model import ClassifierConfig, ViTClassifier
from mmcore.systems.vit.recipe import Labelled
from mmcore.systems.vit.weights import CLASSIFIER_LAYOUT, load_vit, save_classifier, timm_layout
from mmcore.tasks import classification
from mmcore.tasks.subject import Subject
from mmcore.weights.files import read_folder
from tests.torchvision_stub import torchvision_or_skip

SIZES: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 48, "layer_norm_eps": 1e-6,
}  # fmt: skip
VISION: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "width": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 48, "norm_eps": 1e-6,
    "has_norm_pre": False, "has_patch_bias": True, "has_final_norm": True,
}  # fmt: skip
NAMES = ("wolf", "ant", "bee")
FLAGS = "--data scattered --views source --mixup 0 --cutmix 0 --rand-augment None --erase 0 --drop-path 0".split()


def moved(model: Any) -> Any:
    """Every parameter moved by seeded noise."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def images(num: int = 4) -> Tensor:
    return torch.randn(num, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([2, 0, 1, 2])


def step(seed: int = 0, **companions: Any) -> Step:
    return Step(0, 1, seed, companions)


def vit(*flags: str) -> Any:
    return parse("vit", [*FLAGS, *flags], "vit")


def test_outputs_loss_and_every_gradient_are_transformers_through_files_both_ways(tmp_path: Path) -> None:
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    moved(ViTForImageClassification(ViTConfig(**SIZES, **names))).save_pretrained(tmp_path / "theirs")
    theirs: Any = ViTForImageClassification.from_pretrained(tmp_path / "theirs", attn_implementation="sdpa").double()
    ours = load_vit(tmp_path / "theirs").double()
    assert ours.config.classes == NAMES
    expected, logits = theirs(images(), labels=LABELS), ours(images())
    loss = F.cross_entropy(logits, LABELS)
    torch.testing.assert_close(logits, expected.logits, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(loss, expected.loss, atol=1e-9, rtol=1e-9)
    expected.loss.backward()
    loss.backward()
    for p in theirs.parameters():
        p.data = p.grad
    theirs.save_pretrained(tmp_path / "gradients")
    found = CLASSIFIER_LAYOUT.read("test", read_folder("test", tmp_path / "gradients"), ours.state_dict())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, found[name], atol=1e-9, rtol=1e-9, msg=name)

    save_classifier(load_vit(tmp_path / "theirs"), tmp_path / "ours", "hf")
    before, after = (read_folder("test", tmp_path / x) for x in ("theirs", "ours"))
    assert before.keys() == after.keys() and all(torch.equal(x, after[n]) for n, x in before.items())
    again = ViTForImageClassification.from_pretrained(tmp_path / "ours").config
    assert again.id2label == dict(enumerate(NAMES)) and again.label2id == names["label2id"]
    assert torch.equal(load_tower(tmp_path / "ours").state["norm_post.bias"], before["vit.layernorm.bias"])
    mean = ViTClassifier(ClassifierConfig(VisionConfig(**VISION), NAMES, "fc_norm"))
    with pytest.raises(ValueError, match=r"pool must be 'class', .* got 'fc_norm': --format timm has it"):
        save_classifier(mean, tmp_path / "mean", "hf")
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize("pool", ["class", "fc_norm", "mean"])
def test_a_classifier_goes_to_timm_and_comes_back(pool: ImagePool, tmp_path: Path) -> None:
    torchvision_or_skip()
    timm: Any = pytest.importorskip("timm")
    vision = VisionConfig(**VISION, layer_scale=0.3 if pool == "mean" else None)
    ours = moved(ViTClassifier(ClassifierConfig(vision, NAMES, pool)))
    save_classifier(ours, tmp_path / "x", "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).double()
    assert theirs.pretrained_cfg["mean"] == list(vision.image_mean) and theirs.num_classes == 3
    ours, logits = ours.double(), theirs(images())
    torch.testing.assert_close(ours(images()), logits, atol=1e-9, rtol=1e-9)
    F.cross_entropy(logits, LABELS).backward()
    F.cross_entropy(ours(images()), LABELS).backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    found = timm_layout(ours.config).read("test", grads, ours.state_dict())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, found[name], atol=1e-9, rtol=1e-9, msg=name)


def test_towers_are_read_from_files_with_timms_names(tmp_path: Path) -> None:
    ours = moved(ViTClassifier(ClassifierConfig(VisionConfig(**VISION, fit="squash"), NAMES, "fc_norm")))
    save_classifier(ours, tmp_path / "x", "timm")
    state = {name: x.clone() for name, x in read_folder("test", tmp_path / "x").items()}
    bare = tmp_path / "bare/vit.pth"
    bare.parent.mkdir()
    torch.save(state, bare)
    with pytest.raises(ValueError, match=r"tells num_heads, got none for a width of 24"):
        load_pooled(bare)
    (bare.parent / "config.json").write_text((tmp_path / "x/config.json").read_text())
    for where in (tmp_path / "x", tmp_path / "x/model.safetensors", bare):
        found = load_pooled(where)
        assert found.pool == "fc_norm" and found.config == ours.config.vision
        assert found.state.keys() == ours.visual.state_dict().keys()
        assert all(torch.equal(x, ours.visual.state_dict()[n]) for n, x in found.state.items())
        assert torch.equal(load_tower(where).state["norm_post.bias"], ours.visual.norm_post.bias)
    torch.save({"blocks.0.attn.qkv.weight": torch.zeros(2)}, tmp_path / "less.pth")
    assert not is_timm(tmp_path / "less.pth", torch.load(tmp_path / "less.pth")) and not is_timm(tmp_path)


def test_a_tower_of_another_size_has_its_positions_interpolated_and_a_locked_one_stays(monkeypatch: Any) -> None:
    vision = VisionConfig(**{**VISION, "positions": "sincos"}, has_mask_token=True)  # as MAE's and its kin's
    given = ViTClassifier(ClassifierConfig(vision, NAMES)).pooled_tower()
    monkeypatch.setattr(start, "load_pooled", lambda _: PooledTower(vision, "mean", given.state))
    recipe = vit("--vision", "x", "--image-size", "24")
    data = recipe.open_data()
    assets = recipe.assets(data)
    model = recipe.build(assets)
    assert assets.shape.pool == "mean" and assets.preprocess.size == 24
    assert assets.shape.classes == tuple(data.class_names) and model.head.out_features == 10
    initial = recipe.initial(assets, model)
    expected = interpolate_positions(given.state["position_embedding"], 36)
    assert torch.equal(initial["visual.position_embedding"], expected)
    assert "visual.mask_token" not in initial and initial.keys() <= dict(model.named_parameters()).keys()
    locked = parse("vit", [*FLAGS[:-2], "--vision", "x", "--lock-image"], "vit")
    assets = locked.assets(data)
    model = locked.build(assets).train()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    assert model.training and not model.visual.training and not model.visual.transformer.blocks[0].training
    assert torch.equal(model.visual.norm_post.bias, given.state["norm_post.bias"])


def test_mixed_images_have_the_shares_of_their_labels_and_are_a_function_of_the_step() -> None:
    pixels = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 16, 16) * 40
    found = [draw(np.random.default_rng(seed), 6, 16, 0.8, 1.0) for seed in range(200)]
    cut = [mix for mix in found if mix is not None and mix.box is not None]
    assert 70 < len(cut) < 130 and all(isinstance(mix, Mix) for mix in found)
    for mix in cut:  # the share is of the pixels that stay, on the border too
        images, place = mix.images(pixels), int((mix.partner != np.arange(6)).argmax())
        assert (images[place] == pixels[place]).double().mean().item() == pytest.approx(mix.share) or mix.share == 1
    mix = Mix(np.array([5, 4, 3, 2, 1, 0]), 0.75, None)
    assert mix.images(pixels)[0].unique().tolist() == [50] and mix.images(pixels).dtype == torch.uint8
    assert draw(np.random.default_rng(0), 6, 16, 0.0, 0.0) is None
    recipe, model = vit(), torch.nn.Linear(768, 10)
    mixing = parse("vit", [*FLAGS[:4], "--rand-augment", "None", "--label-smoothing", "0.2"], "vit")
    run: Any = lambda x, **_: model(x.flatten(1) / 255)  # noqa: E731
    batch = Labelled(torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8), torch.arange(6))
    losses = [mixing.loss(run, batch, step(seed))["loss"] for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]
    mix = draw(np.random.default_rng(3), 6, 16, 0.8, 1.0)
    assert mix is not None
    soft = sum(
        w * (0.8 * F.one_hot(y, 10) + 0.02)  # smoothing of 10 classes
        for y, w in ((batch.labels, mix.share), (mix.partners(batch.labels), 1 - mix.share))
    )
    assert isinstance(soft, Tensor)
    torch.testing.assert_close(soft.sum(1), torch.ones(6))
    expected = -(soft * run(mix.images(batch.images)).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses[0], expected)
    plain = -(0.9 * F.one_hot(batch.labels, 10) + 0.01) * run(batch.images).log_softmax(1)
    torch.testing.assert_close(recipe.loss(run, batch, step())["loss"], plain.sum(1).mean())


def test_a_teachers_logits_are_learned_at_their_share() -> None:
    recipe = vit("--teacher", "x", "--alpha", "0.6", "--temperature", "3", "--label-smoothing", "0")
    torch.manual_seed(0)
    student, teacher = torch.nn.Linear(48, 10).double(), torch.nn.Linear(48, 10).double()
    read: Any = lambda net: lambda x: net(x.flatten(1) / 255)  # noqa: E731
    batch = Labelled(torch.randint(0, 256, (5, 3, 4, 4)).double(), torch.arange(5))
    losses = recipe.loss(read(student), batch, step(teacher=read(teacher)))
    mine, theirs = read(student)(batch.images), read(teacher)(batch.images)
    soft = -9 * ((theirs / 3).softmax(1) * (mine / 3).log_softmax(1)).sum(1).mean()
    hard = F.cross_entropy(mine, batch.labels)
    torch.testing.assert_close(losses["loss"], 0.6 * soft + 0.4 * hard)
    assert read(student)(batch.images).requires_grad and not losses["distillation"].isnan()
    losses["loss"].backward()
    assert teacher.weight.grad is None and student.weight.grad is not None


def test_augmentations_change_what_they_say_and_an_erased_rectangle_is_noise() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (21, 17, 3), dtype=np.uint8))
    assert np.array_equal(changed(image, "rotate", 0), image) and np.array_equal(changed(image, "solarize", 0), image)  # pyright: ignore[reportArgumentType]
    assert np.array_equal(changed(image, "invert", 3), 255 - np.asarray(image))  # pyright: ignore[reportArgumentType]
    right = np.asarray(changed(image, "translate_x", 10, sign=-1))  # by 7.65 pixels
    assert (right[:, :6] == (124, 116, 104)).all() and not (right[:, 9:] == (124, 116, 104)).all(1).any()
    seen = {np.asarray(rand_augment(image, 9, np.random.default_rng(i))).tobytes() for i in range(40)}
    assert 10 < len(seen) < 40  # one in four is left as it is
    again = [rand_augment(image, 9, np.random.default_rng(5)) for _ in range(2)]
    assert np.array_equal(*again) and again[0].size == (17, 21)  # pyright: ignore[reportArgumentType]
    pixels = torch.zeros(3, 40, 40, dtype=torch.uint8)
    shares = []
    for i in range(100):
        out = erased(pixels, np.random.default_rng(i), (0.5, 0.5, 0.5), (0.1, 0.1, 0.1))
        places = (out > 0).any(0).nonzero()
        (top, left), (bottom, right) = places.min(0).values, places.max(0).values
        assert (out[:, top : bottom + 1, left : right + 1] > 0).double().mean() > 0.99
        shares.append(len(places) / 1600)
    assert min(shares) > 0.015 and max(shares) < 0.36
    assert pixels.max() == 0 and torch.equal(erased(pixels[:, :1, :1], rng, (0,) * 3, (1,) * 3), pixels[:, :1, :1])


def test_augmentations_are_timms() -> None:
    torchvision_or_skip()
    theirs: Any = pytest.importorskip("timm.data.auto_augment")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (21, 17, 3), dtype=np.uint8))
    names = {
        "autocontrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert", "rotate": "Rotate",
        "posterize": "PosterizeIncreasing", "solarize": "SolarizeIncreasing", "solarize_add": "SolarizeAdd",
        "color": "ColorIncreasing", "contrast": "ContrastIncreasing", "brightness": "BrightnessIncreasing",
        "sharpness": "SharpnessIncreasing", "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateXRel",
        "translate_y": "TranslateYRel",
    }  # fmt: skip
    hparams = {"img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    for ours, name in names.items():
        op = theirs.AugmentOp(name, prob=1.0, magnitude=7, hparams=hparams)
        expected = {np.asarray(op(image)).tobytes() for _ in range(8)}  # with either sign
        found = {np.asarray(changed(image, ours, 7, sign=sign)).tobytes() for sign in (1, -1)}
        assert expected <= found, name


def write_classes(folder: Path, *names: str, num: int = 3) -> Path:
    for i, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for j in range(num):
            Image.new("RGB", (8, 8), (40 * i, 10 * j, 0)).save(folder / name / f"{j}.png")
    return folder


def write_pairs(at: Path) -> Path:
    write_classes(at, "ant", "bee")
    file = at / "pairs.csv"
    file.write_text(
        "filepath\ttitle\n" + "".join(f"ant/{i}.png\tan ant {i}\nbee/{i}.png\ta bee {i}\n" for i in range(3))
    )
    return file


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--data PAIRS", "--data must have classes, such as a folder of them, or digits, got "),
        ("--data ONE", "--data must have images of two or more classes, got 1"),
        ("--data SINGLE --val-fraction 0.6", "must be of classes that are trained on, got 1 of 'bee' alone"),
        ("--data TWO --val-data THREE", "val_data must have classes of .* alone, got the folder bee"),
        ("--model ViT-B", "--model must be one of tiny, ViT-Ti-16, ViT-S-16, ViT-B-16, ViT-L-16, got 'ViT-B'"),
        ("--label-smoothing 1", "--label-smoothing must be from 0, below 1, got 1.0"),
        ("--mixup -1", "--mixup must be at least 0, got -1.0"),
        ("--rand-augment 11", "--rand-augment must be from 0 to 10, got 11.0"),
        ("--image-size 18", "--image-size must be a multiple of the patches' 4 pixels, got 18"),
        ("--lock-image", "--lock-image must come with --vision"),
        ("--alpha 0.5", "--alpha has no effect without --teacher, got 0.5"),
        ("--teacher nowhere", "RUN must be a run's folder .* got nowhere, which does not exist"),
        ("--pooling class --vision nowhere", "path must be a weights file or a folder"),
    ],
)
def test_mistakes_are_told_in_a_sentence(flags: str, sentence: str, tmp_path: Path) -> None:
    places = {
        "ONE": lambda at: write_classes(at, "ant"),
        "TWO": lambda at: write_classes(at, "ant", "wolf"),
        "THREE": lambda at: write_classes(at, "ant", "bee", "wolf"),
        "PAIRS": write_pairs,
        "SINGLE": lambda at: (write_classes(at, "ant", "wolf"), write_classes(at, "bee", num=1))[0],
    }
    words = [str(places[w](tmp_path / w)) if w in places else w for w in flags.split()]
    recipe = parse("vit", words, "vit")
    with pytest.raises(ValueError, match=sentence):
        recipe.assets(recipe.open_data())


def test_accuracy_is_of_the_classes_that_the_run_knows_by_their_names(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "x", "bee", "wolf")
    data = open_data(DataConfig(str(folder), val_fraction=0.0), seed=0)
    held_out: Any = data.source
    val = EvalSet(held_out, range(6), [], held_out.classes)
    data = SimpleNamespace(val=val, class_names=data.class_names, name="x")

    def subject(*classes: str) -> Subject:
        def logits(pixels: Tensor) -> Tensor:  # by the red of an image, 0 of a bee and 40 of a wolf
            is_wolf = pixels[:, 0].double().mean((1, 2)) > 20
            return F.one_hot(torch.where(is_wolf, classes.index("wolf"), 0), len(classes)).double()

        able = Classifies(VisionConfig(**VISION).preprocess, classes, logits)
        recipe = SimpleNamespace(classifies=lambda *_: able, pictures=lambda x: x)
        return Subject(recipe, None, None, data, torch.device("cpu"))

    assert classification.follow(subject("bee", "wolf"))[classification.figure(1)] == 1
    assert classification.follow(subject("ant", "bee", "wolf"))[classification.figure(1)] == 0.5
    with pytest.raises(ValueError, match="must have the classes that the run was trained on, got 'bee' besides"):
        classification.follow(subject("ant", "wolf"))
    with pytest.raises(ValueError, match=r"names of classes that tell them apart, .* got 'wolf' twice"):
        classification.follow(subject("bee", "wolf", "wolf"))
