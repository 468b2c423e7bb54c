"""FILIP against the paper's formulas on transformers' towers, and what padding and ties may not do."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from mmcore.metrics.retrieval import late_scores
from mmcore.recipe import Step
from mmcore.systems.clip.names import HF
from mmcore.systems.clip.weights import save_clip
from mmcore.systems.filip.model import FILIP
from mmcore.systems.filip.recipe import Filip, top_tokens
from tests.systems.clip.test_weights import small_config


def make() -> FILIP:
    torch.manual_seed(0)
    model = FILIP(replace(small_config(), text=replace(small_config().text, eos_token_id=9)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def batch(model: FILIP) -> tuple[Tensor, Tensor]:
    """A caption of one token, and of all."""
    text, size = model.config.text, model.config.vision.image_size
    tokens = torch.randint(0, 9, (4, text.context_length))
    tokens[torch.arange(4), torch.tensor([0, 2, 3, text.context_length - 1])] = 9
    return torch.randn(4, 3, size, size), tokens


def published(theirs: CLIPModel, images: Tensor, tokens: Tensor) -> Tensor:
    """InfoNCE of the mean over tokens of the best of the other side, a caption's tokens being those up to its end."""
    of_image = theirs.vision_model(images).last_hidden_state
    image = F.normalize(theirs.visual_projection(theirs.vision_model.post_layernorm(of_image)), dim=-1)
    text = F.normalize(theirs.text_projection(theirs.text_model(tokens).last_hidden_state), dim=-1)
    rows, cols = [], []
    for i in range(len(images)):
        for j in range(len(tokens)):
            words = text[j, : int((tokens[j] == 9).int().argmax()) + 1]
            cosines = image[i] @ words.T
            rows.append(cosines.max(1).values.mean())
            cols.append(cosines.max(0).values.mean())
    of_rows, of_cols = (theirs.logit_scale.exp() * torch.stack(x).view(len(images), -1) for x in (rows, cols))
    own = torch.arange(len(images))
    return (F.cross_entropy(of_rows, own) + F.cross_entropy(of_cols.T, own)) / 2


def test_loss_and_gradients_are_those_of_the_formula_on_transformers_towers(tmp_path) -> None:
    ours = make()
    save_clip(ours, tmp_path / "clip")
    theirs = CLIPModel.from_pretrained(tmp_path / "clip", attn_implementation="sdpa").double().eval()
    ours = ours.double()
    images, tokens = batch(ours)
    loss = Filip().objective(ours(images.double(), tokens), [], Step(0, 1, 0))["loss"]
    expected = published(theirs, images.double(), tokens)
    assert abs(loss - expected) < 1e-9
    loss.backward()
    expected.backward()
    found = HF.write({name: p.grad if p.grad is not None else p * 0 for name, p in ours.named_parameters()})
    for name, p in theirs.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        assert (found[name].reshape(grad.shape) - grad).abs().max() < 1e-9, name


def test_padding_changes_nothing_and_no_padding_wins() -> None:
    model = make().eval()
    images, tokens = batch(model)
    image, text, _ = model(images, tokens)
    other = tokens.clone()
    other[0, 1:] = 3  # behind the end token
    assert torch.equal(model(None, other)[1], text) and (text[0, 1:] == 0).all()
    against = -image[:1, :1].expand(1, 1, -1)  # every cosine is below that of padding, 0
    scores = late_scores(image[:1, :1], F.pad(against, (0, 0, 0, 3)))
    assert all(abs(x.item() + 1) < 1e-5 for x in scores)


def test_the_best_tokens_are_those_nearest_to_the_pair_and_ties_keep_their_order() -> None:
    text = torch.tensor([[[1.0, 0], [0, 1], [0, 0]]])
    image = torch.tensor([[[0.0, 1], [1, 0], [-1, 0], [1, 0]]])
    words = text.ne(0).any(2)
    of_image, of_text, of_words = top_tokens(image, text, words, 2)
    assert torch.equal(of_image, image[:, :2]) and torch.equal(of_text, text[:, :2]) and of_words.all()
    of_image, of_text, of_words = top_tokens(image, text, words, 9)
    assert of_image.shape == image.shape and of_words.tolist() == [[True, True, False]]
    both = [Filip(top_tokens=k).objective((image, text, torch.ones(1)), [], Step(0, 1, 0))["loss"] for k in (None, 9)]
    torch.testing.assert_close(*both)


def test_flags_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="--top-tokens must be at least 1, got 0"):
        Filip(top_tokens=0).assets(None)  # pyright: ignore[reportArgumentType]
