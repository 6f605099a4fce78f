"""From a timm VisionTransformer's weights to this package's encoder.

What timm's `VisionTransformer` can do and the encoder cannot is refused by name. LayerScale is folded into
the maps before it, and a bias that only some maps have becomes zeros in the others: both are exact.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention, Block, Mlp, VisionTransformer
from torch import Tensor, nn

from nextblock.checkpoint import CheckpointError, build_model
from nextblock.config import ModelConfig, Size
from nextblock.interop.names import count_numbered, needed, patch_shape, ratio_of, require_heads
from nextblock.interop.xtra import NUM_HEADS_OF_SIZE
from nextblock.models import NextBlockModel

__all__ = ["TIMM_EPS", "from_timm", "is_timm_weights", "read_timm_weights"]

log = logging.getLogger(__name__)

TIMM_EPS = 1e-6
"""Epsilon of timm's LayerNorms."""
HEADS = ("head.", "attn_pool.", "fc_norm.")
PREFIX_TOKENS = ("cls_token", "reg_token")
MAPS = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
"""The linear maps of a layer."""


def is_timm_weights(weights: Mapping[str, Any]) -> bool:
    """Whether a file's content is the bare state dict of a timm VisionTransformer."""
    return "patch_embed.proj.weight" in weights and "blocks.0.attn.qkv.weight" in weights


def from_timm(
    vit: nn.Module, weights: Mapping[str, Tensor] | None, origin: str, *, drop_prefix_tokens: bool = False
) -> NextBlockModel:
    """The encoder of a timm model, with its own weights, or with `weights` of a file, which it must fit."""
    if type(vit) is not VisionTransformer:
        raise CheckpointError(
            f"{origin} is a timm {type(vit).__name__}; only its VisionTransformer is of this kind"
        )
    differences = list(_differences(vit))
    if differences:
        raise CheckpointError(f"{origin} is no encoder of this kind: it has {', '.join(differences)}")
    if weights is not None:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(HEADS)}
        expected = nn.Module.state_dict(vit)
        _check_names(weights, {n: t for n, t in expected.items() if not n.startswith(HEADS)}, origin)
    kept = _without_prefix(
        vit.state_dict() if weights is None else weights,
        origin,
        drop=drop_prefix_tokens,
        in_positions=not vit.no_embed_class,
    )
    rows, columns = vit.patch_embed.img_size  # type: ignore[misc] # set in all but the dynamic ones
    return _built(
        kept,
        origin,
        image_size=rows if rows == columns else (rows, columns),
        num_heads=vit.blocks[0].attn.num_heads,  # type: ignore[union-attr]
        norm_eps=vit.norm.eps,  # type: ignore[arg-type]
    )


def _check_names(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str) -> None:
    """Refuse weights that are not those of the architecture their directory names."""
    wrong = [f"missing: {name}" for name in expected if name not in weights]
    wrong += [f"unexpected: {name}" for name in weights if name not in expected]
    wrong += [
        f"shape of {name}: {tuple(weights[name].shape)}, {tuple(tensor.shape)} in timm's"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if wrong:
        raise CheckpointError(
            f"the weights of {origin} do not fit the timm model that it names:\n  " + "\n  ".join(wrong[:10])
        )


def _differences(vit: VisionTransformer) -> Iterator[str]:
    """What this timm model has, or lacks, that this package's encoder does not."""
    norms = [
        module for name, module in vit.named_modules() if name.split(".")[-1] in ("norm", "norm1", "norm2")
    ]
    norms = [norm for norm in norms if not isinstance(norm, nn.Identity)]
    if type(vit.patch_embed) is not PatchEmbed:
        yield f"patches embedded by {type(vit.patch_embed).__name__}"
    elif vit.patch_embed.proj.bias is None:
        yield "a patch projection without bias"
    elif len(set(vit.patch_embed.patch_size)) != 1:
        yield f"patches of {vit.patch_embed.patch_size} px, which are not square"
    if vit.pos_embed is None:
        yield "no absolute positions (pos_embed)"
    if not isinstance(vit.norm_pre, nn.Identity):
        yield "a norm before its first layer (pre_norm)"
    if isinstance(vit.norm, nn.Identity):
        yield "no final norm on its tokens (final_norm, or fc_norm after pooling)"
    if any(not isinstance(norm, nn.LayerNorm) for norm in norms):
        yield "norms that are no LayerNorm"
    elif len({norm.eps for norm in norms}) > 1:
        yield "norms of several epsilons"
    yield from sorted({words for block in vit.blocks for words in _layer_differences(block)})


def _layer_differences(block: nn.Module) -> Iterator[str]:
    if type(block) is not Block:
        yield f"layers of another kind ({type(block).__name__})"
        return
    if type(block.attn) is not Attention:
        yield f"attention of another kind ({type(block.attn).__name__})"
    elif not isinstance(block.attn.q_norm, nn.Identity):
        yield "normed queries and keys (qk_norm)"
    elif not isinstance(block.attn.norm, nn.Identity):
        yield "a norm in its attention (scale_attn_norm)"
    if type(block.mlp) is not Mlp:
        yield f"an MLP of another kind ({type(block.mlp).__name__})"
    elif not (isinstance(block.mlp.act, nn.GELU) and block.mlp.act.approximate == "none"):
        yield f"another activation than GELU ({type(block.mlp.act).__name__})"
    elif not isinstance(block.mlp.norm, nn.Identity):
        yield "a norm in its MLP (scale_mlp_norm)"


def read_timm_weights(
    weights: Mapping[str, Tensor],
    origin: str,
    *,
    num_heads: int | None = None,
    drop_prefix_tokens: bool = False,
) -> NextBlockModel:
    """Build the encoder that a bare state dict holds: a square image, GELU, LayerNorm of timm's epsilon.

    `num_heads` comes from the argument or the table of official (width, depth), else the file is refused.
    """
    width, _, patch_size = patch_shape(weights, "patch_embed.proj.weight", origin)
    depth = count_numbered(weights, "blocks.", origin)
    heads = require_heads(num_heads or NUM_HEADS_OF_SIZE.get((width, depth)), (width, depth), origin)
    if "norm.weight" not in weights:
        raise CheckpointError(f"{origin} has no final norm on its tokens (norm.weight); this encoder has one")
    if "pos_embed" not in weights:
        raise CheckpointError(f"{origin} has no pos_embed; this encoder adds positions to its patches")
    kept = _without_prefix(weights, origin, drop=drop_prefix_tokens)
    patches = kept["pos_embed"].shape[1]
    side = math.isqrt(patches)
    if side * side != patches:
        raise CheckpointError(f"{origin} has positions of {patches} patches, which are no square grid")
    return _built(kept, origin, image_size=side * patch_size, num_heads=heads, norm_eps=TIMM_EPS)


def _without_prefix(
    weights: Mapping[str, Tensor], origin: str, *, drop: bool, in_positions: bool | None = None
) -> dict[str, Tensor]:
    """Encoder weights without heads, and without class and register tokens and their positions.

    `in_positions` says whether these tokens have positions; None: where a square grid is left without them.
    """
    tokens = {name: weights[name].shape[1] for name in PREFIX_TOKENS if name in weights}
    count = sum(tokens.values())
    if tokens and not drop:
        raise CheckpointError(
            f"{origin} has tokens beside the patches ({', '.join(tokens)}), to which all patches attend: "
            "without them its features would not be its own. As model.init it can be started from"
        )
    kept = {
        name: tensor for name, tensor in weights.items() if name not in tokens and not name.startswith(HEADS)
    }
    if tokens and in_positions is None:
        in_positions = _prefix_has_positions(kept["pos_embed"].shape[1], count, origin)
    if tokens and in_positions:
        kept["pos_embed"] = kept["pos_embed"][:, count:]
    left_out = [name for name in weights if name not in kept]
    if left_out:
        positions = f", and the positions of {count} of them" if tokens and in_positions else ""
        log.info("left out of %s: %s%s", origin, ", ".join(left_out), positions)
    return kept


def _prefix_has_positions(positions: int, count: int, origin: str) -> bool:
    """Whether the first `count` of these positions are those of tokens beside a square grid of patches."""
    without, with_them = (math.isqrt(number) ** 2 == number for number in (positions, positions - count))
    if without and with_them:
        raise CheckpointError(
            f"{origin} holds {positions} positions and {count} tokens beside the patches, and does not tell "
            f"whether these have positions: {positions} and {positions - count} patches would both make a "
            "square. Save it with timm's config.json beside it (timm.models.save_for_hf), or give timm:NAME"
        )
    return not without


def _built(
    weights: Mapping[str, Tensor], origin: str, *, image_size: Size, num_heads: int, norm_eps: float
) -> NextBlockModel:
    """The encoder of these weights under full attention; its other sizes are those of the tensors."""
    folded = _with_whole_biases(_folded(weights, origin), origin)
    width, in_chans, patch_size = patch_shape(weights, "patch_embed.proj.weight", origin)
    config = ModelConfig(
        image_size=image_size,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=width,
        depth=count_numbered(weights, "blocks.", origin),
        num_heads=num_heads,
        mlp_ratio=ratio_of(needed(weights, "blocks.0.mlp.fc1.weight", origin).shape[0], width),
        norm_eps=norm_eps,
        bias="blocks.0.attn.qkv.bias" in folded,
        patch_norm="patch_embed.norm.weight" in weights,
        block_size=1,
        predictor=None,
        feature_attention="full",
    )
    named = {f"encoder.{name}": tensor for name, tensor in folded.items()}
    return build_model(lambda: NextBlockModel(config), config, named, origin)


def _folded(weights: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """LayerScale multiplies what attention and MLP give: the same as scaling the rows of their last maps."""
    scales = (".ls1.gamma", ".ls2.gamma")
    folded = {name: tensor for name, tensor in weights.items() if not name.endswith(scales)}
    for name, gamma in weights.items():
        block, _, scale = name.rpartition(".ls")
        if scale not in ("1.gamma", "2.gamma"):
            continue
        last_map = f"{block}.attn.proj" if scale == "1.gamma" else f"{block}.mlp.fc2"
        folded[f"{last_map}.weight"] = gamma[:, None] * needed(weights, f"{last_map}.weight", origin)
        if f"{last_map}.bias" in weights:
            folded[f"{last_map}.bias"] = gamma * weights[f"{last_map}.bias"]
    return folded


def _with_whole_biases(weights: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Where some kinds of linear maps have a bias and others none, those get one of zeros.

    A map has it in all layers or in none: what one layer alone lacks is lost, and the file is refused.
    """
    biases = {
        kind: [name.removesuffix("weight") + "bias" for name in weights if name.endswith(kind)]
        for kind in MAPS
    }
    without = []
    for names in biases.values():
        missing = [name for name in names if name not in weights]
        if 0 < len(missing) < len(names):
            raise CheckpointError(
                f"the weights of {origin} do not fit the model:\n  missing: {', '.join(missing[:10])} (other "
                "layers have it); take the original, whole file"
            )
        without += missing
    if len(without) == sum(map(len, biases.values())):
        return dict(weights)
    return {**weights, **{name: _zero_bias(weights, name) for name in without}}


def _zero_bias(weights: Mapping[str, Tensor], name: str) -> Tensor:
    weight = weights[name.removesuffix("bias") + "weight"]
    return weight.new_zeros(len(weight))
