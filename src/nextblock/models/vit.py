"""The encoder: a timm VisionTransformer, and the loop over its layers.

The module that timm builds keeps its key names, so that its weights go anywhere timm goes. Only the loop over
the layers is ours: timm's own `forward_features` silently skips gradient checkpointing when it is given a
mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint

from nextblock.config import ModelConfig, pair

INIT_STD = 0.02
SINCOS_BASE = 10_000.0
ROPE_BASE = 100.0


class Encoded(NamedTuple):
    """What `encode` returns, in raster order."""

    tokens: Float[Tensor, "b n d"]
    """After the final norm."""
    layers: tuple[Float[Tensor, "b n d"], ...]
    """What each layer returns, before the final norm."""
    prefix: tuple[Float[Tensor, "b q d"], ...] = ()
    """Class token (first) and register tokens of each layer; empty if an encoder has patches only."""
    has_class_token: bool = False
    """Whether the first token of the prefix is one; some encoders have registers alone."""


class Layer(Block):
    """timm's transformer layer, with drop path's random numbers as an argument, and `qk_scale`.

    `drop_path` holds uniform numbers in [0, 1), one for each image and branch (attention, MLP). A branch is
    dropped if its number is below the rate. Without them timm draws from torch's global generator.
    """

    def __init__(self, *args: Any, qk_scale: float | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if qk_scale is not None:
            # The attention kernel scales by head_dim**-0.5 itself, so the queries bring what is missing. timm
            # calls q_norm on the queries alone, and this one has no weights, so files stay as they were.
            attention: Any = self.attn
            attention.q_norm = _Scale(qk_scale * attention.head_dim**0.5)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        attn_mask: Bool[Tensor, "*b n n"] | None = None,
        is_causal: bool = False,
        drop_path: Float[Tensor, "b 2"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Attention, then an MLP, each added to what it is given."""
        # timm's own layer draws drop path from the global generator: another number of images or processes
        # would change every later number. Here the numbers come in, a function of seed, step and image.
        if drop_path is None or not self.training:
            return super().forward(x, attn_mask, is_causal)
        attended = self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))
        x = x + _drop(attended, self.drop_path1, drop_path[:, 0])
        return x + _drop(self.ls2(self.mlp(self.norm2(x))), self.drop_path2, drop_path[:, 1])


class RopeLayer(EvaBlock):
    """timm's layer with rotary positions, with drop path's random numbers as an argument as in `Layer`."""

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        rope: Float[Tensor, "*c p r"] | None = None,
        attn_mask: Bool[Tensor, "*b n n"] | None = None,
        is_causal: bool = False,
        drop_path: Float[Tensor, "b 2"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Attention, then an MLP, each added to what it is given; `rope` leaves the class token as it is."""
        if drop_path is None or not self.training:
            return super().forward(x, rope, attn_mask, is_causal)
        factors = [1 if gamma is None else gamma for gamma in (self.gamma_1, self.gamma_2)]
        attended = self.attn(self.norm1(x), rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        x = x + _drop(factors[0] * attended, self.drop_path1, drop_path[:, 0])
        return x + _drop(factors[1] * self.mlp(self.norm2(x)), self.drop_path2, drop_path[:, 1])


class _Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def _drop(branch: Tensor, module: nn.Module, draws: Tensor) -> Tensor:
    rate = getattr(module, "drop_prob", 0.0)  # timm puts an Identity where the rate is 0
    if not rate:
        return branch
    # Kept branches grow by 1 / (1 - rate), so that the expectation stays what it is without drop path.
    return branch * (draws >= rate).to(branch.dtype).div(1 - rate)[:, None, None]


def layer_outputs(
    layers: Iterable[nn.Module],
    hidden: Float[Tensor, "*rows d"],
    mask: Bool[Tensor, "*b n n"] | None = None,
    *,
    recompute: bool = False,
    drop_path: Float[Tensor, "b draws"] | None = None,
    rope: Float[Tensor, "*c p r"] | None = None,
) -> tuple[Float[Tensor, "*rows d"], ...]:
    """Run layers one after the other, and return what each returns.

    `mask` and `rope` are for transformer layers; `recompute` keeps only the layers' inputs for the backward
    pass; `drop_path` holds two numbers for each image and layer (see `Layer`).
    """
    outputs = []
    for number, layer in enumerate(layers):
        # Mask and draws are arguments, not held by a layer: a recomputed layer must see those of its batch.
        given: dict[str, Any] = {} if mask is None else {"attn_mask": mask}
        if rope is not None:
            given["rope"] = rope
        if drop_path is not None:
            given["drop_path"] = drop_path[:, 2 * number : 2 * number + 2]
        # Nothing is recomputed where no gradient is asked for, as in evaluation. The reentrant kind takes
        # no keyword arguments, such as the mask.
        if recompute and hidden.requires_grad:
            hidden = checkpoint(layer, hidden, **given, use_reentrant=False)
        else:
            hidden = layer(hidden, **given)
        outputs.append(hidden)
    return tuple(outputs)


# ----------------------------------------------------------------------------------------- building, weights


def build_encoder(config: ModelConfig) -> VisionTransformer | Eva:
    """The timm ViT of these settings, with rotary positions timm's `Eva`: a final norm, no head.

    Initialised as official XTRA: linear layers from a truncated normal of deviation 0.02 with zero biases,
    the patch projection Kaiming-normal (fan in), learned positions truncated normal 0.02; or as AIM's
    training code: all of them Xavier-uniform. Draws from torch's global generator.
    """
    # timm builds the module and names its weights; its own initialisation is skipped, ours follows.
    layer: Any = partial(Layer, qk_scale=config.qk_scale)
    if config.positions == "rope":
        encoder = _rope_encoder(config)
    else:
        encoder = VisionTransformer(
            num_classes=0,
            global_pool="",
            drop_path_rate=config.drop_path,
            weight_init="skip",
            block_fn=layer,
            **vit_arguments(config),
        )
    if config.qk_norm is not None:
        options: Any = {
            "eps": config.norm_eps,
            "elementwise_affine": config.qk_norm == "scale",
            "bias": False,
        }
        for attention in (module for name, module in encoder.named_modules() if name.endswith(".attn")):
            for name in ("q_norm", "k_norm"):
                setattr(attention, name, nn.LayerNorm(config.embed_dim // config.num_heads, **options))
    init_linear(encoder, config)
    # The patch projection is a convolution, which init_linear passes over. As a matrix it maps a patch's
    # values (c i j) to the width, and that is what Xavier's bound is computed from.
    projection: Any = encoder.patch_embed.proj
    if config.weight_init == "trunc_normal":
        nn.init.kaiming_normal_(projection.weight, mode="fan_in")
    elif config.weight_init == "trunc_normal_all":
        nn.init.trunc_normal_(projection.weight, std=INIT_STD)
    else:
        nn.init.xavier_uniform_(rearrange(projection.weight.data, "d c i j -> d (c i j)"))
    nn.init.zeros_(projection.bias)
    if encoder.cls_token is not None:
        nn.init.trunc_normal_(encoder.cls_token, std=INIT_STD)
    if config.positions != "rope":
        encoder.pos_embed = fresh_positions(config, config.embed_dim)
    return encoder


def _rope_encoder(config: ModelConfig) -> Eva:
    # Built without layers, as timm has no argument for a class of layers of our own.
    encoder = Eva(
        img_size=pair(config.image_size),
        patch_size=config.patch_size,
        in_chans=config.in_chans,
        num_classes=0,
        global_pool="",
        embed_dim=config.embed_dim,
        depth=0,
        num_heads=config.num_heads,
        attn_type="rope",
        norm_layer=layer_norm(config),
        class_token=config.class_token,
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_temperature=ROPE_BASE,
        rope_rotate_half=True,
    )
    rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
    encoder.blocks = nn.ModuleList(
        RopeLayer(
            config.embed_dim,
            config.num_heads,
            qkv_bias=True,
            mlp_ratio=config.mlp_ratio,
            num_prefix_tokens=int(config.class_token),
            attn_type="rope",
            rotate_half=True,
            drop_path=rate,
            init_values=config.layer_scale,
            norm_layer=layer_norm(config),
        )
        for rate in rates
    )
    entry = {"num_chs": config.embed_dim, "reduction": config.patch_size}
    encoder.feature_info = [{"module": f"blocks.{i}", **entry} for i in range(config.depth)]
    return encoder


def vit_arguments(config: ModelConfig) -> dict[str, Any]:
    """Arguments of timm's `VisionTransformer` for the encoder of these settings."""
    return {
        "img_size": pair(config.image_size),
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": config.bias,
        "proj_bias": config.bias,  # timm gives it to the MLP as well
        "class_token": config.class_token,
        "no_embed_class": True,  # it has no position
        "init_values": config.layer_scale,
        "norm_layer": layer_norm(config),
        "embed_norm_layer": layer_norm(config) if config.patch_norm else None,
    }


def layer_norm(config: ModelConfig) -> Any:
    """The LayerNorm of these settings, to be called with a width; timm takes it for a class."""
    return partial(nn.LayerNorm, eps=config.norm_eps)


def init_linear(module: nn.Module, config: ModelConfig) -> None:
    """Give all linear layers of a module their initial weights."""
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if config.weight_init != "xavier_uniform":
            nn.init.trunc_normal_(layer.weight, std=INIT_STD)
        else:
            # Xavier's bound depends on the width of a map, and qkv is three maps in one.
            for part in layer.weight.data.chunk(3 if name.endswith("qkv") else 1):
                nn.init.xavier_uniform_(part)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


# ------------------------------------------------------------------------------------- patches and positions


def embed_patches(
    encoder: VisionTransformer | Eva, images: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b n d"]:
    """Embedded patches without their positions, in raster order."""
    # timm's own patch embedding insists on one image size, so its two parts are called one by one.
    embedded = encoder.patch_embed.proj(images)
    return encoder.patch_embed.norm(rearrange(embedded, "b d i j -> b (i j) d"))


def positions_of(encoder: VisionTransformer | Eva) -> Float[Tensor, "1 n d"]:
    """The encoder's position embedding."""
    assert encoder.pos_embed is not None
    return encoder.pos_embed


def rotary_positions(
    grid: tuple[int, int], head_dim: int, scale: Tensor | float = 1.0
) -> Float[Tensor, "n r"]:
    """Sines, then cosines, of the angles by which queries and keys are turned, in raster order.

    As in NEPA and DINOv3: coordinates are those of the patches' centres in [-1, 1], times `scale`.
    """
    # Row and column have a quarter of a head's width each, of frequencies 2 pi / 100^(i / (head_dim / 4)).
    # Turned together are channel i and i + head_dim / 2, so every angle comes twice.
    row, column = torch.meshgrid(*((2 * torch.arange(n) + 1.0) / n - 1 for n in grid), indexing="ij")
    places = scale * torch.stack([row.flatten(), column.flatten()], dim=1)
    quarter = head_dim // 4
    periods = ROPE_BASE ** (torch.arange(quarter, dtype=torch.float32) / quarter)
    angles = rearrange(2 * math.pi * places[..., None] / periods, "n a f -> n (a f)").tile(2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def fresh_positions(config: ModelConfig, dim: int) -> Parameter:
    """Position embeddings "1 n d" as a model begins with them; fixed ones take no gradient."""
    if config.positions == "sincos":
        return Parameter(sincos_positions(config.grid, dim), requires_grad=False)
    return Parameter(nn.init.trunc_normal_(torch.empty(1, config.num_patches, dim), std=INIT_STD))


def sincos_positions(grid: tuple[int, int], dim: int) -> Float[Tensor, "1 n d"]:
    """Fixed sines and cosines in raster order (AIM, section 4.2, and its code; after MAE)."""
    # The first half of the channels tells the column, the second the row. Each half is all sines, then all
    # cosines, of the place over 10000^(i / (dim / 4)), i = 0 .. dim/4 - 1.
    # In fp64, rounded at the end: large places times small frequencies lose digits in fp32.
    frequencies = SINCOS_BASE ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (column, row)]
    parts = [function(angle) for angle in angles for function in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1)[None].float()


def positions_on(
    grid: tuple[int, int], own: Float[Tensor, "1 n d"], config: ModelConfig
) -> Float[Tensor, "1 n2 d"]:
    """A model's positions on a grid of (rows, columns): its own, else computed anew or resampled."""
    # Fixed positions are a function of the grid: computed, they are exact. Learned ones are resampled.
    if config.positions == "sincos" and grid != config.grid:
        return sincos_positions(grid, own.shape[-1]).to(own)
    return resample_positions(own, config.grid, grid, antialias=config.resample_antialias)


def resample_positions(
    positions: Float[Tensor, "1 n d"],
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    *,
    antialias: bool = True,
) -> Float[Tensor, "1 n2 d"]:
    """Learned positions of one grid on another, by bicubic interpolation; the same grid is left alone."""
    # timm 1.0.26 leaves any grid of as many patches alone if the new one is square, even if it was not.
    if old_grid == new_grid:
        return positions
    # Positions are an image of d channels on the grid, one pixel a patch, so resizing that image gives the
    # positions of another grid. In fp32, as half precision would round the cubic's weights.
    on_grid = rearrange(positions.float(), "1 (i j) d -> 1 d i j", i=old_grid[0])
    resampled = interpolate(on_grid, size=new_grid, mode="bicubic", antialias=antialias)
    return rearrange(resampled, "1 d i j -> 1 (i j) d").to(positions.dtype)
