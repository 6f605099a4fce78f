"""A timm model with a block mask: `import nextblock.interop.timm_models` registers `nextblock_vit`.

timm's own `VisionTransformer` applies no mask and fixes the epsilon of its norms, so encoders under a block
mask, or with another epsilon, are written for this class. It is a `VisionTransformer` in everything else:
names of weights, `features_only`, `forward_intermediates`, `reset_classifier`, `set_input_size`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from nextblock.blocks import block_orders, patches_of_blocks, raster_mask
from nextblock.config import ModelConfig, Size, pair
from nextblock.models.vit import (
    layer_outputs,
    positions_of,
    resample_positions,
    sincos_positions,
    vit_arguments,
)

__all__ = ["NextBlockViT", "model_args", "nextblock_vit"]

default_cfgs = generate_default_cfgs(
    {
        "nextblock_vit": {
            "url": "",
            "num_classes": 0,
            "input_size": (3, 256, 256),
            "pool_size": None,
            "crop_pct": 256 / 300,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


class NextBlockViT(VisionTransformer):
    """timm's `VisionTransformer` under a block mask; all arguments can be written as JSON.

    `attention` "causal" lets a patch attend to its own block and those before it in `order`, "full" to all.
    The mask follows the image's size; with `positions` "sincos" so do the positions, recomputed.
    """

    order_mask: Bool[Tensor, "n n"] | None

    def __init__(
        self,
        *,
        img_size: int | Sequence[int] = 256,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 0,
        global_pool: Literal["", "avg", "avgmax", "max"] = "avg",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        bias: bool = True,
        patch_norm: bool = False,
        positions: Literal["learned", "sincos"] = "learned",
        norm_eps: float = 1e-6,
        attention: Literal["causal", "full"] = "causal",
        block_size: int | Sequence[int] = 4,
        order: Literal["raster", "spiral", "checkerboard", "fixed_random", "random"] = "raster",
        order_seed: int = 0,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        config = ModelConfig(
            image_size=_sides(img_size),
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            norm_eps=norm_eps,
            bias=bias,
            patch_norm=patch_norm,
            positions=positions,
            block_size=_sides(block_size) if attention == "causal" else 1,
            order=order,
            order_seed=order_seed,
            predictor=None,
            feature_attention=attention,
        )
        super().__init__(
            num_classes=num_classes,
            global_pool=global_pool,
            dynamic_img_size=dynamic_img_size,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            device=device,
            dtype=dtype,
            fc_norm=False,
            **vit_arguments(config),
        )
        self.block_config = config
        self._fill_positions()
        self.register_buffer("order_mask", _order_mask(self.block_config), persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """Compute what no weight file holds; transformers calls this, as it builds models without data."""
        self.order_mask = _on(_order_mask(self.block_config), positions_of(self).device)

    def set_input_size(
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
    ) -> None:
        """Change the image's size; learned positions are resampled, fixed ones and the mask recomputed."""
        if patch_size is not None and patch_size != pair(self.block_config.patch_size):
            raise ValueError(
                f"patch_size {patch_size}: the blocks are made for patches of "
                f"{self.block_config.patch_size} px; leave it"
            )
        if img_size is None:
            return
        self.block_config = replace(self.block_config, image_size=_sides(img_size))
        super().set_input_size(img_size=img_size)
        self._fill_positions()
        self.order_mask = _on(_order_mask(self.block_config), positions_of(self).device)

    def forward_features(
        self, x: Float[Tensor, "b c h w"], attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Float[Tensor, "b n d"]:
        """Tokens after the final norm, in raster order."""
        return self.norm(self._layers(x, len(self.blocks), attn_mask, is_causal=is_causal)[-1])

    def forward_intermediates(
        self,
        x: Float[Tensor, "b c h w"],
        indices: int | list[int] | tuple[int, ...] | None = None,
        return_prefix_tokens: bool = False,  # noqa: ARG002 - timm's signature; there are none to return
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Chosen layers' outputs, as timm's; there are no prefix tokens to return."""
        assert output_fmt in ("NCHW", "NLC"), "Output format must be one of NCHW or NLC."
        take, last = feature_take_indices(len(self.blocks), indices)  # type: ignore[arg-type]
        layers = self._layers(x, last + 1 if stop_early else len(self.blocks), attn_mask, is_causal=is_causal)
        chosen = [self.norm(layer) if norm else layer for i, layer in enumerate(layers) if i in take]
        if output_fmt == "NCHW":
            rows, _ = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
            chosen = [rearrange(one, "b (i j) d -> b d i j", i=rows).contiguous() for one in chosen]
        if output_dict:
            features = {} if intermediates_only else {"image_features": self.norm(layers[-1])}
            return {"image_intermediates": chosen, **features}
        return chosen if intermediates_only else (self.norm(layers[-1]), chosen)

    def _layers(
        self, images: Tensor, count: int, attn_mask: Tensor | None, *, is_causal: bool
    ) -> tuple[Tensor, ...]:
        if attn_mask is not None or is_causal:
            raise ValueError("this model brings its own mask; leave attn_mask and is_causal alone")
        tokens, mask = self._embed(images)
        return layer_outputs(self.blocks[:count], tokens, mask, recompute=self.grad_checkpointing)

    def _embed(self, images: Tensor) -> tuple[Tensor, Bool[Tensor, "n n"] | None]:
        """The first layer's input, and the mask over it, at the size of these images."""
        embedded = self.patch_embed(images)
        size = (images.shape[2], images.shape[3])
        if size == pair(self.block_config.image_size):
            return self._pos_embed(embedded), self.order_mask
        config = replace(self.block_config, image_size=size)  # only with dynamic_img_size: timm checks
        mask = _on(_order_mask(config), images.device)
        if config.positions == "sincos":
            positions = sincos_positions(config.grid, config.embed_dim).to(embedded)
            tokens = self.pos_drop(rearrange(embedded, "b i j d -> b (i j) d") + positions)
        else:
            tokens = self._pos_embed(embedded)
        return tokens, mask

    def _fill_positions(self) -> None:
        """Fixed positions are frozen, and recomputed at every size."""
        if self.block_config.positions == "sincos":
            positions = positions_of(self).requires_grad_(False)
            with torch.no_grad():
                positions.copy_(sincos_positions(self.block_config.grid, self.block_config.embed_dim))


def _order_mask(config: ModelConfig) -> Bool[Tensor, "n n"] | None:
    """Who may attend to whom, in raster order; None where all may attend to all."""
    if config.feature_attention == "full":
        return None
    table = patches_of_blocks(config.grid, pair(config.block_size))
    order = block_orders(config.order, config.block_grid, config.order_seed)[0]
    return raster_mask(table, order)


def _on(mask: Bool[Tensor, "n n"] | None, device: torch.device) -> Bool[Tensor, "n n"] | None:
    return None if mask is None else mask.to(device)


def _sides(size: int | Sequence[int]) -> Size:
    """A size as JSON or timm give it, as settings have it."""
    return size if isinstance(size, int) else (size[0], size[1])


def model_args(config: ModelConfig) -> dict[str, Any]:
    """The arguments with which `nextblock_vit` is the encoder of these settings, ready for JSON."""
    return {
        "img_size": list(pair(config.image_size)),
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "bias": config.bias,
        "patch_norm": config.patch_norm,
        "positions": config.positions,
        "norm_eps": config.norm_eps,
        "attention": config.feature_attention,
        "block_size": list(pair(config.block_size)),
        "order": config.order,
        "order_seed": config.order_seed,
        "global_pool": "avg",
    }


def _fit(weights: Mapping[str, Tensor], model: NextBlockViT) -> dict[str, Tensor]:
    """Weights for this model's image size: learned positions resampled, fixed ones recomputed.

    The size that they were written at stands in the directory's settings. (timm 1.0.26 takes their grid for
    square.)
    """
    config = model.block_config
    source: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment] # set by timm's builder
    _, rows_px, columns_px = source["input_size"]
    old_grid = (rows_px // config.patch_size, columns_px // config.patch_size)
    own = weights["pos_embed"]
    if config.positions == "sincos":
        return {**weights, "pos_embed": sincos_positions(config.grid, config.embed_dim)}
    if old_grid == config.grid or own.shape[1] != old_grid[0] * old_grid[1]:
        return dict(weights)  # what does not fit is for timm to refuse
    return {**weights, "pos_embed": resample_positions(own, old_grid, config.grid)}


@register_model
def nextblock_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a `NextBlockViT` or, with `features_only`, a wrapper of timm around one; for timm to call."""
    return build_model_with_cfg(
        NextBlockViT,
        "nextblock_vit",
        pretrained,
        pretrained_filter_fn=_fit,
        pretrained_strict=True,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )
