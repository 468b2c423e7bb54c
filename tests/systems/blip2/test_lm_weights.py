"""BLIP-2's second stage in folders of transformers, there and back, and its processor beside it."""

import json
import socket
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Blip2ForConditionalGeneration

from mmcore.systems.blip2.lm import BLIP2LM
from mmcore.systems.blip2.weights import load_blip2_lm, save_blip2_lm
from mmcore.weights import files
from tests.systems.blip2.test_lm import MODELS, QUERIES, VOCAB, batch, ours_float, pair
from tests.systems.test_weights import assert_same


def theirs_at(folder: Path) -> Any:
    return Blip2ForConditionalGeneration.from_pretrained(folder).eval()


def logits_of(ours: BLIP2LM, images: Tensor, tokens: Tensor) -> Tensor:
    text = ours.language_model.get_input_embeddings()(tokens)
    decoder = {"decoder_input_ids": tokens} if ours.language_model.config.is_encoder_decoder else {}
    return ours.language_model(inputs_embeds=torch.cat([ours.prefix(images), text], 1), **decoder).logits


def is_tied(language_model: Any) -> bool:
    return language_model.get_output_embeddings().weight is language_model.get_input_embeddings().weight


@pytest.mark.parametrize("name", list(MODELS))
def test_what_is_saved_is_what_transformers_loads(name: str, tmp_path: Path) -> None:
    ours = ours_float(name)
    save_blip2_lm(ours, tmp_path / "ours")
    theirs = theirs_at(tmp_path / "ours")
    images, tokens, _, _ = batch()
    images, tokens = images.float(), tokens[:, :2]
    ids = torch.cat([torch.full((3, QUERIES), theirs.config.image_token_index), tokens], 1)
    decoder = {"decoder_input_ids": tokens} if name == "t5" else {}
    with torch.no_grad():
        found = theirs(pixel_values=images, input_ids=ids, **decoder).logits
        torch.testing.assert_close(found[..., :VOCAB], logits_of(ours, images, tokens), rtol=1e-5, atol=1e-5)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = ours.generate(images, tokens, torch.full((3,), 2), **options)
    captions = theirs.generate(pixel_values=images, input_ids=ids, **options)
    assert torch.equal(captions[:, -expected.shape[1] :], expected)
    assert is_tied(theirs.language_model) == is_tied(ours.language_model)
    # the row of the image's token is the copy's alone
    assert ours.language_model.get_input_embeddings().num_embeddings == VOCAB
    assert theirs.language_model.get_input_embeddings().num_embeddings == VOCAB + 1


@pytest.mark.parametrize("name", list(MODELS))
def test_a_folder_of_transformers_loads_without_the_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ours, theirs = pair(name)
    theirs.float().save_pretrained(tmp_path)
    network = Mock(side_effect=OSError)
    for function in ("socket", "getaddrinfo"):
        monkeypatch.setattr(socket, function, network)
    again = load_blip2_lm(tmp_path)
    assert not network.called
    assert_same(again, ours.float())
    assert is_tied(again.language_model) == (name in ("opt", "t5"))
    assert again.qformer.training and not again.visual.training and not again.language_model.training
    trained = {n.split(".")[0] for n, p in again.named_parameters() if p.requires_grad}
    assert trained == {"norm_vision", "qformer", "language_projection"}


def test_large_weights_are_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair("opt")
    ours, theirs = ours.float(), theirs.float()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    monkeypatch.setattr(files, "SHARD_BYTES", 200_000)
    save_blip2_lm(ours, tmp_path / "ours")
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        parts = {p.name: load_file(p) for p in folder.glob("*.safetensors")}
        assert len(parts) > 1 and weight_map == {n: part for part, tensors in parts.items() for n in tensors}
        assert all(sum(x.nbytes for x in part.values()) <= 200_000 for part in parts.values())
        assert_same(load_blip2_lm(folder), ours)
    state = theirs_at(tmp_path / "ours").state_dict()
    assert all(torch.equal(state[n][: len(x)], x) for n, x in theirs.state_dict().items())


def test_where_an_answer_ends_is_the_language_models_own_to_say(tmp_path: Path) -> None:
    ours = ours_float("llama")
    images, tokens, _, _ = batch()
    inputs = (images.float(), tokens[:, :2], torch.full((3,), 2))
    options = {"max_new_tokens": 6, "do_sample": False}
    first, _, third = ours.generate(*inputs, **options)[0, :3].tolist()
    ours.language_model.generation_config.eos_token_id = [3, third]
    ours.language_model.generation_config.suppress_tokens = [first]
    expected = ours.generate(*inputs, **options)
    save_blip2_lm(ours, tmp_path / "ours")
    again = load_blip2_lm(tmp_path / "ours").eval()
    assert torch.equal(again.generate(*inputs, **options), expected)
    assert again.language_model.generation_config.eos_token_id == [3, third]
    theirs = theirs_at(tmp_path / "ours")
    assert theirs.language_model.generation_config.eos_token_id == [3, third]
