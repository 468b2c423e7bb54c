"""ALBEF against a dense transcript by its published names, its state, its files and its traps."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mmcore.data import DataConfig, open_data
from mmcore.data.sources.digits import DIGIT_NAMES
from mmcore.fusion_recipe import FusionBatch
from mmcore.losses import hard_negatives
from mmcore.nn import FeatureQueue, MomentumEncoder
from mmcore.parts.bert import BertConfig
from mmcore.recipe import Step
from mmcore.systems.albef.model import ALBEF, ALBEFConfig
from mmcore.systems.albef.recipe import Albef
from mmcore.systems.albef.shapes import salesforce_vision
from mmcore.systems.albef.vqa import ALBEFVQA, AlbefVqa, with_decoder
from mmcore.systems.albef.weights import LAYOUT, published_state, read_published, save_albef
from tests.refusals import refuses
from tests.systems.albef import transcript

HEADS, LAYERS, VOCAB, E = 2, 4, 29, 6
_DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}
CONFIG = ALBEFConfig(
    salesforce_vision(8, 4, 16, 2, HEADS, 24),
    BertConfig(VOCAB, 8, 16, LAYERS, HEADS, 24, num_positions=8, image_width=16, first_cross=2),
    embed_dim=E,
)


def moved_by_noise(model: Any, seed: int) -> Any:
    """So that no zero bias, unit norm or tied row hides anything."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def a_batch(size: int = 5) -> FusionBatch:
    torch.manual_seed(3)
    num_text = torch.tensor([8, 5, 2, 1, 6])[:size]
    tokens = torch.randint(5, VOCAB, (size, 8)).masked_fill(torch.arange(8) >= num_text[:, None], 0)
    is_hidden = (torch.rand(size, 8) < 0.3) & (torch.arange(8) < num_text[:, None])
    is_hidden[0, 1] = True
    ids = torch.tensor([7, 8, 9, 7, 11])[:size]  # two pairs of one image
    images = torch.randn(size, 3, 8, 8, dtype=torch.float64)
    masked, labels = tokens.masked_fill(is_hidden, 4), tokens.masked_fill(~is_hidden, -100)
    return FusionBatch(images, tokens, num_text, masked, labels, ids, torch.arange(size))


@pytest.mark.parametrize(("alpha", "positives"), [(0.0, "pair"), (0.4, "pair"), (0.4, "image")])
def test_losses_and_every_gradient_are_the_published_ones(alpha: float, positives: Any) -> None:
    torch.manual_seed(0)
    model = moved_by_noise(ALBEF(CONFIG).double(), 1)
    teacher = MomentumEncoder(model)
    moved_by_noise(teacher.teacher, 2)
    recipe = Albef(alpha=alpha, alpha_steps=2, queue_size=9, positives=positives)
    queues = {name: FeatureQueue(9, E).double() for name in ("images", "texts")}
    for queue in queues.values():
        queue.enqueue(F.normalize(torch.randn(7, E), dim=1))
    queued_ids = torch.tensor([7, 1, 8, 2, 3, 4, 5])
    companions: dict[str, Any] = {"teacher": teacher, **queues}
    if positives == "image":
        companions["ids"] = FeatureQueue(9, 1, dtype=torch.int64)
        companions["ids"].enqueue(queued_ids[:, None])
    batch, held = a_batch(), {name: queue.filled for name, queue in queues.items()}
    pairs, momentum = (x("pairs", *batch[:3]) for x in (model, teacher))
    negatives = recipe.negatives(pairs, momentum, batch, Step(2, 9, 5, companions))
    losses = recipe.loss(model, batch, Step(2, 9, 5, companions))
    state = {n: x.detach().requires_grad_() for n, x in LAYOUT.write(model.state_dict()).items()}
    right = (batch.image_ids[:, None] == torch.cat([batch.image_ids, queued_ids])).double()
    given = {
        **{name: getattr(batch, name) for name in ("images", "tokens", "num_text", "masked", "labels")},
        **{"alpha": alpha, "negatives": negatives, "texts": held["texts"], "images queue": held["images"]},
        "right": None if positives == "pair" else right / right.sum(1, keepdim=True),
    }
    taught = LAYOUT.write(teacher.teacher.state_dict())
    theirs = transcript.pretraining_losses(state, taught, given, HEADS, LAYERS)
    for name, x in zip(("contrast", "matching", "words"), theirs, strict=True):
        torch.testing.assert_close(losses[name], x, rtol=0, atol=1e-9)
    losses["loss"].backward()
    torch.stack(theirs).sum().backward()
    grads = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in state.items()}
    wanted = LAYOUT.read("test", grads, model.state_dict())
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, wanted[name], rtol=0, atol=1e-9, msg=name)
    # the batch has joined the queues, the oldest are gone
    torch.testing.assert_close(queues["texts"].features[7:], momentum.text[:2].double())
    assert queues["images"].num_enqueued == 12
    if positives == "image":
        assert companions["ids"].filled[:3, 0].tolist() == [9, 7, 11]


def test_negatives_are_drawn_by_the_momentum_features_of_the_other_side_and_none_is_no_crash() -> None:
    torch.manual_seed(0)
    image, text, image_m, text_m = (F.normalize(torch.randn(6, 4), dim=1) for _ in range(4))
    ids, counts = torch.arange(6), torch.zeros(2, 6)
    generator = torch.Generator().manual_seed(0)
    options: Any = {"image_ids": ids, "text_ids": ids, "generator": generator, "momentum": (image_m, text_m)}
    for _ in range(4000):
        drawn = hard_negatives(image[:, None], text, 2.0, **options)
        counts[0, drawn.images[0]] += 1
        counts[1, drawn.texts[0]] += 1
    for found, own, others in ((counts[0], text, image_m), (counts[1], image, text_m)):
        expected = (2 * own[0] @ others.T).softmax(0)
        expected[0] = 0
        torch.testing.assert_close(found / 4000, expected / expected.sum(), rtol=0, atol=0.03)
    # far too unlikely for float32, and with the least probability all alike
    least = [hard_negatives(image[:, None], text, 1e4, **options, least=1e3) for _ in range(300)]
    assert {int(x.texts[0]) for x in least} == {1, 2, 3, 4, 5}
    options |= {"image_ids": ids[:1], "text_ids": ids[:1], "momentum": (image_m[:1], text_m[:1])}
    alone = hard_negatives(image[:1, None], text[:1], 2.0, **options)
    assert alone.images.tolist() == [-1] == alone.texts.tolist()


def test_a_batch_of_one_and_one_without_hidden_words_have_finite_losses() -> None:
    model = ALBEF(CONFIG)
    one = FusionBatch(*(x[:1].float() if x.is_floating_point() else x[:1] for x in a_batch()))
    one = one._replace(masked=one.tokens, labels=torch.full_like(one.labels, -100))
    losses = Albef(alpha=0.4, alpha_steps=1).loss(model, one, Step(3, 9, 0, {"teacher": MomentumEncoder(model)}))
    losses["loss"].backward()
    assert losses["words"] == 0 and all(x.isfinite() for x in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_files_have_the_published_names_both_ways(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, taught = ALBEF(CONFIG), ALBEF(CONFIG).state_dict()
    queues = {name: F.normalize(torch.randn(9, E), dim=1) for name in ("images", "texts")}
    save_albef(model, tmp_path / "out", momentum=taught, queues=queues)
    found = read_published(tmp_path / "out")
    assert found.model.config == CONFIG
    for name, x in model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], x), name
    assert all(torch.equal(x, taught[name]) for name, x in found.momentum.items()) and len(found.momentum) > 60
    assert all(torch.equal(found.queues[name], x) for name, x in queues.items())
    # as published: a torch file of {"model": ...}, without a shape, whose heads have 64 channels
    wide = ALBEFConfig(
        salesforce_vision(8, 4, 64, 1, 1, 32),
        BertConfig(VOCAB, 8, 64, 2, 1, 32, num_positions=8, image_width=64, first_cross=1, **_DROPOUT),  # pyright: ignore[reportArgumentType]
        embed_dim=E,
    )  # fmt: skip
    published = published_state(ALBEF(wide).state_dict())
    assert published["temp"].ndim == 0 and "text_encoder.cls.predictions.decoder.bias" in published
    file, more = tmp_path / "ALBEF.pth", {"image_queue": queues["images"].T, "queue_ptr": torch.zeros(1)}
    torch.save({"model": {f"module.{n}": x for n, x in {**published, **more}.items()}, "epoch": 29}, file)
    again = read_published(file)
    assert again.model.config == wide and torch.equal(again.queues["images"], queues["images"])
    torch.save({"model": {n: x for n, x in published.items() if n != "itm_head.bias"}}, file)
    refuses("missing itm_head.bias", read_published, file)


def test_answers_are_the_published_ones_by_a_decoder_of_the_fused_layers() -> None:
    torch.manual_seed(0)
    model = ALBEF(CONFIG).double()
    asking = ALBEFVQA(CONFIG).double()
    start = with_decoder(model.state_dict())
    asking.load_state_dict({n: x for n, x in start.items() if n in asking.state_dict()})
    assert torch.equal(asking.decoder.blocks[1].cross.q.weight, model.text.blocks[3].cross.q.weight)  # pyright: ignore
    moved_by_noise(asking, 4)
    batch, owner = a_batch(), torch.tensor([0, 0, 1, 2, 3, 4])
    batch.tokens[:, 0] = 1  # [CLS], with which answers begin too
    num_answer = torch.tensor([3, 4, 3, 5, 3, 3])
    answers = torch.randint(5, VOCAB, (6, 5)).masked_fill(torch.arange(5) >= num_answer[:, None], 0)
    answers[:, 0] = 1
    ours = asking.answers(*batch[:3], owner, answers, num_answer)
    state = asking.state_dict()
    of_text = {n: x for n, x in state.items() if n.startswith(("text.", "visual."))}
    of_text = LAYOUT.write(of_text)
    lower = {f"text.{n.removeprefix('decoder.')}": x for n, x in state.items() if n.startswith("decoder.")}
    lower |= {
        f"text_head.{n.removeprefix('decoder_head.')}": x for n, x in state.items() if n.startswith("decoder_head.")
    }
    of_decoder = LAYOUT.write(lower)
    read = transcript.vit(of_text, batch.images, HEADS)
    asked = transcript.bert(of_text, batch.tokens, batch.num_text, HEADS, read, range(LAYERS))[owner]
    at = "text_encoder.bert.embeddings"
    x = of_decoder[f"{at}.word_embeddings.weight"][answers] + of_decoder[f"{at}.position_embeddings.weight"][:5]
    x = transcript.norm(x + of_decoder[f"{at}.token_type_embeddings.weight"][0], of_decoder, f"{at}.LayerNorm", 1e-12)
    seen = torch.ones(5, 5).tril().bool() & (torch.arange(5) < num_answer[:, None])[:, None, None]
    seen_read = (torch.arange(8) < batch.num_text[owner][:, None])[:, None, None]
    for i in range(2):
        at = f"text_encoder.bert.encoder.layer.{i}"
        x = transcript.bert_layer(x, of_decoder, at, HEADS, seen, asked, seen_read)
    labels = answers.masked_fill(answers == 0, -100)[:, 1:]
    each = F.cross_entropy(transcript.head(of_decoder, x)[:, :-1].mT, labels, reduction="none").sum(1)
    torch.testing.assert_close(ours, each, rtol=0, atol=1e-9)
    ranked = asking.rank(*batch[:3], answers, num_answer, 6)
    every = torch.arange(5).repeat_interleave(6)
    of_all = asking.answers(*batch[:3], every, answers.repeat(5, 1), num_answer.repeat(5)).view(5, 6)
    assert torch.equal(ranked, of_all.argmin(1))
    # token by token as at once: the likeliest text's own probabilities
    said = asking.say(*batch[:3], max_length=5, eos_token_id=2)
    begun = torch.cat([batch.tokens[:, :1], said], 1)
    states = asking.reader(*batch[:3]).states(begun, torch.full((5,), begun.shape[1]))
    best = asking.decoder_head(states)[:, :-1].argmax(-1)
    ended = (said == 2).cumsum(1) - (said == 2).int() > 0
    assert torch.equal(best.masked_fill(ended, 0), said)


def test_answers_that_are_ranked_are_words_as_they_were_learned() -> None:
    found = AlbefVqa().assets(open_data(DataConfig(), seed=0))
    assert set(found.answers) == {*DIGIT_NAMES, "even", "odd"}


def test_what_a_run_starts_from_must_fit_and_other_images_have_their_positions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ALBEF(CONFIG)
    save_albef(model, tmp_path / "out")
    recipe: Any = Albef(start=tmp_path / "out", image_size=16)
    refuses("--tokenizer must be given", recipe.assets, None)
    wide = replace(CONFIG, vision=replace(CONFIG.vision, image_size=16))
    found = recipe.initial(SimpleNamespace(shape=wide), ALBEF(wide))
    assert found["visual.position_embedding"].shape == (17, 16) and "text.word_embedding.weight" in found
    torch.testing.assert_close(found["visual.position_embedding"][0], model.visual.position_embedding[0])  # pyright: ignore
    other = replace(wide, text=replace(wide.text, vocab_size=VOCAB + 1))
    refuses(
        "--from must have weights of this model's shapes", recipe.initial, SimpleNamespace(shape=other), ALBEF(other)
    )


@pytest.mark.parametrize(("flags", "said"), [
    ({"alpha": 1.5}, "--alpha must be from 0 to 1, got 1.5"), ({"queue_size": 0}, "--queue-size must be at least 1"),
    ({"teacher_momentum": -1.0}, "--teacher-momentum must be from 0"), ({"alpha_steps": 0}, "--alpha-steps must be at"),
    ({"queue_after": -1}, "--queue-after must be at least"), ({"temperature_lr": -1.0}, "--temperature-lr must be at"),
])  # fmt: skip
def test_flags_that_mean_nothing_are_refused(flags: dict[str, Any], said: str) -> None:
    refuses(said, replace(Albef(), **flags).assets, None)
