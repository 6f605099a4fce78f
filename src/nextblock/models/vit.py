"""The encoder: a timm VisionTransformer, and the loop over its layers.

The encoder keeps timm's key names, so its weights load wherever timm does. Only the loop over the layers is
ours: timm's `forward_features` silently skips gradient checkpointing when given a mask.
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
    """Output of each layer, before the final norm."""
    prefix: tuple[Float[Tensor, "b q d"], ...] = ()
    """Class token (first) and register tokens of each layer; empty if the encoder has neither."""
    has_class_token: bool = False
    """Whether the first prefix token is a class token; some encoders have only registers."""


class Layer(Block):
    """timm's transformer layer with `qk_scale`, and with the random numbers of drop path as an argument.

    `drop_path` contains uniform numbers in [0, 1), one per image and branch (attention, MLP). A branch is
    dropped if its number is below the rate. Without `drop_path`, timm draws from torch's global generator.
    """

    def __init__(self, *args: Any, qk_scale: float | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if qk_scale is not None:
            # The attention kernel always scales by head_dim**-0.5, so the queries get the remaining factor.
            # timm applies q_norm to queries only. _Scale has no weights, so the state dict does not change.
            attention: Any = self.attn
            attention.q_norm = _Scale(qk_scale * attention.head_dim**0.5)

    @property
    def factors(self) -> list[Any]:
        """LayerScale's factors on attention and MLP; 1 without it."""
        return [getattr(scale, "gamma", 1) for scale in (self.ls1, self.ls2)]

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        attn_mask: Bool[Tensor, "*b n n"] | None = None,
        is_causal: bool = False,
        drop_path: Float[Tensor, "b 2"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Attention, then an MLP, each with a residual connection."""
        # timm draws drop path from the global generator, so the numbers would depend on the batch size and
        # the number of processes. Here the caller passes them: a function of seed, step and image.
        if drop_path is None or not self.training:
            return super().forward(x, attn_mask, is_causal)
        attended = self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))
        x = x + _drop(attended, self.drop_path1, drop_path[:, 0])
        return x + _drop(self.ls2(self.mlp(self.norm2(x))), self.drop_path2, drop_path[:, 1])


class RopeLayer(EvaBlock):
    """timm's layer with rotary positions; `drop_path` as in `Layer`."""

    @property
    def factors(self) -> list[Any]:
        """LayerScale's factors on attention and MLP; 1 without it."""
        return [1 if gamma is None else gamma for gamma in (self.gamma_1, self.gamma_2)]

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        rope: Float[Tensor, "*c p r"] | None = None,
        attn_mask: Bool[Tensor, "*b n n"] | None = None,
        is_causal: bool = False,
        drop_path: Float[Tensor, "b 2"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Attention, then an MLP, each with a residual connection; `rope` does not rotate the class token."""
        if drop_path is None or not self.training:
            return super().forward(x, rope, attn_mask, is_causal)
        first, second = self.factors
        attended = self.attn(self.norm1(x), rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        x = x + _drop(first * attended, self.drop_path1, drop_path[:, 0])
        return x + _drop(second * self.mlp(self.norm2(x)), self.drop_path2, drop_path[:, 1])


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
    # Kept branches are scaled by 1 / (1 - rate), so the expectation is the same as without drop path.
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
    """Run layers in sequence and return the output of each.

    `mask` and `rope` are for transformer layers. `recompute` keeps only the layers' inputs for the backward
    pass. `drop_path` contains two numbers per image and layer (see `Layer`).
    """
    outputs = []
    for number, layer in enumerate(layers):
        # Mask and draws are arguments, not attributes: a recomputed layer must see those of its own batch.
        given: dict[str, Any] = {} if mask is None else {"attn_mask": mask}
        if rope is not None:
            given["rope"] = rope
        if drop_path is not None:
            given["drop_path"] = drop_path[:, 2 * number : 2 * number + 2]
        # Without gradients, as in evaluation, there is nothing to recompute. The reentrant variant accepts
        # no keyword arguments such as the mask.
        if recompute and hidden.requires_grad:
            hidden = checkpoint(layer, hidden, **given, use_reentrant=False)
        else:
            hidden = layer(hidden, **given)
        outputs.append(hidden)
    return tuple(outputs)


# ----------------------------------------------------------------------------------------- building, weights


def build_encoder(config: ModelConfig) -> VisionTransformer | Eva:
    """Build the timm ViT of these settings (timm's `Eva` for rotary positions): a final norm, no head.

    `weight_init` follows official XTRA by default. Linear layers and learned positions are drawn from a
    truncated normal (std 0.02) with zero biases, the patch projection from a Kaiming normal (fan in). AIM's
    training code makes all of them Xavier-uniform. Draws from torch's global generator.
    """
    # timm builds the module and names its weights. Its own initialisation is skipped, as ours follows.
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
    # init_linear skips the patch projection, as it is a convolution. Xavier's bound is computed from its
    # matrix form, which maps a patch's values (c i j) to the width.
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
    # Built with depth 0: Eva has no argument for a custom layer class.
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
    """Arguments with which timm's `VisionTransformer` builds the encoder of these settings."""
    return {
        "img_size": pair(config.image_size),
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": config.bias,
        "proj_bias": config.bias,  # timm uses it for the MLP as well
        "class_token": config.class_token,
        "no_embed_class": True,  # the class token has no position
        "init_values": config.layer_scale,
        "norm_layer": layer_norm(config),
        "embed_norm_layer": layer_norm(config) if config.patch_norm else None,
    }


def layer_norm(config: ModelConfig) -> Any:
    """LayerNorm with the epsilon of these settings; call it with a width, as timm calls a class."""
    return partial(nn.LayerNorm, eps=config.norm_eps)


def init_linear(module: nn.Module, config: ModelConfig) -> None:
    """Initialise all linear layers of a module."""
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if config.weight_init != "xavier_uniform":
            nn.init.trunc_normal_(layer.weight, std=INIT_STD)
        else:
            # Xavier's bound depends on a layer's output width, and qkv is three layers in one.
            for part in layer.weight.data.chunk(3 if name.endswith("qkv") else 1):
                nn.init.xavier_uniform_(part)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


# ------------------------------------------------------------------------------------- patches and positions


def embed_patches(
    encoder: VisionTransformer | Eva, images: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b n d"]:
    """Embed patches without adding positions, in raster order."""
    # timm's patch embedding accepts one image size only, so its two parts are called separately.
    embedded = encoder.patch_embed.proj(images)
    return encoder.patch_embed.norm(rearrange(embedded, "b d i j -> b (i j) d"))


def positions_of(encoder: VisionTransformer | Eva) -> Float[Tensor, "1 n d"]:
    """The encoder's position embedding."""
    assert encoder.pos_embed is not None
    return encoder.pos_embed


def rotary_positions(
    grid: tuple[int, int], head_dim: int, scale: Tensor | float = 1.0
) -> Float[Tensor, "n r"]:
    """Sines, then cosines, of the angles that rotate queries and keys, in raster order.

    As in NEPA and DINOv3, coordinates are the patch centres in [-1, 1], times `scale`.
    """
    # Row and column each get a quarter of the head's width, at frequencies 2 pi / 100^(i / (head_dim / 4)).
    # Channels i and i + head_dim / 2 rotate together, so every angle appears twice.
    row, column = torch.meshgrid(*((2 * torch.arange(n) + 1.0) / n - 1 for n in grid), indexing="ij")
    places = scale * torch.stack([row.flatten(), column.flatten()], dim=1)
    quarter = head_dim // 4
    periods = ROPE_BASE ** (torch.arange(quarter, dtype=torch.float32) / quarter)
    angles = rearrange(2 * math.pi * places[..., None] / periods, "n a f -> n (a f)").tile(2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def fresh_positions(config: ModelConfig, dim: int) -> Parameter:
    """Initial position embedding (1 n d); fixed sines and cosines take no gradient."""
    if config.positions == "sincos":
        return Parameter(sincos_positions(config.grid, dim), requires_grad=False)
    return Parameter(nn.init.trunc_normal_(torch.empty(1, config.num_patches, dim), std=INIT_STD))


def sincos_positions(grid: tuple[int, int], dim: int) -> Float[Tensor, "1 n d"]:
    """Fixed sines and cosines in raster order (AIM, section 4.2, and its code; after MAE)."""
    # The first half of the channels encodes the column, the second the row. Each half is all sines, then all
    # cosines, of the coordinate over 10000^(i / (dim / 4)), i = 0 .. dim/4 - 1.
    # Computed in fp64 and rounded at the end: fp32 loses digits for large coordinates.
    frequencies = SINCOS_BASE ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (column, row)]
    parts = [function(angle) for angle in angles for function in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1)[None].float()


def positions_on(
    grid: tuple[int, int], own: Float[Tensor, "1 n d"], config: ModelConfig
) -> Float[Tensor, "1 n2 d"]:
    """A model's position embedding on a grid of (rows, columns), recomputed if fixed, else resampled."""
    # Fixed positions are a function of the grid, so recomputing them is exact.
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
    """Resample learned positions from one grid to another by bicubic interpolation."""
    # timm 1.0.26 compares only the number of patches if the new grid is square: 2x8 would be used for 4x4.
    if old_grid == new_grid:
        return positions
    # Positions form an image with d channels and one pixel per patch, which can be resized like any other.
    # In fp32, as half precision would round the interpolation weights.
    on_grid = rearrange(positions.float(), "1 (i j) d -> 1 d i j", i=old_grid[0])
    resampled = interpolate(on_grid, size=new_grid, mode="bicubic", antialias=antialias)
    return rearrange(resampled, "1 d i j -> 1 (i j) d").to(positions.dtype)
