"""DeCLIP's losses by their formulas, the bank, and the masked and changed captions."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.data.text.masking import changed_text, mask_tokens
from mmcore.nn import FeatureQueue
from mmcore.recipe import Step
from mmcore.systems.declip.model import MASKED, DeCLIP, DeclipBatch
from mmcore.systems.declip.recipe import Declip, nearest
from tests.systems.clip.test_weights import small_config

END = 59


def make() -> DeCLIP:
    torch.manual_seed(0)
    model = DeCLIP(replace(small_config(), text=replace(small_config().text, eos_token_id=END)), 16, 8)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def batch() -> DeclipBatch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 50, (6, 7), generator=generator)
    tokens[:, 0], tokens[:, 5] = 58, END
    labels = torch.full_like(tokens, -100)
    masked = tokens.clone()
    for row, place in ((0, 2), (0, 3), (2, 1)):
        labels[row, place], masked[row, place] = tokens[row, place], MASKED
    views = torch.randn(2, 6, 3, 16, 16, generator=generator)
    return DeclipBatch(views[0], views[1], masked, tokens.roll(1, 0), labels)


def contrast(image: Tensor, text: Tensor, scale: Tensor, both: bool = True) -> Tensor:
    logits, own = scale * image @ text.T, torch.arange(len(image))
    rows = F.cross_entropy(logits, own)
    return (rows + F.cross_entropy(logits.T, own)) / 2 if both else rows


def test_the_loss_is_the_published_sum() -> None:
    recipe, model, given = Declip(), make(), batch()
    bank = FeatureQueue(16, 12)
    bank.enqueue(F.normalize(torch.randn(9, 12), dim=1))
    known = bank.filled
    features = recipe.features(model, given)
    losses = recipe.objective(features, [], Step(0, 1, 0, {"bank": bank}))
    views = [model.embed_image(x) for x in (given.images, given.second)]
    z = [model.projector(x) for x in views]
    p = [model.predictor(x) for x in z]
    siamese = -(F.cosine_similarity(p[0], z[1].detach()) + F.cosine_similarity(p[1], z[0].detach())).mean() / 2
    text, states = model.text(given.tokens, with_words=True)
    words = F.cross_entropy(
        F.linear(states, model.words.weight, model.words.bias).flatten(0, 1), given.labels.flatten()
    )
    a, b = (F.normalize(x, dim=1) for x in views)
    s, t = F.normalize(text, dim=1), F.normalize(model.text(given.changed), dim=1)
    scale = model.logit_scale.exp()
    clip = sum(contrast(x, y, scale) for x in (a, b) for y in (s, t)) / 4
    near = sum(contrast(x, known[(y @ known.T).argmax(1)], scale, False) for x in (a, b) for y in (s, t)) / 4
    expected = 0.4 * clip + 0.2 * near + 0.2 * siamese + 0.2 * words
    torch.testing.assert_close(losses["loss"], expected)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(losses["loss"], list(parameters.values()))
    wanted = torch.autograd.grad(expected, list(parameters.values()))
    for name, x, y in zip(parameters, found, wanted, strict=True):
        torch.testing.assert_close(x, y, msg=name, atol=2e-6, rtol=1e-4)


def test_the_bank_gives_no_caption_of_the_step_and_then_has_them() -> None:
    recipe, model, given = Declip(), make(), batch()
    bank = FeatureQueue(64, 12)
    features = recipe.features(model, given)
    losses = recipe.objective(features, [], Step(0, 1, 0, {"bank": bank}))
    own = sum(contrast(x, y, features[-1], False) for x in features[:2] for y in features[2:4]) / 4
    torch.testing.assert_close(losses["nearest"], own)
    assert bank.num_enqueued == 12
    rows = F.normalize(torch.randn(4, 12), dim=1)
    assert not torch.isin(nearest(rows, bank.filled), rows).any()
    again = recipe.objective(recipe.features(model, given), [], Step(1, 2, 0, {"bank": bank}))
    assert again["nearest"] > 0 and bank.num_enqueued == 24


def test_without_a_mask_the_text_tower_is_clips() -> None:
    model, given = make().eval(), batch()
    embedded, states = model.text(given.changed, with_words=True)
    torch.testing.assert_close(embedded, model.text(given.changed))
    torch.testing.assert_close(model(given.images, given.changed)[1], F.normalize(embedded, dim=1))
    assert states.shape == (6, 7, 16)


def test_hidden_words_are_the_shares_that_bert_has() -> None:
    tokens, words = torch.full((100_000,), 7), torch.ones(100_000, dtype=torch.bool)
    words[:1000] = False
    found, labels = mask_tokens(tokens, words, 0.15, np.random.default_rng(0), mask_id=-1, num_words=50)
    hidden = labels != -100
    assert not hidden[:1000].any() and (found[~hidden] == 7).all() and (labels[hidden] == 7).all()
    num = int(hidden.sum())
    assert abs(num - 0.15 * 99_000) < 3 * (99_000 * 0.15 * 0.85) ** 0.5
    for share, expected in (((found == -1).sum(), 0.8), ((hidden & (found == 7)).sum(), 0.1 + 0.1 / 50)):
        assert abs(int(share) - expected * num) < 3 * (num * expected * (1 - expected)) ** 0.5
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\], got 2"):
        mask_tokens(tokens, words, 2, np.random.default_rng(0), mask_id=-1, num_words=50)


def test_changed_captions_keep_their_words() -> None:
    rng, text = np.random.default_rng(0), "a photo of the number seven"
    found = {changed_text(text, rng) for _ in range(200)}
    assert len(found) > 20 and all(set(x.split()) <= set(text.split()) and x for x in found)
    assert changed_text("seven", rng) == "seven" and changed_text("a b", rng, deletion=1.0) in ("a", "b", "b a")


@pytest.mark.parametrize(("flags", "said"), [
    ({"bank_size": 0}, "--bank-size must be at least 1, got 0"), ({"mask_rate": 0.0}, "--mask-rate must be in"),
    ({"words_weight": 0.8}, "below 1 in all"), ({"view_scale": 0.0}, "--view-scale must be above 0"),
    ({"view_flip": 2.0}, "--view-flip must be in"), ({"lock_image": True}, "--lock-image must be left out"),
    ({"head_width": 1}, "--head-width must be at least 2, got 1"),
])  # fmt: skip
def test_flags_that_mean_nothing_are_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Declip(**flags).assets(None)  # pyright: ignore[reportArgumentType]
