"""Our encoders as timm models: one of timm's own, or `nextblock_vit`, which has a block mask.

Importing this module registers `nextblock_vit` with timm.

timm's `VisionTransformer` applies no mask and fixes the epsilon of its norms. So encoders with a block mask
or another epsilon use `nextblock_vit`. Otherwise it behaves like a `VisionTransformer`: names of weights,
`features_only`, `forward_intermediates`, `reset_classifier`, `set_input_size`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nextblock.blocks import block_orders, patches_of_blocks, raster_mask
from nextblock.checkpoint import CheckpointError
from nextblock.config import ModelConfig, pair
from nextblock.errors import UsageError
from nextblock.models.vit import ROPE_BASE, fresh_positions, positions_of, positions_on, vit_arguments
from nextblock.settings import require

# timm architectures used with all arguments given explicitly; ROPE has rotary positions.
STOCK, ROPE = "vit_base_patch16_224", "eva_giant_patch14_224"
# Epsilon of timm's LayerNorms.
TIMM_EPS = 1e-6
# Largest allowed difference between an encoder's epsilon and its epsilon in timm.
MAX_EPS_ERROR = 1e-9
# Arguments of nextblock_vit, all valid in JSON, and the settings that they correspond to.
ARGUMENTS = {
    "img_size": "image_size",
    "attention": "feature_attention",
    **{name: name for name in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")},
    **{name: name for name in ("bias", "patch_norm", "positions", "norm_eps", "block_size")},
    **{name: name for name in ("order", "order_seed")},
}

# Arguments of timm's class that do not affect tokens in evaluation mode. Any other is refused.
TIMMS_ARGUMENTS = {"num_classes", "global_pool", "drop_rate", "drop_path_rate", "device", "dtype"}

_CFG: dict[str, Any] = {"num_classes": 0, "input_size": (3, 256, 256), "crop_pct": 256 / 300}
_CFG |= {"fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head"}
default_cfgs = generate_default_cfgs({"nextblock_vit": _CFG})


class _Block(Block):
    """A layer with its own activation checkpointing, as timm skips it if there is a mask."""

    recompute = False

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,  # noqa: ARG002 - timm's signature; the model refuses True
    ) -> Tensor:
        """Apply the layer under a mask (True: may attend)."""
        if self.recompute and x.requires_grad:
            # The mask is an argument of the recomputed call. A mask stored in the layer could already be that
            # of another image size.
            return checkpoint(super().forward, x, attn_mask=attn_mask, use_reentrant=False)
        return super().forward(x, attn_mask=attn_mask)


class NextBlockViT(VisionTransformer):
    """timm's `VisionTransformer` with a block mask, built from `ARGUMENTS` (defaults as in `ModelConfig`).

    `attention` "causal": a patch attends to its own block and earlier ones in `order`; "full": to all.
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
        # A buffer moves with the model. It is not persistent, as the weight file has timm's names only.
        self.register_buffer("order_mask", None, persistent=False)
        self._set_config(config)

    def _set_config(self, config: ModelConfig) -> None:
        """Apply settings, and compute the mask and fixed positions for their image size."""
        self.block_config = config
        # The weight file stores fixed positions, possibly of another size; recomputing them is exact. The
        # parameter keeps timm's name, so the file still fits.
        if config.positions == "sincos":
            positions = fresh_positions(config, config.embed_dim)
            self.pos_embed = nn.Parameter(positions.to(positions_of(self)), requires_grad=False)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Compute the mask, which no weight file contains; transformers calls this after a meta build."""
        config = self.block_config
        if config.feature_attention == "full":
            return  # no mask: all patches attend to all
        # timm keeps tokens in raster order for every block order, so the mask is permuted instead.
        table = patches_of_blocks(config.grid, pair(config.block_size))
        order = block_orders(config.order, config.block_grid, config.order_seed)[0]
        self.order_mask = raster_mask(table, order).to(positions_of(self).device)

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Change the image size; learned positions are resampled, fixed ones and the mask recomputed."""
        if patch_size is not None and patch_size != pair(self.block_config.patch_size):
            own = self.block_config.patch_size
            raise UsageError(f"the blocks are made for patches of {own} px; leave patch_size out")
        if img_size is not None:
            config = replace(self.block_config, image_size=_hashable(img_size))
            # timm resamples the positions; `_set_config` then recomputes fixed ones and the mask.
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
        return super().forward_features(x, **self._own_mask(attn_mask, is_causal))

    def forward_intermediates(
        self, x: Tensor, *args: Any, attn_mask: Tensor | None = None, is_causal: bool = False, **kwargs: Any
    ) -> Any:
        """Outputs of chosen layers, with the arguments of timm's method."""
        return super().forward_intermediates(x, *args, **self._own_mask(attn_mask, is_causal), **kwargs)

    def _own_mask(self, attn_mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
        require(
            attn_mask is None and not is_causal,
            "this model has its own mask; leave out attn_mask and is_causal",
        )
        return {"attn_mask": self.order_mask}  # timm passes it to every layer


def _hashable(value: Any) -> Any:
    """Convert lists from JSON or timm to tuples."""
    return value if isinstance(value, int | float | str) else tuple(value)


def _fit(weights: Mapping[str, Tensor], model: NextBlockViT) -> dict[str, Tensor]:
    """Resample positions to this model's image size from the size in the directory's settings."""
    # timm 1.0.26 assumes a square grid in every file, so its own resampling is not enough.
    pretrained_cfg: Any = model.pretrained_cfg
    source = replace(model.block_config, image_size=tuple(pretrained_cfg["input_size"][1:]))
    if weights["pos_embed"].shape[1] != source.num_patches:
        return dict(weights)  # for timm to refuse
    return {**weights, "pos_embed": positions_on(model.block_config.grid, weights["pos_embed"], source)}


@register_model
def nextblock_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a `NextBlockViT`, or timm's wrapper around one with `features_only`; called by timm."""
    # Load strictly, as a missing or additional tensor would silently be another function. `_fit` runs before,
    # so a directory opens at any image size that its blocks divide.
    return build_model_with_cfg(
        NextBlockViT,
        "nextblock_vit",
        pretrained,
        pretrained_filter_fn=_fit,
        pretrained_strict=True,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )


# ------------------------------------------------------------------------------ our encoders in timm's terms


def timm_architecture(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Name and arguments of an encoder in timm: a timm architecture if possible, else nextblock_vit."""
    # timm's class has no mask and one epsilon; any other encoder under its name would silently compute
    # something else. nextblock_vit has none of the newer parts.
    if not _has_newer_parts(config) and (config.feature_attention == "causal" or config.norm_eps != TIMM_EPS):
        arguments = {name: getattr(config, field) for name, field in ARGUMENTS.items()}
        sizes = {name: list(pair(arguments[name])) for name in ("img_size", "block_size")}
        return "nextblock_vit", {**arguments, **sizes, "global_pool": "avg"}
    if config.feature_attention == "causal":
        raise UsageError(
            "timm has no mask for an encoder with rotary positions, a class token, normed queries or "
            "LayerScale; write it with full attention (--attention full)"
        )
    # Norm classes are left out, as JSON cannot store them and timm's defaults are equal; num_classes, as
    # transformers adds it; and defaults, as the first release did not write them and `own_config` compares.
    norms = ("norm_layer", "embed_norm_layer")
    given = {name: value for name, value in vit_arguments(config).items() if name not in norms}
    arguments = {name: value for name, value in given.items() if value is not None}
    arguments |= {"img_size": list(pair(config.image_size)), "global_pool": "avg"}
    arguments |= {"qk_norm": True} if config.qk_norm else {}
    if not config.class_token or config.positions == "rope":
        del arguments["no_embed_class"]
    if config.positions != "rope":
        norm = {"embed_norm_layer": "layernorm"} if config.patch_norm else {}
        return STOCK, arguments | {"fc_norm": False} | norm
    del arguments["proj_bias"]
    arguments |= {"attn_type": "rope", "use_abs_pos_emb": False, "use_rot_pos_emb": True}
    arguments |= {"rope_type": "dinov3", "rope_temperature": ROPE_BASE, "rope_rotate_half": True}
    return ROPE, arguments | {"use_fc_norm": False}


def _has_newer_parts(config: ModelConfig) -> bool:
    """Whether the encoder has parts that nextblock_vit lacks."""
    return config.positions == "rope" or bool(config.class_token or config.qk_norm or config.layer_scale)


def as_timm_has(
    weights: Mapping[str, Tensor], config: ModelConfig, *, back: bool = False
) -> dict[str, Tensor]:
    """Convert our encoder's weights for timm's architectures with newer parts; `back` reverses it."""
    if not _has_newer_parts(config):
        return dict(weights)
    # timm's norms have a fixed epsilon. The norm of s x with epsilon s²e equals that of x with e. So all
    # weights that write to the tokens are multiplied by s, and so are normed queries and keys. A power of two
    # is exact: NEPA's 1e-12 becomes 0.95e-12.
    scale = 2.0 ** round(math.log2(TIMM_EPS / config.norm_eps) / 2)
    if abs(TIMM_EPS / scale**2 - config.norm_eps) > MAX_EPS_ERROR:
        raise UsageError(
            f"timm's norms have epsilon {TIMM_EPS:g}, and model.norm_eps {config.norm_eps:g} cannot be "
            "converted to it; train with model.norm_eps 1e-6"
        )
    scale = 1 / scale if back else scale
    writers = r"patch_embed\..*|cls_token|pos_embed|.*\.gamma(_[12])?"
    writers += "" if config.layer_scale else r"|.*\.(attn\.proj|mlp\.fc2)\.\w+"
    changed = {}
    for name, weight in weights.items():
        rows = weight.new_ones(len(weight), *[1] * (weight.ndim - 1))
        if re.fullmatch(writers, name):
            rows *= scale
        elif config.qk_norm and ".attn.qkv." in name:
            rows[: 2 * config.embed_dim] *= scale
        changed[name] = weight if scale == 1 else weight * rows
    # timm's norms of queries and keys have weight and bias; ours have at most a weight.
    head_dim = config.embed_dim // config.num_heads
    constant: dict[str, float] = {} if config.qk_norm is None else {"bias": 0.0}
    constant |= {"weight": 1.0} if config.qk_norm == "plain" else {}
    for layer, part, (kind, value) in itertools.product(range(config.depth), "qk", constant.items()):
        name, tensor = f"blocks.{layer}.attn.{part}_norm.{kind}", torch.full((head_dim,), value)
        if not back:
            changed[name] = tensor
        elif not torch.equal(changed.pop(name, tensor + 1).float(), tensor):
            raise CheckpointError(
                f"{name} is not {value:g}, and model.qk_norm {config.qk_norm} has no such weight; use the "
                "original file"
            )
    return changed
