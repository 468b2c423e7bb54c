"""The drop-in classes on one process: their originals' formulas, and what they refuse."""

import inspect
import math
from enum import Enum
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.losses import BackpropType, ClipLoss, ContrastiveLossWithTemperature, SigLipLoss
from tests.refusals import refuses


def features(num: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    a, b = F.normalize(torch.randn(2, num, 6, generator=generator, dtype=torch.float64), dim=-1)
    return a.requires_grad_(), b.requires_grad_()


def assert_same(ours: Tensor, published: Tensor, *leaves: Tensor) -> None:
    assert abs(ours - published) < 1e-12
    grads = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (ours, published))
    for found, expected in zip(*grads, strict=True):
        assert (found - expected).abs().max() < 1e-12


def test_clip_loss_is_open_clips_formula():
    (a, b), scale = features(), torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(len(a))
    logits_per_image, logits_per_text = scale * a @ b.T, scale * b @ a.T
    published = (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2
    loss = ClipLoss()(a, b, scale)
    assert isinstance(loss, Tensor)
    assert_same(loss, published, a, b, scale)
    assert ClipLoss()(a, b, scale, output_dict=True) == {"contrastive_loss": loss}


def test_a_bias_of_all_logits_leaves_clip_loss_alone_and_gets_the_gradient_zero():
    (a, b), bias = features(), torch.tensor(-10.0, requires_grad=True)
    loss = ClipLoss()(a, b, 14.0, logit_bias=bias)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert loss == ClipLoss()(a, b, 14.0) and bias.grad == 0.0


def test_siglip_loss_is_open_clips_formula():
    a, b = features()
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (10.0, -10.0))
    signs = 2 * torch.eye(len(a), dtype=torch.float64) - 1
    published = -F.logsigmoid(signs * (scale * a @ b.T + bias)).sum() / len(a)
    loss = SigLipLoss()(a, b, scale, bias)
    assert isinstance(loss, Tensor)
    assert_same(loss, published, a, b, scale, bias)
    assert SigLipLoss(dist_impl="gather")(a, b, scale, bias, output_dict=True) == {"contrastive_loss": loss}
    without = -F.logsigmoid(signs * (scale * a @ b.T)).sum() / len(a)
    assert abs(SigLipLoss()(a, b, scale, None) - without) < 1e-12  # pyright: ignore[reportOperatorIssue]


@pytest.mark.parametrize("chunk_size", [1, 4, 9, 1000])
def test_siglip_loss_in_chunks_is_open_clips_formula_and_the_same_loss(chunk_size: int) -> None:
    a, b = features()
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (10.0, -10.0))
    published = torch.zeros((), dtype=torch.float64)
    for i in range(0, len(a), chunk_size):
        logits = scale * a[i : i + chunk_size] @ b.T + bias
        published = published + F.softplus(logits).sum() - logits.diagonal(i).sum()
    loss = SigLipLoss(chunk_size=chunk_size)(a, b, scale, bias)
    assert_same(loss, published / len(a), a, b, scale, bias)  # pyright: ignore[reportArgumentType]
    assert loss == SigLipLoss(False, 0, 1, None, 0)(a, b, scale, bias)


# open_clip's arguments and their defaults, in order, of 3.3 and of 4.2; a class of ours may have more behind them
CLIP = {"local_loss": False, "gather_with_grad": False, "cache_labels": False, "rank": 0, "world_size": 1}
SIGLIP = {"cache_labels": False, "rank": 0, "world_size": 1, "dist_impl": None}
FEATURES = dict.fromkeys(("image_features", "text_features", "logit_scale"), inspect.Parameter.empty)
PUBLISHED: dict[Any, tuple[dict[str, Any], ...]] = {
    ClipLoss.__init__: (CLIP | {"use_horovod": False}, CLIP),
    ClipLoss.forward: (FEATURES | {"logit_bias": None, "output_dict": False},),
    SigLipLoss.__init__: (SIGLIP, SIGLIP | {"chunk_size": 0}),
    SigLipLoss.forward: (FEATURES | {"logit_bias": inspect.Parameter.empty, "output_dict": False},),
}


def arguments(function: Any) -> dict[str, Any]:
    """Names and defaults, in order, without self."""
    named = list(inspect.signature(function).parameters.items())[1:]
    return {name: parameter.default for name, parameter in named}


def begins_with(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return list(ours.items())[: len(theirs)] == list(theirs.items())


@pytest.mark.parametrize("function", PUBLISHED, ids=lambda function: function.__qualname__)
def test_the_signatures_are_open_clips(function: Any) -> None:
    for theirs in PUBLISHED[function]:
        assert begins_with(arguments(function), theirs)


@pytest.mark.parametrize("function", PUBLISHED, ids=lambda function: function.__qualname__)
def test_the_signatures_are_those_of_the_open_clip_that_is_installed(function: Any) -> None:
    installed = pytest.importorskip("open_clip.loss", exc_type=ImportError)
    of_class, method = function.__qualname__.split(".")
    assert begins_with(arguments(function), arguments(getattr(getattr(installed, of_class), method)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_with_temperature_is_torchmultimodals_formula(masked, smoothing):
    a, b = features()
    module = ContrastiveLossWithTemperature().double()
    kwargs = {"label_smoothing": smoothing} if smoothing else None
    mask = torch.arange(len(a)) % 3 > 0 if masked else torch.ones(len(a), dtype=torch.bool)
    logits_a = (a @ b.T * module.logit_scale.exp())[mask]
    logits_b = (b @ a.T * module.logit_scale.exp())[mask]
    labels = torch.arange(len(a))[mask]
    cross_entropies = (F.cross_entropy(x, labels, label_smoothing=smoothing) for x in (logits_a, logits_b))
    loss = module(a, b, cross_entropy_kwargs=kwargs, mask=mask if masked else None)
    assert_same(loss, sum(cross_entropies) / 2, a, b, module.logit_scale)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("first", "limits", "clamped"), [
    (math.log(1 / 0.07), (math.log(1), math.log(100)), math.log(1 / 0.07)),
    (9.0, (math.log(1), math.log(100)), math.log(100)), (-1.0, (math.log(1), math.log(100)), 0.0),
    (9.0, (0.0, None), 9.0), (-1.0, (None, 5.0), -1.0),
])  # fmt: skip
def test_the_learnable_scale_is_clamped_in_place_in_forward(first, limits, clamped):
    module = ContrastiveLossWithTemperature(first, *limits)
    module(*features())
    assert module.logit_scale.item() == pytest.approx(clamped, abs=1e-6)
    module(*features()).backward()
    assert module.logit_scale.grad is not None


def test_a_parameter_of_the_callers_is_taken_as_it_is_and_other_enums_by_name():
    class Theirs(Enum):
        GLOBAL = 7

    own = nn.Parameter(torch.tensor(2.0))
    module = ContrastiveLossWithTemperature(own)
    assert module.logit_scale is own
    module(*features(), backprop_type=Theirs.GLOBAL)


@pytest.mark.parametrize(("arguments", "complaint"), [
    ({"backprop_type": BackpropType.LOCAL}, "backprop_type must be GLOBAL, got BackpropType.LOCAL"),
    ({"backprop_type": BackpropType.NONE}, "backprop_type must be GLOBAL, got BackpropType.NONE"),
    ({"cross_entropy_kwargs": {"weight": 1}}, "cross_entropy_kwargs must hold label_smoothing alone"),
    ({"mask": torch.ones(9)}, r"mask must be bool \[9\], got torch.float32 \[9\]"),
    ({"mask": torch.ones(8, dtype=torch.bool)}, r"mask must be bool \[9\], got torch.bool \[8\]"),
])  # fmt: skip
def test_what_the_loss_with_temperature_does_not_support_is_refused_by_name(arguments: dict[str, Any], complaint):
    refuses(f"ContrastiveLossWithTemperature: {complaint}", ContrastiveLossWithTemperature(), *features(), **arguments)


def test_settings_that_cannot_be_honoured_are_refused():
    refuses("ClipLoss: use_horovod must be False, got True", ClipLoss, use_horovod=True)
    for size in (-1, 2.5):
        refuses(r"SigLipLoss: chunk_size must be a whole .*, got", SigLipLoss, chunk_size=size)
    refuses(r"SigLipLoss: dist_impl must be None or one of .*, got 'ring'", SigLipLoss, dist_impl="ring")
    with pytest.raises(ValueError, match="logit_scale_min must be given where logit_scale_max is None"):
        ContrastiveLossWithTemperature(logit_scale_min=None, logit_scale_max=None)
    refuses(r"rank and world_size must be .*, \(0, 1\), got \(1, 4\)", ClipLoss(rank=1, world_size=4), *features(), 1.0)
    refuses(r"rank and world_size must be .*, \(0, 1\), got \(0, 2\)", SigLipLoss(world_size=2), *features(), 1.0, 0.0)
