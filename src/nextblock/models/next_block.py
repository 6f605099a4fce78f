"""The model: an encoder under a block-causal mask, a predictor, and the loss of predicting each next block.

One path serves training, validation and pictures (`forward`), one serves features (`encode`). In `forward`
the tokens are put in block-major order along the block order, so the mask is the same staircase whatever the
order, and the last block is simply the end of the sequence. No earlier block may attend to it and nothing is
predicted from it, so it is left out of encoder and predictor: the result is exact, and 1/(number of blocks)
of the work is saved.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from nextblock.blocks import may_attend, patches_of_blocks, random_orders, raster_orders
from nextblock.config import Attention, ModelConfig, pair
from nextblock.models.encoder import (
    build_encoder,
    layer_outputs,
    patch_tokens,
    positions_of,
    resample_positions,
)
from nextblock.models.predictor import Predictor
from nextblock.objective import block_losses, block_targets, combine, kept_rows

__all__ = ["Encoded", "Further", "NextBlockModel", "Prediction"]


class Further(NamedTuple):
    """Predictions two or more blocks ahead: as the same fields of `Prediction`, with fewer steps."""

    predictions: Float[Tensor, "b steps p"]
    targets: Float[Tensor, "b steps p"]
    block_loss: Float[Tensor, "b steps"]
    kept: Bool[Tensor, "b steps"]


class Prediction(NamedTuple):
    """What `NextBlockModel.forward` returns; row i predicts the block at position i+1 of the order."""

    loss: Float[Tensor, ""]
    """Mean of `block_loss` over kept rows, averaged over the predicted distances; fp32."""
    predictions: Float[Tensor, "b steps p"]
    """Predicted pixel values, in (c h w) order, as the loss sees them (normalised where the targets are)."""
    targets: Float[Tensor, "b steps p"]
    """True pixel values as the loss saw them."""
    block_loss: Float[Tensor, "b steps"]
    """Loss of each block."""
    kept: Bool[Tensor, "b steps"]
    """False where the target lies in the prefix; predictions, targets and losses of those rows are zero."""
    further: tuple[Further, ...]
    """The same four for distances 2, 3, ...; empty unless several blocks ahead are predicted."""

    @property
    def distances(self) -> tuple[Further, ...]:
        """All predicted distances, the nearest first."""
        return (Further(self.predictions, self.targets, self.block_loss, self.kept), *self.further)


class Encoded(NamedTuple):
    """What `NextBlockModel.encode` returns, in raster order."""

    tokens: Float[Tensor, "b n d"]
    """After the final norm."""
    layers: tuple[Float[Tensor, "b n d"], ...]
    """What each layer returns, before the final norm."""


class NextBlockModel(nn.Module):
    """A vision transformer and what it predicts (XTRA, arXiv 2411.15648; AIM, arXiv 2401.08541).

    `encoder` is a timm `VisionTransformer`; called by itself it applies no mask. With `config.predictor`
    null the model encodes and refuses to predict.
    """

    patches_of_blocks: Int64[Tensor, "k m"]
    orders: Int64[Tensor, "o k"]
    seen_mask: Bool[Tensor, "s s"]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.predictor = None if config.predictor is None else Predictor(config)
        self.recompute = False
        self.predictor_fp32 = False
        self.register_buffer("patches_of_blocks", _patches_of_blocks(config), persistent=False)
        self.register_buffer("orders", _orders(config), persistent=False)
        self.register_buffer("seen_mask", _seen_mask(config), persistent=False)

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        block_order: Int64[Tensor, " k"] | None = None,
        prefix_lengths: Int64[Tensor, " b"] | None = None,
    ) -> Prediction:
        """Predict every block from those before it.

        `images` are normalised. `block_order` goes from position in the sequence to block in raster order;
        None: the model's one order, or the first of its random set. `prefix_lengths`, one an image, count
        blocks along the order that all tokens may attend to, and that are not predicted; None, 0 and 1 are
        the same. Raises `ValueError` on images that the blocks do not divide, an order that is no
        permutation, a prefix of all blocks.
        """
        config = self._config_of(images)
        predictor = self._able_predictor(config)
        order = self._checked_order(block_order, config).to(images.device)
        prefix = _checked_prefix(prefix_lengths, config, len(images), images.device)
        patches, mask = self._sequence(config, order, prefix)

        tokens = patch_tokens(self.encoder, images, self.config.grid).index_select(1, patches)
        tokens = layer_outputs(self.encoder.blocks, tokens, mask, recompute=self.recompute)[-1]
        tokens = self.encoder.norm(tokens)
        with torch.autocast(tokens.device.type, enabled=_autocast_stays(tokens, self.predictor_fp32)):
            tokens = tokens.float() if self.predictor_fp32 else tokens
            joined = self._decode(predictor, tokens, config, patches, mask)
            targets = block_targets(images, order, config.block_px, normalize=config.norm_pixels)
            distances = [
                self._predict(mlp, joined, targets, distance, prefix)
                for distance, mlp in enumerate(predictor.block_mlps, start=1)
            ]
        loss = combine(
            [part.block_loss for part in distances], [part.kept.sum().float() for part in distances]
        )
        return Prediction(loss, *distances[0], further=tuple(distances[1:]))

    def encode(self, images: Float[Tensor, "b c h w"], attention: Attention = "native") -> Encoded:
        """Tokens and every layer, in raster order, of whole images of any size that the blocks divide.

        `attention`: "native" is what this model's features are made for, "causal" the pre-training mask
        without a prefix, "full" none. Under full attention the patches alone must divide the image.
        """
        kind = self.config.feature_attention if attention == "native" else attention
        if kind not in ("causal", "full"):
            raise ValueError(f"attention is {attention!r}; it must be 'native', 'causal' or 'full'")
        config = self._config_of(images, blocks_matter=kind == "causal")
        mask = self._raster_mask(config) if kind == "causal" else None
        tokens = patch_tokens(self.encoder, images, self.config.grid)
        layers = layer_outputs(self.encoder.blocks, tokens, mask, recompute=self.recompute)
        return Encoded(self.encoder.norm(layers[-1]), layers)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every layer in the backward pass instead of keeping its activations."""
        self.recompute = enable

    def _decode(
        self,
        predictor: Predictor,
        tokens: Float[Tensor, "b s d"],
        config: ModelConfig,
        patches: Int64[Tensor, " s"],
        mask: Bool[Tensor, "*b s s"],
    ) -> Float[Tensor, "b steps dm"]:
        positions = resample_positions(predictor.pos_embed, self.config.grid, config.grid)
        hidden = predictor.projection(tokens) + positions.index_select(1, patches)
        hidden = layer_outputs(predictor.blocks, hidden, mask, recompute=self.recompute)[-1]
        return predictor.join_blocks(hidden, config.patches_per_block)

    def _predict(
        self,
        mlp: nn.Module,
        joined: Float[Tensor, "b steps dm"],
        all_targets: Float[Tensor, "b steps p"],
        distance: int,
        prefix: Int64[Tensor, " b"] | None,
    ) -> Further:
        """Rows 0 .. k-1-distance predict `distance` blocks ahead; only kept rows go through the MLP."""
        steps = joined.shape[1] + 1 - distance
        inputs, targets = joined[:, :steps], all_targets[:, distance - 1 :]
        kept = kept_rows(len(joined), steps, distance, prefix, joined.device)
        if prefix is None:
            predictions = mlp(inputs)
        else:
            rows = mlp(inputs[kept])
            predictions = rows.new_zeros(*kept.shape, rows.shape[-1]).masked_scatter(kept[..., None], rows)
            targets = targets * kept[..., None]
        return Further(predictions, targets, block_losses(predictions, targets, self.config.loss), kept)

    def _sequence(
        self, config: ModelConfig, order: Int64[Tensor, " k"], prefix: Int64[Tensor, " b"] | None
    ) -> tuple[Int64[Tensor, " s"], Bool[Tensor, "*b s s"]]:
        """The patches that the loss can see, block-major along the order, and who may attend to whom."""
        same = config is self.config
        table = self.patches_of_blocks if same else _patches_of_blocks(config).to(order.device)
        patches = table[order[:-1]].flatten()
        if prefix is None:
            return patches, self.seen_mask if same else _seen_mask(config).to(order.device)
        positions = _seen_positions(config).to(order.device)
        return patches, may_attend(positions, prefix)

    def _raster_mask(self, config: ModelConfig) -> Bool[Tensor, "n n"]:
        """The pre-training mask, without a prefix, over all patches in raster order."""
        same = config is self.config
        table = self.patches_of_blocks if same else _patches_of_blocks(config)
        order = (self.orders if same else _orders(config))[0]
        positions = torch.empty(config.num_patches, dtype=torch.int64, device=table.device)
        positions[table[order]] = torch.arange(len(order), device=table.device)[:, None]
        return may_attend(positions).to(positions_of(self.encoder).device)

    def _config_of(self, images: Tensor, *, blocks_matter: bool = True) -> ModelConfig:
        """The settings at the size of these images; `self.config` itself where they have its size."""
        if not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype}; divide by 255, subtract the mean and divide by the deviation"
            )
        if images.shape[1] != self.config.in_chans:
            raise ValueError(
                f"images have {images.shape[1]} channels, the model takes {self.config.in_chans}"
            )
        size = (images.shape[2], images.shape[3])
        if size == pair(self.config.image_size):
            return self.config
        block_size = self.config.block_size if blocks_matter else 1
        return replace(self.config, image_size=size, block_size=block_size)

    def _checked_order(self, order: Tensor | None, config: ModelConfig) -> Int64[Tensor, " k"]:
        if order is None:
            return self.orders[0] if config is self.config else _orders(config)[0]
        k = config.num_blocks
        if order.shape != (k,) or not torch.equal(order.sort().values.cpu(), torch.arange(k)):
            raise ValueError(f"block_order must be a permutation of 0..{k - 1}, got {order.tolist()}")
        return order

    def _able_predictor(self, config: ModelConfig) -> Predictor:
        if self.predictor is None:
            raise ValueError("this is an encoder without a predictor: it encodes, but cannot predict blocks")
        if config.num_blocks == 1:
            raise ValueError(
                "the whole image is one block, so there is no next block; use a smaller model.block_size"
            )
        return self.predictor


def _patches_of_blocks(config: ModelConfig) -> Int64[Tensor, "k m"]:
    return patches_of_blocks(config.grid, pair(config.block_size))


def _orders(config: ModelConfig) -> Int64[Tensor, "o k"]:
    if config.order == "random":
        return random_orders(config.num_blocks, config.order_seed)
    return raster_orders(config.num_blocks)


def _seen_positions(config: ModelConfig) -> Int64[Tensor, " s"]:
    """Position in the order of the block of every token, the last block left out."""
    return torch.arange(config.num_blocks - 1).repeat_interleave(config.patches_per_block)


def _seen_mask(config: ModelConfig) -> Bool[Tensor, "s s"]:
    return may_attend(_seen_positions(config))


def _checked_prefix(
    lengths: Tensor | None, config: ModelConfig, batch: int, device: torch.device
) -> Int64[Tensor, " b"] | None:
    if lengths is None:
        return None
    if lengths.shape != (batch,):
        raise ValueError(
            f"prefix_lengths has shape {tuple(lengths.shape)}; give one length an image, ({batch},)"
        )
    if lengths.min() < 0 or lengths.max() >= config.num_blocks:
        raise ValueError(
            f"prefix_lengths must lie in 0..{config.num_blocks - 1} (an image has {config.num_blocks} blocks "
            f"and the last must be left to predict), got {lengths.tolist()}"
        )
    return lengths.to(device)


def _autocast_stays(tokens: Tensor, predictor_fp32: bool) -> bool:
    return torch.is_autocast_enabled(tokens.device.type) and not predictor_fp32
