"""Frozen features: nearest neighbours and the linear probe, scattered digits, and the options of the ViT they need."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmcore.data import DataConfig
from mmcore.data.opening import open_data
from mmcore.metrics import knn_accuracy, linear_probe_accuracy
from mmcore.nn.transformer import residual
from mmcore.parts.vit import VisionConfig, ViT


def clouds(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three clouds of unlike directions, which overlap a little."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 3
    return F.one_hot(labels, 8).double() + 0.35 * torch.randn(num, 8, generator=rng, dtype=torch.float64), labels


def test_neighbours_vote_as_dino_counts_them() -> None:
    (train, known), (test, wanted) = clouds(90, 0), clouds(60, 1)
    right = 0
    for row, label in zip(test, wanted, strict=True):  # the formula, a row at a time
        score = F.normalize(train, dim=1) @ F.normalize(row, dim=0)
        places = score.argsort(descending=True)[:7]
        votes = [((score[places] / 0.07).exp() * (known[places] == c)).sum() for c in range(3)]
        right += int(torch.stack(votes).argmax() == label)
    assert knn_accuracy(train, known, test, wanted, k=7) == right / 60 > 0.8
    assert knn_accuracy(train, known, train, known, k=1) == 1  # a test row among the training rows is found out
    assert knn_accuracy(train, known, test, wanted, k=7, temperature=1e-4) > 0.7  # nothing overflows


def test_a_probe_of_shuffled_labels_is_at_chance_and_reads_no_test_statistics() -> None:
    (train, known), (test, wanted) = clouds(300, 0), clouds(150, 1)
    assert linear_probe_accuracy(train, known, test, wanted) > 0.9
    shuffled = known[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    assert linear_probe_accuracy(train, shuffled, test, wanted) < 0.5
    # one test row alone is judged as among others
    alone = [linear_probe_accuracy(train, known, test[i : i + 1], wanted[i : i + 1]) for i in range(8)]
    assert sum(alone) / 8 == linear_probe_accuracy(train, known, test[:8], wanted[:8])


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"k": 91}, "k must be from 1 to the 90 training features, got 91"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"train_labels": torch.zeros(89).long()}, r"train_labels must be int64 \[90\] of at least 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict[str, object], sentence: str) -> None:
    (train, known), (test, wanted) = clouds(90, 0), clouds(6, 1)
    inputs = {"train": train, "train_labels": known, "test": test, "test_labels": wanted, **change}
    with pytest.raises(ValueError, match=sentence):
        knn_accuracy(**inputs)  # pyright: ignore[reportArgumentType]


def test_scattered_digits_stay_where_they_are_and_move_in_training() -> None:
    for inverted in (False, True):
        data = open_data(DataConfig("scattered", inverted=inverted), seed=0)
        again = open_data(DataConfig("scattered", inverted=inverted), seed=0)
        assert data.val is not None and again.val is not None
        first, second = (np.asarray(x.val.raw_image(3)) for x in (data, again))  # pyright: ignore[reportOptionalMemberAccess]
        assert (first == second).all() and first.shape == (16, 16, 3)
        record = data.source.record(0)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        preprocess = VisionConfig(16, 4, 64, 1, 4, 64).preprocess
        views = [np.asarray(record.augment(preprocess, np.random.default_rng(i))) for i in range(2)]
        assert (views[0] != views[1]).any() and views[0].shape == (16, 16, 3)
        corner = [np.asarray(data.val.raw_image(i))[:2, :2].mean() for i in range(60)]
        assert (np.std(corner) > 30) == inverted  # the ground's grey


def test_registers_layer_scale_mask_token_and_drop_path_are_as_defined() -> None:
    torch.manual_seed(0)
    options = {"num_registers": 3, "has_mask_token": True, "layer_scale": 0.5, "drop_path": 0.5}
    model = ViT(VisionConfig(8, 4, 8, 2, 2, 16, **options)).double()  # pyright: ignore[reportArgumentType]
    plain = ViT(VisionConfig(8, 4, 8, 2, 2, 16)).double()
    images = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    assert model.config.num_tokens == 4 + 1 + 3 and model(images).shape == (5, 8, 8)
    own = model.state_dict()
    with torch.no_grad():  # a scale of the outputs is one of the weights before them
        for name, x in plain.state_dict().items():
            shrinks = ".attn.out." in name or ".mlp.fc2." in name
            x.copy_(own[name] * (0.5 if shrinks else 1))
    model.eval()
    embedded = model.embed(images)
    assert torch.equal(embedded[:, 4:], plain.embed(images)[:, 1:]) and torch.equal(
        embedded[:, :1], plain.embed(images)[:, :1]
    )
    torch.testing.assert_close(model.transformer(embedded), plain.transformer(embedded))
    masked = torch.tensor([[True, False, False, True]] * 5)
    shown = model.embed(images, masked=masked)
    positions = own["position_embedding"][1:]
    expected = (own["mask_token"] + positions)[[0, 3]].expand(5, 2, 8)
    torch.testing.assert_close(
        F.layer_norm(expected, (8,), own["norm_pre.weight"], own["norm_pre.bias"]), shown[:, [4, 7]]
    )
    assert torch.equal(shown[:, [5, 6]], embedded[:, [5, 6]])
    with pytest.raises(ValueError, match="masked must be None: the tower has no mask token"):
        plain(images, masked=masked)

    model.train()  # the last block leaves out half of the samples, the first one none
    assert [b.drop_path for b in model.transformer.blocks] == [0.0, 0.5]  # pyright: ignore[reportAttributeAccessIssue]
    x = torch.randn(4000, 2, 8, dtype=torch.float64)
    added = residual(torch.ones_like(x), None, 0.5)
    assert set(added.unique().tolist()) == {0.0, 2.0} and added.mean().item() == pytest.approx(1, abs=0.05)
    assert (added == added[:, :1, :1]).all()
