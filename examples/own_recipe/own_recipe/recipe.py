"""What a recipe has to say; `pip install -e examples/own_recipe`, then `mmcore train own`."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from mmcore.data import IMAGE_MEAN, IMAGE_STD, Preprocess, collate_pairs, normalized
from mmcore.data.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from mmcore.losses import global_contrastive_loss
from mmcore.recipe import Assets, Claim, Contrastive, Embeds, OnPairs, Proof

WANTED = Preprocess(size=16)


class Towers(nn.Module):
    def __init__(self, vocab_size, width):
        super().__init__()
        first, second = nn.Conv2d(3, width, 4, stride=2), nn.Conv2d(width, width, 4, stride=2)  # 16 to 7 to 2 pixels
        self.image = nn.Sequential(first, nn.GELU(), second, nn.GELU(), nn.Flatten(), nn.Linear(4 * width, width))
        self.text = nn.EmbeddingBag(vocab_size, width)
        self.logit_scale = nn.Parameter(torch.full((1,), 2.66))

    def forward(self, images, tokens):
        image = None
        if images is not None:
            pixels = normalized(images, IMAGE_MEAN, IMAGE_STD).to(self.text.weight.dtype)
            image = F.normalize(self.image(pixels).float(), dim=-1)
        text = None if tokens is None else F.normalize(self.text(tokens).float(), dim=-1)
        return image, text, self.logit_scale.exp()


@dataclass(frozen=True)
class OwnAssets(Assets):
    tokenizer: Tokenizer
    preprocess: Preprocess = WANTED

    def save(self, folder):
        self.tokenizer.save(folder / "tokenizer")
        return {"vocab_size": self.tokenizer.vocab_size}


@dataclass(frozen=True)
class Own(OnPairs, Contrastive):
    """Train a small convolution and a bag of words on image-caption pairs."""

    width: int = 64
    """Channels of the convolution, and of what images and captions become."""

    tasks = ("zeroshot", "retrieval")
    formats = ("safetensors",)

    def assets(self, data):
        return OwnAssets(train_tokenizer(list(data.captions()), vocab_size=1024, context_length=32))

    def load_assets(self, folder, saved, frozen, purpose):
        return OwnAssets(load_tokenizer(folder / "tokenizer"))

    def build(self, assets):
        return Towers(assets.tokenizer.vocab_size, self.width)

    def collate(self, assets, samples):
        batch = collate_pairs(samples, assets.tokenizer)
        return batch.images, batch.tokens

    def features(self, model, batch):
        return model(*batch)

    def objective(self, features, parts, step):
        return {"loss": global_contrastive_loss(*features)}

    def embeds(self, assets, model, device):
        def text(captions):
            return model(None, assets.tokenizer(captions).to(device))[1]

        return Embeds(assets.preprocess, lambda x: model(x, None)[0], lambda x: x, text)

    def export(self, assets, model, folder, format):
        folder.mkdir(parents=True)
        save_file(model.state_dict(), folder / "model.safetensors")


PROOF = Proof(
    [("own", "--data digits --epochs 12 --batch-size 128 --lr 3e-3")],
    [Claim("zero-shot accuracy (held-out)", "zero-shot top-1", 0.85)],
)
