"""SigLIP 2: parity with transformers' Siglip2Model on images of many aspects, files both ways, the decoder, budgets."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import Siglip2Config, Siglip2ImageProcessorPil, Siglip2Model
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from mmcore.data.transforms.images import normalized
from mmcore.data.transforms.naflex import NaflexPreprocess, Patches, patch_grid
from mmcore.losses import global_sigmoid_loss
from mmcore.nn import Packing, resized_positions
from mmcore.recipe import Step
from mmcore.runs import read_run
from mmcore.systems.siglip.weights import load_siglip
from mmcore.systems.siglip2.decoder import Decoder
from mmcore.systems.siglip2.distiller import Targets, Views, num_patches
from mmcore.systems.siglip2.model import SigLIP2
from mmcore.systems.siglip2.recipe import Siglip2, Siglip2Batch, within
from mmcore.systems.siglip2.shapes import siglip2_config
from mmcore.systems.siglip2.weights import LAYOUT, load_siglip2, save_siglip2
from mmcore.train import trainer
from mmcore.train.config import RunConfig

BLOCK = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
TEXT = {**BLOCK, "vocab_size": 50, "max_position_embeddings": 7, "bos_token_id": 1, "eos_token_id": 1}
SIZES = ((40, 40), (200, 31), (9, 64), (3, 100), (64, 48), (5, 5))  # width and height
MOST = 20


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


@pytest.fixture(scope="module")
def theirs() -> Siglip2Model:
    """No weight is where it began."""
    torch.manual_seed(0)
    model = Siglip2Model(Siglip2Config(vision_config={**BLOCK, "patch_size": 4, "num_patches": 16}, text_config=TEXT))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.set_attn_implementation("sdpa")  # the eager one has its softmax in float32
    return model.eval()


@pytest.fixture(scope="module")
def folder(theirs: Siglip2Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("siglip2") / "theirs"
    theirs.save_pretrained(path)
    Siglip2ImageProcessorPil(patch_size=4, max_num_patches=MOST).save_pretrained(path)
    return path


def test_pixels_are_those_of_the_image_processor(folder: Path) -> None:
    found = load_siglip2(folder).config.preprocess
    assert found == NaflexPreprocess(4, MOST, (0.5,) * 3, (0.5,) * 3, "bilinear")
    theirs = Siglip2ImageProcessorPil.from_pretrained(folder)(pictures(), return_tensors="pt")
    ours = found(pictures())
    assert ours.grids == [tuple(x) for x in theirs.spatial_shapes.tolist()] and len(set(ours.grids)) > 3
    assert ours.counts == theirs.pixel_attention_mask.sum(1).tolist() and max(ours.counts) <= MOST
    rows = normalized(ours.rows, found.mean, found.std).permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(rows, theirs.pixel_values[theirs.pixel_attention_mask.bool()], rtol=0, atol=1e-6)
    rng = np.random.default_rng(1)
    for height, width, patch, most in zip(*rng.integers(1, (3000, 3000, 33, 1025), (300, 4)).T.tolist(), strict=True):
        rows, columns = get_image_size_for_max_num_patches(height, width, patch, most)
        assert patch_grid(height, width, patch, most) == (rows // patch, columns // patch)
    assert patch_grid(1, 100_000, 16, 256) == (1, 256)


def test_outputs_loss_and_every_gradient_equal_transformers_on_images_of_all_aspects(
    theirs: Siglip2Model, folder: Path
) -> None:
    ours = load_siglip2(folder).double()
    read = Siglip2ImageProcessorPil.from_pretrained(folder)(pictures(), return_tensors="pt")
    tokens = torch.randint(2, 50, (len(SIZES), 7), generator=torch.Generator().manual_seed(1)).tril()
    theirs = theirs.double()
    expected: Any = theirs(input_ids=tokens, return_loss=True, **{**read, "pixel_values": read.pixel_values.double()})
    valid = read.pixel_attention_mask.bool()
    rows = read.pixel_values[valid].unflatten(1, (4, 4, 3)).permute(0, 3, 1, 2).double()
    images = Patches(rows, [tuple(x) for x in read.spatial_shapes.tolist()])
    image, text, scale, bias = ours(images, tokens)
    loss = global_sigmoid_loss(image, text, scale, bias)
    states = ours.visual(images)[1][0]
    table = (
        (image, expected.image_embeds),
        (text, expected.text_embeds),
        (loss, expected.loss),
        (states, expected.vision_model_output.last_hidden_state[valid]),
    )
    for found, wanted in table:
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    loss.backward()
    expected.loss.backward()
    gradients = LAYOUT.read("test", {n: p.grad for n, p in theirs.named_parameters()}, ours.state_dict())  # pyright: ignore[reportArgumentType]
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        close = 1e-6 if name == "visual.position_embedding" else 1e-9  # which both resize in float32
        torch.testing.assert_close(p.grad, gradients[name], rtol=close, atol=close, msg=name)
    theirs.float().zero_grad()


def test_what_is_written_is_a_siglip2_of_transformers_and_both_of_our_loaders_read_it(
    folder: Path, tmp_path: Path
) -> None:
    ours = load_siglip2(folder).eval()
    save_siglip2(ours, tmp_path / "ours")
    theirs = Siglip2Model.from_pretrained(tmp_path / "ours").eval()
    assert LAYOUT.write(ours.state_dict()).keys() == theirs.state_dict().keys()
    read = Siglip2ImageProcessorPil.from_pretrained(tmp_path / "ours")(pictures(), return_tensors="pt")
    with torch.no_grad():
        expected: Any = theirs.get_image_features(**read)
        found = ours.visual(ours.config.preprocess(pictures()))[0]
    torch.testing.assert_close(found, expected.pooler_output, rtol=1e-4, atol=1e-5)
    again, square = load_siglip2(tmp_path / "ours"), load_siglip(tmp_path / "ours")
    assert again.config == ours.config and square.config.vision == ours.config.vision
    for name, x in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], x) and torch.equal(square.state_dict()[name], x)
    images = torch.randn(2, 3, 16, 16)
    rows = images.unflatten(3, (4, 4)).unflatten(2, (4, 4)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    torch.testing.assert_close(ours.visual(Patches(rows, [(4, 4)] * 2))[0], square.visual(images))


def test_positions_of_another_shape_are_resized_and_their_own_stay() -> None:
    positions = torch.randn(16, 3)
    torch.testing.assert_close(resized_positions(positions, [(4, 4)]), positions)
    found = resized_positions(positions, [(4, 4), (2, 7), (4, 4)])
    grid = positions.view(1, 4, 4, 3).permute(0, 3, 1, 2)
    wide = F.interpolate(grid, size=(2, 7), mode="bilinear", antialias=True)[0].permute(1, 2, 0).reshape(14, 3)
    torch.testing.assert_close(found, torch.cat([positions, wide, positions]))
    assert resized_positions(positions, []).shape == (0, 3)
    with pytest.raises(ValueError, match="positions must hold a square grid of patches, got 15"):
        resized_positions(positions[1:], [(1, 1)])
    with pytest.raises(ValueError, match=r"grids must be of at least one row and column, got \[\(0, 2\)\]"):
        resized_positions(positions, [(0, 2)])


def decoder() -> tuple[Decoder, Any]:
    torch.manual_seed(0)
    text = replace(siglip2_config("tiny").text, vocab_size=11, context_length=5, width=24, num_heads=3, mlp_dim=40)
    made = Decoder(text, 16, 2).double()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made, text


def alone(made: Decoder, states: Tensor, tokens: Tensor, length: int, *, is_masked: bool) -> Tensor:
    """The loss of one caption, by torch's own attention."""
    total = len(tokens) if is_masked else length
    read = [made.start + 1] * total if is_masked else [made.start, *tokens.tolist()][:total]
    x = (made.token_embedding(torch.tensor(read)) + made.position_embedding.weight[:total])[None]

    def attended(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
        q, k, v = (y.unflatten(2, (3, -1)).transpose(1, 2) for y in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2).flatten(2)

    for block in made.blocks:
        layer: Any = block
        x = x + layer.attn.out(attended(*layer.attn.qkv(layer.norm1(x)).chunk(3, 2), is_causal=not is_masked))
        kv = layer.cross.kv(states[None]).chunk(2, 2)
        x = x + layer.cross.out(attended(layer.cross.q(layer.norm2(x)), *kv, is_causal=False))
        x = x + layer.mlp(layer.norm3(x))
    logits = F.linear(made.norm(x)[0], made.head.weight, made.head.bias)
    return F.cross_entropy(logits[:length], tokens[:length])


def test_a_caption_is_predicted_word_by_word_or_at_once_as_if_it_were_alone() -> None:
    made, _ = decoder()
    counts, lengths, parallel = [3, 6, 1, 4], [5, 2, 1, 3], [False, True, True, False]
    states, tokens = torch.randn(sum(counts), 16, dtype=torch.float64), torch.randint(11, (4, 5))
    states.requires_grad_()
    images = Packing.of(counts, is_causal=False)
    found = made(states[None], images, tokens, lengths, parallel)
    each = zip(states.split(counts), tokens, lengths, parallel, strict=True)
    wanted = torch.stack([alone(made, s, t, n, is_masked=m) for s, t, n, m in each])[:, None]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    learned = [states, *made.parameters()]
    weights = torch.randn(4, 1, dtype=torch.float64)
    gradients = [torch.autograd.grad((x * weights).sum(), learned) for x in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    made.activation_checkpointing = True
    torch.testing.assert_close(made(states[None], images, tokens, lengths, parallel), found)


def test_captions_are_the_likeliest_words_of_each_image() -> None:
    model = SigLIP2(replace(siglip2_config("tiny"), text=decoder()[1], decoder_layers=2)).eval()
    for p in model.decoder.parameters() if model.decoder else ():
        torch.nn.init.normal_(p, std=0.5)
    images = model.config.preprocess(pictures())
    with torch.no_grad():
        found = model(images, None, generate={"end": 0, "max_length": 5})
        for i, row in enumerate(found):
            for n in range(1, 1 + next((j for j, x in enumerate(row.tolist()) if x == 0), len(row) - 1)):
                others = torch.stack([torch.cat([row[: n - 1], x[None]]) for x in torch.arange(11)])
                others = F.pad(others, (0, 5 - n))
                one = Patches.joined([images.part(slice(i, i + 1))] * 11)
                losses = model(one, others, [n] * 11, [False] * 11)[2]
                assert int(losses.argmin()) == int(row[n - 1])
        beams = model(images, None, generate={"end": 0, "max_length": 5, "num_beams": 3})
        assert len(beams) == len(found)
        drawn = model(images, None, generate={"end": 0, "max_length": 5, "top_p": 1e-6})
    assert torch.equal(drawn, found)


class Plain:
    """A model as the engine runs it."""

    def __init__(self, module: SigLIP2) -> None:
        self.module, self.device = module, torch.device("cpu")

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def place(self, batch: Any) -> Any:
        return batch

    def accumulate(self) -> Any:
        return torch.autograd.graph.save_on_cpu()  # any context

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        loss.backward()


def test_a_budget_of_patches_changes_neither_loss_nor_gradient() -> None:
    assert within([4, 4, 4, 9, 1], 9, torch.device("cpu")) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]
    assert within([4, 4], 9, torch.device("cpu")) == [slice(0, 2)]
    torch.manual_seed(0)
    model = Plain(SigLIP2(siglip2_config("tiny")).double())
    batch = Siglip2Batch(
        model.module.config.preprocess(pictures()), torch.randint(1024, (6, 16)), [3] * 6, [True, False] * 3
    )
    results = []
    for budget in (None, 30):
        recipe = Siglip2(token_budget=budget)
        loss = recipe.backward(model, [batch], Step(0, 1, 0))["loss"]
        results.append((loss, {n: p.grad for n, p in model.module.named_parameters()}))
        model.module.zero_grad(set_to_none=True)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


def test_a_run_captions_exports_and_is_refused_wrong_flags(tmp_path: Path) -> None:
    run = RunConfig(out=tmp_path / "run", steps=2, batch_size=8)
    trainer.train("siglip2", Siglip2(run=run, max_patches=(9, 16), token_budget=64), is_quiet=True)
    trained: Any = read_run(tmp_path / "run")
    recipe, assets = trained.recipe, trained.assets
    assert assets.preprocess.max_patches == 16
    recipe.export(assets, trained.model, tmp_path / "hf", "hf")
    start = Siglip2(init=tmp_path / "hf", captioning=False)
    data = recipe.open_data()
    assert start.assets(data).shape == replace(trained.model.config, decoder_layers=0)
    for recipe, sentence in (
        (Siglip2(max_patches=(0,)), r"--max-patches must be one number or several, each at least 1, got \(0,\)"),
        (Siglip2(view_scale=0), r"--view-scale must be in \(0, 1\], got 0"),
        (Siglip2(parallel=2), r"--parallel must be in \[0, 1\], got 2"),
        (Siglip2(caption_weight=0), "--caption-weight must be above 0, or --no-captioning be given, got 0"),
        (Siglip2(captioning=False, parallel=0.1), "--parallel has no effect with --no-captioning, got 0.1"),
        (Siglip2(token_budget=15), "--token-budget must hold the 16 patches of an image and its views, got 15"),
        (Siglip2(token_budget=99, run=RunConfig(accum=2)), "--accum must be left out with --token-budget, got 2"),
        (Siglip2(model="B-32"), r"name must be one of tiny, B-16, .*, got 'B-32'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            recipe.assets(data)
    with pytest.raises(ValueError, match=r"images must be \[6, 3, 4, 4\], got \[5, 3, 4, 4\]"):
        trained.model(Patches(torch.zeros(5, 3, 4, 4), [(2, 3)]), None)


def test_small_views_and_masked_patches_are_compared_with_a_teachers_as_by_the_formula() -> None:
    torch.manual_seed(0)
    model = SigLIP2(replace(siglip2_config("tiny"), num_prototypes=7)).double()
    for p in model.distiller.parameters() if model.distiller else ():
        torch.nn.init.normal_(p)
    rng, size = np.random.default_rng(0), 3
    record = SimpleNamespace(load=lambda least: pictures()[0])
    views = Views.joined([Views.drawn(record, model.config.preprocess, 4, 0.5, rng) for _ in range(size)])
    assert views.large.grids == [(4, 4)] * size and views.small.grids == [(2, 2)] * (8 * size)
    assert views.masked.shape == (size, 8) and views.num_patches == num_patches(4) == 16 + 8 * 4
    masked = torch.zeros(size, 16, dtype=torch.bool).scatter(1, views.masked, True)
    part = views.part(slice(1, 3), size)
    assert torch.equal(part.large.rows, views.large.rows[16:]) and torch.equal(part.masked, views.masked[1:])
    assert torch.equal(part.small.rows, views.small.rows.view(8, size, 4, 3, 4, 4)[:, 1:].flatten(0, 2))

    centres = torch.randn(2, 7, dtype=torch.float64)
    targets = Targets(*(x.detach() for x in model(None, None, views=views)[:2]), *centres)
    _, _, small, patches, *_ = model(None, None, views=views, targets=targets)

    def states_of(images: Patches, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pooled, states, _ = model.visual(images, masked, model.distiller.mask_token)  # pyright: ignore[reportOptionalMemberAccess]
        return pooled, states[0]

    heads: Any = model.distiller
    pooled, states = states_of(views.large)
    shares = [
        ((x - c) / 0.04).softmax(1).detach() for x, c in zip((heads.head(pooled), heads.patch_head(states)), centres)
    ]
    seen = heads.head(states_of(views.small)[0]).unflatten(0, (8, size))
    wanted = torch.stack([-(shares[0] * (x / 0.1).log_softmax(1)).sum(1) for x in seen]).mean(0)
    told = heads.patch_head(states_of(views.large, masked.flatten().nonzero()[:, 0])[1])
    each = -(shares[1] * (told / 0.1).log_softmax(1)).sum(1)
    of_patches = torch.stack([x[m].mean() for x, m in zip(each.chunk(size), masked)])
    learned = [p for n, p in model.named_parameters() if n.startswith(("visual.", "distiller."))]
    for found, expected in ((small, wanted), (patches, of_patches)):
        torch.testing.assert_close(found[:, 0], expected)
        gradients = [torch.autograd.grad(x.sum(), learned, allow_unused=True) for x in (found, expected)]
        torch.testing.assert_close(*gradients)
