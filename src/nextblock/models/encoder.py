"""The encoder: a timm VisionTransformer, and the loop over its layers.

The module that timm builds is kept as it is, with its key names, so that its weights go anywhere timm goes.
Only the loop over the layers is ours: timm's own `forward_features` skips gradient checkpointing without a
word when it is given a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint

from nextblock.config import ModelConfig, pair

__all__ = [
    "build_encoder",
    "fresh_positions",
    "init_linear",
    "layer_norm",
    "layer_outputs",
    "patch_tokens",
    "picked_output",
    "positions_of",
    "positions_on",
    "resample_positions",
    "sincos_positions",
    "vit_arguments",
]

INIT_STD = 0.02
SINCOS_BASE = 10_000.0


def build_encoder(config: ModelConfig) -> VisionTransformer:
    """The timm ViT of these settings: no class token, a final norm, no head.

    Initialised as official XTRA: linear layers from a truncated normal of deviation 0.02 with zero biases,
    the patch projection Kaiming-normal (fan in), learned positions truncated normal 0.02; or as AIM's
    training code: all of them Xavier-uniform. Draws from torch's global generator.
    """
    encoder = VisionTransformer(
        num_classes=0,
        global_pool="",
        drop_path_rate=config.drop_path,
        weight_init="skip",
        **vit_arguments(config),
    )
    init_linear(encoder, config)
    projection = encoder.patch_embed.proj
    if config.weight_init == "trunc_normal":
        nn.init.kaiming_normal_(projection.weight, mode="fan_in")
    else:
        nn.init.xavier_uniform_(rearrange(projection.weight.data, "d c i j -> d (c i j)"))
    nn.init.zeros_(projection.bias)
    encoder.pos_embed = fresh_positions(config, config.embed_dim)
    return encoder


def vit_arguments(config: ModelConfig) -> dict[str, Any]:
    """What timm's `VisionTransformer` is told of the encoder of these settings."""
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
        "class_token": False,
        "norm_layer": layer_norm(config),
        "embed_norm_layer": layer_norm(config) if config.patch_norm else None,
    }


def layer_norm(config: ModelConfig) -> Any:
    """The LayerNorm of these settings, to be called with a width: what timm takes for a class."""
    return partial(nn.LayerNorm, eps=config.norm_eps)


def init_linear(module: nn.Module, config: ModelConfig) -> None:
    """Give all linear layers of a module their initial weights.

    A joint map to queries, keys and values counts as three: Xavier's bound hangs on the width of each.
    """
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if config.weight_init == "trunc_normal":
            nn.init.trunc_normal_(layer.weight, std=INIT_STD)
        else:
            for part in layer.weight.data.chunk(3 if name.endswith("qkv") else 1):
                nn.init.xavier_uniform_(part)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def patch_tokens(
    encoder: VisionTransformer, images: Float[Tensor, "b c h w"], config: ModelConfig
) -> Float[Tensor, "b n d"]:
    """Embedded patches with their positions, in raster order; `config` is that of the encoder's own size."""
    embedded = encoder.patch_embed.proj(images)
    grid = (embedded.shape[2], embedded.shape[3])
    tokens = encoder.patch_embed.norm(rearrange(embedded, "b d i j -> b (i j) d"))
    return tokens + positions_on(grid, positions_of(encoder), config)


def positions_of(encoder: VisionTransformer) -> Float[Tensor, "1 n d"]:
    """The encoder's position embedding, which ours always have."""
    assert encoder.pos_embed is not None
    return encoder.pos_embed


def fresh_positions(config: ModelConfig, dim: int) -> Parameter:
    """Position embeddings "1 n d" as a model begins with them; fixed ones take no gradient."""
    if config.positions == "sincos":
        return Parameter(sincos_positions(config.grid, dim), requires_grad=False)
    return Parameter(nn.init.trunc_normal_(torch.empty(1, config.num_patches, dim), std=INIT_STD))


def sincos_positions(grid: tuple[int, int], dim: int) -> Float[Tensor, "1 n d"]:
    """Fixed sines and cosines, in raster order: half of the channels of the column, half of the row.

    Each half is the sines, then the cosines, of the place over 10000^(i / (dim / 4)), i = 0 .. dim/4 - 1
    (AIM, section 4.2, and its code; after MAE).
    """
    frequencies = SINCOS_BASE ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (column, row)]
    parts = [function(angle) for angle in angles for function in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1)[None].float()


def positions_on(
    grid: tuple[int, int], own: Float[Tensor, "1 n d"], config: ModelConfig
) -> Float[Tensor, "1 n2 d"]:
    """A model's positions on a grid of (rows, columns): its own, else computed anew or resampled."""
    if config.positions == "sincos" and grid != config.grid:
        return sincos_positions(grid, own.shape[-1]).to(own)
    return resample_positions(own, config.grid, grid)


def resample_positions(
    positions: Float[Tensor, "1 n d"], old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Tensor, "1 n2 d"]:
    """Learned positions of one grid on another: antialiased bicubic; the same grid is left alone.

    (timm 1.0.26 leaves any grid of as many patches alone if the new one is square, also one that was not.)
    """
    if old_grid == new_grid:
        return positions
    on_grid = rearrange(positions.float(), "1 (i j) d -> 1 d i j", i=old_grid[0])
    resampled = interpolate(on_grid, size=new_grid, mode="bicubic", antialias=True)
    return rearrange(resampled, "1 d i j -> 1 (i j) d").to(positions.dtype)


def picked_output(
    layer: nn.Module,
    hidden: Float[Tensor, "b n d"],
    mask: Bool[Tensor, "*b n n"],
    *,
    pick: Callable[[Tensor], Tensor],
    recompute: bool = False,
) -> Float[Tensor, "*rows d"]:
    """What a transformer layer returns, for the tokens that `pick` picks: only these go through its MLP.

    All of them are keys and values. Where drop path is on, which draws a number for each image, the layer
    runs whole.
    """
    if layer.training and not isinstance(layer.drop_path2, nn.Identity):
        return pick(layer_outputs([layer], hidden, mask, recompute=recompute)[-1])
    if recompute and hidden.requires_grad:
        return checkpoint(_halves, layer, hidden, mask, pick, use_reentrant=False)
    return _halves(layer, hidden, mask, pick)


def _halves(layer: Any, hidden: Tensor, mask: Tensor, pick: Callable[[Tensor], Tensor]) -> Tensor:
    """The two halves of timm's `Block.forward`, picked between them."""
    hidden = pick(hidden + layer.drop_path1(layer.ls1(layer.attn(layer.norm1(hidden), attn_mask=mask))))
    return hidden + layer.ls2(layer.mlp(layer.norm2(hidden)))


def layer_outputs(
    layers: Iterable[nn.Module],
    hidden: Float[Tensor, "*rows d"],
    mask: Bool[Tensor, "*b n n"] | None = None,
    *,
    recompute: bool = False,
) -> tuple[Float[Tensor, "*rows d"], ...]:
    """Run layers one after the other, transformer ones under one mask, and return what each returns.

    Without a mask none is handed down. `recompute` keeps only the layers' inputs for the backward pass. The
    mask is an argument of every layer, and not held by it, so that a recomputed layer sees the one it saw the
    first time.
    """
    outputs = []
    given: dict[str, Any] = {} if mask is None else {"attn_mask": mask}
    for layer in layers:
        if recompute and hidden.requires_grad:
            hidden = checkpoint(layer, hidden, **given, use_reentrant=False)
        else:
            hidden = layer(hidden, **given)
        outputs.append(hidden)
    return tuple(outputs)
