"""`nextblock_vit`, a timm model with a block mask; importing this module registers it with timm.

timm's own `VisionTransformer` applies no mask and fixes the epsilon of its norms, so encoders under a block
mask, or with another epsilon, are written for this class. In everything else it is a `VisionTransformer`:
names of weights, `features_only`, `forward_intermediates`, `reset_classifier`, `set_input_size`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxtyping import Bool, Float
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nextblock.blocks import block_orders, patches_of_blocks, raster_mask
from nextblock.config import ModelConfig, pair
from nextblock.errors import UsageError
from nextblock.models.vit import fresh_positions, positions_of, positions_on, vit_arguments

# The arguments of nextblock_vit, all of which JSON can hold, and the settings that they stand for.
ARGUMENTS = {
    "img_size": "image_size",
    "attention": "feature_attention",
    **{name: name for name in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")},
    **{name: name for name in ("bias", "patch_norm", "positions", "norm_eps", "block_size")},
    **{name: name for name in ("order", "order_seed")},
}

# Arguments of timm's own class that change no token of an evaluated encoder. Any other is refused: it could.
TIMMS_ARGUMENTS = {"num_classes", "global_pool", "drop_rate", "drop_path_rate", "device", "dtype"}

_CFG: dict[str, Any] = {"num_classes": 0, "input_size": (3, 256, 256), "crop_pct": 256 / 300}
_CFG |= {"fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head"}
default_cfgs = generate_default_cfgs({"nextblock_vit": _CFG})


class _Block(Block):
    """A layer that recomputes itself: timm drops activation checkpointing as soon as there is a mask."""

    recompute = False

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,  # noqa: ARG002 - timm's signature; the model has refused True
    ) -> Tensor:
        """One layer under a mask (True: may attend)."""
        if self.recompute and x.requires_grad:
            # The mask is an argument of the recomputed call: a layer that kept it could be recomputed under
            # another image size's mask.
            return checkpoint(super().forward, x, attn_mask=attn_mask, use_reentrant=False)
        return super().forward(x, attn_mask=attn_mask)


class NextBlockViT(VisionTransformer):
    """timm's `VisionTransformer` under a block mask, built from `ARGUMENTS` (defaults: `ModelConfig`'s).

    `attention` "causal" lets a patch attend to its own block and those before it in `order`, "full" to all.
    """

    order_mask: Bool[Tensor, "n n"] | None

    def __init__(self, **arguments: Any) -> None:
        unknown = arguments.keys() - ARGUMENTS.keys() - TIMMS_ARGUMENTS
        if unknown:
            known = ", ".join(ARGUMENTS)
            raise TypeError(f"nextblock_vit has no argument {sorted(unknown)}; it takes {known}")
        settings = {ours: _hashable(arguments[name]) for name, ours in ARGUMENTS.items() if name in arguments}
        config = ModelConfig(**settings, predictor=None)
        if config.feature_attention == "full":
            config = replace(config, block_size=1)  # else images of other sizes would have to fit the blocks
        of_timm: dict[str, Any] = {"num_classes": 0, "global_pool": "avg"}
        of_timm |= {name: arguments[name] for name in arguments.keys() & TIMMS_ARGUMENTS}
        super().__init__(**of_timm, fc_norm=False, block_fn=_Block, **vit_arguments(config))
        # A buffer moves with the model; not persistent, as the weight file holds timm's names and no others.
        self.register_buffer("order_mask", None, persistent=False)
        self._set_config(config)

    def _set_config(self, config: ModelConfig) -> None:
        """Take the settings at an image size, with the mask and the fixed positions of that size."""
        self.block_config = config
        # Fixed positions are in the weight file, but those of another size: computed here, they are exact.
        # The parameter keeps timm's name, so the file still fits.
        if config.positions == "sincos":
            positions = fresh_positions(config, config.embed_dim)
            self.pos_embed = nn.Parameter(positions.to(positions_of(self)), requires_grad=False)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Compute what no weight file holds; transformers calls this, as it builds models without data."""
        config = self.block_config
        if config.feature_attention == "full":
            return  # no mask: all patches attend to all
        # timm keeps tokens in raster order, whatever the order of the blocks: the mask is permuted instead.
        table = patches_of_blocks(config.grid, pair(config.block_size))
        order = block_orders(config.order, config.block_grid, config.order_seed)[0]
        self.order_mask = raster_mask(table, order).to(positions_of(self).device)

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Change the image's size; learned positions are resampled, fixed ones and the mask recomputed."""
        if patch_size is not None and patch_size != pair(self.block_config.patch_size):
            own = self.block_config.patch_size
            raise UsageError(
                f"patch_size {patch_size}: the blocks are made for patches of {own} px; leave it out"
            )
        if img_size is not None:
            config = replace(self.block_config, image_size=_hashable(img_size))
            # timm resamples the positions; fixed ones are then replaced by `_set_config`, with the mask.
            super().set_input_size(img_size=img_size)
            self._set_config(config)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every layer in the backward pass instead of keeping its activations."""
        layers: Any = self.blocks
        for layer in layers:
            layer.recompute = enable

    def forward_features(
        self, x: Float[Tensor, "b c h w"], attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Float[Tensor, "b n d"]:
        """Tokens after the final norm, in raster order."""
        _refuse_mask(attn_mask, is_causal)
        # timm hands the mask to every layer. It is the same for all images of the size, in raster order.
        return super().forward_features(x, attn_mask=self.order_mask)

    def forward_intermediates(
        self, x: Tensor, *args: Any, attn_mask: Tensor | None = None, is_causal: bool = False, **kwargs: Any
    ) -> Any:
        """Chosen layers' outputs, by the arguments of timm's method."""
        _refuse_mask(attn_mask, is_causal)
        return super().forward_intermediates(x, *args, attn_mask=self.order_mask, **kwargs)


def _refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise UsageError("this model brings its own mask; leave attn_mask and is_causal alone")


def _hashable(value: Any) -> Any:
    """A pair as settings have it; JSON and timm give lists."""
    return value if isinstance(value, int | float | str) else tuple(value)


def model_args(config: ModelConfig) -> dict[str, Any]:
    """The arguments with which `nextblock_vit` is the encoder of these settings, ready for JSON."""
    arguments = {name: getattr(config, field) for name, field in ARGUMENTS.items()}
    sizes = {name: list(pair(arguments[name])) for name in ("img_size", "block_size")}
    return {**arguments, **sizes, "global_pool": "avg"}


def _fit(weights: Mapping[str, Tensor], model: NextBlockViT) -> dict[str, Tensor]:
    """Weights at this model's image size; the size they were written at is in the directory's settings."""
    # timm 1.0.26 takes the grid of every file for square, so its own resampling is not enough.
    pretrained_cfg: Any = model.pretrained_cfg
    source = replace(model.block_config, image_size=tuple(pretrained_cfg["input_size"][1:]))
    if weights["pos_embed"].shape[1] != source.num_patches:
        return dict(weights)  # for timm to refuse
    return {**weights, "pos_embed": positions_on(model.block_config.grid, weights["pos_embed"], source)}


@register_model
def nextblock_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a `NextBlockViT` or, with `features_only`, a wrapper of timm around one; for timm to call."""
    # Strict loading: a missing or a further tensor would be another function, and no error. `_fit` runs
    # before, so a directory opens at any image size that its blocks divide.
    return build_model_with_cfg(
        NextBlockViT,
        "nextblock_vit",
        pretrained,
        pretrained_filter_fn=_fit,
        pretrained_strict=True,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )
