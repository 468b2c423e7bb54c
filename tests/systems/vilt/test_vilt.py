"""ViLT beside transformers' ViltModel and its heads, images of unequal sizes, transport, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor, nn

from mmcore.data.transforms.any_size import AnySizePreprocess, shorter_side_grid
from mmcore.data.transforms.naflex import Patches
from mmcore.losses import transport_distance, transport_plan
from mmcore.parts.answers import AnswerVocabulary, answer_loss
from mmcore.parts.vit import ViT
from mmcore.recipe import Step
from mmcore.systems.vilt.model import Kept, ViLT, ViltTower
from mmcore.systems.vilt.recipe import Vilt, matched_images
from mmcore.systems.vilt.shapes import VILT_CONFIGS, Head, ViltConfig, vilt_vision
from mmcore.systems.vilt.weights import ARCHITECTURES, SETTINGS, layout_of, load_vilt, save_vilt
from mmcore.tasks import check_capability, retrieval
from mmcore.tasks.matching import every_score
from mmcore.tasks.subject import Subject

PATCH, GRIDS, LENGTHS, LENGTH = 4, [(2, 3), (1, 1), (3, 2), (3, 4)], [5, 1, 7, 3], 7


def config(head: Head = "pretraining", **options: Any) -> ViltConfig:
    vision = vilt_vision(image_size=12, patch_size=PATCH, width=16, num_layers=2, num_heads=2, mlp_dim=32)
    return ViltConfig(vision, vocab_size=50, context_length=9, head=head, **options)


def pair(head: Head = "pretraining", **options: Any) -> tuple[ViLT, Any]:
    """Ours and theirs in float64 of the same weights, none of which is what it began as."""
    torch.manual_seed(0)
    ours = ViLT(config(head, **options))
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.05 * torch.randn_like(p))
    raw = SETTINGS.write("test", ViltConfig(**{**vars(ours.config), "head": "pretraining", "num_answers": 0}))
    settings = transformers.ViltConfig(**raw, num_labels=max(1, options.get("num_answers", 1)))  # pyright: ignore[reportCallIssue]
    theirs = getattr(transformers, ARCHITECTURES[head])(settings)
    state = layout_of(head).write(ours.state_dict())
    state = {name: x for name, x in state.items() if not name.startswith("itm_score")}
    missing, unknown = theirs.load_state_dict(state, strict=False)
    assert not unknown and set(missing) <= {"mlm_score.decoder.weight"}
    return ours.double().eval(), theirs.double().eval()


def batch(grids: list[tuple[int, int]] = GRIDS, seed: int = 1) -> tuple[Patches, dict[str, Tensor]]:
    """Images for ours, and what theirs reads of the same and of texts: padded, with masks."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (max(x) for x in zip(*grids, strict=True))
    pixels = torch.zeros(len(grids), 3, rows * PATCH, columns * PATCH, dtype=torch.float64)
    mask, parts = torch.zeros(len(grids), *pixels.shape[2:], dtype=torch.int64), []
    for i, (h, w) in enumerate(grids):
        image = torch.randn(3, h * PATCH, w * PATCH, generator=generator, dtype=torch.float64)
        pixels[i, :, : h * PATCH, : w * PATCH], mask[i, : h * PATCH, : w * PATCH] = image, 1
        cells = image.unflatten(2, (w, PATCH)).unflatten(1, (h, PATCH))
        parts.append(Patches(cells.permute(1, 3, 0, 2, 4).flatten(0, 1), [(h, w)]))
    tokens = torch.randint(5, 50, (len(grids), LENGTH), generator=generator)
    seen = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
    texts = {"input_ids": tokens.masked_fill(~seen, 0), "attention_mask": seen.long()}
    return Patches.joined(parts), {**texts, "pixel_values": pixels, "pixel_mask": mask}


def same_gradients(ours: ViLT, theirs: nn.Module) -> None:
    grads = {name: x.grad for name, x in ours.named_parameters() if x.grad is not None}
    found = layout_of(ours.config.head).write(grads)
    wanted = {name: x.grad for name, x in theirs.named_parameters() if x.grad is not None}
    assert found.keys() - wanted.keys() <= {"itm_score.fc.weight", "itm_score.fc.bias"}
    for name, x in wanted.items():
        torch.testing.assert_close(found.get(name, torch.zeros_like(x)), x, msg=name, rtol=1e-9, atol=1e-11)


def test_hidden_words_and_every_gradient_are_those_of_vilt_for_masked_lm() -> None:
    ours, theirs = pair()
    images, given = batch()
    labels = torch.full_like(given["input_ids"], -100)
    for row, place in ((0, 1), (0, 3), (1, 0), (2, 6)):
        labels[row, place] = 7 + place
    out = theirs(**given, labels=labels)
    logits = ours("words", images, given["input_ids"], torch.tensor(LENGTHS))
    seen = given["attention_mask"].bool()
    torch.testing.assert_close(logits[seen], out.logits[seen], rtol=1e-9, atol=1e-11)
    out.loss.backward()
    hidden = (labels.flatten() != -100).nonzero()[:, 0]
    inputs = given["input_ids"], LENGTHS, given["input_ids"], hidden, labels.flatten()[hidden], [0, 1, 2, 3]
    loss = ours("pretrain", images, None, *inputs).words / len(hidden)
    torch.testing.assert_close(loss, out.loss, rtol=1e-9, atol=0)
    loss.backward()
    same_gradients(ours, theirs)


def test_valid_patches_come_in_random_order_there_and_row_by_row_here() -> None:
    """V: where an image has as many patches as the batch's largest, its states are shuffled at each call."""
    ours, theirs = pair()
    images, given = batch()
    first, again = (theirs.vilt(**given) for _ in range(2))
    torch.testing.assert_close(first.last_hidden_state[:, :LENGTH], again.last_hidden_state[:, :LENGTH])
    assert (first.last_hidden_state[3, LENGTH:] - again.last_hidden_state[3, LENGTH:]).abs().max() > 1e-3
    stream, pooled = ours("states", images, given["input_ids"], LENGTHS)
    torch.testing.assert_close(pooled, first.pooler_output, rtol=1e-9, atol=1e-11)
    for row, (start, n, total) in enumerate(
        zip(stream.packing.starts.tolist(), stream.lengths, stream.totals, strict=True)
    ):
        x, theirs_ = stream.states[0, start : start + total], first.last_hidden_state[row]
        torch.testing.assert_close(x[:n], theirs_[:n], rtol=1e-9, atol=1e-11)
        patches = theirs_[LENGTH : LENGTH + total - n]
        order = (x[n:, None] - patches).abs().amax(2).argmin(1)  # theirs of ours
        assert sorted(order.tolist()) == list(range(total - n)) and (row == 3 or order.tolist() == sorted(order))
        torch.testing.assert_close(x[n:], patches[order], rtol=1e-9, atol=1e-11)


def test_answers_and_every_gradient_are_those_of_vilt_for_question_answering() -> None:
    ours, theirs = pair("answers", num_answers=6)
    images, given = batch()
    targets = torch.rand(4, 6, dtype=torch.float64) * (torch.rand(4, 6) < 0.4)
    targets[2] = 0  # no known answer
    out = theirs(**given, labels=targets)
    logits = ours("answer", images, given["input_ids"], torch.tensor(LENGTHS))
    torch.testing.assert_close(logits, out.logits, rtol=1e-9, atol=1e-11)
    out.loss.backward()
    total = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / 4
    torch.testing.assert_close(total, out.loss)
    torch.testing.assert_close(answer_loss(logits, targets).double(), out.loss, rtol=1e-6, atol=0)
    total.backward()
    same_gradients(ours, theirs)
    with pytest.raises((ValueError, RuntimeError)):  # V: a target is of the whole vocabulary, no class's number
        theirs(**given, labels=torch.zeros(4, dtype=torch.int64))


def test_the_score_of_a_pair_is_that_of_vilt_for_image_and_text_retrieval() -> None:
    ours, theirs = pair("retrieval")
    images, given = batch()
    logits = ours("match", images, [0, 1, 2, 3], given["input_ids"], LENGTHS)
    out = theirs(**given).logits[:, 0]
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], out, rtol=1e-9, atol=1e-11)
    out.sum().backward()
    logits[:, 1].sum().backward()
    same_gradients(ours, theirs)
    with pytest.raises(NotImplementedError):  # V: it cannot be trained there
        theirs(**given, labels=torch.ones(4))


def test_two_images_are_judged_as_by_vilt_for_images_and_text_classification() -> None:
    ours, theirs = pair("reasoning", num_answers=2, num_images=2, num_modalities=3)
    both = [batch(), batch(seed=2)]
    given = dict(both[0][1])
    for name in ("pixel_values", "pixel_mask"):
        given[name] = torch.stack([x[1][name] for x in both], 1)
    labels = torch.tensor([0, 1, 1, 0])
    out = theirs(**given, labels=labels)
    logits = ours("judge", [x[0] for x in both], given["input_ids"], LENGTHS)
    torch.testing.assert_close(logits, out.logits, rtol=1e-9, atol=1e-11)
    out.loss.backward()
    F.cross_entropy(logits, labels).backward()
    same_gradients(ours, theirs)


@pytest.mark.parametrize(("head", "options"), [
    ("pretraining", {}), ("retrieval", {}), ("answers", {"num_answers": 3}),
    ("reasoning", {"num_answers": 2, "num_images": 2, "num_modalities": 3}),
])  # fmt: skip
def test_what_is_saved_is_loaded_by_transformers_and_again(head: Head, options: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ViLT(config(head, **options))
    answers = ("no", "yes", "two") if head == "answers" else ()
    save_vilt(model, tmp_path / "out", answers)
    kind = getattr(transformers, ARCHITECTURES[head])
    theirs, told = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and set(told["unexpected_keys"]) <= {"itm_score.fc.weight", "itm_score.fc.bias"}
    images, given = batch()
    if head != "reasoning":
        task = {"pretraining": "words", "retrieval": "match", "answers": "answer"}[head]
        index = ([0, 1, 2, 3],) if head == "retrieval" else ()
        ours = model(task, images, *index, given["input_ids"], LENGTHS)
        expected = theirs(**{n: x.float() if n == "pixel_values" else x for n, x in given.items()}).logits
        seen = given["attention_mask"].bool()
        ours = ours[:, 1:] if head == "retrieval" else ours[seen] if head == "pretraining" else ours
        torch.testing.assert_close(ours, expected[seen] if head == "pretraining" else expected, rtol=1e-4, atol=1e-5)
    assert not answers or tuple(theirs.config.id2label.values()) == answers
    again = load_vilt(tmp_path / "out")
    assert again.config == model.config
    for name, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_vilt(tmp_path / "theirs").config == model.config


def test_a_bare_vilt_model_is_read_with_new_heads(tmp_path: Path) -> None:
    theirs = pair()[1].vilt.float()
    theirs.save_pretrained(tmp_path / "bare")
    found = load_vilt(tmp_path / "bare")
    torch.testing.assert_close(found.pooler.weight, theirs.pooler.dense.weight)
    assert found.itm is not None and found.text_head is not None


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (101, 1000), (384, 384), (33, 35), (1333, 800)])
def test_sizes_and_pixels_are_those_of_the_image_processor(size: tuple[int, int]) -> None:
    preprocess = AnySizePreprocess(96, 32, (0.5,) * 3, (0.5,) * 3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    options = {"size": {"shortest_edge": 96}, "size_divisor": 32}
    found = preprocess.of(image)
    (h, w), cells = found.grids[0], found.rows
    if min(h, w) == 1 and max(size) > 3 * min(size):
        assert shorter_side_grid(size[1], size[0], 96, 32) == (h, w)  # theirs has no patch left
        return
    theirs = transformers.ViltImageProcessorPil(**options)(image, return_tensors="pt").pixel_values[0]
    assert theirs.shape[1:] == (h * 32, w * 32)
    joined = cells.unflatten(0, (h, w)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    torch.testing.assert_close((joined.float() / 255 - 0.5) / 0.5, theirs, rtol=0, atol=1e-5)


def test_patches_that_are_drawn_are_read_as_if_there_were_no_others() -> None:
    ours, _ = pair()
    images, given = batch()
    counts = [2, 1, 3, 12]
    places = torch.tensor([1, 4, 6, 7, 9, 12, *range(13, 25)])
    found = ours.visual(images, Kept(places, counts))
    every = ours.visual(images).states
    starts = torch.tensor([0, 7, 9, 16])
    own = torch.cat([torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([8]), torch.arange(10, 16), torch.arange(17, 29)])
    expected = [torch.cat([starts[i : i + 1], own[p]]) for i, p in enumerate(places.split(counts))]
    torch.testing.assert_close(found.states, every[torch.cat(expected)])
    recipe, rngs = Vilt(max_patches=6), [np.random.default_rng(i) for i in range(4)]
    kept = recipe.kept(images, rngs)
    assert kept is not None and kept.counts == [6, 1, 6, 6] and kept.places.unique().numel() == 19
    assert Vilt().kept(images, rngs) is None
    given["input_ids"][1, 0] = 3


def as_published(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """IPOT of one sample by its steps, on what is no padding."""
    x, y = F.normalize(x[rows], dim=1), F.normalize(y[columns], dim=1)
    cost = 1 - x @ y.T
    n, m = cost.shape
    kernel, plan = (-cost / 0.5).exp(), torch.ones_like(cost)
    of_rows = torch.full((n,), 1 / n, dtype=cost.dtype)
    for _ in range(50):
        moved = kernel * plan
        of_columns = 1 / (m * (moved.T @ of_rows))
        of_rows = 1 / (n * (moved @ of_columns))
        plan = of_rows[:, None] * moved * of_columns
    return (plan * cost).sum()


def test_transport_is_that_of_its_steps_and_nothing_where_a_side_is_empty() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True), torch.randn(3, 6, 8, dtype=torch.float64)
    rows = torch.tensor([[True] * 4, [True, False, True, False], [False] * 4])
    columns = torch.tensor([[True] * 6, [True] * 3 + [False] * 3, [True] * 6])
    found = transport_distance(x, y, rows, columns)
    expected = torch.stack([as_published(x[i], y[i], rows[i], columns[i]) for i in range(2)])
    torch.testing.assert_close(found[:2], expected)
    assert found[2] == 0
    wanted = torch.randn(2, dtype=torch.float64)
    cost = 1 - F.normalize(x, dim=2) @ F.normalize(y, dim=2).transpose(1, 2)
    plan = transport_plan(cost.detach(), rows, columns)
    torch.testing.assert_close(plan[0].sum(0), torch.full((6,), 1 / 6, dtype=torch.float64), rtol=1e-2, atol=0)
    (got,) = torch.autograd.grad((found[:2] * wanted).sum(), x)
    (held,) = torch.autograd.grad(((cost * plan).sum((1, 2))[:2] * wanted).sum(), x)  # the plan has no gradient
    torch.testing.assert_close(got, held)


def test_wrong_images_are_of_other_images_and_captions() -> None:
    images, texts = [1, 1, 2, 3, 4] * 40, [9, 9, 8, 8, 7] * 40
    index = matched_images(images, texts, [np.random.default_rng(i) for i in range(200)])
    wrong = [(row, i) for row, i in enumerate(index) if i != row]
    assert 70 < len(wrong) < 130
    assert all(images[row] != images[i] and texts[row] != texts[i] for row, i in wrong)
    assert matched_images([5], [5], [np.random.default_rng(0)]) == [0]


def small(recipe: Any) -> tuple[Any, Any, Any]:
    """A recipe's data, what it keeps, and its new model."""
    torch.manual_seed(0)
    data = recipe.open_data()
    assets = recipe.assets(data)
    return data, assets, recipe.build(assets).eval()


def test_all_pairs_are_ranked_by_matching_alone_where_nothing_is_embedded(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Vilt()
    data, assets, model = small(recipe)
    assert data.val is not None
    chosen = list(range(0, len(data.val), 40))
    val = replace(
        data.val,
        indices=[data.val.indices[i] for i in chosen],
        captions=[data.val.captions[i] for i in chosen],
        labels=[data.val.labels[i] for i in chosen],
    )
    subject = Subject(recipe, assets, model, replace(data, val=val), torch.device("cpu"))
    check_capability("retrieval", recipe, "it")
    found, back = every_score(subject)
    assert found.shape == (len(chosen), len(chosen)) and torch.equal(found, back.T)
    pixels = assets.preprocess([val.raw_image(2)])
    captions = subject.held_out.captions
    tokens = assets.wordpiece(captions)
    logits = model("match", pixels, [0] * len(captions), *tokens)
    torch.testing.assert_close(found[2], (logits[:, 1] - logits[:, 0]).detach(), rtol=1e-4, atol=1e-5)
    assert retrieval.follow(subject).keys() == {"image to text R@1", "text to image R@1"}
    retrieval.report(subject, retrieval.Options())
    assert "all pairs matched" in capsys.readouterr().out
    with pytest.raises(ValueError, match="zeroshot asks for a model that embeds, which it does not"):
        check_capability("zeroshot", recipe, "it")


def test_a_vit_is_what_the_transformer_starts_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = VILT_CONFIGS["tiny"].vision
    tower = ViT(vision)
    with pytest.raises(ValueError, match="--max-patches must be at least 1, got 0"):
        Vilt(max_patches=0).assets(Vilt().open_data())
    ours = ViltTower(vision)
    ours.load_state_dict(tower.state_dict())
    images = torch.randn(2, 3, 16, 16)
    cells = images.unflatten(3, (4, 4)).unflatten(2, (4, 4)).permute(0, 2, 4, 1, 3, 5)
    found = ours(Patches(cells.flatten(0, 2), [(4, 4)] * 2))
    torch.testing.assert_close(found.states.view(2, 17, -1), tower.embed(images))


def test_a_batch_of_one_and_texts_without_a_word_are_learned_from() -> None:
    recipe = Vilt()
    data, assets, model = small(recipe)
    record = data.source.record(0)
    samples = [recipe.sample(assets, record, np.random.default_rng(i)) for i in range(2)]
    samples[1] = samples[1]._replace(pair=samples[1].pair._replace(caption=""))
    for part in (samples[:1], samples[1:], samples):
        given = recipe.collate(assets, part)
        losses = recipe.loss(model, given, Step(0, 1, 0))
        losses["loss"].backward()
        assert all(x.isfinite() for x in losses.values()) and given.is_match.all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("recipe", "said"), [
    (Vilt(max_text=41), "--max-text must be at most 40, got 41"),
    (Vilt(view_scale=0.0), r"--view-scale must be in \(0"),
    (Vilt(model="B-16"), "--model must be one of tiny, B-32, got 'B-16'"),
    (Vilt(start=Path("nowhere")), "folder must hold config.json"),
])  # fmt: skip
def test_flags_that_mean_nothing_are_refused(recipe: Vilt, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        recipe.assets(recipe.open_data())


def test_answers_are_said_as_most_people_wrote_them_and_compared_in_their_normal_form(tmp_path: Path) -> None:
    people = [["Three"] * 4 + ["three"] * 5 + ["3"] * 2, ["yes"] * 9, ["rare"]]
    known = AnswerVocabulary.of_questions(people, 9)
    assert known.answers == ("three", "yes")
    found = known.targets([["3"] * 2 + ["no"] * 8, ["Yes."], ["rare"] * 10])
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    (tmp_path / "answers.json").write_text('["net", "3"]')
    assert AnswerVocabulary.of_file(tmp_path / "answers.json").targets([["three"] * 10]).tolist() == [[0.0, 1.0]]
    with pytest.raises(ValueError, match="answers must hold each once, got 2 of 1"):
        AnswerVocabulary(["a", "a"])
