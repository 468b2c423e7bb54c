"""A vision transformer: images to the states of their patches (arXiv:2010.11929)."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.data.transforms.images import IMAGE_MEAN, IMAGE_STD, Fit, Interpolation, Preprocess, normalized
from mmcore.data.transforms.masks import gather
from mmcore.nn import ACTIVATIONS, RelativePositions, Transformer, interpolate_positions, sincos_positions
from mmcore.nn.attention import QKVBias
from mmcore.nn.transformer import Pool
from mmcore.ops import require


def check_tower(owner: str, width: int, num_heads: int, activation: str, **sizes: int) -> None:
    """Raise a ValueError unless a transformer can have these sizes."""
    for name, value in {"width": width, "num_heads": num_heads, **sizes}.items():
        require(owner, isinstance(value, int) and value >= 1, "{} must be at least 1, got {}", name, value)
    require(owner, width % num_heads == 0, "num_heads must divide width {}, got {}", width, num_heads)
    known = sorted(ACTIVATIONS)
    require(owner, activation in known, "activation must be one of {}, got {!r}", known, activation)


def tower_summary(config: Any) -> str:
    """For the reader, of a transformer's shape."""
    sizes = f"{config.num_layers} layers of {config.width} (MLP {config.mlp_dim}), {config.num_heads} heads"
    return f"{sizes}, {config.activation}, eps {config.norm_eps:g}"


@dataclass(frozen=True)
class VisionConfig:
    """Shape of an image tower: square images of `image_size` pixels, patches of `patch_size` pixels.

    The defaults of the options are CLIP's. EVA's tower has a patch bias in place of the norm before the layers.
    SigLIP's has a final norm besides, and no class token; MAE's has the final norm, and fixed positions ("sincos");
    DINOv2's has registers (arXiv:2309.16588), which stand between class token and patches and have no positions, and a
    layer scale. A mask token stands for patches that are not shown. BEiT's has no positions ("none"), but
    `mmcore.nn.RelativePositions`, one table for all layers or one each, and no bias of keys. `layer_scale`, `drop_path`
    and `has_swiglu` are of `mmcore.nn.Transformer`, `antialias` is of `mmcore.nn.interpolate_positions`, for images of
    other sizes. The last four are of `Preprocess`.
    """

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    activation: str = "gelu"
    norm_eps: float = 1e-5
    has_norm_pre: bool = True
    has_patch_bias: bool = False
    has_class_token: bool = True
    positions: Literal["learned", "sincos", "none"] = "learned"
    has_final_norm: bool = False
    num_registers: int = 0
    has_mask_token: bool = False
    layer_scale: float | None = None
    drop_path: float = 0.0
    drop_path_uniform: bool = False
    has_swiglu: bool = False
    antialias: bool = True
    qkv_bias: QKVBias = "all"
    relative_positions: Literal["none", "shared", "layers"] = "none"
    has_margin: bool = False  # pixels that fill no patch, right and below, are not read (SigLIP's 384 in 14s)
    image_mean: tuple[float, ...] = IMAGE_MEAN
    image_std: tuple[float, ...] = IMAGE_STD
    interpolation: Interpolation = "bicubic"
    fit: Fit = "crop"

    def __post_init__(self) -> None:
        owner, size, patch = "VisionConfig", self.image_size, self.patch_size
        sizes = {"image_size": size, "patch_size": patch, "num_layers": self.num_layers, "mlp_dim": self.mlp_dim}
        check_tower(owner, self.width, self.num_heads, self.activation, **sizes)
        fits = size % patch == 0 or (self.has_margin and size > patch)
        require(owner, fits, "image_size must be a multiple of patch_size {}, got {}", patch, size)
        kinds = {"positions": ("learned", "sincos", "none"), "relative_positions": ("none", "shared", "layers")}
        for name, known in {**kinds, "qkv_bias": get_args(QKVBias)}.items():
            value = getattr(self, name)
            require(owner, value in known, "{} must be one of {}, got {!r}", name, known, value)
        has_grid = self.relative_positions == "none" or (self.has_class_token and not self.num_registers)
        what = "relative_positions must be of a class token and patches alone, got {!r}"
        require(owner, has_grid, what, self.relative_positions)
        require(owner, self.num_registers >= 0, "num_registers must be at least 0, got {}", self.num_registers)
        for name in ("image_mean", "image_std"):  # a run's config.json holds lists
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def preprocess(self) -> Preprocess:
        """What it wants of an image."""
        return Preprocess(self.image_size, self.image_mean, self.image_std, self.interpolation, self.fit)

    @property
    def summary(self) -> str:
        """For the reader."""
        return f"patches of {self.patch_size} pixels, {tower_summary(self)}"

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_prefix(self) -> int:
        """The class token and registers, which stand before the patches."""
        return self.has_class_token + self.num_registers

    @property
    def num_tokens(self) -> int:
        """Patches, the class token and registers."""
        return self.num_patches + self.num_prefix


siglip_vision = partial(
    VisionConfig,
    activation="gelu_tanh",
    norm_eps=1e-6,
    has_class_token=False,
    has_norm_pre=False,
    has_patch_bias=True,
    has_final_norm=True,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    fit="squash",
)
"""`VisionConfig` with the options of SigLIP's tower."""
mae_vision = partial(
    VisionConfig,
    norm_eps=1e-6,
    has_norm_pre=False,
    has_patch_bias=True,
    positions="sincos",
    has_final_norm=True,
    image_mean=(0.485, 0.456, 0.406),
    image_std=(0.229, 0.224, 0.225),
)
"""`VisionConfig` with the options of MAE's encoder, and ImageNet's mean and deviation."""


class Tower(NamedTuple):
    """The shape of a ViT and its weights by their names in it."""

    config: VisionConfig
    state: dict[str, Tensor]

    @property
    def bare(self) -> "Tower":
        """Without what its own training alone needs: a mask token, and residuals that are left out."""
        config = replace(self.config, has_mask_token=False, drop_path=0.0, drop_path_uniform=False)
        return Tower(config, {name: x for name, x in self.state.items() if name != "mask_token"})


class PatchEmbedding(nn.Module):
    """What a `ViT`'s transformer reads of images: patches with positions, and a class token and registers before
    them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.has_any_size = False  # images of other multiples of the patches' size are read too
        width = config.width
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=config.has_patch_bias)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5) if config.has_class_token else None
        if config.positions == "learned":
            num_places = config.num_patches + config.has_class_token
            self.position_embedding = nn.Parameter(torch.randn(num_places, width) * width**-0.5)
        elif config.positions == "none":
            self.position_embedding = None
        else:
            fixed = sincos_positions(width, config.num_patches, num_prefix=config.has_class_token)
            self.position_embedding = nn.Buffer(fixed)
        registers = torch.randn(config.num_registers, width) * 1e-6
        self.registers = nn.Parameter(registers) if config.num_registers else None
        self.mask_token = nn.Parameter(torch.zeros(width)) if config.has_mask_token else None
        self.norm_pre = nn.LayerNorm(width, eps=config.norm_eps) if config.has_norm_pre else nn.Identity()

    def forward(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """See `embed`."""
        return self.embed(images, masked=masked)

    def embed(self, images: Tensor, kept: Tensor | None = None, masked: Tensor | None = None) -> Tensor:
        """What the transformer reads, of shapes as in `ViT.forward`."""
        size, patch = self.image_size, self.config.patch_size
        if self.has_any_size and images.ndim == 4 and images.shape[-1] >= patch and images.shape[-1] % patch == 0:
            size = images.shape[-1]
        fits = images.ndim == 4 and images.shape[1:] == (3, size, size)
        require("ViT", fits, "images must be [B, 3, {}, {}], got {}", size, size, list(images.shape))
        if images.dtype == torch.uint8:
            images = normalized(images, self.config.image_mean, self.config.image_std)
        require("ViT", images.is_floating_point(), "images must be uint8 or floating point, got {}", images.dtype)
        x = self.patch_embed(images.to(self.patch_embed.weight.dtype))  # [B, D, S / P, S / P]
        x = x.flatten(2).transpose(1, 2)  # [B, P, D]
        if masked is not None:
            require("ViT", self.mask_token is not None, "masked must be None: the tower has no mask token, got a mask")
            assert self.mask_token is not None
            fits = masked.dtype == torch.bool and masked.shape == x.shape[:2]
            got = f"{masked.dtype} {list(masked.shape)}"
            require("ViT", fits, "masked must be bool {}, got {}", list(x.shape[:2]), got)
            x = torch.where(masked[:, :, None], self.mask_token.to(x.dtype), x)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1)
        if self.position_embedding is not None:
            # a buffer stays float32 under bf16 weights
            x = x + self._positions(self.position_embedding, size).to(self.patch_embed.weight.dtype)
        if kept is not None:
            is_whole = self.config.relative_positions == "none"
            require("ViT", is_whole, "kept must be None with {} positions, got some", "relative")
            fits = kept.ndim == 2 and len(kept) == len(x) and kept.shape[1] > 0 and kept.dtype == torch.int64
            got = f"{kept.dtype} {list(kept.shape)}"
            require("ViT", fits, "kept must be int64 [{}, K] of at least one patch an image, got {}", len(x), got)
            if self.class_embedding is not None:
                kept = F.pad(kept + 1, (1, 0))  # the class token is row 0
            x = gather(x, kept)
        if self.registers is not None:
            first = int(self.config.has_class_token)
            registers = self.registers.to(x.dtype).expand(len(x), -1, -1)
            x = torch.cat([x[:, :first], registers, x[:, first:]], 1)
        return self.norm_pre(x)

    def _positions(self, own: Tensor, size: int) -> Tensor:
        if size == self.image_size:
            return own
        num, num_prefix = (size // self.config.patch_size) ** 2, int(self.config.has_class_token)
        if self.config.positions == "learned":
            return interpolate_positions(own, num, num_prefix=num_prefix, antialias=self.config.antialias)
        return sincos_positions(self.config.width, num, num_prefix=num_prefix).to(own.device)


class ViT(PatchEmbedding):
    """A pre-LN transformer over patches, and a class token before them where the configuration has one."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        width = config.width
        options = {"is_causal": False, "activation": config.activation, "norm_eps": config.norm_eps}
        of_blocks = ("layer_scale", "drop_path", "drop_path_uniform", "qkv_bias", "has_swiglu")
        options |= {name: getattr(config, name) for name in of_blocks}
        side = config.image_size // config.patch_size
        self.relative = RelativePositions(side, config.num_heads) if config.relative_positions == "shared" else None
        options["relative_side"] = side if config.relative_positions == "layers" else None
        self.transformer = Transformer(width, config.num_layers, config.num_heads, config.mlp_dim, **options)
        self.norm_post = nn.LayerNorm(width, eps=config.norm_eps) if config.has_final_norm else nn.Identity()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: Tensor,
        kept: Tensor | None = None,
        *,
        masked: Tensor | None = None,
        pool: Pool | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """The states of the class token, of the registers and of the patches.

        Args:
            images: [B, 3, S, S], S the configured image size or, with `has_any_size`, another multiple of the patches',
                whose positions are interpolated; uint8, or floating point where they are normalised already; B may be
                0.
            kept: int64 [B, K], the patches that are read, in the order of their states; None = all P. The class token
                and the registers always are.
            masked: bool [B, P], the patches that the mask token stands for, of all P; None = none.
            pool: takes of the last layer's states `[B, 1 + P, D]` those that are wanted.
            states: gets what each layer makes, before the final norm.

        Returns:
            [B, 1 + P, D], [B, 1 + K, D], the 1 being `config.num_prefix`, or what `pool` returns.
        """
        x = self.embed(images, kept, masked)
        bias = None if self.relative is None else self.relative(images.shape[-1] // self.config.patch_size)
        return self.norm_post(self.transformer(x, pool=pool, bias=bias, states=states))
