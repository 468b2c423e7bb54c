"""FLIP and CLIPA: how many tokens are read, which, the same in every pass of a step, and all of them at the end."""

from typing import Any

import numpy as np
import pytest
import torch

from mmcore.data import LoaderSpec
from mmcore.recipe import Step
from mmcore.systems.clip.recipe import ClipBatch
from mmcore.systems.clipa.recipe import Clipa
from mmcore.systems.flip.recipe import Flip, shortened


class Bare:
    """A model without an engine."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)

    def place(self, batch: Any) -> Any:
        return batch

    def accumulate(self) -> Any:
        return torch.enable_grad()

    def backward(self, loss: Any, *, last: bool = True) -> None:
        loss.backward()


def made(recipe: Any, accum: int = 1) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    data = recipe.open_data()
    assets = recipe.assets(data)
    batch = next(recipe.loader(data, assets, LoaderSpec(8, 0, 1, 0, accum=accum)))
    return Bare(recipe.build(assets)), assets, batch.parts


def num_tokens(model: Any) -> list[tuple[int, ...]]:
    """Shapes of what the image tower's first layer reads."""
    seen: list[tuple[int, ...]] = []
    model.module.visual.transformer.blocks[0].register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape)))
    return seen


@pytest.mark.parametrize(("recipe", "few"), [
    (Flip(), 8), (Flip(mask_ratio=0.75), 4), (Clipa(), 4), (Clipa(mask_ratio=0.5), 2),
])  # fmt: skip
def test_a_step_reads_few_tokens_and_the_last_ones_all(recipe: Any, few: int) -> None:
    model, _, parts = made(recipe)
    seen = num_tokens(model)
    total = 100
    for number in (0, total - 1):
        losses = recipe.backward(model, parts, Step(number, total, 0))
        assert losses["loss"].isfinite()
    assert seen == [(8, 1 + few, 128), (8, 1 + 16, 128)]


def test_patches_are_drawn_evenly_and_as_many_of_each_image() -> None:
    recipe = Flip(mask_ratio=0.75)
    data: Any = recipe.open_data()
    assets, rng = recipe.assets(data), np.random.default_rng(0)
    kept = torch.stack([recipe.sample(assets, data.source.record(0), rng)[1] for _ in range(2000)])
    assert kept.shape == (2000, 4) and all(len(row.unique()) == 4 for row in kept)
    counts = torch.bincount(kept.flatten(), minlength=16).double()
    assert (counts - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("recipe", [Flip(), Clipa()])
def test_micro_batches_and_checkpointing_see_the_same_tokens_as_the_whole_batch(recipe: Any) -> None:
    gradients = []
    for accum, recomputes in ((1, False), (2, False), (2, True)):
        model, _, parts = made(recipe, accum)
        model.module.double().set_activation_checkpointing(recomputes)
        loss = recipe.backward(model, parts, Step(0, 10, 0))["loss"]
        gradients.append([loss, *(p.grad for p in model.module.parameters())])
    for others in gradients[1:]:
        for x, y in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_a_caption_is_cut_before_its_end_token() -> None:
    tokens = torch.tensor([[7, 1, 2, 3, 9, 0], [7, 4, 9, 0, 0, 0], [7, 1, 2, 3, 4, 9]])
    found = shortened(ClipBatch(torch.zeros(3), tokens, [5, 3, 6]), 4)
    assert found.tokens.tolist() == [[7, 1, 2, 9], [7, 4, 9, 0], [7, 1, 2, 9]] and found.lengths == [4, 3, 4]


def test_what_leaves_nothing_out_is_refused() -> None:
    for recipe, sentence in (
        (Flip(mask_ratio=0.0), "must leave something out"),
        (Flip(mask_ratio=1.0), "must leave out and keep at least one of 16 patches, got 1.0"),
        (Flip(full_share=1.0), r"--full-share must be in \[0, 1\), got 1.0"),
        (Clipa(image_scale=0.0), "--image-scale must be above 0 and at most 1, got 0.0"),
        (Clipa(text_tokens=32), "--text-tokens must be from 3 to 31, got 32"),
    ):
        with pytest.raises(ValueError, match=sentence):
            recipe.assets(recipe.open_data())
