"""The model: an encoder under a block-causal mask, a predictor, and the loss of predicting each next block.

One path serves training, validation and pictures (`forward`), one serves features (`encode`). In `forward`
the tokens are put in block-major order along the block order, so the mask is the same staircase whatever the
order, and the last block is simply the end of the sequence. No earlier block may attend to it and nothing is
predicted from it, so it is left out of encoder and predictor: the result is exact, and 1/(number of blocks)
of the work is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn
from torch.nn.functional import pad

from nextblock.blocks import block_orders, may_attend, patches_of_blocks, raster_mask
from nextblock.config import IMAGENET_MEAN, IMAGENET_STD, Attention, ModelConfig, pair
from nextblock.models.encoder import (
    build_encoder,
    layer_outputs,
    patch_tokens,
    picked_output,
    positions_of,
    positions_on,
)
from nextblock.models.features import Encoded
from nextblock.models.predictor import Predictor
from nextblock.objective import block_losses, block_targets, combine, kept_rows
from nextblock.tokens import KMeansTokenizer, Tokenizer, open_tokenizer, token_losses, token_targets

__all__ = ["Further", "NextBlockModel", "Prediction"]


class Further(NamedTuple):
    """Predictions two or more blocks ahead: as the same fields of `Prediction`, with fewer steps."""

    predictions: Float[Tensor, "b steps *p"]
    targets: Shaped[Tensor, "b steps *t"]
    block_loss: Float[Tensor, "b steps"]
    kept: Bool[Tensor, "b steps"]


class Prediction(NamedTuple):
    """What `NextBlockModel.forward` returns; row i predicts the block at position i+1 of the order."""

    loss: Float[Tensor, ""]
    """Mean of `block_loss` over kept rows, averaged over the predicted distances; fp32."""
    predictions: Float[Tensor, "b steps *p"]
    """Predicted pixel values (b steps p), in (c h w) order, as the loss sees them (normalised where the
    targets are); where tokens are predicted, their logits (b steps m v)."""
    targets: Shaped[Tensor, "b steps *t"]
    """True pixel values as the loss saw them (b steps p), or integer tokens (b steps m)."""
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
        self.tokenizer: Tokenizer | None = None
        """What makes the targets where tokens are predicted: k-means is part of the model and saved with it;
        one from outside is opened when it is first needed."""
        if config.predictor is not None and config.tokenizer == "kmeans":
            self.tokenizer = KMeansTokenizer(config.vocab_size, config.in_chans, config.patch_size)
        self.image_stats: tuple[Sequence[float], Sequence[float]] = (IMAGENET_MEAN, IMAGENET_STD)
        """Mean and deviation that images are normalised by, which a tokenizer from outside has to know."""
        self.recompute = False
        self.predictor_fp32 = False
        self.make_buffers()

    def make_buffers(self) -> None:
        """Make the tables that no file holds; on the CPU, also in a model on the meta device."""
        with torch.device("cpu"):
            self.register_buffer("patches_of_blocks", _patches_of_blocks(self.config), persistent=False)
            self.register_buffer("orders", _orders(self.config), persistent=False)
            self.register_buffer("seen_mask", _seen_mask(self.config), persistent=False)

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
        _check_prefix(prefix_lengths, config, len(images))
        patches, mask = self._sequence(config, order, prefix_lengths)
        rows = _rows_of_use(config, prefix_lengths)

        tokens = patch_tokens(self.encoder, images, self.config).index_select(1, patches)
        if predictor.mixes_tokens:
            tokens = layer_outputs(self.encoder.blocks, tokens, mask, recompute=self.recompute)[-1]
        else:
            tokens = self._run_picked(self.encoder.blocks, tokens, mask, rows, config)
        tokens = self.encoder.norm(tokens)
        with torch.autocast(tokens.device.type, enabled=_autocast_stays(tokens, self.predictor_fp32)):
            tokens = tokens.float() if self.predictor_fp32 else tokens
            joined = self._decode(predictor, tokens, config, patches, mask, rows)
            targets = self._targets(images, order, config)
            distances = [
                self._predict(mlp, joined, rows, targets, distance, prefix_lengths)
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
        config = self._config_of(images, predicting=False, blocks_matter=kind == "causal")
        mask = self._raster_mask(config) if kind == "causal" else None
        tokens = patch_tokens(self.encoder, images, self.config).contiguous()  # else every norm copies
        layers = layer_outputs(self.encoder.blocks, tokens, mask, recompute=self.recompute)
        return Encoded(self.encoder.norm(layers[-1]), layers)

    @property
    def final_norm(self) -> nn.Module:
        """The encoder's norm after the last layer."""
        return self.encoder.norm

    def open_tokenizer(self) -> Tokenizer:
        """What makes the targets of a model that predicts tokens; opened, if it comes from outside."""
        config = self.config
        assert config.tokenizer is not None, "this model predicts pixels"
        if self.tokenizer is None:
            mean, std = self.image_stats
            self.tokenizer = open_tokenizer(
                config.tokenizer,
                mean=mean,
                std=std,
                vocab_size=config.vocab_size,
                token_px=config.token_side_px,
            )
        return self.tokenizer

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every layer in the backward pass instead of keeping its activations."""
        self.recompute = enable

    def _decode(
        self,
        predictor: Predictor,
        tokens: Float[Tensor, "*rows d"],
        config: ModelConfig,
        patches: Int64[Tensor, " s"],
        mask: Bool[Tensor, "*b s s"],
        rows: Bool[Tensor, "b k"] | None,
    ) -> Float[Tensor, "*joined dm"]:
        """Each block's tokens as one vector, (b k dm), or (r dm) for the r `rows` that are of use.

        What a predictor does on each token alone is done for those rows only; its `tokens` are picked.
        """
        hidden = predictor.projection(tokens)
        if predictor.pos_embed is not None:
            positions = positions_on(config.grid, predictor.pos_embed, self.config).index_select(1, patches)
            if not predictor.mixes_tokens:
                positions = _pick_of_each(positions, rows, config)
            hidden = hidden + positions
        if predictor.mixes_tokens:
            hidden = self._run_picked(predictor.blocks, hidden, mask, rows, config)
        else:
            hidden = (hidden, *layer_outputs(predictor.blocks, hidden, recompute=self.recompute))[-1]
        return predictor.join_blocks(hidden)

    def _run_picked(
        self,
        layers: nn.Sequential,
        tokens: Float[Tensor, "b s d"],
        mask: Bool[Tensor, "*b s s"],
        rows: Bool[Tensor, "b k"] | None,
        config: ModelConfig,
    ) -> Float[Tensor, "*rows m d"]:
        """The layers' output by block; under a prefix, of the blocks that are of use alone."""
        if rows is None:
            return _pick(layer_outputs(layers, tokens, mask, recompute=self.recompute)[-1], None, config)
        tokens = (tokens, *layer_outputs(layers[:-1], tokens, mask, recompute=self.recompute))[-1]
        return picked_output(
            layers[-1], tokens, mask, pick=lambda all_: _pick(all_, rows, config), recompute=self.recompute
        )

    def _targets(
        self, images: Float[Tensor, "b c h w"], order: Int64[Tensor, " k"], config: ModelConfig
    ) -> Shaped[Tensor, "b steps *t"]:
        """What stands at positions 1, 2, ... of the order: pixels (b steps p), or tokens (b steps m)."""
        if config.tokenizer is None:
            return block_targets(images, order, config.block_px, normalize=config.norm_pixels)
        per_block = (config.block_px[0] // config.token_side_px, config.block_px[1] // config.token_side_px)
        tokens = self.open_tokenizer()(images)
        grid = (config.block_grid[0] * per_block[0], config.block_grid[1] * per_block[1])
        assert tokens.shape[1:] == grid, f"the tokenizer's grid is {tuple(tokens.shape[1:])}, not {grid}"
        return token_targets(tokens, order, per_block)

    def _predict(
        self,
        mlp: nn.Module,
        joined: Float[Tensor, "*joined dm"],
        rows: Bool[Tensor, "b k"] | None,
        all_targets: Shaped[Tensor, "b k *t"],
        distance: int,
        prefix: Int64[Tensor, " b"] | None,
    ) -> Further:
        """Rows 0 .. k-1-distance predict `distance` blocks ahead; only kept rows go through the MLP."""
        targets = all_targets[:, distance - 1 :]
        batch, steps = targets.shape[:2]
        kept = kept_rows(batch, steps, distance, prefix)
        on_device = kept.to(targets.device, non_blocking=True)
        if rows is None:
            predictions = mlp(joined[:, :steps])
        else:
            among_rows = pad(kept, (0, distance - 1))[rows]
            of_kept = mlp(joined if among_rows.all() else joined.index_select(0, _where(among_rows, joined)))
            flat = of_kept.new_zeros(batch * steps, of_kept.shape[-1])
            flat = flat.index_copy(0, _where(kept, flat), of_kept)
            predictions = rearrange(flat, "(b k) p -> b k p", b=batch)
            targets = targets * on_device.view(batch, steps, *[1] * (targets.ndim - 2))
        if self.config.tokenizer is None:
            losses = block_losses(predictions, targets, self.config.loss)
            return Further(predictions, targets, losses, on_device)
        logits = rearrange(predictions, "b k (m v) -> b k m v", v=self.config.vocab_size)
        return Further(logits, targets, token_losses(logits, targets) * on_device, on_device)

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
        return patches, may_attend(positions, prefix.to(order.device, non_blocking=True))

    def _raster_mask(self, config: ModelConfig) -> Bool[Tensor, "n n"]:
        """The pre-training mask, without a prefix, over all patches in raster order."""
        same = config is self.config
        table = self.patches_of_blocks if same else _patches_of_blocks(config)
        order = (self.orders if same else _orders(config))[0]
        return raster_mask(table, order).to(positions_of(self.encoder).device)

    def _config_of(
        self, images: Tensor, *, predicting: bool = True, blocks_matter: bool = True
    ) -> ModelConfig:
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
        predictor = self.config.predictor if predicting else None
        return replace(self.config, image_size=size, block_size=block_size, predictor=predictor)

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
    return block_orders(config.order, config.block_grid, config.order_seed)


def _rows_of_use(config: ModelConfig, prefix: Int64[Tensor, " b"] | None) -> Bool[Tensor, "b k"] | None:
    """Which blocks, but for the last, predict something outside the prefix; None: all do.

    Where prefixes come from the CPU this stays there: a GPU is not waited for.
    """
    if prefix is None:
        return None
    return kept_rows(len(prefix), config.num_blocks - 1, config.num_predicted_blocks, prefix)


def _pick(
    tokens: Float[Tensor, "b s d"], rows: Bool[Tensor, "b k"] | None, config: ModelConfig
) -> Float[Tensor, "*rows m d"]:
    """Tokens by block, (b k m d), or those of the r blocks that are of use, (r m d)."""
    m = config.patches_per_block
    if rows is None:
        return rearrange(tokens, "b (k m) d -> b k m d", m=m)
    return rearrange(tokens, "b (k m) d -> (b k) m d", m=m).index_select(0, _where(rows, tokens))


def _pick_of_each(
    positions: Float[Tensor, "1 s d"], rows: Bool[Tensor, "b k"] | None, config: ModelConfig
) -> Float[Tensor, "*rows m d"]:
    """The same for what is alike in all images."""
    by_block = rearrange(positions, "1 (k m) d -> k m d", m=config.patches_per_block)
    return by_block if rows is None else by_block.index_select(0, _where(rows, positions) % len(by_block))


def _where(rows: Bool[Tensor, "*b"], like: Tensor) -> Int64[Tensor, " r"]:
    """The numbers of the rows that are True, all counted in one, on the device of `like`."""
    return rows.flatten().nonzero().flatten().to(like.device, non_blocking=True)


def _seen_positions(config: ModelConfig) -> Int64[Tensor, " s"]:
    """Position in the order of the block of every token, the last block left out."""
    return torch.arange(config.num_blocks - 1).repeat_interleave(config.patches_per_block)


def _seen_mask(config: ModelConfig) -> Bool[Tensor, "s s"]:
    return may_attend(_seen_positions(config))


def _check_prefix(lengths: Tensor | None, config: ModelConfig, batch: int) -> None:
    if lengths is None:
        return
    if lengths.shape != (batch,):
        raise ValueError(
            f"prefix_lengths has shape {tuple(lengths.shape)}; give one length an image, ({batch},)"
        )
    if lengths.min() < 0 or lengths.max() >= config.num_blocks:
        raise ValueError(
            f"prefix_lengths must lie in 0..{config.num_blocks - 1} (an image has {config.num_blocks} blocks "
            f"and the last must be left to predict), got {lengths.tolist()}"
        )


def _autocast_stays(tokens: Tensor, predictor_fp32: bool) -> bool:
    return torch.is_autocast_enabled(tokens.device.type) and not predictor_fp32
