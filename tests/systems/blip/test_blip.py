"""BLIP against transformers' classes, which side is right where they differ, and its traps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    BlipTextConfig,
    BlipVisionConfig,
)

from mmcore.fusion_recipe import FusionBatch
from mmcore.nn import MomentumEncoder
from mmcore.parts.decoding import nucleus
from mmcore.recipe import Step
from mmcore.systems.albef.shapes import salesforce_vision
from mmcore.systems.blip.model import BLIP, BLIPConfig, Kind, fitting
from mmcore.systems.blip.recipe import LEAST_PROBABILITY, Blip, BlipCaption, BlipVqa
from mmcore.systems.blip.shapes import blip_text
from mmcore.systems.blip.weights import SETTINGS, layout, load_blip, save_blip, written
from tests.refusals import refuses
from tests.systems.albef.test_albef import moved_by_noise

VOCAB, DEC, ENC, SEP = 31, 29, 30, 3
_TEXT = {"width": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 24, "num_positions": 9, "image_width": 16}
CONFIG = BLIPConfig(
    salesforce_vision(8, 4, 16, 2, 2, 24),
    blip_text(vocab_size=VOCAB, **_TEXT),
    embed_dim=6,
    decoder_token_id=DEC,
    encoder_token_id=ENC,
    end_token_id=SEP,
)
CLASSES: dict[str, Any] = {
    "retrieval": BlipForImageTextRetrieval,
    "caption": BlipForConditionalGeneration,
    "vqa": BlipForQuestionAnswering,
}
TOLERANCE = {"rtol": 0, "atol": 1e-9}


def both(kind: Kind, cls: Any = None) -> tuple[BLIP, Any]:
    """Ours and theirs, of one state, float64."""
    torch.manual_seed(0)
    ours = moved_by_noise(BLIP(replace(CONFIG, kind=kind)).double(), 1)
    return ours, theirs_of(ours, cls or CLASSES[kind])


def theirs_of(ours: BLIP, cls: Any) -> Any:
    theirs = cls(BlipConfig(**SETTINGS.write("test", ours.config))).double().eval()
    state = written(ours)
    found = theirs.load_state_dict({n: x for n, x in state.items() if n in theirs.state_dict()}, strict=True)
    assert not found.missing_keys
    return theirs


def texts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, tokens, lengths, and which tokens are there."""
    torch.manual_seed(5)
    num_text = torch.tensor([7, 5, 2, 3])
    seen = torch.arange(7) < num_text[:, None]
    tokens = torch.randint(5, 28, (4, 7)).masked_fill(~seen, 0)
    tokens[:, 0] = 2
    return torch.randn(4, 3, 8, 8, dtype=torch.float64), tokens, num_text, seen.long()


def same_gradients(ours: BLIP, theirs: Any) -> None:
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    rows = layout(ours.config.kind)
    wanted = {n: p for n, p in ours.state_dict().items() if n != "temperature"}
    found = rows.read("test", grads, wanted)
    for name, p in ours.named_parameters():
        if name != "temperature":
            torch.testing.assert_close(
                torch.zeros_like(p) if p.grad is None else p.grad, found[name], msg=name, **TOLERANCE
            )


def test_captions_their_loss_and_every_gradient_are_transformers() -> None:
    ours, theirs = both("caption")
    images, tokens, num_text, seen = texts()
    begun = ours.begun(tokens, DEC)
    prompt = 2
    labels = begun.masked_fill((seen == 0) | (torch.arange(7) < prompt), -100)
    out = theirs(pixel_values=images, input_ids=begun, attention_mask=seen, labels=labels)
    total, count = ours.captions(images, tokens, num_text, prompt)
    assert count == (labels[:, 1:] >= 0).sum()
    torch.testing.assert_close(total / count, out.loss, **TOLERANCE)
    logits = ours.text_head(ours.writer(images).states(begun, num_text))  # pyright: ignore[reportOptionalCall]
    torch.testing.assert_close(logits[seen.bool()], out.logits[seen.bool()], **TOLERANCE)
    (total / count).backward()
    out.loss.backward()
    same_gradients(ours, theirs)
    # the tower, and its pooled state, which transformers norms twice
    states = ours.states(images)
    vision = theirs.vision_model(images)
    torch.testing.assert_close(vision.last_hidden_state, states, **TOLERANCE)
    assert (vision.pooler_output - states[:, 0]).abs().max() > 1e-3
    torch.testing.assert_close(vision.pooler_output, ours.visual.norm_post(states[:, 0]), **TOLERANCE)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_captions_are_written_as_transformers_writes_them(num_beams: int) -> None:
    ours, theirs = both("caption")
    images, tokens, _, _ = texts()
    start = tokens[:1, :3].expand(4, 3)
    found = ours.eval().describe(images, start, max_length=9, min_length=5, num_beams=num_beams, eos_token_id=SEP)
    ids = torch.cat([start, torch.full((4, 1), SEP)], 1)  # whose last is cut there
    options = {"max_length": 9, "min_length": 5, "num_beams": num_beams, "do_sample": False}
    options |= {"early_stopping": "never"} if num_beams > 1 else {}
    expected = theirs.generate(images, input_ids=ids.clone(), **options)
    assert (expected[:, 0] == DEC).all()
    expected = expected[:, 3:]
    assert torch.equal(F.pad(found, (0, 6 - found.shape[1])), F.pad(expected, (0, 6 - expected.shape[1])))
    # of prompts of two lengths theirs cuts the last column, so that the shorter one's end and padding stay in it
    ids = torch.tensor([[2, 7, 8, SEP], [2, 7, SEP, 0]])
    more = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True, "do_sample": False}
    mixed = theirs.generate(images[:2], input_ids=ids.clone(), attention_mask=(ids > 0).long(), **more).scores[0]
    alone = theirs.generate(images[1:2], input_ids=ids[1:, :3].clone(), **more).scores[0]
    assert (mixed[1] - alone[0]).abs().max() > 1e-3


def test_matching_and_features_are_transformers_where_the_text_begins_with_enc() -> None:
    ours, theirs = both("retrieval")
    images, tokens, num_text, seen = texts()
    index = torch.arange(4)
    logits = ours.match(images, index, tokens, num_text)
    with_enc = ours.begun(tokens, ENC)
    out = theirs(input_ids=with_enc, pixel_values=images, attention_mask=seen).itm_score
    torch.testing.assert_close(logits, out, **TOLERANCE)
    # theirs leaves [CLS] where pretraining puts [ENC]
    assert (theirs(input_ids=tokens, pixel_values=images, attention_mask=seen).itm_score - logits).abs().max() > 1e-3
    pairs = ours.pairs(images, tokens, num_text)
    cosines = theirs(input_ids=tokens, pixel_values=images, attention_mask=seen, use_itm_head=False).itm_score
    torch.testing.assert_close(pairs.image @ pairs.text.T, cosines, **TOLERANCE)
    weights = torch.randn(4, 4, dtype=torch.float64)
    (logits.square().sum() + (weights * (pairs.image @ pairs.text.T)).sum()).backward()
    (out.square().sum() + (weights * cosines).sum()).backward()
    same_gradients(ours, theirs)


def test_answers_and_every_gradient_are_transformers_but_for_the_mean() -> None:
    ours, theirs = both("vqa")
    images, tokens, _, _ = texts()
    num_text = torch.full((4,), 7)
    tokens, seen = tokens.clamp(min=5), torch.ones(4, 7, dtype=torch.int64)
    num_answer = torch.tensor([3, 4, 2, 3])
    is_there = torch.arange(4) < num_answer[:, None]
    answers = torch.randint(5, 28, (4, 4)).masked_fill(~is_there, 0)
    begun = ours.begun(answers, DEC)
    each = ours.answers(images, tokens, num_text, torch.arange(4), answers, num_answer)
    asked = {"input_ids": ours.begun(tokens, ENC), "pixel_values": images, "attention_mask": seen}
    labels = begun.masked_fill(~is_there, -100)
    there = is_there.long()
    out = theirs(**asked, decoder_input_ids=begun, decoder_attention_mask=there, labels=labels)
    # the authors' loss sums an answer's tokens and divides by the images, transformers' is a mean over tokens
    torch.testing.assert_close(each.sum() / (num_answer - 1).sum(), out.loss, **TOLERANCE)
    (each.sum() / (num_answer - 1).sum()).backward()
    out.loss.backward()
    same_gradients(ours, theirs)
    # its encoder and decoder are not tied, as the authors' are not
    assert theirs.text_encoder.embeddings.word_embeddings.weight is not theirs.text_decoder.bert.embeddings.word_embeddings.weight  # fmt: skip  # noqa: E501
    # labels are what its decoder reads: -100 in them is no word, and padding in them is learned
    with pytest.raises(IndexError):
        theirs(**asked, decoder_attention_mask=there, labels=labels)
    padded = theirs(**asked, decoder_attention_mask=there, labels=begun).loss
    assert (padded - out.loss).abs() > 1e-3
    # its decoder is given which of a question's states are padding, and reads them all the same
    options = {"attention_mask": there, "encoder_hidden_states": torch.randn(4, 7, 16, dtype=torch.float64)}
    uneven = (torch.arange(7) < torch.tensor([7, 5, 2, 3])[:, None]).long()
    found = [theirs.text_decoder(begun, **options, encoder_attention_mask=x).logits for x in (uneven, seen)]
    assert torch.equal(*found)
    shorter = ours.answers(images, tokens, torch.tensor([7, 5, 2, 3]), torch.arange(4), answers, num_answer)
    changed = torch.where(uneven.bool(), tokens, 9)
    again = ours.answers(images, changed, torch.tensor([7, 5, 2, 3]), torch.arange(4), answers, num_answer)
    torch.testing.assert_close(shorter, again, **TOLERANCE)


def test_pretraining_is_the_sum_of_transformers_parts_with_shared_weights_once() -> None:
    ours, encoder = both("pretrain", BlipForImageTextRetrieval)
    decoder = theirs_of(ours, BlipForConditionalGeneration)
    decoder.text_decoder.label_smoothing = 0.1
    images, tokens, num_text, seen = texts()
    ids = torch.arange(4)
    batch = FusionBatch(images, tokens, num_text, tokens, tokens, ids, ids)
    recipe, companions = Blip(alpha=0.4, alpha_steps=1), {"teacher": MomentumEncoder(ours)}
    pairs = ours.pairs(images, tokens, num_text)
    negatives = recipe.negatives(pairs, pairs, batch, Step(2, 9, 5), least=LEAST_PROBABILITY)
    losses = recipe.loss(ours, batch, Step(2, 9, 5, companions))
    losses["loss"].backward()
    image = F.normalize(encoder.vision_proj(encoder.vision_model(images)[0][:, 0]), dim=1)
    text = F.normalize(encoder.text_proj(encoder.text_encoder(tokens, attention_mask=seen)[0][:, 0]), dim=1)
    temperature, right = ours.temperature.item(), torch.eye(4, dtype=torch.float64)
    contrast = torch.zeros((), dtype=torch.float64)
    for own, other in ((image, text.detach()), (text, image.detach())):
        logits = own @ other.T / temperature
        contrast = (
            contrast - ((0.4 * logits.detach().softmax(1) + 0.6 * right) * logits.log_softmax(1)).sum(1).mean() / 2
        )
    image_of, text_of = torch.cat([ids, negatives.images, ids]), torch.cat([ids, ids, negatives.texts])
    rows = {"input_ids": ours.begun(tokens, ENC)[text_of], "attention_mask": seen[text_of]}
    matched = encoder(pixel_values=images[image_of], **rows).itm_score
    matching = F.cross_entropy(matched, (torch.arange(12) < 4).long())
    begun = ours.begun(tokens, DEC)
    out = decoder(
        pixel_values=images, input_ids=begun, attention_mask=seen, labels=begun.masked_fill(seen == 0, -100)
    ).loss
    for name, x in {"contrast": contrast, "matching": matching, "captions": out}.items():
        torch.testing.assert_close(losses[name], x, **TOLERANCE)
    (contrast + matching + out).backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in encoder.named_parameters()}
    for n, p in decoder.named_parameters():
        shared = n.replace("text_decoder.bert.", "text_encoder.")
        at = shared if shared in grads and ".attention." not in n else n
        grads[at] = grads.get(at, torch.zeros_like(p)) + (torch.zeros_like(p) if p.grad is None else p.grad)
    found = layout("pretrain").read("test", grads, {n: p for n, p in ours.state_dict().items() if n != "temperature"})
    for name, p in ours.named_parameters():
        if name != "temperature":
            torch.testing.assert_close(p.grad, found[name], msg=name, **TOLERANCE)


def test_defaults_of_transformers_are_not_the_published_ones() -> None:
    text, vision, whole = BlipTextConfig(), BlipVisionConfig(), BlipConfig(label_smoothing=0.1)
    assert text.num_attention_heads == 8 and CONFIG.text.num_heads != 8  # published: 12
    assert vision.layer_norm_eps == 1e-5 and CONFIG.vision.norm_eps == 1e-6
    assert text.label_smoothing == 0 and whole.text_config.label_smoothing == 0  # which never gets there  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    pooled = BlipModel(BlipConfig(**SETTINGS.write("test", CONFIG)) ).vision_model(torch.randn(1, 3, 8, 8))  # fmt: skip
    assert pooled.pooler_output.shape == (1, 16)


@pytest.mark.parametrize("kind", ["pretrain", "retrieval", "caption", "vqa"])
def test_folders_load_in_transformers_and_come_back(kind: Kind, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = BLIP(replace(CONFIG, kind=kind))
    save_blip(ours, tmp_path / "out")
    again = load_blip(tmp_path / "out")
    assert again.config == ours.config
    for name, x in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name
    for other in CLASSES if kind == "pretrain" else [kind]:
        theirs, info = CLASSES[other].from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not info["missing_keys"], other
        fitted = BLIP(replace(ours.config, kind=other))
        fitted.load_state_dict({n: x for n, x in fitting(ours.state_dict(), other).items() if n in fitted.state_dict()})  # pyright: ignore[reportArgumentType]
        assert theirs.config.text_config.bos_token_id == DEC
        for name, x in written(fitted).items():
            if name in theirs.state_dict():
                assert torch.equal(theirs.state_dict()[name], x), (other, name)
    refuses("folder must not exist yet", save_blip, ours, tmp_path / "out")


def test_a_wider_image_tower_leaves_what_reads_questions_anew_and_is_not_written(tmp_path: Path) -> None:
    vision = salesforce_vision(8, 4, 32, 1, 2, 24)
    wide = replace(CONFIG, vision=vision, text=replace(CONFIG.text, image_width=32))
    started: Any = BlipVqa().started(dict(BLIP(wide).state_dict()))
    asking = BLIP(replace(wide, kind="vqa"))
    ours = {n: x for n, x in started.items() if n in asking.state_dict()}
    assert asking.load_state_dict(ours, strict=False).missing_keys == [
        f"decoder.blocks.{i}.cross.kv.{x}" for i in range(2) for x in ("weight", "bias")
    ]
    refuses("vision.width must be text.width 16", save_blip, asking, tmp_path / "out")


def test_a_caption_drawn_by_its_own_numbers_does_not_depend_on_its_neighbours() -> None:
    ours, _ = both("caption")
    images, tokens, _, _ = texts()
    uniform, options = torch.rand(4, 9, dtype=torch.float64), {"max_length": 9, "top_p": 0.9, "eos_token_id": SEP}
    start = tokens[:, :1]
    together = ours.describe(images, start, uniform=uniform, **options)
    for i in range(4):
        alone = ours.describe(images[i : i + 1], start[:1], uniform=uniform[i : i + 1], **options)
        assert torch.equal(alone[0], together[i, : alone.shape[1]]) and not together[i, alone.shape[1] :].any()
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    drawn = nucleus(logits, top_p=0.9, uniform=torch.rand(4000))
    shares = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95, rtol=0, atol=0.03)


@pytest.mark.parametrize(("flags", "said"), [
    ({"prompt": "a {}"}, "--prompt must hold no {"), ({"max_caption": 2}, "--max-caption must be from 5 to 512, got 2"),
    ({"min_caption": 20}, "--min-caption must be from 0, below --max-caption, got 20"),
    ({"image_size": 30}, "--image-size must be a multiple of 16, got 30"),
])  # fmt: skip
def test_flags_that_mean_nothing_are_refused(flags: dict[str, Any], said: str) -> None:
    class Words:
        num_train, name = 9, "words"

        def captions(self, *_: Any) -> list[str]:
            return ["a picture of words"] * 3

    refuses(said, replace(BlipCaption(model="base"), **flags).assets, Words())
