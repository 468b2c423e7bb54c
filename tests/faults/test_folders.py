"""Somebody's folder: what it says of pictures, tokens and shape is taken, or refused, and never left aside."""

import gzip
import importlib.util
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, BertTokenizer

from mmcore.checkpoint import write_json
from mmcore.data import DataConfig, Preprocess, decode_rgb, normalized, open_data
from mmcore.data.sources import tar
from mmcore.data.text.tokenizer import find_clip_vocabulary, load_tokenizer, train_tokenizer
from mmcore.data.text.wordpiece import load_wordpiece, train_wordpiece
from mmcore.parts.padded import load_padded_tokenizer
from mmcore.parts.towers import load_tower
from mmcore.systems.clip.model import CLIP, CLIPConfig
from mmcore.systems.clip.names import HF, OPEN_CLIP
from mmcore.systems.clip.recipe import Clip
from mmcore.systems.clip.shapes import CLIP_CONFIGS
from mmcore.systems.clip.weights import load_clip, save_clip
from mmcore.systems.llava.inputs import views
from mmcore.systems.llava.weights import load_llava, save_llava
from mmcore.systems.siglip.model import SigLIP
from mmcore.systems.siglip.recipe import Siglip
from mmcore.systems.siglip.shapes import siglip_config
from mmcore.systems.siglip.weights import load_siglip, save_siglip
from mmcore.weights.pictures import FILE, processor_settings, write_pictures
from tests.mmcore.data_fixtures import write_shards
from tests.refusals import refuses
from tests.systems.llava.fixtures import llava

ODD = [(61, 47), (40, 93), (33, 16), (16, 16)]


@pytest.fixture(scope="module")
def data() -> Any:
    return open_data(DataConfig("digits"), seed=0)


def tokenizer_of(data: Any, vocab_size: int = 700, words: str = "") -> Any:
    captions = [f"{caption} {words}" for caption in data.captions()]
    return train_tokenizer(captions, vocab_size=vocab_size, context_length=32)


def folder_of(folder: Path, tokenizer: Any | None = None, **vision: Any) -> Path:
    """A CLIP of random weights, tiny but for what is given, and its tokenizer."""
    torch.manual_seed(0)
    tiny, size = CLIP_CONFIGS["tiny"], tokenizer.vocab_size if tokenizer else 700
    config = replace(tiny, vision=replace(tiny.vision, **vision), text=replace(tiny.text, vocab_size=size))
    save_clip(CLIP(config), folder)
    if tokenizer is not None:
        tokenizer.save(folder)
    return folder


# tokens


def test_the_tokenizer_beside_the_weights_is_the_runs(tmp_path: Path, data: Any) -> None:
    own = tokenizer_of(data, 560)
    start = Clip(init=folder_of(tmp_path / "clip", own)).assets(data)
    assert start.tokenizer.vocabulary == own.vocabulary and start.shape.text.vocab_size == own.vocab_size
    assert "560 tokens" in start.summary["tokenizer"] and start.summary["weights"] == f"of {tmp_path / 'clip'}"
    given = Clip(init=tmp_path / "clip", tokenizer=str(tmp_path / "clip")).assets(data)
    assert given.tokenizer.vocabulary == own.vocabulary
    file = Clip(init=tmp_path / "clip" / "model.safetensors").assets(data)
    assert file.tokenizer.vocabulary == own.vocabulary


def test_another_tokenizer_than_the_weights_is_refused_though_it_is_as_large(tmp_path: Path, data: Any) -> None:
    own, other = tokenizer_of(data, 540), tokenizer_of(data, 540, "zebra crossing")
    assert own.vocab_size == other.vocab_size and own.vocabulary != other.vocabulary
    other.save(tmp_path / "other")
    folder = folder_of(tmp_path / "clip", own)
    said = "--tokenizer must be left out: another one lies beside the weights"
    refuses(said, Clip(init=folder, tokenizer=str(tmp_path / "other")).assets, data)
    refuses("must be the one of the weights", Clip(init=folder, tokenizer="captions").assets, data)
    bare = folder_of(tmp_path / "bare")
    refuses(r"--tokenizer must be the one of the weights .* none lies beside", Clip(init=bare).assets, data)
    tokenizer_of(data, 800, "a quick brown fox jumps over lazy dogs, sphinx of black quartz").save(tmp_path / "large")
    assert load_tokenizer(tmp_path / "large").vocab_size > 540
    small = folder_of(tmp_path / "small", own)
    for file in (*small.glob("tok*"), small / "vocab.json", small / "merges.txt"):
        file.unlink()
    said = "--tokenizer must have at most 540 tokens"
    refuses(said, Clip(init=small, tokenizer=str(tmp_path / "large")).assets, data)


def test_siglips_tokenizer_beside_the_weights_is_the_runs_and_another_is_refused(tmp_path: Path, data: Any) -> None:
    first = Siglip().assets(data)
    torch.manual_seed(0)
    save_siglip(SigLIP(first.shape), tmp_path / "siglip")
    first.tokenizer.save(tmp_path / "siglip")
    assert Siglip(init=tmp_path / "siglip").assets(data).tokenizer.vocabulary == first.tokenizer.vocabulary
    other = json.loads((tmp_path / "siglip" / "tokenizer.json").read_text())
    vocab = other["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.__getitem__)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(other))
    settings = tmp_path / "siglip" / "tokenizer_config.json"
    (tmp_path / "other" / settings.name).write_text(settings.read_text())
    recipe = Siglip(init=tmp_path / "siglip", tokenizer=tmp_path / "other")
    refuses("--tokenizer must be left out: another one lies beside the weights", recipe.assets, data)


def test_the_first_siglips_tokens_are_of_the_words_without_punctuation(tmp_path: Path, data: Any) -> None:
    Siglip().assets(data).tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    before = load_padded_tokenizer(tmp_path, 16)
    write_json(tmp_path / "tokenizer_config.json", settings | {"tokenizer_class": "SiglipTokenizer"})
    ours = load_padded_tokenizer(tmp_path, 16)
    texts = ["A scan, of the (digit) 'Three'!", "  a\tscan  of the digit-three.  "]
    assert ours(texts).tolist() == before(["a scan of the digit three", "a scan of the digitthree"]).tolist()
    ours.save(tmp_path / "again")
    assert load_padded_tokenizer(tmp_path / "again", 16)(texts).tolist() == ours(texts).tolist()
    assert "SiglipTokenizer" not in (tmp_path / "again" / "tokenizer_config.json").read_text()


def test_clips_own_vocabulary_is_found_where_open_clip_is_installed_and_not_imported(
    tmp_path: Path, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmcore.data.text.tokenizer.try_to_load_from_cache", lambda *_: None)
    with monkeypatch.context() as nowhere:
        nowhere.setattr(importlib.util, "find_spec", lambda _: None)
        assert find_clip_vocabulary() is None
        said = r"CLIP's vocabulary must be installed \(pip install open_clip_torch\), or --tokenizer be a folder"
        refuses(said, Clip(model="ViT-B-32").assets, data)
    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    merges = ["i n", "t h", "a n", "r e", "a r", "e r", "th e</w>"]
    with gzip.open(package / "bpe_simple_vocab_16e6.txt.gz", "wt") as file:
        file.write('"bpe_simple_vocab_16e6.txt#version: 0.2\n' + "\n".join(merges))
    monkeypatch.syspath_prepend(tmp_path)
    assert find_clip_vocabulary() == package / "bpe_simple_vocab_16e6.txt.gz"
    for model, chosen in (("ViT-B-32", None), ("tiny", "clip")):
        made = Clip(model=model, tokenizer=chosen).assets(data)
        assert "the</w>" in made.tokenizer.vocabulary and made.shape.text.vocab_size == 514 + len(merges)
    assert "open_clip" not in sys.modules


def test_a_vocabulary_is_learned_from_a_sample_of_shards_and_no_more_of_them_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = write_shards(tmp_path, 6, 10)
    shards = open_data(DataConfig(pattern), seed=0)
    every, some = shards.captions(), shards.captions(7)
    assert len(every) == 60 and len(some) == 7 and set(some) < set(every) and some == shards.captions(7)
    assert shards.captions(7, seed=1) != some
    opened: list[str] = []
    samples = tar.shard_samples
    monkeypatch.setattr(tar, "shard_samples", lambda urls: samples(opened.append(url) or url for url in urls))
    shards.captions(12)
    assert len(opened) == 2
    assert "learned from 12 captions" in Clip(tokenizer_samples=12).assets(shards).summary["tokenizer"]
    refuses("--tokenizer-samples must be at least 1, got 0", shards.captions, 0)
    table: Any = open_data(DataConfig("digits"), seed=0)
    assert len(table.captions(5)) == 5 * len(table.source.all_captions(0)) and table.captions(5) == table.captions(5)


# shape


@pytest.mark.parametrize(
    ("vision", "said"),
    [
        ({"activation": "quick_gelu"}, "vision tower has activation 'gelu', as --model tiny has it, got 'quick_gelu'"),
        ({"num_heads": 2}, "num_heads 4, as --model tiny has it, got 2"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-05, as --model tiny has it, got 1e-06"),
        ({"patch_size": 8}, "patch_size 4, as --model tiny has it, got 8"),
    ],
)
def test_what_config_json_says_of_the_shape_is_taken_or_refused(
    tmp_path: Path, data: Any, vision: dict[str, Any], said: str
) -> None:
    folder = folder_of(tmp_path / "clip", tokenizer_of(data), **vision)
    assert {n: getattr(Clip(init=folder).assets(data).shape.vision, n) for n in vision} == vision
    refuses(said, Clip(init=folder, model="tiny").assets, data)


def test_weights_without_a_configuration_take_that_of_model(tmp_path: Path, data: Any) -> None:
    tokenizer_of(data).save(tmp_path / "bare")
    tiny, file = CLIP_CONFIGS["tiny"], tmp_path / "bare" / "weights.pt"
    torch.save(HF.write(CLIP(tiny).state_dict()), file)
    refuses("config.json must lie beside the weights, or config be given", Clip(init=file).assets, data)
    start = Clip(init=file, model="tiny").assets(data)
    assert start.shape.vision == tiny.vision and start.shape.text.vocab_size == tiny.text.vocab_size


def test_model_may_ask_for_larger_images_than_those_of_the_weights(tmp_path: Path, data: Any) -> None:
    folder = folder_of(tmp_path / "clip", tokenizer_of(data), image_size=8)
    assert Clip(init=folder, model="tiny").assets(data).shape.vision.image_size == 16


# pictures


def pictures(rng: np.random.Generator, mode: str) -> list[Image.Image]:
    made = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in ODD]
    if mode == "I;16":
        return [Image.fromarray(rng.integers(0, 65536, (h, w), dtype=np.uint16)) for w, h in ODD]
    if mode == "P+":  # a transparent colour
        found = [x.convert("P") for x in made]
        for x in found:
            x.info["transparency"] = 3
        return found
    if mode in ("RGBA", "LA"):
        for x in made:
            x.putalpha(Image.fromarray(rng.integers(0, 256, x.size[::-1], dtype=np.uint8)))
    return [x.convert(mode) for x in made]


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_exported_processor_gives_the_pixels_that_training_saw(
    tmp_path: Path, fit: Any, interpolation: Any
) -> None:
    rng = np.random.default_rng(0)
    for size in (16, 33):
        ours = Preprocess(size, (0.1, 0.5, 0.9), (0.2, 0.3, 0.4), interpolation, fit)
        folder = tmp_path / str(size)
        folder.mkdir()
        write_pictures(folder, ours)
        theirs: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
        for mode in ("RGB", "L", "1", "P", "CMYK"):
            for image in pictures(rng, mode):
                wanted = normalized(ours([image.convert("RGB")]), ours.mean, ours.std)
                found = theirs(image, return_tensors="pt").pixel_values
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        for mode in ("RGB", "RGBA", "LA", "P", "P+", "I;16", "CMYK"):
            for orientation, image in enumerate(pictures(rng, mode) * 2, 1):
                file, exif = io.BytesIO(), Image.Exif()
                exif[0x0112] = orientation
                image.save(file, "JPEG" if mode == "CMYK" else "PNG", exif=exif)
                seen = decode_rgb(file.getvalue())
                upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue())))
                assert seen.size == upright.size
                found = theirs(seen, return_tensors="pt").pixel_values
                wanted = normalized(ours([seen]), ours.mean, ours.std)
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_what_a_folder_says_of_pictures_is_taken_into_the_run_and_into_what_starts_from_its_tower(
    tmp_path: Path, data: Any
) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    rules = {"image_mean": mean, "image_std": std, "interpolation": "bilinear", "fit": "squash"}
    folder = folder_of(tmp_path / "clip", tokenizer_of(data), **rules)
    start = Clip(init=folder).assets(data)
    assert start.preprocess == Preprocess(16, mean, std, "bilinear", "squash")
    assert start.summary["pictures"] == "16 pixels by bilinear, both sides; mean 0.1 0.2 0.3, std 0.4 0.5 0.6"
    assert load_tower(folder).config.preprocess == start.preprocess
    # as transformers writes it beside a whole processor, and as it once did
    settings = json.loads((folder / FILE).read_text())
    (folder / FILE).unlink()
    assert load_clip(folder).config.vision.preprocess == Preprocess(16)  # CLIP's own where nothing is said
    write_json(folder / "processor_config.json", {"image_processor": settings, "processor_class": "CLIPProcessor"})
    assert load_clip(folder).config.vision.preprocess == start.preprocess
    (folder / "processor_config.json").unlink()
    write_json(folder / FILE, {"feature_extractor_type": "CLIPFeatureExtractor", "size": 16, "crop_size": 16})
    assert load_clip(folder).config.vision.preprocess == Preprocess(16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": {"height": 24, "width": 24}}, "must be of 16 pixels, as config.json has it, got 24"),
        ({"resample": 1}, "must resize by bilinear or bicubic interpolation, got 1"),
        ({"do_resize": False}, "must resize by bilinear or bicubic interpolation"),
        ({"rescale_factor": 1 / 127.5}, "got other pixels from its"),
        ({"do_rescale": False}, "got other pixels from its"),
        ({"size": {"height": 16, "width": 24}}, "got other pixels from its"),
        ({"image_processor_type": "NoSuchProcessor"}, "must be one that transformers reads"),
        ({"image_std": [0.0, 0.1, 0.1]}, "std must be 3 numbers"),
        ({"image_mean": "imagenet"}, "must tell how a picture becomes a square of RGB, got: could not convert"),
        ({"image_mean": [0.5]}, "must tell how a picture becomes a square of RGB, got: .*3 numbers"),
        ({"size": {"longest_edge": 16}}, "must tell how a picture becomes a square of RGB"),
        ({"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}}, "contains custom code"),
        (
            {"do_center_crop": True, "crop_size": {"height": 16, "width": 16}, "size": {"shortest_edge": 20}},
            "got other pixels from its",
        ),
    ],
)
def test_pictures_that_we_cannot_make_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = folder_of(tmp_path / "clip", fit="squash")
    write_json(folder / FILE, {**json.loads((folder / FILE).read_text()), **change})
    refuses(said, load_clip, folder)


def test_open_clips_settings_of_pictures_are_taken_and_written(tmp_path: Path, data: Any) -> None:
    tiny = CLIP_CONFIGS["tiny"]
    vision = replace(tiny.vision, num_heads=2, image_mean=(0.5,) * 3, interpolation="bilinear", fit="squash")
    save_clip(CLIP(CLIPConfig(64, vision, replace(tiny.text, eos_token_id=None))), tmp_path / "oc", format="open_clip")
    file = tmp_path / "oc" / "open_clip_config.json"
    raw = json.loads(file.read_text())
    assert raw["preprocess_cfg"]["mean"] == [0.5] * 3 and raw["preprocess_cfg"]["size"] == 16
    assert load_clip(tmp_path / "oc").config.vision.preprocess == vision.preprocess
    for change, said in (
        ({"resize_mode": "longest"}, "fit must be one of"),
        ({"resize_mode": "pad"}, "fit must be one of"),
        ({"mean": 0.5}, r"preprocess_cfg.mean such as \(0.48.*got 0.5"),
        ({"std": None}, "preprocess_cfg.std such as"),
        ({"mean": ["a", "b", "c"]}, "mean must be 3 numbers"),
        ({"interpolation": "random"}, "interpolation must be one of"),
        ({"size": [32, 32]}, r"preprocess_cfg.size 16, as model_cfg has it, got \[32, 32\]"),
        ({"mode": "L"}, "preprocess_cfg.mode 'RGB', got 'L'"),
    ):
        write_json(file, {**raw, "preprocess_cfg": raw["preprocess_cfg"] | change})
        refuses(said, lambda: load_clip(tmp_path / "oc").config.vision.preprocess)


def test_siglips_and_maes_folders_too(tmp_path: Path) -> None:
    config = siglip_config("tiny")
    vision = replace(config.vision, image_mean=(0.1, 0.2, 0.3), fit="crop", interpolation="bilinear")
    save_siglip(SigLIP(replace(config, vision=vision)), tmp_path / "siglip")
    assert load_siglip(tmp_path / "siglip").config.vision == vision


@pytest.mark.parametrize("fit", ["pad", "crop", "squash"])
def test_llavas_folder_says_how_a_picture_becomes_square(tmp_path: Path, fit: Any) -> None:
    model = llava()
    save_llava(model, tmp_path / "llava")
    square = replace(model.config.preprocess, fit=fit, mean=(0.5, 0.5, 0.5))
    write_json(tmp_path / "llava" / FILE, processor_settings(square))
    loaded = load_llava(tmp_path / "llava")
    assert loaded.config.preprocess == square
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 50, 3), dtype=np.uint8))
    theirs: Any = AutoImageProcessor.from_pretrained(tmp_path / "llava", backend="pil")
    found = normalized(views(image, loaded.config), square.mean, square.std)
    torch.testing.assert_close(theirs(image, return_tensors="pt").pixel_values, found, rtol=0, atol=1e-6)


def test_openais_own_weights_are_not_run_with_another_activation(tmp_path: Path) -> None:
    state = OPEN_CLIP.write(CLIP(CLIP_CONFIGS["tiny"]).state_dict()) | {"input_resolution": torch.tensor(16)}
    torch.save(state, tmp_path / "ViT.pt")
    said = r"quick_gelu \(ViT-B-32-quickgelu\), got gelu"
    refuses(said, load_clip, tmp_path / "ViT.pt", config=CLIP_CONFIGS["tiny"])


@pytest.mark.parametrize("change", [{"do_lower_case": False}, {"strip_accents": False}])
def test_a_vocabulary_of_a_bert_that_keeps_cases_or_accents_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    learned = train_wordpiece(["a café at noon", "A Dog"] * 3, vocab_size=80)
    learned.save(tmp_path)
    assert load_wordpiece(tmp_path).words == learned.words
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write_json(tmp_path / "tokenizer_config.json", settings | change)
    refuses("tokenizer must be of an uncased BERT", load_wordpiece, tmp_path)
    refuses("tokenizer must be of an uncased BERT", load_wordpiece, tmp_path / "vocab.txt")


def test_a_bert_folder_of_today_holds_tokenizer_json_alone(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s", "café", "cafe"]
    BertTokenizer({word: i for i, word in enumerate(words)}).save_pretrained(tmp_path / "uncased")
    assert not (tmp_path / "uncased" / "vocab.txt").exists()
    assert load_wordpiece(tmp_path / "uncased").words[: len(words)] == tuple(words)
    assert load_wordpiece(tmp_path / "uncased")(["A Dogs café"]).tokens.tolist() == [[2, 5, 6, 7, 9, 3]]
    cased = BertTokenizer({word: i for i, word in enumerate(words)}, do_lower_case=False)
    cased.save_pretrained(tmp_path / "cased")
    refuses("tokenizer must be of an uncased BERT", load_wordpiece, tmp_path / "cased")
