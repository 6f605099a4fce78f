"""The encoder: a timm VisionTransformer, and the loop over its layers.

The module that timm builds is kept as it is, with its key names, so that its weights go anywhere timm goes.
Only the loop over the layers is ours: timm's own `forward_features` skips gradient checkpointing without a
word when it is given a mask.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from einops import rearrange
from jaxtyping import Bool, Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint

from nextblock.config import ModelConfig, pair

__all__ = [
    "build_encoder",
    "init_linear",
    "layer_outputs",
    "patch_tokens",
    "positions_of",
    "resample_positions",
]

INIT_STD = 0.02


def build_encoder(config: ModelConfig) -> VisionTransformer:
    """The timm ViT of these settings: no class token, learned positions, a final norm, no head.

    Initialised as official XTRA: linear layers from a truncated normal of deviation 0.02 with zero biases,
    the patch projection Kaiming-normal (fan in), positions truncated normal 0.02. Draws from torch's global
    generator.
    """
    encoder = VisionTransformer(
        img_size=pair(config.image_size),
        patch_size=config.patch_size,
        in_chans=config.in_chans,
        num_classes=0,
        global_pool="",
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        class_token=False,
        drop_path_rate=config.drop_path,
        norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
        weight_init="skip",
    )
    encoder.apply(init_linear)
    projection = encoder.patch_embed.proj
    nn.init.kaiming_normal_(projection.weight, mode="fan_in")
    nn.init.zeros_(projection.bias)
    nn.init.trunc_normal_(positions_of(encoder), std=INIT_STD)
    return encoder


def init_linear(module: nn.Module) -> None:
    """Give a linear layer its initial weights; for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def patch_tokens(
    encoder: VisionTransformer, images: Float[Tensor, "b c h w"], old_grid: tuple[int, int]
) -> Float[Tensor, "b n d"]:
    """Embedded patches with their positions, in raster order; positions of `old_grid` are resampled."""
    embedded = encoder.patch_embed.proj(images)
    grid = (embedded.shape[2], embedded.shape[3])
    tokens = encoder.patch_embed.norm(rearrange(embedded, "b d i j -> b (i j) d"))
    return tokens + resample_positions(positions_of(encoder), old_grid, grid)


def positions_of(encoder: VisionTransformer) -> Float[Tensor, "1 n d"]:
    """The encoder's position embedding, which ours always have."""
    assert encoder.pos_embed is not None
    return encoder.pos_embed


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


def layer_outputs(
    layers: Iterable[nn.Module],
    hidden: Float[Tensor, "b n d"],
    mask: Bool[Tensor, "*b n n"] | None,
    *,
    recompute: bool = False,
) -> tuple[Float[Tensor, "b n d"], ...]:
    """Run transformer layers one after the other under one mask, and return what each returns.

    `recompute` keeps only the layers' inputs for the backward pass. The mask is an argument of every layer,
    and not held by it, so that a recomputed layer sees the one it saw the first time.
    """
    outputs = []
    for layer in layers:
        if recompute and hidden.requires_grad:
            hidden = checkpoint(layer, hidden, attn_mask=mask, use_reentrant=False)
        else:
            hidden = layer(hidden, attn_mask=mask)
        outputs.append(hidden)
    return tuple(outputs)
