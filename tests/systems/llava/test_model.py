"""LLaVA: parity with transformers, what is learned and what is frozen, packed rows, rows without an image."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmcore.integrations.transformers import register
from mmcore.labels import IMAGE_TOKEN
from mmcore.parts.language_weights import LANGUAGE, beside_language
from mmcore.parts.vit import VisionConfig
from mmcore.systems.llava.model import Llava, LlavaConfig, Trainable
from mmcore.systems.llava.weights import config_from_hf, hf_layout
from tests.refusals import refuses
from tests.systems.blip2.test_lm import MODELS, VOCAB

register()

SIZE, MARK, PAD = 16, VOCAB - 1, 1
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
IMAGE_SIZES = [(40, 20), (10, 30), (17, 17)]
VISION: dict[str, Any] = {
    "image_size": SIZE, "patch_size": 4, "hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 40,
}  # fmt: skip
KINDS = ["llava", "llava_next"]
TIED = {"text_config": {**MODELS["qwen"].to_dict(), "tie_word_embeddings": True}, "tie_word_embeddings": True}
TEXTS: dict[str, dict[str, Any]] = {"llama": {}, "qwen": {}, "tied": TIED}


def hf_model(name: str, kind: str, **settings: Any) -> Any:
    settings = {
        "vision_config": hf.CLIPVisionConfig(**VISION).to_dict(), "text_config": MODELS[name].to_dict(),
        "image_token_index": MARK, "image_seq_length": 16, **settings,
    }  # fmt: skip
    torch.manual_seed(0)
    model: Any
    if kind == "llava":
        model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(**settings))
    else:
        model = hf.LlavaNextForConditionalGeneration(hf.LlavaNextConfig(**settings, image_grid_pinpoints=PINPOINTS))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


def ours_of(theirs: Any, trainable: Trainable = "all") -> Llava:
    config, whole, unread = config_from_hf("test", theirs.config.to_dict())
    state = hf_layout().renamed(theirs.state_dict())
    language: Any = hf.AutoModelForCausalLM.from_config(whole.text_config)
    language.load_state_dict({n.removeprefix(LANGUAGE): x for n, x in state.items() if n.startswith(LANGUAGE)})
    ours = Llava(config, language, trainable=trainable).double().eval()
    state = {n: x for n, x in state.items() if not n.startswith(LANGUAGE)}
    ours.load_state_dict(hf_layout().read("test", state, beside_language(ours), unread=unread), strict=False)
    return ours


def pair(name: str, kind: str, **settings: Any) -> tuple[Llava, Any]:
    """Ours and transformers' with the same weights, which are numbers of float32."""
    theirs = hf_model(name, kind, **settings).float().double()
    return ours_of(theirs), theirs


def theirs_float(name: str, kind: str = "llava", **settings: Any) -> Any:
    return hf_model("qwen" if name == "tied" else name, kind, **TEXTS[name], **settings).float()


def ours_float(name: str, kind: str = "llava") -> Llava:
    return ours_of(theirs_float(name, kind), "projector").float()


def documents(config: LlavaConfig) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Two images among words, words alone, an image that comes first; the images and their sizes."""
    generator = torch.Generator().manual_seed(1)
    sizes = IMAGE_SIZES if config.has_tiles else [(SIZE, SIZE)] * 3

    def words(count: int) -> Tensor:
        return torch.randint(4, MARK, (count,), generator=generator)

    marks = [torch.full((config.num_image_tokens(size),), IMAGE_TOKEN) for size in sizes]
    rows = [torch.cat([words(3), marks[0], words(2), marks[1], words(4)]), words(7)]
    rows.append(torch.cat([marks[2], words(5)]))
    num_views = sum(config.num_views(size) for size in sizes)
    images = torch.randn(num_views, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return rows, images, torch.tensor(sizes) if config.has_tiles else None


def labels_of(tokens: Tensor) -> Tensor:
    return tokens.masked_fill((tokens == IMAGE_TOKEN) | (tokens == PAD) | (tokens % 5 == 0), -100)


def batch(config: LlavaConfig) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    rows, images, sizes = documents(config)
    tokens = pad_sequence(rows, batch_first=True, padding_value=PAD)
    return tokens, labels_of(tokens), images, sizes


def hf_inputs(tokens: Tensor, images: Tensor, sizes: Tensor | None) -> dict[str, Tensor]:
    inputs = {"input_ids": tokens.masked_fill(tokens == IMAGE_TOKEN, MARK), "pixel_values": images}
    inputs["attention_mask"] = (tokens != PAD).long()
    return inputs if sizes is None else inputs | {"image_sizes": sizes}


@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_are_those_of_transformers_row_by_row(kind: str) -> None:
    ours, theirs = pair("llama", kind)
    tokens, labels, images, sizes = batch(ours.config)
    with torch.no_grad():
        logits = theirs(**hf_inputs(tokens, images, sizes)).logits[:, :-1]
    labels[1, 1:] = torch.where(labels[1, 1:] == -100, labels[1, 1:], logits[1].argmax(-1))
    total, count, is_greedy = ours.likelihood(tokens, labels, images, sizes)
    for row in range(len(tokens)):
        learned = labels[row, 1:] != -100
        wanted = labels[row, 1:][learned]
        expected = -F.cross_entropy(logits[row][learned], wanted, reduction="sum")
        torch.testing.assert_close(total[row], expected.float(), atol=1e-4, rtol=1e-5)
        assert int(count[row]) == len(wanted) > 0
        assert bool(is_greedy[row]) == bool((logits[row][learned].argmax(-1) == wanted).all()) == (row == 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_loss_and_all_gradients_are_those_of_transformers(name: str, kind: str) -> None:
    ours, theirs = pair(name, kind)
    tokens, labels, images, sizes = batch(ours.config)
    found = theirs(**hf_inputs(tokens, images, sizes), labels=labels)
    expected = F.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    expected.backward()
    total, count = ours("loss", tokens, labels, images, sizes)
    total.backward()
    assert int(count) == int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=0)
    # transformers takes its logits to float32
    torch.testing.assert_close((total / count).float(), found.loss, rtol=1e-6, atol=0)
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    grads = hf_layout().renamed(grads)
    found = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert found.keys() == dict(ours.named_parameters()).keys()
    assert ("image_newline" in found) == (kind == "llava_next")
    language = {n: grad for n, grad in found.items() if n.startswith(LANGUAGE)}
    for n, grad in found.items():
        theirs = next(hf_layout().pairs([n])).theirs if n not in language else [n]
        expected = torch.cat([grads[x] for x in theirs])
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


# transformers' eager has a softmax of float32
@pytest.mark.parametrize(("implementation", "tolerance"), [("sdpa", 1e-10), ("eager", 1e-6), ("mmkernels", 1e-10)])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_do_not_see_each_other(kind: str, implementation: str, tolerance: float) -> None:
    ours, _ = pair("qwen", kind)
    ours.language_model.set_attn_implementation(implementation)
    rows, images, sizes = documents(ours.config)
    views = [1] * 3 if sizes is None else [ours.config.num_views((h, w)) for h, w in sizes.tolist()]
    split = images.split(views)
    of_rows = [[0, 1], [], [2]]
    separate = torch.zeros((), dtype=torch.float64)
    num_learned = 0
    for row, which in zip(rows, of_rows):
        own = torch.cat([images[:0], *(split[i] for i in which)])
        own_sizes = None if sizes is None else sizes[which]
        total, count = ours.loss(row[None], labels_of(row)[None], own, own_sizes)
        separate, num_learned = separate + total, num_learned + int(count)
    separate.backward()
    expected = {n: p.grad for n, p in ours.named_parameters()}
    ours.zero_grad()
    rows = [*rows, torch.full((3,), PAD)]
    tokens, positions = torch.cat(rows)[None], torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed, count = ours.loss(tokens, labels_of(tokens), images, sizes, positions)
    assert int(count) == num_learned
    torch.testing.assert_close(packed, separate, rtol=tolerance, atol=0)
    packed.backward()
    for n, p in ours.named_parameters():
        grad = expected[n]
        assert p.grad is not None and grad is not None
        torch.testing.assert_close(p.grad, grad, rtol=tolerance, atol=tolerance * grad.abs().max().item())
    mixed, _ = ours.loss(tokens, labels_of(tokens), images, sizes)
    assert abs((mixed / packed).item() - 1) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_words_alone_still_run_tower_and_projector_and_teach_them_nothing(kind: str) -> None:
    ours, theirs = pair("llama", kind)
    tokens = torch.randint(4, MARK, (2, 6))
    total, count = ours.loss(tokens, tokens, torch.zeros(0, 3, SIZE, SIZE))
    expected = theirs(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(
        total, F.cross_entropy(expected, tokens[:, 1:].flatten(), reduction="sum"), rtol=1e-11, atol=0
    )
    assert int(count) == 10
    total.backward()
    for n, p in ours.named_parameters():
        assert p.grad is not None and n.startswith("language_model.") == bool(p.grad.any())


@pytest.mark.parametrize("kind", KINDS)
def test_image_tokens_and_features_must_be_as_many(kind: str) -> None:
    ours, _ = pair("llama", kind)
    tokens, labels, images, sizes = batch(ours.config)
    places = tokens == IMAGE_TOKEN
    num_tokens, (fewer, more) = int(places.sum()), (tokens.clone(), tokens.clone())
    fewer[tuple(places.nonzero()[0])] = 5
    more[tuple((~places).nonzero()[0])] = IMAGE_TOKEN
    message = "Llava: tokens must hold {} image tokens, as many as the images have features, got {}"
    for wrong, count in ((fewer, num_tokens - 1), (more, num_tokens + 1)):
        refuses(message.format(num_tokens, count), ours.loss, wrong, labels, images, sizes)
    refuses(message.format(0, num_tokens), ours.loss, tokens, labels, images[:0], None)


def test_sizes_must_belong_to_the_images() -> None:
    plain, tiled = pair("llama", "llava")[0], pair("llama", "llava_next")[0]
    tokens, labels, images, sizes = batch(tiled.config)
    with pytest.raises(ValueError, match="Llava: images must be the 11 views that image_sizes tell of, got 10"):
        tiled.loss(tokens, labels, images[1:], sizes)
    refuses("Llava: image_sizes must be given with tiles, got None", tiled.loss, tokens, labels, images)
    refuses("Llava: image_sizes must be None without tiles, got some", plain.loss, tokens, labels, images, sizes)


@pytest.mark.parametrize(("trainable", "parts"), [
    ("projector", {"projector", "image_newline"}),
    ("language", {"projector", "image_newline", "language_model"}),
    ("all", {"projector", "image_newline", "language_model", "visual"}),
])  # fmt: skip
def test_what_is_frozen_learns_nothing_and_stays_in_evaluation(trainable: Trainable, parts: set[str]) -> None:
    ours, _ = pair("llama", "llava_next")
    ours.set_trainable(trainable)
    assert not any(m.training for m in ours.modules())
    ours.train()
    assert ours.projector.training and ours.visual.training == ("visual" in parts)
    assert ours.language_model.training == ("language_model" in parts)
    ours.loss(*batch(ours.config))[0].backward()
    assert {n.split(".")[0] for n, p in ours.named_parameters() if p.requires_grad} == parts
    assert all((p.grad is not None) == (n.split(".")[0] in parts) for n, p in ours.named_parameters())


def test_a_new_one_trains_its_projector_alone() -> None:
    _, theirs = pair("llama", "llava")
    ours = Llava(ours_of(theirs).config, ours_of(theirs).language_model)
    assert ours.trainable == "projector" and ours.training and not ours.language_model.training
    with pytest.raises(ValueError, match=r"Llava: trainable must be one of .*, got 'tower'"):
        ours.set_trainable("tower")  # pyright: ignore[reportArgumentType]


def test_the_projector_of_the_first_llava_is_linear() -> None:
    config = LlavaConfig(VisionConfig(image_size=16, patch_size=4, width=20, num_heads=2), "linear")
    ours = Llava(config, pair("llama", "llava")[0].language_model.float())
    weights = dict(ours.projector.named_parameters())
    assert {n: list(x.shape) for n, x in weights.items()} == {"weight": [24, 20], "bias": [24]}
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = F.linear(ours.visual(images)[:, 1:], weights["weight"], weights["bias"])
        torch.testing.assert_close(ours.features(images), expected.flatten(0, 1))


def test_a_config_that_no_llava_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LlavaConfig: projector must be one of .*, got 'mlp3x_gelu'"):
        LlavaConfig(VisionConfig(), "mlp3x_gelu")  # pyright: ignore[reportArgumentType]
    for pinpoint in ((224, 300), (0, 224)):
        with pytest.raises(ValueError, match=r"grid_pinpoints must be multiples of .* image_size 224, got"):
            LlavaConfig(VisionConfig(), grid_pinpoints=((224, 448), pinpoint))
