"""BLIP-2's folders there and back, and image towers from wherever they come."""

from pathlib import Path

import pytest
import torch
from transformers import Blip2ForImageTextRetrieval

from mmcore.parts.towers import load_tower
from mmcore.parts.vit import ViT
from mmcore.systems.blip2.weights import load_blip2, save_blip2
from mmcore.systems.clip.model import CLIP
from mmcore.systems.clip.shapes import CLIP_CONFIGS
from mmcore.systems.clip.weights import save_clip
from tests.systems.blip2.test_model import batch, hf_model, ours_of


def test_a_first_stage_that_is_saved_is_what_transformers_loads(tmp_path: Path) -> None:
    ours = ours_of(hf_model(torch.float32))
    with torch.no_grad():
        ours.temperature.fill_(0.05)
    save_blip2(ours, tmp_path / "ours")
    theirs = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "ours").eval()
    images, tokens, num_text = batch()
    mask = (torch.arange(tokens.shape[1]) < num_text[:, None]).long()
    with torch.no_grad():
        found = theirs(images.float(), tokens, mask, use_image_text_matching_head=True).logits_per_image
        expected = ours("match", None, images.float(), torch.arange(3), tokens, num_text)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_folder_of_transformers_loads_and_what_it_lacks_starts_anew(tmp_path: Path) -> None:
    theirs = hf_model(torch.float32)
    theirs.save_pretrained(tmp_path)
    ours = load_blip2(tmp_path)
    expected = ours_of(theirs).state_dict()
    for name, x in ours.state_dict().items():
        assert torch.equal(x, expected[name]) or name.startswith("text_head.transform"), name
    assert ours.temperature.item() == pytest.approx(0.07)


class TestTowers:
    def test_of_a_clip_without_its_last_layer(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        config = CLIP_CONFIGS["tiny"]
        clip = CLIP(config).eval()
        save_clip(clip, tmp_path / "clip")
        tower = load_tower(tmp_path / "clip")
        assert tower.config.num_layers == config.vision.num_layers - 1
        vit = ViT(tower.config).eval()
        vit.load_state_dict(tower.state)
        seen = []
        last = clip.visual.transformer.blocks[-1]
        last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        images = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            clip.encode_image(images)
            torch.testing.assert_close(vit(images), seen[0])

    def test_of_a_blip2_as_it_is(self, tmp_path: Path) -> None:
        theirs = hf_model(torch.float32)
        theirs.save_pretrained(tmp_path)
        tower = load_tower(tmp_path)
        vit = ViT(tower.config).eval()
        vit.load_state_dict(tower.state)
        images = batch()[0].float()
        with torch.no_grad():
            expected = theirs.vision_model(images).last_hidden_state
            found = theirs.vision_model.post_layernorm(vit(images))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
