"""CoCa: parity with open_clip's in outputs, losses, gradients and texts; its files both ways; masks and padding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcore.data.text.tokenizer import train_tokenizer
from mmcore.parts.decoding import beam_search
from mmcore.parts.towers import load_tower
from mmcore.parts.vit import ViT
from mmcore.recipe import Step
from mmcore.systems.clip.recipe import ClipBatch
from mmcore.systems.coca.model import CoCa
from mmcore.systems.coca.recipe import Coca
from mmcore.systems.coca.weights import layout, load_coca, save_coca
from tests.systems.clip.towers import moved
from tests.torchvision_stub import torchvision_or_skip

VOCAB, START, END, LENGTH = 60, 58, 59, 9
VISION = {"image_size": 16, "layers": 2, "width": 48, "head_width": 16, "patch_size": 4}
VISION |= {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 5, "output_tokens": True}
TEXT = {"context_length": LENGTH, "vocab_size": VOCAB, "width": 32, "heads": 2, "layers": 2}
SHAPE: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": VISION,
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": TEXT,
}
IMAGES = torch.randn(5, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
ENDS: dict[str, Any] = {"eos_token_id": END, "max_length": LENGTH - 1}


def captions(*lengths: int) -> Tensor:
    """Of so many tokens, none of them 0."""
    tokens = torch.randint(1, START, (len(lengths), LENGTH), generator=torch.Generator().manual_seed(2))
    tokens[:, 0] = START
    for row, length in zip(tokens, lengths, strict=True):
        row[length - 1], row[length:] = END, 0
    return tokens


# one that fills the context, and one of an end token alone
TOKENS = captions(4, LENGTH, 1, 7, LENGTH - 1)


@pytest.fixture
def theirs() -> Any:
    torchvision_or_skip()
    open_clip: Any = pytest.importorskip("open_clip", exc_type=ImportError)
    torch.manual_seed(0)
    model = open_clip.CoCa(**SHAPE)
    model.text_decoder.text_projection.data.normal_()  # uninitialised there
    return moved(model).double()


def ours_of(theirs: Any, folder: Path, **shape: Any) -> CoCa:
    """Of the weights in open_clip's files."""
    folder.mkdir(exist_ok=True)
    torch.save(theirs.float().state_dict(), folder / "open_clip_pytorch_model.bin")
    theirs.double()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": SHAPE}))
    ours = load_coca(folder)
    for name, value in shape.items():
        object.__setattr__(ours.config, name, value)
    ours.text.is_correct, ours.text.pads_by_id = ours.config.correct_cls_mask, ours.config.pads_by_id
    return ours.double()


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("has_sign", [False, True])
def test_outputs_losses_and_every_gradient_equal_open_clips(
    theirs: Any, tmp_path: Path, correct: bool, has_sign: bool
) -> None:
    from open_clip.loss import CoCaLoss  # pyright: ignore[reportMissingImports]  # noqa: PLC0415

    theirs.text.correct_cls_mask, tokens = correct, TOKENS.clone()
    if has_sign:  # a token of id 0 in a caption
        tokens[3, 2] = tokens[1, 5] = 0
    ours = ours_of(theirs, tmp_path / "x", correct_cls_mask=correct, pads_by_id=has_sign)
    ours.train()
    expected = theirs.train()(IMAGES, tokens)
    rows, recipe = ClipBatch(IMAGES, tokens, [4, LENGTH, 1, 7, LENGTH - 1]), Coca(contrast_weight=0.7)
    features = recipe.features(ours, rows)
    for ours_x, name in zip(features[:2], ("image_features", "text_features"), strict=True):
        torch.testing.assert_close(ours_x, expected[name], **CLOSE)
    logits = ours.logits(IMAGES, tokens)
    kept = (tokens != 0)[:, 1:]  # what those of padding are is nobody's loss
    torch.testing.assert_close(logits[kept], expected["logits"][kept], **CLOSE)
    losses = recipe.objective(features, [rows], Step(0, 1, 0))
    wanted = CoCaLoss(2.0, 0.7)(**expected, output_dict=True)
    torch.testing.assert_close(0.7 * losses["contrast"], wanted["contrastive_loss"], **CLOSE)
    torch.testing.assert_close(2 * losses["caption"], wanted["caption_loss"], **CLOSE)
    losses["loss"].backward()
    (wanted["contrastive_loss"] + wanted["caption_loss"]).backward()
    grads = layout(ours.config).read("test", {n: p.grad for n, p in theirs.named_parameters()}, ours.state_dict())
    assert grads.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], **CLOSE, msg=name)


def test_a_sign_of_id_0_in_a_caption_is_a_word_unless_asked_otherwise(theirs: Any, tmp_path: Path) -> None:
    ours, tokens = ours_of(theirs, tmp_path / "x"), TOKENS.clone()
    tokens[3, 2] = 0
    assert ours(IMAGES, tokens)[3].sum() == ours(IMAGES, TOKENS)[3].sum() == (TOKENS[:, 1:] != 0).sum()
    ours.text.pads_by_id = True
    assert ours(IMAGES, tokens)[3].sum() == (TOKENS[:, 1:] != 0).sum() - 1
    tokenizer = train_tokenizer(["what a day"], vocab_size=514, context_length=20)
    assert 0 in tokenizer(["a!?"])[0, :4] and 0 not in tokenizer(["a !"])[0, :4]
    assert tokenizer.decode(tokenizer(["Ä day!? 北"])[0, 1:].tolist()) == "ä day !? 北"


def test_the_class_token_does_not_see_itself_behind_a_short_caption_unless_the_mask_is_correct(
    theirs: Any, tmp_path: Path
) -> None:
    ours = ours_of(theirs, tmp_path / "x")
    for correct in (False, True):
        ours.text.is_correct = correct
        with torch.no_grad():
            before, places = ours.encode_text(TOKENS), ours.text.position_embedding.clone()
            ours.text.position_embedding[4, 0] += 1.0  # of the first place behind the first caption
            differs = (ours.encode_text(TOKENS) - before).abs().amax(1) > 1e-9
            assert differs.tolist() == [not correct, True, False, True, True]
            ours.text.position_embedding.copy_(places)
    # of whatever length the rows are, the class token stands at the end of the context
    torch.testing.assert_close(ours.encode_text(TOKENS[:1, :4]), ours.encode_text(TOKENS[:1]))
    with pytest.raises(ValueError, match="lengths must reach each caption's end token, got 3 for caption 0"):
        ours.encode_text(TOKENS[:2], [3, LENGTH])


def test_texts_are_those_that_open_clips_logits_choose(theirs: Any, tmp_path: Path) -> None:
    ours = ours_of(theirs, tmp_path / "x")
    theirs.text.pad_id = -1  # open_clip hides what is generated of id 0
    start, prompt = torch.full((5,), START), torch.tensor([START])

    def logits(images: Tensor, texts: Tensor) -> Tensor:
        return theirs(images, texts, output_labels=False)["logits"][:, -1]

    texts = start[:, None]
    for _ in range(LENGTH - 1):
        texts = torch.cat([texts, logits(IMAGES, texts).argmax(1)[:, None]], 1)
    ended = (texts == END).cumsum(1).cumsum(1) > 1
    greedy = texts.masked_fill(ended, 0)[:, 1:]
    found = ours(IMAGES, generate={"prompt": prompt, **ENDS})
    assert torch.equal(found, greedy[:, : found.shape[1]]) and not greedy[:, found.shape[1] :].any()
    again = ours(IMAGES, generate={"prompt": texts[0, :3], "eos_token_id": END, "max_length": LENGTH - 3})
    assert torch.equal(again[0], greedy[0, 2 : 2 + again.shape[1]])

    held, beams = start[:0, None], 3

    def step(tokens: Tensor, rows: Tensor | None) -> Tensor:
        nonlocal held
        assert rows is not None
        held = torch.cat([held[rows], tokens[:, None]], 1) if held.numel() else tokens[:, None]
        return logits(IMAGES.repeat_interleave(beams, 0), held)

    expected = beam_search(step, start, num_beams=beams, pad_token_id=0, **ENDS)
    assert torch.equal(ours(IMAGES, generate={"prompt": prompt, "num_beams": beams, **ENDS}), expected)
    drawn = [
        ours(IMAGES, generate={"prompt": prompt, "top_p": 0.9, "generator": torch.Generator().manual_seed(3), **ENDS})
        for _ in range(2)
    ]
    assert torch.equal(*drawn) and not torch.equal(drawn[0], found)
    likeliest = ours(IMAGES, generate={"prompt": prompt, "top_p": 1e-9, **ENDS})
    assert torch.equal(likeliest, found)
    with pytest.raises(ValueError, match=r"CoCa.generate: max_length must be in \[1, 8\], got 9"):
        ours(IMAGES, generate={"prompt": prompt, "eos_token_id": END, "max_length": 9})


def test_what_is_written_is_loaded_by_open_clip_and_what_it_lacks_is_refused(theirs: Any, tmp_path: Path) -> None:
    import open_clip  # pyright: ignore[reportMissingImports]  # noqa: PLC0415

    ours = ours_of(theirs, tmp_path / "x").float()
    save_coca(ours, tmp_path / "y")
    again: Any = open_clip.create_model(f"local-dir:{tmp_path / 'y'}").eval()
    images = IMAGES.float()
    torch.testing.assert_close(again.encode_image(images), ours.encode_image(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.encode_text(TOKENS), ours.encode_text(TOKENS), rtol=1e-4, atol=1e-5)
    found = load_coca(tmp_path / "y").state_dict()
    assert all(torch.equal(x, found[n]) for n, x in ours.state_dict().items())
    file = tmp_path / "y/open_clip_model.safetensors"
    assert load_coca(file, config=ours.config).config == ours.config
    (tmp_path / "y/config.json").unlink()  # as open_clip's own folders are
    tower = load_tower(tmp_path / "y")
    vit = ViT(tower.config)
    vit.load_state_dict(tower.state)
    states = ours.visual.pooler.key_norm(ViT.forward(ours.visual, images))
    torch.testing.assert_close(vit(images), states)
    object.__setattr__(ours.config, "correct_cls_mask", True)
    with pytest.raises(ValueError, match="correct_cls_mask must be False to be written in"):
        save_coca(ours, tmp_path / "z")
    assert not (tmp_path / "z").exists()
    settings = json.loads((tmp_path / "y/open_clip_config.json").read_text())
    for part, name, value, sentence in (
        ("vision_cfg", "attentional_pool", False, "must have model_cfg.vision_cfg.attentional_pool true, got False"),
        ("multimodal_cfg", "width", 16, "must have model_cfg.multimodal_cfg.width 32, as text_cfg has it, got 16"),
        ("text_cfg", "hf_model_name", "roberta", "must be of CLIP's tower, got hf_model_name 'roberta'"),
    ):
        wrong = json.loads(json.dumps(settings))
        wrong["model_cfg"][part][name] = value
        (tmp_path / "y/open_clip_config.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=sentence):
            load_coca(tmp_path / "y")


def test_captions_of_padding_alone_cost_nothing() -> None:
    recipe = Coca()
    images, rows = torch.randn(2, 8), torch.zeros(2, 1, requires_grad=True)
    losses = recipe.objective((images, images, rows, rows.detach(), torch.ones(1)), [], Step(0, 1, 0))
    losses["loss"].backward()
    assert losses["caption"] == 0 and rows.grad is not None and rows.grad.isfinite().all()
