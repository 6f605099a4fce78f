"""The settings of a network: sizes, orders, masks, targets. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

from nextblock.settings import Auto, Count, Positive, Rule, check_types, listed, require, typed

Attention = Literal["native", "causal", "full"]
"""Attention mask used for features: native (as trained for), causal (as in pre-training), or full."""


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (rows, columns) of `4` or `(4, 4)`."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


Size = Annotated[
    int | tuple[int, int],
    Rule(lambda size: min(pair(size)) >= 1, "one whole number from 1, or two: 64, 32,64 or 32x64"),
]
Rate = Annotated[float, Rule(lambda x: 0 <= x < 1, "from 0 to below 1")]


class Steps(NamedTuple):
    """A range of the predictor's rows, and the positions of the order that they predict."""

    row: int
    """The first row."""
    position: int
    """The position that the first row predicts."""
    number: int
    """How many rows there are."""


class Section:
    """Base of settings whose types check their values."""

    def __post_init__(self) -> None:
        check_types(self, type(self).__name__.removesuffix("Config").lower())


def nearest_sizes(sides: tuple[int, int], unit: tuple[int, int], *, least: int = 1) -> str:
    """Name the multiples of `unit` pixels nearest to `sides`, as "16 or 24"; "" if `sides` is one.

    Those of fewer than `least` units are left out.
    """
    below = tuple(side // px for side, px in zip(sides, unit, strict=True))
    above = tuple(-(-side // px) for side, px in zip(sides, unit, strict=True))
    if below == above:
        return ""
    near = [below, above if math.prod(above) >= least else (least, least)]
    sizes = [(rows * unit[0], columns * unit[1]) for rows, columns in near if rows * columns >= least]
    return " or ".join("x".join(map(str, dict.fromkeys(size))) for size in sizes)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The network and its objective: a timm ViT that encodes, and a predictor of the next block."""

    image_size: Size = 256
    """Image size in pixels: 64 (square), or rows and columns as 32,64 or 32x64."""
    patch_size: Count = 16
    """Side of a patch in pixels."""
    in_chans: Count = 3
    """Channels of the image; sets data.channels too."""
    embed_dim: Count = 768
    """Width of the encoder."""
    depth: Count = 12
    """Layers of the encoder."""
    num_heads: Count = 12
    """Attention heads of the encoder; must divide embed_dim."""
    mlp_ratio: Positive = 4.0
    """Hidden width of an encoder layer's MLP, as a multiple of its width."""
    norm_eps: Positive = 1e-6
    """Epsilon of every LayerNorm."""
    bias: bool = True
    """Use a bias in the linear maps of all layers; AIM has none."""
    qk_scale: Positive | Auto = None
    """Factor on query-key products before the softmax; auto: 1 / sqrt(head width)."""
    patch_norm: bool = False
    """Normalise patch embeddings before positions are added, as AIM does."""
    positions: Literal["learned", "sincos", "rope"] = "learned"
    """Positions of encoder and predictor: learned embeddings, or fixed sines and cosines of row and column;
    rope: rotary in the encoder (NEPA), learned in the predictor."""
    rope_rescale: Annotated[float, Rule(lambda x: x >= 1, "from 1")] = 1.0
    """In training, stretch rotary coordinates by a factor per step, log-uniform from 1/x to x; 1: off."""
    class_token: bool = False
    """Put a class token first, and predict the first block from it (NEPA)."""
    qk_norm: Literal["plain", "scale"] | None = None
    """LayerNorm on each head's queries and keys: plain, or with a learned scale; none: no norm."""
    layer_scale: Positive | None = None
    """Initial value of LayerScale, a learned factor on each branch of an encoder layer; none: no factor."""
    weight_init: Literal["trunc_normal", "trunc_normal_all", "xavier_uniform"] = "trunc_normal"
    """Initial weights of linear maps: truncated normal 0.02 (XTRA), or Xavier uniform (AIM);
    trunc_normal_all: the patch projection too (NEPA)."""
    drop_path: Rate = 0.0
    """Drop-path rate of the encoder's last layer; grows linearly from 0 at the first."""
    block_size: Size = 4
    """Patches along a block's side: 4, or rows and columns as 2,4 or 2x4; 1 is plain causal attention."""
    encoder_attention: Literal["block_causal", "full"] = "block_causal"
    """Attention mask of the encoder; full lets every patch see the targets, so it cannot be pre-trained."""
    order: Literal[
        "raster", "reverse", "column", "reverse_column", "spiral", "checkerboard",
        "fixed_random", "random", "per_image",
    ] = "raster"  # fmt: skip
    """raster: row by row; column: column by column; reverse, reverse_column: these backwards; spiral: from
    the centre out; checkerboard: every other block first; fixed_random: one random order; random: one of a
    fixed set, drawn per step; per_image: a new random order for every image and visit."""
    order_seed: int = 0
    """Seed of the random orders."""
    prefix: bool = False
    """Let all tokens attend to a prefix of random length, as AIM does; only blocks after it are predicted."""
    mask_ratio: Annotated[float, Rule(lambda x: 0 < x < 1, "above 0, below 1")] | None = None
    """Instead of next blocks, predict this share of the blocks, drawn per image and replaced by a mask token,
    from all others (AIM's comparison); needs model.order per_image."""
    num_predicted_blocks: Count = 1
    """How many blocks ahead to predict, each with its own block MLP; the losses are averaged."""
    predictor: Literal["transformer", "mlp", "linear", "identity"] | None = "transformer"
    """Predictor: transformer layers (XTRA), MLPs on each patch (AIM), a linear map, identity: the encoder's
    output itself (NEPA); none: encoder only."""
    target_positions: bool = False
    """Tell the predictor the position of the block to predict; recommended for model.order per_image."""
    predictor_attention: Literal["native", "block_causal", "causal", "full"] = "native"
    """Attention mask of a transformer predictor; native: the encoder's. The others are for official files."""
    predictor_block_size: Size | Auto = None
    """Patches along a block's side in the predictor's own mask: 4, or 2x4; auto: block_size."""
    projection_dim: Count | None = 4096
    """Hidden width of the MLP between encoder and predictor; none: one linear map."""
    predictor_dim: Count = 768
    """Width of the predictor."""
    predictor_depth: Count = 8
    """Layers of the predictor."""
    predictor_heads: Count = 6
    """Attention heads of the predictor; must divide predictor_dim."""
    predictor_mlp_ratio: Positive = 4.0
    """Hidden width of a predictor layer's MLP, as a multiple of its width."""
    predictor_extra_norm: bool = False
    """Predictor "mlp": add each layer's normed input before the MLP, as AIM's official code does."""
    block_mlp_dim: Count | None = 6144
    """Hidden width of the MLP that turns a block's tokens into the next block; none: one linear map."""
    norm_pixels: bool = True
    """Normalise the target pixels of each block by its own mean and deviation."""
    loss: Literal["mse", "l1"] = "mse"
    """Distance between predicted and true pixels."""
    target: Literal["pixels", "tokens", "embedding", "features"] = "pixels"
    """What to predict for a block: its pixels; k-means tokens of its patches, fitted on data.train; the
    encoder's own patch embeddings (NEPA); or features of a frozen teacher (D-iGPT)."""
    vocab_size: Annotated[int, Rule(lambda n: n >= 2, "from 2")] = 8192
    """Number of k-means tokens."""
    teacher: str | None = None
    """Encoder whose features are predicted: timm:NAME, a run, or a weight file."""
    teacher_dim: Count | Auto = None
    """Width of the teacher's features; auto: read from the teacher when training starts."""
    teacher_digest: str | Auto = None
    """Hash of the teacher's weights, so that a run resumes with the same ones; auto: computed."""
    predict_visible: bool = False
    """Also predict the teacher's features of the visible blocks, with a separate output map (D-iGPT)."""
    feature_attention: Literal["causal", "full"] = "causal"
    """Meaning of native attention for this model's features: the pre-training mask, or no mask."""
    resample_antialias: bool = True
    """Antialias learned positions when resampling them to another grid, as timm does; XTRA does not."""
    init: str | None = None
    """Start from these weights, anything `nextblock info` reads; the rest is resampled or initialised."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sides, p, block = pair(self.image_size), self.patch_size, pair(self.block_size)
        blocks = f"blocks of {block[0]}x{block[1]} patches of {p} px"
        # Blocks are made of patches; the message names the nearest sizes that suit both.
        near = nearest_sizes(sides, self.block_px, least=1 if self.predictor is None else 2)
        parts = f"{p}-px patches" if any(side % p for side in sides) else blocks
        require(
            not near,
            f"an image of {sides[0]}x{sides[1]} px cannot be cut into {parts}; "
            f"use model.image_size {near}, or another patch_size or block_size",
        )
        self._check_widths("embed_dim", "num_heads")
        head_dim = self.embed_dim // self.num_heads
        require(
            self.positions != "rope" or head_dim % 4 == 0,
            f"model.positions rope needs a head width divisible by 4, not {head_dim}",
        )
        for name, is_used, needs in self._requirements():
            for other, wanted in needs.items():
                value, allowed = getattr(self, other), wanted if isinstance(wanted, tuple) else (wanted,)
                require(
                    not is_used or value in allowed,
                    f"model.{name} {typed(getattr(self, name))} needs model.{other} "
                    f"{listed([typed(word) for word in allowed], 'or')}, not {typed(value)}",
                )
        if self.predictor is None:
            return
        if self.predictor in ("transformer", "mlp"):
            self._check_widths("predictor_dim", "predictor_heads" if self.predictor == "transformer" else "")
        require(
            (self.target == "features") == (self.teacher is not None),
            "model.target features needs model.teacher, e.g. timm:NAME, and model.teacher needs "
            "model.target features",
        )
        # The predictor's own mask may have other blocks than those that are predicted.
        own = pair(self.predictor_block_size or 1)
        require(
            not (self.grid[0] % own[0] or self.grid[1] % own[1]),
            f"model.predictor_block_size {self.predictor_block_size} does not divide a grid of "
            f"{self.grid[0]}x{self.grid[1]}",
        )
        require(
            # One block is allowed here, as such a model still encodes.
            self.num_blocks == 1 or self.num_predicted_blocks < self.num_blocks,
            f"model.num_predicted_blocks is {self.num_predicted_blocks}, but an image has only "
            f"{self.num_blocks} blocks; predict at most {self.num_blocks - 1} ahead",
        )

    def _requirements(self) -> Iterator[tuple[str, bool, dict[str, Any]]]:
        """Yield (setting, whether it is in use, the values that it needs of other settings)."""
        is_rope, is_masked = self.positions == "rope", self.mask_ratio is not None
        is_full, has_own_mask = self.encoder_attention == "full", self.predictor_attention != "native"
        yield "encoder_attention", is_full, {"feature_attention": "full"}
        yield "positions", is_rope, {"bias": True, "patch_norm": False, "qk_scale": None}
        yield "rope_rescale", self.rope_rescale != 1, {"positions": "rope"}
        yield "qk_scale", self.qk_scale is not None, {"qk_norm": None}
        yield "class_token", self.class_token, {"prefix": False, "mask_ratio": None}
        if self.predictor is None:
            return
        # Other masks assume raster order without a prefix; in any other order, targets would be visible.
        raster = {"order": "raster", "prefix": False}
        has_own_blocks = self.predictor_block_size is not None
        yield "predictor_block_size", has_own_blocks, {"predictor_attention": "block_causal"}
        yield "encoder_attention", is_full, raster
        yield "predictor_attention", has_own_mask, {"predictor": "transformer", **raster}
        native = {"encoder_attention": "block_causal", "predictor_attention": "native"}
        one_ahead = {"num_predicted_blocks": 1}
        yield "class_token", self.class_token, native
        yield "target", self.target != "pixels", {"norm_pixels": True, "loss": "mse"}
        yield "predictor", self.predictor == "identity", {"target": "embedding", **one_ahead}
        yield "target_positions", self.target_positions, {
            "predictor": ("transformer", "mlp"), **one_ahead, **native,
        }  # fmt: skip
        yield "predict_visible", self.predict_visible, {"target": "features", "prefix": False}
        yield "mask_ratio", is_masked, {
            "order": "per_image", "prefix": False, "target_positions": False, "predict_visible": False,
            "feature_attention": "full", **one_ahead, **native,
        }  # fmt: skip

    def _check_widths(self, width: str, heads: str) -> None:
        # Without a setting for the number of heads it counts as 1.
        dim, number = getattr(self, width), getattr(self, heads, 1)
        require(dim % number == 0, f"model.{width} {dim} is not divisible by model.{heads} {number}")
        # Sines and cosines of row and column take a quarter of the width each.
        quarters = dim // 4 * 4
        require(
            self.positions != "sincos" or dim % 4 == 0,
            f"model.{width} {dim} cannot be divided by 4 (sincos); use {quarters or 4} or {quarters + 4}",
        )

    def check_predicts(self) -> None:
        """Refuse settings of a model that cannot predict; it may still encode."""
        require(
            self.predictor is not None,
            "this is an encoder alone (model.predictor is none): it encodes, but cannot predict blocks",
        )
        require(
            self.num_blocks > 1,
            "the whole image is one block, so there is no next block; use a smaller model.block_size or "
            "patch_size, as --preset xtra-small-64 does",
        )

    def encoder_alone(self) -> ModelConfig:
        """The settings of the encoder, without predictor, target and initial weights."""
        return replace(
            self, predictor=None, target="pixels", teacher=None, teacher_dim=None, teacher_digest=None,
            mask_ratio=None, init=None,
        )  # fmt: skip

    @property
    def has_class_token(self) -> bool:
        """Whether the encoder has a class token; `TimmConfig` has the same attribute."""
        return self.class_token

    @property
    def distances(self) -> tuple[int, ...]:
        """How many blocks ahead each output map predicts; 0 is the current block."""
        if self.mask_ratio is not None:
            return (0,)
        ahead = range(1, self.num_predicted_blocks + 1)
        return (*ahead, 0) if self.predict_visible else (*ahead,)

    def steps(self, distance: int) -> Steps:
        """The predictor rows that predict `distance` blocks ahead, and the positions that they predict."""
        k = self.num_blocks
        if self.mask_ratio is not None:
            # Masked blocks come last in an image's order, and each predicts itself.
            hidden = min(k - 1, max(1, round(self.mask_ratio * k)))
            return Steps(k - hidden, k - hidden, hidden)
        # Row r is at position r, or at r - 1 if a class token comes first. The last block has no row.
        behind = int(self.class_token)
        row, position = max(0, behind - distance), max(0, distance - behind)
        return Steps(row, position, min(k - 1 + behind - row, k - position))

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along the image, (rows, columns)."""
        rows, columns = pair(self.image_size)
        return rows // self.patch_size, columns // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches in an image, n."""
        return math.prod(self.grid)

    @property
    def block_grid(self) -> tuple[int, int]:
        """Blocks along the image, (rows, columns)."""
        block = pair(self.block_size)
        return self.grid[0] // block[0], self.grid[1] // block[1]

    @property
    def num_blocks(self) -> int:
        """Blocks in an image, k."""
        return math.prod(self.block_grid)

    @property
    def patches_per_block(self) -> int:
        """Patches in a block, m; also its k-means tokens."""
        return math.prod(pair(self.block_size))

    @property
    def block_px(self) -> tuple[int, int]:
        """A block's height and width in pixels."""
        block = pair(self.block_size)
        return block[0] * self.patch_size, block[1] * self.patch_size

    @property
    def block_values(self) -> int:
        """Pixel values in a block, p: channels x height x width."""
        return self.in_chans * math.prod(self.block_px)
