"""The network's settings, and the geometry that follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nextblock.settings import check_types, require, require_divides

__all__ = ["Attention", "ModelConfig", "Size", "pair"]

Attention = Literal["native", "causal", "full"]
"""Attention at encoding: what the checkpoint records for its features, the pre-training mask, or no mask."""

Size = int | tuple[int, int]


def pair(size: Size) -> tuple[int, int]:
    """`4` and `(4, 4)` alike as (rows, columns)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and its objective: a timm ViT that encodes, and a predictor of the next block's pixels."""

    image_size: Size = 256
    """Side of the square image in pixels, or (rows, columns)."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    in_chans: int = 3
    """Channels of the image."""
    embed_dim: int = 768
    """Width of the encoder."""
    depth: int = 12
    """Layers of the encoder."""
    num_heads: int = 12
    """Attention heads of the encoder."""
    mlp_ratio: float = 4.0
    """Hidden width of an encoder layer's MLP over its width."""
    norm_eps: float = 1e-6
    """Epsilon of every LayerNorm."""
    bias: bool = True
    """Give the linear maps of all layers a bias; AIM has none."""
    patch_norm: bool = False
    """Normalise embedded patches before positions are added, as AIM does."""
    positions: Literal["learned", "sincos"] = "learned"
    """Position embeddings of encoder and predictor: learned, or fixed sines and cosines of row and column."""
    weight_init: Literal["trunc_normal", "xavier_uniform"] = "trunc_normal"
    """Fresh weights of linear maps: truncated normal 0.02 (XTRA), or Xavier uniform (AIM)."""
    drop_path: float = 0.0
    """Drop-path rate of the encoder's last layer; the rate grows linearly from 0 at the first."""
    block_size: Size = 4
    """Patches along a block's side, or (rows, columns). 1 makes the attention plainly causal."""
    order: Literal["raster", "spiral", "checkerboard", "fixed_random", "random"] = "raster"
    """Which block comes when: row by row, from the centre out, every other block first, one random order, or
    a random set of as many orders as blocks, one drawn a step."""
    order_seed: int = 0
    """Seed of the random orders."""
    prefix: bool = False
    """Draw for every training image how many blocks, from 1 to all but one, all its tokens may attend to;
    only those after them are predicted (AIM)."""
    num_predicted_blocks: int = 1
    """How many blocks ahead are predicted, each by a block MLP of its own; their losses are averaged."""
    predictor: Literal["transformer", "mlp", "linear"] | None = "transformer"
    """What predicts: transformer layers under the encoder's mask (XTRA), residual MLPs on each patch alone
    (AIM), the output map alone; or null, an encoder that cannot predict."""
    projection_dim: int | None = 4096
    """Hidden width of the MLP between encoder and predictor; null: one linear map."""
    predictor_dim: int = 768
    """Width of the predictor."""
    predictor_depth: int = 8
    """Layers of the predictor."""
    predictor_heads: int = 6
    """Attention heads of the predictor."""
    predictor_mlp_ratio: float = 4.0
    """Hidden width of a predictor layer's MLP over its width."""
    predictor_attention: Literal["native", "block_causal", "causal", "full"] = "native"
    """Mask of the predictor's transformer layers: the encoder's, other blocks, plainly causal, or none."""
    predictor_block_size: int | tuple[int, int] | None = None
    """Patches along a block's side under predictor_attention block_causal."""
    qk_scale: float | None = None
    """Factor of the attention's scores; null: one over the square root of a head's width."""
    resample_antialias: bool = True
    """Antialias learned positions when they are resampled to another grid; official XTRA does not."""
    predictor_extra_norm: bool = False
    """Predictor "mlp": add each layer's normed input to it before the MLP, as AIM's official code does."""
    block_mlp_dim: int | None = 6144
    """Hidden width of the MLP that turns a block's tokens into the next block; null: one linear map."""
    norm_pixels: bool = True
    """Normalise the target pixels of each block by its own mean and deviation."""
    loss: Literal["mse", "l1"] = "mse"
    """Distance between predicted and true pixels."""
    tokenizer: str | None = None
    """Predict the tokens of a frozen tokenizer, by cross-entropy, in place of pixels: kmeans, fitted on
    normalised patches of data.train, or hf:NAME, a transformers VQ image model (a hub name or a path)."""
    vocab_size: int = 8192
    """Tokens that the tokenizer knows."""
    token_px: int | None = None
    """Side in pixels of the square that a token stands for; null: a patch."""
    feature_attention: Literal["causal", "full"] = "causal"
    """What `attention="native"` means when this model encodes: the pre-training mask, or none."""
    init: str | None = None
    """Start from these weights (whatever `nextblock info` can read); what does not fit is resampled or
    fresh, and listed."""

    def __post_init__(self) -> None:
        check_types(self, "model")
        for name in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "num_predicted_blocks"):
            require(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("image_size", "block_size"):
            require(
                min(pair(getattr(self, name))) >= 1, f"model.{name} is {getattr(self, name)}; use at least 1"
            )
        for name in ("mlp_ratio", "predictor_mlp_ratio", "norm_eps"):
            require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be above 0")
        require(0 <= self.drop_path < 1, f"model.drop_path is {self.drop_path}; it must lie in [0, 1)")
        require_divides(self.embed_dim, self.num_heads, "model.embed_dim", "model.num_heads")
        self._check_geometry()
        if self.positions == "sincos":
            _require_four("model.embed_dim", self.embed_dim)
        if self.predictor is not None:
            self._check_predictor()
            self._check_tokens()

    def _check_predictor(self) -> None:
        for name in (
            "projection_dim",
            "predictor_dim",
            "predictor_depth",
            "predictor_heads",
            "block_mlp_dim",
        ):
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.{name} is {value}; it must be at least 1")
        if self.predictor == "transformer":
            require_divides(
                self.predictor_dim, self.predictor_heads, "model.predictor_dim", "model.predictor_heads"
            )
        if self.positions == "sincos" and self.predictor != "linear":
            _require_four("model.predictor_dim", self.predictor_dim)
        require(
            self.num_blocks == 1 or self.num_predicted_blocks < self.num_blocks,
            f"model.num_predicted_blocks is {self.num_predicted_blocks}, but an image has only "
            f"{self.num_blocks} blocks; predict at most {self.num_blocks - 1} ahead",
        )

    def _check_tokens(self) -> None:
        if self.tokenizer is None:
            require(
                self.token_px is None,
                f"model.token_px is {self.token_px}, but no tokens are predicted; leave it null, or set "
                "model.tokenizer",
            )
            return
        require(
            self.norm_pixels and self.loss == "mse",
            f"model.norm_pixels {self.norm_pixels} and model.loss {self.loss} are for pixels, and tokens of "
            f"{self.tokenizer} are predicted by cross-entropy; leave them out, or set model.tokenizer null",
        )
        require(
            self.tokenizer == "kmeans" or (self.tokenizer.startswith("hf:") and len(self.tokenizer) > 3),
            f"model.tokenizer is {self.tokenizer!r}; it must be kmeans, hf:NAME, or null for pixels",
        )
        require(self.vocab_size >= 2, f"model.vocab_size is {self.vocab_size}; use at least 2")
        require(
            self.token_px is None or self.tokenizer != "kmeans",
            f"model.token_px is {self.token_px}, but kmeans makes one token a patch; leave it null",
        )
        side = self.token_side_px
        require(
            side >= 1 and all(block % side == 0 for block in self.block_px),
            f"blocks of {self.block_px[0]}x{self.block_px[1]} px are no whole number of tokens of "
            f"{side}x{side} px; change model.token_px or model.block_size",
        )

    def _check_geometry(self) -> None:
        rows, columns = pair(self.image_size)
        p = self.patch_size
        require(
            rows % p == 0 and columns % p == 0,
            f"an image of {rows}x{columns} px is no whole number of {p}-px patches; "
            f"use model.image_size {_nearest_sizes(self.image_size, (p, p))}",
        )
        unit = (p * pair(self.block_size)[0], p * pair(self.block_size)[1])
        require(
            rows % unit[0] == 0 and columns % unit[1] == 0,
            f"a grid of {rows // p}x{columns // p} patches ({rows}x{columns} px in {p}-px patches) "
            f"cannot be cut into blocks of {pair(self.block_size)[0]}x{pair(self.block_size)[1]} patches; "
            f"use model.image_size {_nearest_sizes(self.image_size, unit)}, or another model.block_size",
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along the image, (rows, columns)."""
        rows, columns = pair(self.image_size)
        return rows // self.patch_size, columns // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches in an image, n."""
        return self.grid[0] * self.grid[1]

    @property
    def block_grid(self) -> tuple[int, int]:
        """Blocks along the image, (rows, columns)."""
        block = pair(self.block_size)
        return self.grid[0] // block[0], self.grid[1] // block[1]

    @property
    def num_blocks(self) -> int:
        """Blocks in an image, k."""
        return self.block_grid[0] * self.block_grid[1]

    @property
    def patches_per_block(self) -> int:
        """Patches in a block, m."""
        block = pair(self.block_size)
        return block[0] * block[1]

    @property
    def block_px(self) -> tuple[int, int]:
        """A block's height and width in pixels."""
        block = pair(self.block_size)
        return block[0] * self.patch_size, block[1] * self.patch_size

    @property
    def block_values(self) -> int:
        """Pixel values in a block, p: channels x height x width."""
        return self.in_chans * self.block_px[0] * self.block_px[1]

    @property
    def token_side_px(self) -> int:
        """Side in pixels of the square that a tokenizer's token stands for."""
        return self.patch_size if self.token_px is None else self.token_px

    @property
    def tokens_per_block(self) -> int:
        """A tokenizer's tokens in a block."""
        return (self.block_px[0] // self.token_side_px) * (self.block_px[1] // self.token_side_px)

    @property
    def outputs_per_block(self) -> int:
        """Numbers that are predicted of a block: its pixel values, or the logits of its tokens."""
        return self.block_values if self.tokenizer is None else self.tokens_per_block * self.vocab_size


def _require_four(name: str, width: int) -> None:
    """Sines and cosines of row and column take a quarter of the width each."""
    require(
        width % 4 == 0,
        f"{name} {width} cannot be divided among the sines and cosines of row and column; "
        f"use {width // 4 * 4 or 4} or {width // 4 * 4 + 4}",
    )


def _nearest_sizes(size: Size, unit: tuple[int, int]) -> str:
    """The nearest image sizes that are whole multiples of `unit` pixels, as words: "192 or 256"."""
    sides = pair(size)
    below = tuple(side // u * u for side, u in zip(sides, unit, strict=True))
    above = tuple(-(-side // u) * u for side, u in zip(sides, unit, strict=True))
    candidates = [s for s in dict.fromkeys((below, above)) if min(s) > 0]
    return " or ".join(
        str(s[0]) if s[0] == s[1] and isinstance(size, int) else f"[{s[0]}, {s[1]}]" for s in candidates
    )
