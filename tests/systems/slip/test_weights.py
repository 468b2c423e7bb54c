"""SLIP's published files, of a class that has the names, shapes and order of computation of the published one."""

from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmcore.systems.clip.model import CLIP, CLIPConfig, TextConfig
from mmcore.systems.clip.weights import save_clip
from mmcore.systems.slip.model import SLIP
from mmcore.systems.slip.recipe import Slip
from mmcore.systems.slip.weights import LAYOUT, load_slip, slip_vision
from tests.refusals import refuses

WIDTH, PATCH, SIDE, WORDS, EMBED = 384, 4, 12, 128, 24


class TimmBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 64), "fc2": nn.Linear(64, width)})

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, 12, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.attn["proj"](nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class TimmTower(nn.Module):
    """timm's ViT without a classifier: the normed class token."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (SIDE // PATCH) ** 2, WIDTH))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, PATCH)})
        self.blocks = nn.Sequential(*[TimmBlock(WIDTH) for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed["proj"](images).flatten(2).mT
        return self.norm(self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed))[:, 0]


class TextBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WORDS, WORDS // 64, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(WORDS), nn.LayerNorm(WORDS)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WORDS, 4 * WORDS), "c_proj": nn.Linear(4 * WORDS, WORDS)})

    def forward(self, x: Tensor) -> Tensor:
        y, length = self.ln_1(x), x.shape[1]
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=torch.ones(length, length).triu(1).bool())[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


class Published(nn.Module):
    """The published SLIP, and with `has_mlp=False` the CLIP beside it."""

    def __init__(self, *, has_mlp: bool = True) -> None:
        super().__init__()
        self.visual, self.transformer = TimmTower(), nn.Module()
        self.transformer.resblocks = nn.Sequential(*[TextBlock() for _ in range(3)])
        self.token_embedding, self.ln_final = nn.Embedding(40, WORDS), nn.LayerNorm(WORDS)
        self.positional_embedding = nn.Parameter(torch.randn(7, WORDS) * 0.1)
        self.image_projection = nn.Parameter(torch.randn(WIDTH, EMBED))
        self.text_projection = nn.Parameter(torch.randn(WORDS, EMBED))
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        if has_mlp:
            sizes, layers = (WIDTH, 32, 32, 8), OrderedDict()
            for i in (1, 2, 3):
                layers[f"layer{i}"] = nn.Linear(sizes[i - 1], sizes[i])
                if i < 3:
                    layers |= {f"bn{i}": nn.SyncBatchNorm(sizes[i]), f"relu{i}": nn.ReLU()}
            self.image_mlp = nn.Sequential(layers)
        for p in self.parameters():  # no norm and no bias is as it begins
            p.data.add_(0.05 * torch.randn_like(p))
        for name, x in self.named_buffers():
            x.add_(3 if name.endswith("tracked") else torch.rand_like(x))

    def embeddings(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        x = self.ln_final(self.transformer.resblocks(self.token_embedding(tokens) + self.positional_embedding))  # pyright: ignore[reportCallIssue]
        text = x[torch.arange(len(tokens)), tokens.argmax(1)] @ self.text_projection
        return (*(nn.functional.normalize(y, dim=1) for y in (self.visual(images) @ self.image_projection, text)),)


@pytest.fixture(scope="module", params=[True, False], ids=["SLIP", "CLIP"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Published, Path]:
    """With a file as its training writes it: names as of DDP, numbers of numpy's schedule, the arguments."""
    torch.manual_seed(0)
    model, file = Published(has_mlp=request.param), tmp_path_factory.mktemp("slip") / "slip_small_25ep.pt"
    state = {f"module.{name}": x for name, x in model.state_dict().items()}
    groups = [{"lr": np.linspace(1e-6, 3e-3, 5)[2], "betas": (0.9, 0.98), "params": [0]}]
    more = {"args": Namespace(model="SLIP_VITS16", betas=(0.9, 0.98), distributed=True), "best_acc1": 38.3}
    torch.save({"epoch": 25, "state_dict": state, "optimizer": {"state": {}, "param_groups": groups}, **more}, file)
    return model.eval(), file


def test_a_published_file_loads_and_its_names_are_ours_one_to_one(published: tuple[Published, Path]) -> None:
    theirs, file = published
    ours = load_slip(file)
    assert type(ours) is (SLIP if hasattr(theirs, "image_mlp") else CLIP) and ours.training
    state, again = theirs.state_dict(), LAYOUT.write(ours.state_dict())
    assert again.keys() == state.keys() and all(torch.equal(x, state[name]) for name, x in again.items())
    pairs = list(LAYOUT.pairs(ours.state_dict()))
    assert sorted(n for pair in pairs for n in pair.ours) == sorted(ours.state_dict())
    assert sorted(n for pair in pairs for n in pair.theirs) == sorted(state)
    images, tokens = torch.randn(3, 3, SIDE, SIDE), torch.randint(0, 38, (3, 7))
    tokens[torch.arange(3), torch.tensor([2, 6, 0])] = 39
    found = ours.eval()(images, tokens)
    for x, y in zip(found, (*theirs.embeddings(images, tokens), theirs.logit_scale.exp().reshape(1)), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    if isinstance(ours, SLIP):
        torch.testing.assert_close(ours(images, only_projection=True), theirs.image_mlp(theirs.visual(images)))
        assert ours.image_mlp.bn1.num_batches_tracked == 3  # pyright: ignore[reportAttributeAccessIssue]


def test_training_starts_from_a_published_file(published: tuple[Published, Path]) -> None:
    theirs, file = published
    recipe = Slip(init=file, ssl_hidden=32, ssl_width=8)
    found = recipe.initial(None, None)  # pyright: ignore[reportArgumentType]
    assert torch.equal(found["visual.class_embedding"], theirs.visual.cls_token[0, 0])
    assert ("image_mlp.bn1.running_var" in found) == hasattr(theirs, "image_mlp")
    if hasattr(theirs, "image_mlp"):
        wanted = r"--ssl-hidden and --ssl-width must be \(32, 8\), as .*_25ep.pt has them, got \(4096, 256\)"
        refuses(wanted, Slip(init=file).initial, None, None)
    with pytest.raises(ValueError, match="--model must be left out with SLIP's own file, got tiny"):
        Slip(init=file, model="tiny").initial(None, None)  # pyright: ignore[reportArgumentType]


def changed(file: Path, tmp_path: Path, change: Any) -> Path:
    raw = torch.load(file, weights_only=False)
    change(raw["state_dict"])
    torch.save(raw, tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


@pytest.mark.parametrize("published", [True], indirect=True, ids=["SLIP"])
@pytest.mark.parametrize(("change", "said"), [
    (lambda x: x.pop("module.visual.norm.bias"), "must hold every weight of the model, missing visual.norm.bias"),
    (lambda x: x.update({"module.visual.fc.bias": torch.zeros(1)}), "this model's weights only, got also visual.fc.b"),
    (lambda x: x.pop("module.token_embedding.weight"), "must hold SLIP's text tower, missing token_embedding.weight"),
    (lambda x: x.pop("module.visual.patch_embed.proj.weight"), "missing visual.patch_embed.proj.weight"),
    (lambda x: x.update({"module.visual.pos_embed": torch.zeros(1, 10, 64)}), "config must be given of a tower 64 w"),
])  # fmt: skip
def test_a_file_that_is_not_whole_is_a_sentence(
    published: tuple[Published, Path], change: Any, said: str, tmp_path: Path
) -> None:
    refuses(said, load_slip, changed(published[1], tmp_path, change))


@pytest.mark.parametrize("published", [True], indirect=True, ids=["SLIP"])
def test_another_shape_is_given_and_other_objects_are_not_made(
    published: tuple[Published, Path], tmp_path: Path
) -> None:
    vision = slip_vision(image_size=SIDE, patch_size=PATCH, width=WIDTH, num_layers=2, num_heads=6, mlp_dim=64)
    text = TextConfig(40, 7, WORDS, 3, 4, 512, activation="quick_gelu")
    assert load_slip(published[1], config=CLIPConfig(EMBED, vision, text)).visual.config.num_heads == 6
    torch.save({"state_dict": {}, "args": Path("x")}, tmp_path / "path.pt")
    refuses("must be a whole pickle of tensors and nothing else", load_slip, tmp_path / "path.pt")
    refuses("file must exist", load_slip, tmp_path / "none.pt")
    for format in ("hf", "open_clip"):  # neither has a bias of patches
        clip = CLIP(CLIPConfig(EMBED, vision, text))
        refuses("vision.*must be .* to be written", save_clip, clip, tmp_path / format, format=format)
