"""UniCL: labels and captions in one batch, and the published loss."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mmcore.data import DataConfig, LoaderSpec
from mmcore.recipe import Step
from mmcore.systems.unicl.recipe import Unicl


def test_labels_are_positives_of_their_class_and_pairs_of_nothing_else() -> None:
    data = Unicl(label_classes=4).open_data()
    source: Any = data.source
    count = len(source.of_pairs)
    assert data.class_names is not None
    labels = [source.label(i, source.all_captions(i)[0]) for i in range(len(source))]
    assert len(source) == data.num_train == 1438
    assert sorted(set(labels[count:])) == [0, 1, 2, 3] and min(labels[:count]) >= len(data.class_names)
    assert len(set(labels[:count])) == count
    assert source.all_captions(count)[0] == f"a scan of the digit {data.class_names[labels[count]]}"
    captions = {source.all_captions(i)[0] for i in range(count)}
    assert len(captions) == 6 and captions.isdisjoint(source.all_captions(i)[0] for i in range(count, len(source)))


def test_another_source_gives_the_labels() -> None:
    recipe = Unicl(label_data="digits")
    data, alone = recipe.open_data(), replace(recipe, label_data=None).open_data()
    assert data.num_train == 2 * alone.num_train


def test_the_loss_is_the_published_one() -> None:
    """-1/|P(i)| sum over P(i) of log softmax, the mean over images, and over texts, halved."""
    torch.manual_seed(0)
    recipe = Unicl()
    data = recipe.open_data()
    assets = recipe.assets(data)
    [part] = next(recipe.loader(data, assets, LoaderSpec(24, 0, 1, 0))).parts
    image, text = (F.normalize(torch.randn(24, 8, dtype=torch.float64), dim=1).requires_grad_() for _ in range(2))
    found = recipe.objective((image, text, torch.tensor([3.0]).double()), [part], Step(0, 1, 0))["loss"]
    same = (part.labels[:, None] == part.labels).double()
    assert 24 < same.sum() < 24 * 24
    logits = 3.0 * image @ text.T
    sides = ((x.log_softmax(1) * y).sum(1) / y.sum(1) for x, y in ((logits, same), (logits.T, same.T)))
    expected: Any = -sum(x.mean() for x in sides) / 2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for x, y in zip(*(torch.autograd.grad(z, (image, text)) for z in (found, expected)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    assert recipe.build(assets).logit_scale.item() == 1.0


def test_what_cannot_be_mixed_is_refused() -> None:
    for recipe, sentence in (
        (Unicl(label_classes=10), "--label-classes must be from 1 to 9, got 10"),
        (Unicl(label_classes=2, label_data="digits"), "--label-classes has no effect beside --label-data, got 2"),
        (Unicl(data=DataConfig("emoji")), "must have classes, got .emoji., which has none"),
    ):
        with pytest.raises(ValueError, match=sentence):
            recipe.open_data()
