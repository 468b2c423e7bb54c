"""LLaVA in folders of transformers, there and back, its processor beside it, and the original's mm_projector.bin."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmcore.labels import IMAGE_TOKEN
from mmcore.systems.llava.model import Llava
from mmcore.systems.llava.weights import load_llava, load_projector, save_llava
from tests.refusals import refuses
from tests.systems.blip2.test_lm import MODELS, VOCAB
from tests.systems.blip2.test_lm_weights import is_tied
from tests.systems.llava.test_model import (
    KINDS,
    PAD,
    TEXTS,
    batch,
    documents,
    hf_inputs,
    ours_float,
    ours_of,
    theirs_float,
)
from tests.systems.test_weights import assert_same


def theirs_at(folder: Path, kind: str) -> Any:
    kinds: dict[str, Any] = {"llava": hf.LlavaForConditionalGeneration}
    kinds["llava_next"] = hf.LlavaNextForConditionalGeneration
    model, info = kinds[kind].from_pretrained(folder, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def loss_of(model: Llava) -> Tensor:
    tokens, labels, images, sizes = batch(model.config)
    with torch.no_grad():
        total, count = model.eval().loss(tokens, labels, images.float(), sizes)
    return total / count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(TEXTS))
def test_what_is_saved_is_what_transformers_loads(name: str, kind: str, tmp_path: Path) -> None:
    ours = ours_float(name, kind)
    ours.language_model.generation_config.eos_token_id = [3, 17]
    save_llava(ours, tmp_path / "ours")
    theirs = theirs_at(tmp_path / "ours", kind)
    tokens, labels, images, sizes = batch(ours.config)
    inputs = hf_inputs(tokens, images.float(), sizes)
    inputs["input_ids"] = tokens.masked_fill(tokens == IMAGE_TOKEN, theirs.config.image_token_index)
    with torch.no_grad():
        logits = theirs(**inputs).logits[:, :-1, :VOCAB]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss_of(ours), expected, rtol=1e-5, atol=0)
    rows, images, sizes = documents(ours.config)
    prompts = pad_sequence(rows, batch_first=True, padding_value=PAD, padding_side="left")
    num_text = torch.tensor([len(row) for row in rows])
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = ours.generate(prompts, num_text, images.float(), sizes, **options)
    inputs = hf_inputs(prompts, images.float(), sizes)
    inputs["input_ids"] = prompts.masked_fill(prompts == IMAGE_TOKEN, theirs.config.image_token_index)
    assert torch.equal(theirs.generate(**inputs, **options)[:, prompts.shape[1] :], expected)
    # the row of the image's token is the copy's alone
    assert theirs.get_input_embeddings().num_embeddings == VOCAB + 1
    assert (theirs.lm_head.weight is theirs.get_input_embeddings().weight) == (name == "tied")
    again = load_llava(tmp_path / "ours")
    assert again.trainable == "projector"
    for model in (theirs, again.language_model):
        assert model.generation_config.eos_token_id == [3, 17]


def of_version_4(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def of_version_4_52(name: str) -> str:
    name = of_version_4(name).replace("language_model.model.", "language_model.")
    return name.replace("language_model.lm_head", "lm_head") if "lm_head" in name else f"model.{name}"


def in_memory(name: str) -> str:
    """transformers 5's names, of a model and not of a file."""
    return of_version_4_52(name).replace("vision_model.", "")


@pytest.mark.parametrize("renamed", [str, in_memory, of_version_4_52, of_version_4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(TEXTS))
def test_every_layout_that_transformers_wrote_loads(name: str, kind: str, renamed: Callable[[str], str], tmp_path):
    theirs = theirs_float(name, kind)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {renamed(n): x for n, x in load_file(file).items()}
    if renamed is of_version_4:
        tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, file, metadata={"format": "pt"})
    if renamed is in_memory:
        assert tensors.keys() <= theirs.state_dict().keys()
    assert_same(load_llava(tmp_path), ours_of(theirs).float())


@pytest.mark.parametrize(("layer", "num_layers"), [(-2, 2), (-1, 3), (-3, 1), (2, 2), (1, 1)])
def test_the_layer_that_is_read_is_the_last_there_is(layer: int, num_layers: int, tmp_path: Path) -> None:
    theirs = theirs_float("llama", vision_feature_layer=layer)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_llava(tmp_path / "theirs")
    assert ours.config.vision.num_layers == num_layers
    tokens, labels, images, sizes = batch(ours.config)
    expected = theirs(**hf_inputs(tokens, images.float(), sizes), labels=labels).loss
    torch.testing.assert_close(loss_of(ours), expected, rtol=1e-5, atol=0)
    save_llava(ours, tmp_path / "ours")
    assert_same(load_llava(tmp_path / "ours"), ours)


@pytest.mark.parametrize(("kind", "text", "whole"), [("llava_next", True, False), ("llava", False, True)])
def test_the_whole_model_says_what_is_tied(kind: str, text: bool, whole: bool, tmp_path: Path) -> None:
    settings = {"text_config": {**MODELS["qwen"].to_dict(), "tie_word_embeddings": text}}
    theirs = theirs_float("qwen", kind, **settings, tie_word_embeddings=whole)
    assert (theirs.lm_head.weight is theirs.get_input_embeddings().weight) == whole
    theirs.save_pretrained(tmp_path)
    language = load_llava(tmp_path).language_model
    assert is_tied(language) == whole and torch.equal(language.get_output_embeddings().weight, theirs.lm_head.weight)


class TestTheOriginalsProjector:
    def saved(self, tmp_path: Path, state: object) -> Path:
        torch.save(state, tmp_path / "mm_projector.bin")
        return tmp_path / "mm_projector.bin"

    @pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
    def test_loads_in_the_models_dtype(self, projector: Any, tmp_path: Path) -> None:
        start = ours_float("llama")
        ours = Llava(replace(start.config, projector=projector), start.language_model)
        prefix = "model.mm_projector."
        learned = {prefix + n: torch.randn_like(x).half() for n, x in ours.projector.state_dict().items()}
        wanted = {"linear": {"weight", "bias"}, "mlp2x_gelu": {"0.weight", "0.bias", "2.weight", "2.bias"}}
        assert learned.keys() == {prefix + n for n in wanted[projector]}
        before = {n: x.clone() for n, x in ours.visual.state_dict().items()}
        load_projector(ours, self.saved(tmp_path, learned | {"model.embed_tokens.weight": torch.zeros(2)}))
        for n, x in ours.projector.state_dict().items():
            assert x.dtype == torch.float32 and torch.equal(x, learned[prefix + n].float())
        assert all(torch.equal(x, before[n]) for n, x in ours.visual.state_dict().items())

    def test_of_another_kind_or_of_anything_else_is_refused(self, tmp_path: Path) -> None:
        ours, file = ours_float("llama"), tmp_path / "mm_projector.bin"
        linear = {"model.mm_projector.weight": torch.zeros(24, 20), "model.mm_projector.bias": torch.zeros(24)}
        for state, message in (
            (linear, r"must hold a projector of shapes .*projector.0.weight.*, got .*projector.weight"),
            ({}, r"must hold a projector of shapes .*, got \{\}"),
            ([1, 2], "must hold tensors by name, got list"),
            ({"a": Path("/")}, "must be a whole pickle of tensors and nothing else, got"),
        ):
            refuses(f"load_projector: .*{file.name} {message}", load_projector, ours, self.saved(tmp_path, state))
        file.write_bytes(b"short")
        refuses(f"load_projector: .*{file.name} must be a whole pickle of tensors", load_projector, ours, file)
        refuses(r"load_projector: file must exist, got .*none.bin", load_projector, ours, tmp_path / "none.bin")
