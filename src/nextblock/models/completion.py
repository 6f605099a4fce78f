"""Completing images: some blocks are given, and the model predicts the others.

The given blocks come first, then the hidden ones, each predicted from all blocks before it, whether given or
predicted. Keys and values are cached in every attention layer, so each further block costs one block of
tokens. A model that predicts masked blocks predicts all hidden blocks at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor
from torch.nn.functional import embedding, pad, scaled_dot_product_attention

from nextblock.blocks import block_orders, check_order, may_attend, patches_of_blocks, patchify, unpatchify
from nextblock.config import ModelConfig, pair
from nextblock.models.next_block import NextBlockModel
from nextblock.models.predictor import join_blocks
from nextblock.models.vit import embed_patches, positions_of, positions_on, rotary_positions
from nextblock.settings import require
from nextblock.targets import KINDS


class Completion(NamedTuple):
    """Output of `complete`."""

    images: Float[Tensor, "b c h w"]
    """Normalised like the input: given blocks unchanged, the others predicted."""
    order: Int64[Tensor, " k"]
    """Block order used, from position to block: the given blocks first."""
    given: int
    """Number of given blocks."""


def complete(
    model: NextBlockModel,
    images: Float[Tensor, "b c h w"],
    given: Bool[Tensor, " k"],
    *,
    order: Int64[Tensor, " k"] | None = None,
    cached: bool = True,
) -> Completion:
    """Predict the blocks of normalised images that are not `given`; their pixels are never read.

    `given` is a mask of blocks in raster order. Given and hidden blocks each follow `order` (default: the
    model's first). A model trained with prefixes lets all tokens attend to the given blocks. With
    `cached=False`, every block is predicted by the model's `forward` on the image completed so far: slower,
    with the same result. Raises `ValueError` if the model cannot complete images.
    """
    config = replace(model.config, image_size=(images.shape[2], images.shape[3]))
    check_completes(config)
    k, given = config.num_blocks, given.cpu()
    require(given.shape == (k,), f"given has shape {tuple(given.shape)}, but an image has {k} blocks")
    count = int(given.sum())
    require(count < k, f"all {k} blocks are given; hide at least one")
    require(
        count > 0 or config.class_token,
        "no block is given, and without a class token this model predicts from given blocks only; give one",
    )
    if order is None:
        order = block_orders(config.order, config.block_grid, config.order_seed)[0]
    check_order(order := order.cpu(), k)
    # Each block is predicted from those before it, so the given blocks come first.
    order = torch.cat([order[given[order]], order[~given[order]]])
    canvas, was_training = _Canvas(model, images, config, given), model.training
    predictions = _cached if cached else _recomputed
    model.eval()
    try:
        with torch.no_grad():
            found = predictions(model, canvas, config, order.to(images.device), count)
            for block, prediction in zip(order[count:].tolist(), found, strict=True):
                canvas.fill(block, prediction)
    finally:
        model.train(was_training)
    return Completion(canvas.images, order.to(images.device), count)


def check_completes(config: ModelConfig) -> None:
    """Raise `ValueError` if a model of these settings cannot complete images."""
    config.check_predicts()
    require(
        KINDS[config.target].are_pixels,
        f"this model predicts vectors (model.target {config.target}), not pixels to continue from; "
        "use a model with target pixels or tokens",
    )
    require(
        config.encoder_attention == "block_causal" and config.predictor_attention == "native",
        f"model.encoder_attention {config.encoder_attention} and model.predictor_attention "
        f"{config.predictor_attention} may let tokens see later blocks, which are not known yet; use a "
        "model with block_causal and native",
    )


class _Canvas:
    """Images completed piece by piece: by blocks, or by patches if the model predicts tokens.

    A normalised prediction has neither brightness nor contrast. Both are taken from its neighbours, the
    nearest known pieces. Its standard deviation is the mean of theirs; a piece of one colour counts as 0. The
    mean of each channel makes the pixels on both sides of shared edges equal on average. Without a shared
    edge it is the neighbours' mean. If no piece is known, mean and deviation are 0 and 1, as of all data.
    """

    def __init__(
        self,
        model: NextBlockModel,
        images: Float[Tensor, "b c h w"],
        config: ModelConfig,
        given: Bool[Tensor, " k"],
    ) -> None:
        self.config, self.tokenizer = config, model.tokenizer
        self.table = patches_of_blocks(config.grid, pair(config.block_size))
        self.grid, self.size_px, self.known = config.block_grid, config.block_px, given.clone()
        if self.tokenizer is not None:
            self.grid, self.size_px = config.grid, (config.patch_size, config.patch_size)
            self.known = torch.zeros(config.num_patches, dtype=torch.bool)
            self.known[self.table[given]] = True
        # Hidden pieces are erased, so that no mistake can use them.
        pieces = patchify(images.float(), self.size_px)
        pieces = pieces.masked_fill(~self.known.to(images.device)[:, None], 0)
        self.images = unpatchify(pieces, self.grid, self.size_px)

    def fill(self, block: int, prediction: Float[Tensor, "b ..."]) -> None:
        """Write the pixels of a predicted block into the images."""
        if self.tokenizer is None:
            self._put(block, prediction)
            return
        patches = embedding(prediction.argmax(-1), self.tokenizer.centroids)
        for patch, pixels in zip(self.table[block].tolist(), patches.unbind(1), strict=True):
            self._put(patch, pixels)

    def _put(self, piece: int, values: Float[Tensor, "b p"]) -> None:
        pixels = rearrange(values.float(), "b (c h w) -> b c h w", c=self.config.in_chans, h=self.size_px[0])
        if self.config.norm_pixels and self.known.any():
            pixels = self._with_statistics(piece, pixels)
        self._at(piece).copy_(pixels)
        self.known[piece] = True

    def _at(self, piece: int) -> Float[Tensor, "b c h w"]:
        (row, column), (height, width) = divmod(piece, self.grid[1]), self.size_px
        return self.images[:, :, row * height :, column * width :][:, :, :height, :width]

    def _with_statistics(self, piece: int, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        known, across = self.known.nonzero().flatten(), self.grid[1]
        rows, columns = known // across - piece // across, known % across - piece % across
        # Squared, counted in pieces: 1 for those that share an edge. All of the nearest count alike.
        distance = rows.square() + columns.square()
        near = distance == distance.min()
        deviations, theirs, ours = [], [], []
        for index, row, column in zip(*(x[near].tolist() for x in (known, rows, columns)), strict=True):
            other = self._at(index)
            is_flat = (other == other[..., :1, :1]).flatten(1).all(1)
            deviations.append(other.flatten(1).std(1).masked_fill(is_flat, 0))
            if distance.min() > 1:  # no shared edge
                theirs, ours = [*theirs, other.flatten(2)], [*ours, pixels.flatten(2)]
            elif row:  # above or below: their last row adjoins our first, or their first our last
                theirs, ours = [*theirs, other[:, :, -(row < 0)]], [*ours, pixels[:, :, -(row > 0)]]
            else:
                theirs, ours = [*theirs, other[..., -(column < 0)]], [*ours, pixels[..., -(column > 0)]]
        deviation = torch.stack(deviations).mean(0)[:, None, None]
        # Averaging differences from one pixel keeps the mean of equal colours exact.
        edge = torch.cat(theirs, dim=-1)
        origin = edge[..., :1]
        mean = origin + (edge - origin - deviation * torch.cat(ours, dim=-1)).mean(-1, keepdim=True)
        return mean[..., None] + deviation[..., None] * pixels


# ---------------------------------------------------------------------------------- predicting block by block

# Both generators yield the predictions of the hidden blocks in order. Before each, they read the image
# completed so far; masked blocks are predicted all at once.


def _recomputed(
    model: NextBlockModel, canvas: _Canvas, config: ModelConfig, order: Int64[Tensor, " k"], given: int
) -> Iterator[Tensor]:
    """Predict each block by the model's `forward`."""
    lengths = torch.full((len(canvas.images),), given) if config.prefix else None
    if config.mask_ratio is not None:
        hidden, trained = len(order) - given, config.steps(0).number
        require(
            hidden == trained,
            f"model.mask_ratio {config.mask_ratio} predicts {trained} blocks, not {hidden}; omit cached",
        )
        yield from model(canvas.images, order, lengths).predictions.unbind(1)
        return
    for position in range(given, len(order)):
        row = position - config.steps(1).position
        yield model(canvas.images, order, lengths).predictions[:, row]


def _cached(
    model: NextBlockModel, canvas: _Canvas, config: ModelConfig, order: Int64[Tensor, " k"], given: int
) -> Iterator[Tensor]:
    """The same predictions with cached keys and values: each block passes through the model once."""
    encoder, predictor, targets = model.encoder, model.predictor, model.targets
    assert predictor is not None
    assert targets is not None
    k, m, batch, front = len(order), config.patches_per_block, len(canvas.images), int(config.class_token)
    patches = patches_of_blocks(config.grid, pair(config.block_size)).to(order.device)[order].flatten()
    # Positions along the sequence. The class token has none: it is not rotated (sine 0, cosine 1), or its
    # position embedding is zero. The predictor treats it as a block.
    rope = positions = own = None
    if config.positions == "rope":
        table = rotary_positions(config.grid, config.embed_dim // config.num_heads).to(order.device)
        unrotated = table.new_tensor([0.0, 1.0]).repeat_interleave(table.shape[1] // 2)
        rope = torch.cat([unrotated.expand(front, -1), table[patches]])
    else:
        positions = positions_on(config.grid, positions_of(encoder), model.config)
        positions = pad(positions[:, patches], (0, 0, front, 0))
    if predictor.pos_embed is not None:
        own = positions_on(config.grid, predictor.pos_embed, model.config)
        own = pad(own[:, patches], (0, 0, front * m, 0))
    if own is not None and predictor.target_embed is not None:
        # A row predicts the next block; the last row predicts none.
        ahead = positions_on(config.grid, predictor.target_embed, model.config)
        own = own + pad(ahead[:, patches[(1 - front) * m :]], (0, 0, 0, m))
    keys: list[Kept | None] = [None] * len(encoder.blocks)
    predictor_keys: list[Kept | None] = [None] * len(predictor.blocks)
    masked = 0 if model.mask_token is None else k - given
    done, stop = 0, 0  # blocks and tokens that have passed through the model
    for position in (given,) if masked else range(given, k):
        # Blocks that became known since the last round are embedded, each as a small image.
        pixels = patchify(canvas.images, config.block_px)[:, order[done:position]]
        blocks = rearrange(pixels, "b s (c h w) -> (b s) c h w", c=config.in_chans, h=config.block_px[0])
        tokens = rearrange(embed_patches(encoder, blocks), "(b s) m d -> b (s m) d", b=batch)
        if model.mask_token is not None:
            tokens = torch.cat([tokens, model.mask_token.expand(batch, masked * m, -1)], dim=1)
        start, behind = stop, front if stop == 0 else 0
        if behind and encoder.cls_token is not None:
            tokens = torch.cat([encoder.cls_token.expand(batch, -1, -1), tokens], dim=1)
        # Only the first round needs masks, among given blocks: later tokens attend to all tokens before them.
        mask = predictor_mask = None
        if start == 0 and not config.prefix and not masked:
            places = torch.arange(-behind, position, device=order.device).repeat_interleave(m)
            predictor_mask = may_attend(places)
            mask = may_attend(places[behind * (m - 1) :])
        stop = start + tokens.shape[1]
        tokens = tokens if positions is None else tokens + positions[:, start:stop]
        tokens = _attend(encoder.blocks, tokens, keys, mask, None if rope is None else rope[start:stop])
        tokens = encoder.norm(tokens)
        if behind:  # m copies of the class token are the predictor's first block
            tokens = torch.cat([tokens[:, :1].expand(-1, m - 1, -1), tokens], dim=1)
        # The predictor's sequence ends at the same block. Without attention it needs predicting tokens only.
        last = (masked or 1) * m
        tokens = predictor.projection(tokens if predictor.mixes_tokens else tokens[:, -last:])
        if own is not None:  # the predictor's positions of the same tokens, ending where they end
            end = stop + front * (m - 1)
            tokens = tokens + own[:, end - tokens.shape[1] : end]
        if predictor.mixes_tokens:
            tokens = _attend(predictor.blocks, tokens, predictor_keys, predictor_mask)
        else:
            tokens = predictor.blocks(tokens)
        done = position
        joined = join_blocks(rearrange(predictor.norm(tokens[:, -last:]), "b (s m) d -> b s m d", m=m))
        yield from targets.shaped(predictor.block_mlps[0](joined)).unbind(1)


Kept = tuple[Float[Tensor, "b heads _ e"], Float[Tensor, "b heads _ e"]]
"""Cached keys and values of an attention layer."""


def _attend(
    layers: Any,
    tokens: Float[Tensor, "b n d"],
    kept: list[Kept | None],
    mask: Bool[Tensor, "n n"] | None = None,
    rope: Float[Tensor, "n r"] | None = None,
) -> Float[Tensor, "b n d"]:
    """Run transformer layers on new tokens, which also attend to earlier tokens through the cache `kept`."""
    # timm's attention has no cache, so its layers are written out here.
    for number, layer in enumerate(layers):
        attention = layer.attn
        qkv = attention.qkv(layer.norm1(tokens))
        q, k, v = rearrange(qkv, "b n (three h e) -> three b h n e", three=3, h=attention.num_heads)
        q, k = attention.q_norm(q), attention.k_norm(k)
        if rope is not None:
            q, k = (apply_rot_embed_cat(x, rope, half=attention.rotate_half) for x in (q, k))
        if (before := kept[number]) is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(before, (k, v), strict=True))
        kept[number] = (k, v)
        attended = rearrange(scaled_dot_product_attention(q, k, v, mask), "b h n e -> b n (h e)")
        attended = attention.proj(attention.norm(attended))
        first, second = layer.factors
        tokens = tokens + first * attended
        tokens = tokens + second * layer.mlp(layer.norm2(tokens))
    return tokens
