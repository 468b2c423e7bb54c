"""BEiT-3 against torchscale's, its files both ways, captions with a cache and without, its traps."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mmcore.fusion_recipe import AnswerBatch, FusionBatch
from mmcore.recipe import Step
from mmcore.systems.beit3.finetune import Beit3Caption, Beit3Retrieval, Beit3Vqa
from mmcore.systems.beit3.model import BEiT3, Beit3Config
from mmcore.systems.beit3.recipe import Beit3, Beit3Batch
from mmcore.systems.beit3.shapes import beit3_vision
from mmcore.systems.beit3.weights import LAYOUTS, fitted_state, load_beit3, save_beit3
from tests.refusals import refuses
from tests.systems.beit3.published import Peer, stubbed
from tests.systems.beit3.published import encoder as published

HEADS, LAYERS, VOCAB, LENGTH, CODES, WIDTH = 2, 3, 29, 8, 7, 16
VISION = beit3_vision(12, 4, WIDTH, LAYERS, HEADS, 24, drop_path=0.0)
CONFIG = Beit3Config(VISION, VOCAB, pad_token_id=0, num_text=10, num_codes=CODES)
PEERS = pytest.mark.parametrize("peer", ["transcript", "torchscale"])
SETTINGS: dict[str, Any] = {
    "img_size": 12, "patch_size": 4, "vocab_size": VOCAB, "encoder_embed_dim": WIDTH, "encoder_ffn_embed_dim": 24,
    "encoder_attention_heads": HEADS, "encoder_layers": LAYERS, "max_source_positions": 12,
}  # fmt: skip


def a_model(seed: int = 0, **changes: Any) -> BEiT3:
    """Moved by noise, so that no zero or unit hides anything."""
    torch.manual_seed(seed)
    model = BEiT3(replace(CONFIG, **changes)).double()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def a_batch() -> Any:
    torch.manual_seed(3)
    num_text = torch.tensor([7, 5, 2, 1, 6])
    seen = torch.arange(LENGTH) < num_text[:, None]
    tokens = torch.randint(5, VOCAB, (5, LENGTH)).masked_fill(~seen, 0)
    hidden = [(torch.rand(5, LENGTH) < share) & seen for share in (0.3, 0.6)]
    for x in hidden:
        x[0, 1] = True
    texts = [y for x in hidden for y in (tokens.masked_fill(x, 4), tokens.masked_fill(~x, -100))]
    images, masked = torch.randn(5, 3, 12, 12, dtype=torch.float64), torch.rand(5, 9) < 0.4
    batch = Beit3Batch(images, masked, num_text, *texts)
    return batch, tokens, ~seen, torch.randint(CODES, (5, 9))


def theirs_of(peer: Peer, model: BEiT3, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """The published model with a model's weights, and the heads beside it by their names, which want gradients."""
    state = LAYOUTS[True].write(model.state_dict())
    of_encoder = {name.removeprefix("beit3."): x for name, x in state.items() if name.startswith("beit3.")}
    encoder = published(peer, of_encoder, **SETTINGS, **settings)
    return encoder, {name: x.requires_grad_() for name, x in state.items() if not name.startswith("beit3.")}


def assert_gradients_equal(model: BEiT3, encoder: Any, heads: dict[str, Any], close: float = 1e-9) -> None:
    grads = {f"beit3.{name}": p.grad for name, p in encoder.named_parameters()}
    grads |= {name: x.grad for name, x in heads.items()}
    state = LAYOUTS[True].write(model.state_dict())
    grads = {name: torch.zeros_like(state[name]) if x is None else x for name, x in grads.items()}
    wanted = LAYOUTS[True].read("test", grads, model.state_dict())
    for name, p in model.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(grad, wanted[name], rtol=0, atol=close, msg=name)


def head(x: Any, heads: dict[str, Any], name: str) -> Any:
    return F.linear(x, heads[f"{name}.weight"], heads.get(f"{name}.bias"))


@PEERS
@pytest.mark.parametrize("recompute", [False, True])
def test_masked_modelling_and_every_gradient_are_those_of_the_published_model(recompute: bool, peer: Peer) -> None:
    """Texts are cut to the longest of the batch here, and padded there."""
    model, (batch, _, padding, codes) = a_model(), a_batch()
    model.coder, model.activation_checkpointing = lambda _: codes, recompute
    losses = Beit3().loss(model, batch, Step(0, 1, 0))
    with stubbed():
        encoder, heads = theirs_of(peer, model)
        image = encoder(visual_tokens=batch.images, vision_masked_position=batch.masked)["encoder_out"]
        text = encoder(textual_tokens=batch.alone, text_padding_position=padding)["encoder_out"]
        both = encoder(batch.beside, batch.images, padding, vision_masked_position=batch.masked)["encoder_out"]
        labels = codes.masked_fill(~batch.masked, -100).flatten()
        expected = [
            F.cross_entropy(head(image[:, 1:], heads, "mim_head").flatten(0, 1), labels),
            F.cross_entropy(head(text, heads, "mlm_head").flatten(0, 1), batch.alone_labels.flatten()),
            F.cross_entropy(head(both[:, 1:10], heads, "mim_head").flatten(0, 1), labels),
            F.cross_entropy(head(both[:, 10:], heads, "mlm_head").flatten(0, 1), batch.beside_labels.flatten()),
        ]
        for ours, x in zip(list(losses.values())[1:], expected, strict=True):
            torch.testing.assert_close(ours, x, rtol=0, atol=1e-9)
        torch.stack(expected).sum().backward()
    losses["loss"].backward()
    assert_gradients_equal(model, encoder, heads)


@PEERS
def test_contrast_and_every_gradient_are_those_of_the_published_model(peer: Peer) -> None:
    model, (batch, tokens, padding, _) = a_model(head="retrieval"), a_batch()
    ids = torch.arange(5)
    given = FusionBatch(batch.images, tokens, batch.num_text, tokens, tokens, ids, ids)
    loss = Beit3Retrieval().loss(model, given, Step(0, 1, 0))["loss"]
    with stubbed():
        encoder, heads = theirs_of(peer, model)
        image = encoder(visual_tokens=batch.images)["encoder_out"][:, 0]
        text = encoder(textual_tokens=tokens, text_padding_position=padding)["encoder_out"][:, 0]
        image, text = (
            F.normalize(head(x, heads, n), dim=-1) for x, n in ((image, "vision_head"), (text, "language_head"))
        )
        logits = heads["logit_scale"].exp() * image @ text.T
        expected = (F.cross_entropy(logits, ids) + F.cross_entropy(logits.T, ids)) / 2
        expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    loss.backward()
    assert_gradients_equal(model, encoder, heads)


@PEERS
def test_answers_and_every_gradient_are_those_of_the_published_model(peer: Peer) -> None:
    model, (batch, tokens, padding, _) = a_model(head="answers", num_answers=6), a_batch()
    targets = torch.tensor([0.0, 0.3, 0.6, 0.9, 1.0])[torch.randint(5, (5, 6))]
    loss = Beit3Vqa().loss(model, AnswerBatch(batch.images, tokens, batch.num_text, targets), Step(0, 1, 0))["loss"]
    with stubbed():
        encoder, heads = theirs_of(peer, model, normalize_output=False)
        x = encoder(tokens, batch.images, padding)["encoder_out"][:, 0]
        x = F.layer_norm(x, (WIDTH,), heads["pooler.norm.weight"], heads["pooler.norm.bias"])
        x = head(torch.tanh(head(x, heads, "pooler.dense")), heads, "head.0")
        x = F.gelu(F.layer_norm(x, (2 * WIDTH,), heads["head.1.weight"], heads["head.1.bias"]))
        expected = F.binary_cross_entropy_with_logits(head(x, heads, "head.3"), targets.double()) * 6
        expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    loss.backward()
    assert_gradients_equal(model, encoder, heads)


@PEERS
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_captions_and_every_gradient_are_those_of_the_published_model(smoothing: float, peer: Peer) -> None:
    model, (batch, tokens, padding, _) = a_model(head="captioning"), a_batch()
    ids = torch.arange(5)
    given = FusionBatch(batch.images, tokens, batch.num_text, batch.beside, batch.beside_labels, ids, ids)
    loss = Beit3Caption(label_smoothing=smoothing).loss(model, given, Step(0, 1, 0))["loss"]
    with stubbed():
        encoder, heads = theirs_of(peer, model)
        total = 10 + LENGTH
        seen = torch.zeros(total, total, dtype=torch.long)
        seen[:, :10] = 1
        seen[10:, 10:] = torch.ones(LENGTH, LENGTH, dtype=torch.long).tril()
        out = encoder(batch.beside, batch.images, padding, attn_mask=1 - seen)["encoder_out"][:, 10:]
        where = batch.beside_labels >= 0
        logits, wanted = head(out[where], heads, "mlm_head"), batch.beside_labels[where]
        is_label = F.one_hot(wanted, VOCAB)
        target = is_label * (1 - smoothing) + (1 - is_label) * smoothing / (VOCAB - 1)
        expected = -(target * logits.log_softmax(-1)).sum(1).mean()
        expected.backward()
    close = 1e-9 if smoothing == 0 else 1e-6  # the share of the smoothing is a float32 in the op
    torch.testing.assert_close(loss, expected, rtol=0, atol=close)
    loss.backward()
    assert_gradients_equal(model, encoder, heads, close)


def test_a_caption_is_said_as_without_a_cache() -> None:
    """Each word is the likeliest for a [MASK] behind those before it."""
    model, (batch, *_) = a_model(head="captioning", seed=5).eval(), a_batch()
    ids: Any = {"start_token_id": 2, "mask_token_id": 4, "eos_token_id": 3}
    said = model.say(batch.images, **ids, max_length=7)
    for row, image in zip(said, batch.images[:, None], strict=True):
        text = [2]
        for word in row.tolist():
            tokens = torch.tensor([[*text, 4]])
            states = model.states(image, tokens, torch.tensor([len(text) + 1]), is_causal=True)
            assert word == int(model.text_head(states[:, -1]).argmax())
            text.append(word)
            if word == 3:
                break
    beams = model.say(batch.images, **ids, max_length=7, num_beams=3)
    assert beams.shape[0] == 5 and beams.shape[1] <= 6
    refuses("max_length must be from 2 to 10, got 11", model.say, batch.images, **ids, max_length=11)


def test_shared_attention_is_that_of_two_copies_which_are_equal() -> None:
    shared, (batch, tokens, _, _) = a_model(decoupled=False), a_batch()
    decoupled = BEiT3(CONFIG).double()
    state = shared.state_dict()
    own = {name: re.sub(r"\.(norm1|qkv|out|inner_norm)\.[01]\.", r".\1.", name) for name in decoupled.state_dict()}
    copies = {name: state[re.sub(r"^norm\.1", "norm.0", x)] for name, x in own.items()}
    decoupled.load_state_dict(copies)
    texts = tokens, batch.num_text
    torch.testing.assert_close(decoupled.states(batch.images, *texts), shared.states(batch.images, *texts))
    torch.testing.assert_close(decoupled.text_states(*texts), shared.text_states(*texts))
    # what is padded says nothing to the image
    more = torch.where(torch.arange(LENGTH) < batch.num_text[:, None], tokens, 9)
    found, again = (shared.states(batch.images, x, batch.num_text)[:, :10] for x in (tokens, more))
    assert torch.equal(found, again)


@pytest.mark.parametrize(
    "changes",
    [{}, {"decoupled": False}, {"head": "retrieval"}, {"head": "captioning"}, {"head": "answers", "num_answers": 4}],
)
def test_files_have_the_published_names_both_ways(changes: Any, tmp_path: Path) -> None:
    model = BEiT3(replace(CONFIG, **changes))
    save_beit3(model, tmp_path / "out")
    again = load_beit3(tmp_path / "out")
    assert again.config == model.config
    assert all(torch.equal(x, again.state_dict()[n]) for n, x in model.state_dict().items())
    if "decoupled" in changes:
        return
    # as published: a torch file of {"model": ...} without a shape, whose heads have 64 channels
    wide = replace(CONFIG, vision=beit3_vision(12, 4, 64, LAYERS, 1, 24), pad_token_id=1, **changes)
    state = LAYOUTS[True].write(BEiT3(wide).state_dict())
    assert state["beit3.encoder.embed_positions.A.weight"].shape == (12, 64)
    assert "beit3.encoder.layers.1.self_attn.q_proj.B.weight" in state
    assert ("beit3.encoder.layer_norm.A.weight" in state) == (wide.head != "answers")
    file = tmp_path / "beit3.pth"
    torch.save({"model": state}, file)
    found = load_beit3(file)
    wide = replace(wide, num_codes=CODES if wide.head == "pretraining" else 8192)
    assert found.config == wide
    # the rows of no place come back as zeros
    assert all(torch.equal(x, state[n]) for n, x in LAYOUTS[True].write(found.state_dict()).items())
    torch.save({"model": {n: x for n, x in state.items() if "layers.1.ffn.A.fc1" not in n}}, file)
    refuses("missing beit3.encoder.layers.1.ffn.A.fc1", load_beit3, file)


def test_larger_images_and_shorter_texts_go_on_from_the_same_weights() -> None:
    model, (batch, tokens, _, _) = a_model(head="retrieval"), a_batch()
    larger = replace(model.config, vision=replace(VISION, image_size=20), num_text=8)
    other = BEiT3(larger).double()
    other.load_state_dict(fitted_state(model.state_dict(), larger))
    texts = tokens, batch.num_text
    torch.testing.assert_close(other.embed_text(*texts), model.embed_text(*texts), rtol=0, atol=1e-12)
    assert other.embed_image(torch.zeros(1, 3, 20, 20, dtype=torch.float64)).isfinite().all()


def test_a_batch_of_one_and_one_without_hidden_words_have_finite_losses() -> None:
    model, (batch, _, _, codes) = a_model(), a_batch()
    model.coder = lambda _: codes[:1]
    one = Beit3Batch(*(x[:1] for x in batch))
    none = torch.full_like(one.alone, -100)
    losses = Beit3().loss(model, one._replace(alone_labels=none, beside_labels=none), Step(0, 1, 0))
    losses["loss"].backward()
    assert losses["texts"] == 0 == losses["words of pairs"] and all(x.isfinite() for x in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_what_makes_no_sense_is_refused() -> None:
    refuses("--text-mask-ratio must be in \\(0, 1\\], got 0", Beit3(text_mask_ratio=0.0).assets, None)
    refuses("--label-smoothing must be from 0, below 1", Beit3Caption(label_smoothing=1.0).assets, None)
    refuses("--head-lr-scale must be above 0", Beit3Vqa(head_lr_scale=0.0).assets, None)
    refuses("num_answers must come with head 'answers', got 3", replace, CONFIG, num_answers=3)
    refuses("vision must have a class and a mask token", replace, CONFIG, vision=replace(VISION, has_mask_token=False))
    with pytest.raises(ValueError, match="--vision must be a ViT, got a BEiT-3"):
        Beit3().image_tower(None, None)  # pyright: ignore[reportArgumentType]
