"""transformers' dual encoders on our losses, on one process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel

from mmcore.integrations.contrastive import use_global_loss
from tests.mmcore.integrations.dual_encoders import MODELS, batch, make
from tests.refusals import refuses


@pytest.mark.parametrize("name", MODELS)
def test_on_one_rank_loss_and_gradients_are_the_models_own(name: str) -> None:
    own, ours = make(name), make(name)
    use_global_loss(ours)
    losses = [model(**batch(6), return_loss=True).loss for model in (own, ours)]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-12)
    found = dict(ours.named_parameters())
    for parameter, expected in own.named_parameters():
        if expected.grad is None:
            assert found[parameter].grad is None
            continue
        difference = (found[parameter].grad.reshape(expected.shape) - expected.grad).abs().max()
        assert difference <= 1e-10 * expected.grad.abs().max() + 1e-15, parameter
    assert own.logit_scale.grad.abs().max() > 1e-3


def test_the_scale_has_an_axis_for_deepspeed_and_none_in_files_and_loads_from_either(tmp_path: Path) -> None:
    model = make("CLIP")
    model.logit_scale.requires_grad_(False)
    use_global_loss(model)
    assert model.logit_scale.shape == (1,) and not model.logit_scale.requires_grad
    assert model.state_dict()["logit_scale"].shape == ()
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["logit_scale"].shape == ()
    assert CLIPModel.from_pretrained(tmp_path).logit_scale.item() == 1.5
    for shape in ((), (1,)):
        model.load_state_dict(model.state_dict() | {"logit_scale": torch.full(shape, 2.0 + len(shape))})
        assert model.logit_scale.tolist() == [2.0 + len(shape)]


def test_without_a_loss_the_output_has_none_and_what_cannot_be_is_refused() -> None:
    model = make("CLIP")
    use_global_loss(model)
    output = model(**batch(3))
    assert output.loss is None and output.logits_per_image.shape == (3, 3)
    refuses("model must have a parameter logit_scale, got Linear", use_global_loss, torch.nn.Linear(2, 2))
    refuses("return_dict must be True, got False", model, **batch(3), return_loss=True, return_dict=False)
