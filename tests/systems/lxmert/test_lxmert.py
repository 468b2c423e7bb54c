"""LXMERT beside transformers' LxmertModel and its heads, regions of a grid and of a detector, and what is refused."""

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor

from mmcore.data import BrokenRecord, DataConfig, LoaderSpec
from mmcore.data.regions import TSV_FIELDS, DetectorRows, Objects, Regions
from mmcore.losses import matching_loss
from mmcore.parts.bert import BertConfig
from mmcore.recipe import Step
from mmcore.systems.lxmert.answers import LxmertVqa
from mmcore.systems.lxmert.model import LXMERT
from mmcore.systems.lxmert.recipe import Lxmert, region_losses
from mmcore.systems.lxmert.shapes import LxmertConfig
from mmcore.systems.lxmert.weights import ARCHITECTURES, LAYOUT, load_lxmert, save_lxmert, written_settings
from mmcore.tasks.subject import Subject

LENGTHS, COUNTS = [5, 1, 7], [4, 2, 3]
_TEXT = BertConfig(50, 32, 16, 2, 2, 32, num_positions=32)
CONFIG = LxmertConfig(_TEXT, 1, 2, feature_width=6, num_objects=5, num_attributes=4, num_answers=3)
# padding_idx=0 there: no gradient of the first position and the first type
FROZEN_ROWS = ("position_embeddings", "token_type_embeddings")


def pair(config: LxmertConfig = CONFIG) -> tuple[LXMERT, Any]:
    """Ours and theirs in float64 of the same weights, none of which is what it began as."""
    torch.manual_seed(0)
    ours = LXMERT(config)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.05 * torch.randn_like(p))
    theirs = getattr(transformers, ARCHITECTURES[config.head])(transformers.LxmertConfig(**written_settings(config)))
    missing, unknown = theirs.load_state_dict(LAYOUT.write(ours.state_dict()), strict=False)
    assert not unknown and set(missing) <= {"cls.predictions.decoder.weight"}
    return ours.double().train(), theirs.double().train()


def batch() -> tuple[Regions, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    boxes = torch.rand(3, 4, 4, generator=generator, dtype=torch.float64)
    labels = [torch.randint(0, n, (3, 4), generator=generator) for n in (5, 4)]
    scores = [torch.rand(3, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
    objects = Objects(labels[0], scores[0], labels[1], scores[1])
    tokens = torch.randint(5, 50, (3, 7), generator=generator)
    seen = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    given = {"input_ids": tokens.masked_fill(~seen, 0), "attention_mask": seen.long()}
    given |= {"visual_feats": features, "visual_pos": boxes}
    given["visual_attention_mask"] = (torch.arange(4) < torch.tensor(COUNTS)[:, None]).long()
    return Regions(features, boxes, torch.tensor(COUNTS), objects), given


def same_gradients(ours: LXMERT, theirs: Any) -> None:
    found = LAYOUT.write({name: x.grad for name, x in ours.named_parameters() if x.grad is not None})
    for name, x in theirs.named_parameters():
        if x.grad is None:
            continue
        grad, first = found[name], 0
        if any(part in name for part in FROZEN_ROWS):  # V
            assert not x.grad[0].any()
            first = 1
        torch.testing.assert_close(grad[first:], x.grad[first:], msg=name, rtol=1e-9, atol=1e-11)


def test_all_losses_and_every_gradient_are_those_of_lxmert_for_pretraining() -> None:
    ours, theirs = pair()
    regions, given = batch()
    counts = (torch.arange(4) < torch.tensor(COUNTS)[:, None]).double()
    labels = torch.full_like(given["input_ids"], -100)
    for row, place in ((0, 1), (0, 3), (2, 6)):
        labels[row, place] = 7 + place
    is_hidden = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0, 0]]).bool()
    known = regions.objects
    assert known is not None
    obj_labels = {
        "obj": (known.objects, known.object_scores * counts),
        "attr": (known.attributes, known.attribute_scores * counts),
        "feat": (regions.features, is_hidden.double() * counts),
    }
    matched, answer = torch.tensor([1, 0, 1]), torch.tensor([2, -100, 0])
    out = theirs(**given, labels=labels, obj_labels=obj_labels, matched_label=matched, ans=answer)
    hidden = (labels.flatten() != -100).nonzero()[:, 0]
    inputs = given["input_ids"], torch.tensor(LENGTHS), hidden, labels.flatten()[hidden]
    learned = ours("pretrain", regions, regions.features, *inputs)
    torch.testing.assert_close(learned.match, out.cross_relationship_score, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(learned.answers, out.question_answering_score, rtol=1e-9, atol=1e-11)
    total = region_losses(learned, regions, is_hidden, counts.bool())
    loss = learned.words / len(hidden) + F.cross_entropy(learned.match, matched) + 6.67 * total / 12
    loss = loss + F.cross_entropy(learned.answers, answer)
    assert out.loss.dtype == torch.float32  # V: summed in it, whatever the model's
    torch.testing.assert_close(loss, out.loss.double(), rtol=1e-6, atol=0)
    ours_loss = matching_loss(learned.match, matched.bool()).double()
    torch.testing.assert_close(ours_loss, F.cross_entropy(learned.match, matched), rtol=1e-6, atol=0)
    out.loss.backward()
    loss.backward()
    same_gradients(ours, theirs)


def test_states_words_and_what_the_first_is_pooled_to_are_those_of_lxmert_model() -> None:
    ours, theirs = pair()
    regions, given = batch()
    out = theirs.lxmert(**given)
    text, image, pooled = ours("states", regions, given["input_ids"], LENGTHS)
    torch.testing.assert_close(pooled, out.pooled_output, rtol=1e-9, atol=1e-11)
    for found, expected, counts in ((text, out.language_output, LENGTHS), (image, out.vision_output, COUNTS)):
        for row, count in enumerate(counts):
            torch.testing.assert_close(found[row, :count], expected[row, :count], rtol=1e-9, atol=1e-11)
    logits = ours("words", regions, given["input_ids"], LENGTHS)
    seen = given["attention_mask"].bool()
    torch.testing.assert_close(logits[seen], theirs(**given).prediction_logits[seen], rtol=1e-9, atol=1e-11)
    match = ours("match", regions, [2, 0], given["input_ids"][:2], LENGTHS[:2])
    swapped = {n: x[[2, 0]] if n.startswith("visual") else x[:2] for n, x in given.items()}
    torch.testing.assert_close(match, theirs(**swapped).cross_relationship_score, rtol=1e-9, atol=1e-11)


def test_answers_and_every_gradient_are_those_of_lxmert_for_question_answering() -> None:
    ours, theirs = pair(replace(CONFIG, head="answers", num_objects=0, num_attributes=0))
    regions, given = batch()
    labels = torch.tensor([0, 2, 1])
    out = theirs(**given, labels=labels)
    logits = ours("answer", regions, given["input_ids"], LENGTHS)
    torch.testing.assert_close(logits, out.question_answering_score, rtol=1e-9, atol=1e-11)
    out.loss.backward()
    F.cross_entropy(logits, labels).backward()
    same_gradients(ours, theirs)
    with pytest.raises(IndexError):  # V: an answer that is not known must be -100 there, -1 in the original
        theirs(**given, labels=torch.tensor([0, -1, 1]))


@pytest.mark.parametrize("head", ["pretraining", "answers"])
@pytest.mark.parametrize("with_objects", [True, False])
def test_what_is_saved_is_loaded_by_transformers_and_again(head: Any, with_objects: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = CONFIG if with_objects and head == "pretraining" else replace(CONFIG, num_objects=0, num_attributes=0)
    shape = replace(shape, head=head)
    if not with_objects:
        shape = replace(shape, feature_width=48, image_size=16, cell_size=4)
        shape = shape if head == "answers" else replace(shape, num_answers=0)
    model = LXMERT(shape).eval()
    save_lxmert(model, tmp_path / "out", ("a", "b", "c") if head == "answers" else ())
    kind = getattr(transformers, ARCHITECTURES[head])
    theirs, told = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    again = load_lxmert(tmp_path / "out")
    assert again.config == model.config
    for name, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name
    theirs.lxmert.save_pretrained(tmp_path / "bare")
    bare = load_lxmert(tmp_path / "bare")
    torch.testing.assert_close(bare.pooler.weight, model.pooler.weight)


def test_the_cells_of_a_grid_are_regions_with_boxes() -> None:
    grid = LxmertConfig(_TEXT, feature_width=48, image_size=8, cell_size=4).grid
    assert grid is not None
    pixels = torch.arange(3 * 64, dtype=torch.uint8).view(1, 3, 8, 8)
    found = grid.cells(pixels)
    assert found.features.shape == (1, 4, 48) and found.counts.tolist() == [4]
    assert found.boxes[0].tolist() == [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]
    expected = (pixels[0, :, :4, 4:].float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(found.features[0, 1], expected.flatten())
    with pytest.raises(ValueError, match="feature_width must be 48 of cells of 4 pixels, got 6"):
        LxmertConfig(_TEXT, feature_width=6, image_size=8, cell_size=4)


def detected(folder: Path, names: list[str], *, tsv: bool) -> Path:
    """Rows of 3 regions, 5 features each, as npz files or as LXMERT's tsv."""
    rng, lines = np.random.default_rng(0), []
    for name in names:
        raw = {
            "features": rng.standard_normal((3, 5)).astype(np.float32),
            "boxes": np.array([[0, 0, 10, 20], [10, 0, 20, 40], [5, 5, 10, 10]], np.float32),
            "objects_id": rng.integers(0, 1600, 3),
            "objects_conf": rng.random(3).astype(np.float32),
            "attrs_id": rng.integers(0, 400, 3),
            "attrs_conf": rng.random(3).astype(np.float32),
        }
        if not tsv:
            np.savez(folder / f"{name}.npz", **raw, img_w=20, img_h=40)
            continue
        coded = {k: base64.b64encode(x.tobytes()).decode() for k, x in raw.items()}
        coded |= {"img_id": name, "img_h": "40", "img_w": "20", "num_boxes": "3"}
        lines.append("\t".join(coded[k] for k in TSV_FIELDS))
    if tsv:
        (folder / "rows.tsv").write_text("\n".join(lines) + "\n")
    return folder / "rows.tsv" if tsv else folder


@pytest.mark.parametrize("tsv", [True, False])
def test_a_model_of_a_detectors_rows_learns_from_them(tmp_path: Path, tsv: bool) -> None:
    names = [f"picture{i}" for i in range(6)]
    rows, table = tmp_path / "rows", ["filepath\ttitle"]
    rows.mkdir()
    for i, name in enumerate(names):
        Image.new("RGB", (20, 40), (40 * i, 0, 0)).save(tmp_path / f"{name}.png")
        table.append(f"{name}.png\ta picture of thing {i}")
    (tmp_path / "pairs.tsv").write_text("\n".join(table) + "\n")
    where = detected(rows, names, tsv=tsv)
    torch.manual_seed(0)
    data_config = DataConfig(str(tmp_path / "pairs.tsv"), val_fraction=0.34)
    recipe = Lxmert(data=data_config, regions=where)
    data = recipe.open_data()
    assets = recipe.assets(data)
    assert (assets.shape.feature_width, assets.shape.num_objects, assets.shape.image_size) == (5, 1600, 0)
    model = recipe.build(assets)
    assert data.source is not None and data.val is not None
    samples = [recipe.sample(assets, data.source.record(i), np.random.default_rng(i)) for i in range(4)]  # pyright: ignore[reportAttributeAccessIssue]
    given = recipe.collate(assets, samples)
    torch.testing.assert_close(given.regions.boxes[0, 1], torch.tensor([0.5, 0.0, 1.0, 1.0]))
    losses = recipe.loss(model, given, Step(0, 1, 0))
    losses["loss"].backward()
    assert all(x.isfinite() for x in losses.values()) and "answers" not in losses
    assert all(p.grad is not None for p in model.parameters())
    subject = Subject(recipe, assets, model.eval(), data, torch.device("cpu"))
    assert subject.held_out.states.counts.tolist() == [3, 3]
    picture = Image.new("RGB", (4, 4))
    assert not assets.preprocess([picture]).features.any()  # of nobody
    with pytest.raises(BrokenRecord, match="a picture without a file's name has no rows"):
        assets.rows.of_picture(picture)  # pyright: ignore[reportOptionalMemberAccess]
    picture.info["file"] = "nobody.png"
    with pytest.raises(ValueError, match=r"must hold rows of every picture, got no rows of a detector for nobody\.png"):
        assets.preprocess([picture])
    assert DetectorRows.open(where, 2).of(names[0]).counts.tolist() == [2]
    with pytest.raises(ValueError, match=r"must be a folder with \.npz files"):
        DetectorRows.open(tmp_path / "pairs.csv")


def test_questions_are_learned_with_answers_and_wrong_texts_without() -> None:
    torch.manual_seed(0)
    recipe = Lxmert(with_questions=True)
    data = recipe.open_data()
    assets = recipe.assets(data)
    model = recipe.build(assets)
    part = next(recipe.loader(data, assets, LoaderSpec(48, 0, 1, 0))).parts[0]
    losses = recipe.loss(model, part, Step(0, 1, 0))
    losses["loss"].backward()
    assert assets.shape.num_answers == 12 and losses["answers"] > 0
    has_answer = part.answer >= 0
    assert 5 < has_answer.sum() < 40 and not has_answer[~part.is_match].any()
    none = part._replace(answer=torch.full_like(part.answer, -1))
    assert recipe.loss(model, none, Step(0, 1, 0))["answers"] == 0
    assert 0.05 < part.is_hidden.double().mean() < 0.25 and (part.features != part.regions.features).any()
    one = recipe.collate(assets, [recipe.sample(assets, data.questions.record(0), np.random.default_rng(0))])  # pyright: ignore[reportOptionalMemberAccess]
    assert recipe.loss(model, one, Step(0, 1, 0))["loss"].isfinite() and one.is_match.all()


@pytest.mark.parametrize(("recipe", "said"), [
    (Lxmert(max_text=33), "--max-text must be at most 32, got 33"),
    (Lxmert(max_regions=5), "--max-regions has no effect without --regions, got 5"),
    (Lxmert(least_answers=5), "--least-answers has no effect without --with-questions, got 5"),
    (Lxmert(regions=Path("nowhere")), "--regions must be a folder or a file, got nowhere"),
    (LxmertVqa(start=Path("nowhere")), "folder must hold config.json"),
])  # fmt: skip
def test_flags_that_mean_nothing_are_refused(recipe: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        recipe.assets(recipe.open_data())
