"""The model: an encoder under a block-causal mask, a predictor, and the loss of predicting each next block.

`forward` serves training, validation and pictures; `encode` serves features. In `forward` the tokens are
block-major and follow the block order. So the mask is the same staircase for every order, and the last block
is the end of the sequence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn
from torch.nn.functional import pad

from nextblock.blocks import block_orders, check_order, may_attend, patches_of_blocks, raster_mask, take
from nextblock.config import Attention, ModelConfig, pair
from nextblock.errors import UsageError
from nextblock.logs import counted
from nextblock.model_config import Steps
from nextblock.models.predictor import Predictor, join_blocks
from nextblock.models.vit import (
    INIT_STD,
    Encoded,
    build_encoder,
    embed_patches,
    layer_outputs,
    positions_of,
    positions_on,
    rotary_positions,
)
from nextblock.targets import combine, kept_rows, make_targets


class Further(NamedTuple):
    """Predictions two or more blocks ahead: the same fields as in `Prediction`, with fewer steps."""

    predictions: Float[Tensor, "b steps *p"]
    targets: Shaped[Tensor, "b steps *t"]
    block_loss: Float[Tensor, "b steps"]
    kept: Bool[Tensor, "b steps"]


class Prediction(NamedTuple):
    """Output of `NextBlockModel.forward`; row i predicts the block at position i+1 of the order.

    With a class token, an additional first row predicts the first block. With `mask_ratio` there is one row
    per masked block; these are the last of the order.
    """

    loss: Float[Tensor, ""]
    """Mean of `block_loss` over kept rows, averaged over the predicted distances; fp32."""
    predictions: Float[Tensor, "b steps *p"]
    """Pixel values (b steps p) in (c h w) order, normalised if the targets are; logits of tokens
    (b steps m v); or vectors (b steps m e)."""
    targets: Shaped[Tensor, "b steps *t"]
    """Targets of the loss: pixel values (b steps p), tokens (b steps m), or vectors (b steps m e)."""
    block_loss: Float[Tensor, "b steps"]
    """Loss per block."""
    kept: Bool[Tensor, "b steps"]
    """False if the target is in the prefix; predictions, targets and losses of those rows are zero."""
    further: tuple[Further, ...]
    """The same for distances 2, 3, ..., and last for the visible blocks, if these are predicted."""

    @property
    def distances(self) -> tuple[Further, ...]:
        """All predicted distances, nearest first."""
        return (Further(self.predictions, self.targets, self.block_loss, self.kept), *self.further)


class Geometry(NamedTuple):
    """Index tables and masks for one image size."""

    patches_of_blocks: Int64[Tensor, "k m"]
    orders: Int64[Tensor, "o k"]
    """The set of block orders; validation and features use the first."""
    mask: Bool[Tensor, "s s"] | None
    """Mask of the encoder over the sequence of `forward`, including a class token, without a prefix. None:
    full attention."""
    predictor_mask: Bool[Tensor, "n n"] | None
    """Mask of the predictor over all patches in raster order, if it differs from the encoder's."""


class NextBlockModel(nn.Module):
    """A vision transformer that predicts blocks (XTRA, arXiv 2411.15648; AIM, arXiv 2401.08541).

    `encoder` is a timm `VisionTransformer`; called directly, it applies no mask. If `config.predictor` is
    None, the model only encodes.
    """

    patches_of_blocks: Int64[Tensor, "k m"]
    orders: Int64[Tensor, "o k"]
    mask: Bool[Tensor, "s s"] | None
    predictor_mask: Bool[Tensor, "n n"] | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.targets = None if config.predictor is None else make_targets(config)
        self.predictor = None if self.targets is None else Predictor(config, self.targets.outputs)
        self.tokenizer = None if self.targets is None else self.targets.tokenizer  # saved with the model
        self.mask_token = None
        if config.mask_ratio is not None and self.predictor is not None:
            self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(config.embed_dim), std=INIT_STD))
        self.recompute = False
        self.predictor_fp32 = False
        """Run the predictor's layers without autocast (`train.predictor_fp32`)."""
        self.make_buffers()

    def make_buffers(self) -> None:
        """Compute the tables that are not stored in model files; call this again after `to_empty`."""
        self.leaks = masks_leak(self.config)
        """Whether tokens see what they should predict, so that training would only learn to copy."""
        # Non-persistent buffers move with the model but are not stored, as they follow from the settings.
        for name, table in _geometry(self.config, self.leaks, self._device)._asdict().items():
            self.register_buffer(name, table, persistent=False)
        if self.config.positions == "rope":  # timm's own table, for direct calls of the encoder
            encoder: Any = self.encoder
            with torch.device("cpu"):
                encoder.rope.to_empty(device=self.patches_of_blocks.device).reset_parameters()

    @property
    def _device(self) -> torch.device:
        return self.encoder.patch_embed.proj.weight.device

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        block_order: Int64[Tensor, "... k"] | None = None,
        prefix_lengths: Int64[Tensor, " b"] | None = None,
        drop_path: Float[Tensor, "b draws"] | None = None,
        rope_scale: Float[Tensor, ""] | None = None,
    ) -> Prediction:
        """Predict every block from the blocks before it.

        `images` are normalised. `block_order` maps positions in the sequence to blocks in raster order, for
        all images or per image; None is the model's first order. With `mask_ratio`, its last blocks are
        masked. `prefix_lengths` counts, per image, the leading blocks that all tokens may attend to and that
        are not predicted; None, 0 and 1 are the same. `rope_scale` stretches rotary coordinates. `drop_path`
        contains two uniform numbers in [0, 1) per encoder layer, used in training only; None draws them from
        torch's global generator. Raises `ValueError` for wrong shapes, and for invalid values of
        `block_order` and `prefix_lengths` if these are on the CPU.
        """
        config = self._config_at(images)
        leaks = self.leaks if config is self.config else masks_leak(config)
        check_predicts(config, leaks=self.training and leaks)
        assert self.targets is not None
        assert self.predictor is not None
        self._check_arguments(config, len(images), block_order, prefix_lengths, drop_path)
        # Tables and masks for the size of these images; at the model's own size, its buffers.
        geometry, k, m = self._geometry_at(config, leaks=leaks), config.num_blocks, config.patches_per_block
        hidden = config.steps(0).number if self.mask_token is not None else 0
        # Validation and pictures pass no order and always get the same one, so their numbers are comparable.
        order = geometry.orders[0] if block_order is None else block_order
        order = order.to(images.device, non_blocking=True)

        # The last block is skipped: no earlier token attends to it and nothing is predicted from it. The loss
        # is the same and 1/k of the work is saved. Only leaking masks (in some official files) need it.
        seen = k if leaks or hidden else k - 1
        patches = geometry.patches_of_blocks[order[..., :seen]].flatten(-2)
        # Along the order the mask is always the same staircase. A prefix opens it per image and determines
        # which rows are predicted.
        mask, rows, prefix = geometry.mask, None, None
        if prefix_lengths is not None:
            # Computed on the device of the lengths: on the CPU, nonzero does not wait for a GPU. Row i is
            # needed if its farthest target, at position i + num_predicted_blocks, comes after the prefix.
            needed = kept_rows(k - 1, config.num_predicted_blocks, prefix_lengths)
            rows = needed.flatten().nonzero().flatten().to(images.device, non_blocking=True)
            prefix = prefix_lengths.to(images.device, non_blocking=True)
            positions = torch.arange(k - 1, device=images.device).repeat_interleave(m)
            mask = may_attend(positions, prefix)
        predictor_mask = mask
        # The predictor's own mask is in raster order. Indexing with patches as a column and as a row permutes
        # its rows and columns to the order of the sequence.
        if geometry.predictor_mask is not None:
            predictor_mask = geometry.predictor_mask[patches[:, None], patches]

        # Each token carries its position, so the sequence can be permuted: attention treats it as a set, and
        # only the mask defines what comes first.
        embedded = embed_patches(self.encoder, images)
        tokens, rope = take(embedded, patches), None
        if self.mask_token is not None:
            masked = self.mask_token.to(tokens.dtype).expand(len(images), hidden * m, -1)
            tokens = torch.cat([tokens[:, : (k - hidden) * m], masked], dim=1)
        if config.positions == "rope":
            table = self._rotary(config, 1.0 if rope_scale is None else rope_scale)
            rope = table[patches] if patches.ndim == 1 else table[patches][:, None]
        else:
            tokens = tokens + take(
                positions_on(config.grid, positions_of(self.encoder), self.config), patches
            )
        tokens = self._with_class_token(tokens)
        drop_path = None if drop_path is None else drop_path.to(images.device, non_blocking=True)
        tokens = layer_outputs(
            self.encoder.blocks, tokens, mask, recompute=self.recompute, drop_path=drop_path, rope=rope
        )[-1]
        tokens = self.encoder.norm(tokens)
        # The predictor treats the class token as a block before the first, so it is repeated m times.
        if config.class_token and m > 1:
            tokens = torch.cat([tokens[:, :1].expand(-1, m, -1), tokens[:, 1:]], dim=1)
            predictor_mask = may_attend(torch.arange(k, device=images.device).repeat_interleave(m))
        joined = self._decode(tokens, config, order, geometry.patches_of_blocks, predictor_mask, rows)

        # Each distance has its own output map on the same joined tokens.
        targets = self.targets.of_blocks(images, order, embedded)
        distances = [
            self._predict(mlp, joined, targets, config.steps(distance), distance, rows, prefix)
            for distance, mlp in zip(config.distances, self.predictor.block_mlps, strict=True)
        ]
        # Means over this batch. Training divides the same block losses by the counts of the global batch.
        counts = [part.kept.sum().float() for part in distances]
        loss = combine([part.block_loss for part in distances], counts)
        return Prediction(loss, *distances[0], further=tuple(distances[1:]))

    def targets_of(
        self, images: Float[Tensor, "b c h w"], order: Int64[Tensor, "... k"]
    ) -> Shaped[Tensor, "b k *t"]:
        """Targets of all blocks, along the order."""
        assert self.targets is not None, "a model without a predictor has no targets"
        return self.targets.of_blocks(images, order, embed_patches(self.encoder, images))

    def _rotary(self, config: ModelConfig, scale: Tensor | float) -> Float[Tensor, "n r"]:
        with torch.autocast(self._device.type, enabled=False):
            table = rotary_positions(config.grid, config.embed_dim // config.num_heads, scale)
        return table.to(self._device, non_blocking=True)

    def _with_class_token(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n2 d"]:
        # The residual stream is fp32. Under autocast, patches are not, unless learned positions were added.
        tokens, token = tokens.to(self.encoder.patch_embed.proj.weight.dtype), self.encoder.cls_token
        if token is None:
            return tokens
        return torch.cat([token.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens], dim=1)

    def _decode(
        self,
        tokens: Float[Tensor, "b s e"],
        config: ModelConfig,
        order: Int64[Tensor, "... k"],
        table: Int64[Tensor, "k m"],
        mask: Bool[Tensor, "*b s s"] | None,
        rows: Int64[Tensor, " r"] | None,
    ) -> Float[Tensor, "*joined dm"]:
        """Each block's tokens as one vector: (b k dm), or (r dm) for `rows`, which index (b k) flattened.

        Rows are picked after the last attention, as every token is a key there.
        """
        predictor, positions, m = self.predictor, None, config.patches_per_block
        assert predictor is not None
        # The predictor adds its own positions, as the encoder has mixed the tokens it receives.
        behind, seen = int(config.class_token), tokens.shape[1] // m - int(config.class_token)
        if predictor.pos_embed is not None:
            own = positions_on(config.grid, predictor.pos_embed, self.config)
            positions = pad(take(own, table[order[..., :seen]].flatten(-2)), (0, 0, behind * m, 0))
        # A row predicts the next block of the order, so target positions are shifted by one block.
        if predictor.target_embed is not None and positions is not None:
            ahead = positions_on(config.grid, predictor.target_embed, self.config)
            positions = positions + take(ahead, table[order[..., 1 - behind :]].flatten(-2))

        def pick(by_token: Tensor) -> Tensor:
            if rows is None:
                return rearrange(by_token, "b (k m) d -> b k m d", m=m)
            return rearrange(by_token, "b (k m) d -> (b k) m d", m=m).index_select(0, rows)

        settings = {"fp32": self.predictor_fp32, "recompute": self.recompute}
        if predictor.mixes_tokens:
            return join_blocks(pick(predictor(tokens, positions, mask, **settings)))
        # Without attention each token is computed separately, so the layers need only the picked ones. If
        # positions are the same for all images, row r of (b k) is block r mod k of the sequence.
        if positions is not None:
            positions = rearrange(positions, "b (k m) d -> b k m d", m=m)
            if rows is not None:
                positions = positions.flatten(0, 1)
                positions = positions.index_select(0, rows % len(positions))
        return join_blocks(predictor(pick(tokens), positions, **settings))

    def _predict(
        self,
        mlp: nn.Module,
        joined: Float[Tensor, "*joined dm"],
        all_targets: Shaped[Tensor, "b k *t"],
        which: Steps,
        distance: int,
        rows: Int64[Tensor, " r"] | None,
        prefix: Int64[Tensor, " b"] | None,
    ) -> Further:
        """Predictions, targets and losses of the rows `which`, `distance` blocks ahead."""
        assert self.targets is not None
        targets = all_targets[:, which.position : which.position + which.number]
        batch, steps = targets.shape[:2]
        if rows is None or prefix is None:
            kept = torch.ones(batch, steps, dtype=torch.bool, device=targets.device)
            predictions = self.targets.shaped(mlp(joined[:, which.row : which.row + steps]))
        else:
            # The MLP sees only the picked rows; its outputs are scattered back to (b k-1). A row that only
            # another distance needs is zeroed: its own target is in the prefix or past the end.
            kept = kept_rows(steps, distance, prefix)
            picked = mlp(joined)
            in_place = picked.new_zeros(batch * (all_targets.shape[1] - 1), picked.shape[-1])
            in_place = rearrange(in_place.index_copy(0, rows, picked), "(b k) p -> b k p", b=batch)
            predictions = self.targets.shaped(_zero_unless(kept, in_place[:, :steps]))
            targets = _zero_unless(kept, targets)
        losses = _zero_unless(kept, self.targets.losses(predictions, targets))
        return Further(predictions, targets, losses, kept)

    def encode(self, images: Float[Tensor, "b c h w"], attention: Attention = "native") -> Encoded:
        """Encode images of any size that blocks divide; tokens and layers are in raster order.

        `attention`: "native" uses `config.feature_attention`, "causal" the pre-training mask without a
        prefix, "full" no mask. Under full attention it is enough that patches divide the image.
        """
        kind = self.config.feature_attention if attention == "native" else attention
        if kind not in ("causal", "full"):
            raise UsageError(f"attention is {attention!r}; it must be 'native', 'causal' or 'full'")
        config = self._config_at(images, predicting=False, blocks_matter=kind == "causal")
        # Features are returned in raster order, so the mask is permuted instead of the tokens.
        mask, rope, q = None, None, int(config.class_token)
        if kind == "causal" and config.encoder_attention == "block_causal":
            geometry = self._geometry_at(config, leaks=False)
            mask = raster_mask(geometry.patches_of_blocks, geometry.orders[0])
            # All tokens see the class token, which sees only itself.
            mask = pad(pad(mask, (0, 0, q, 0), value=False), (q, 0), value=True)
        # The patch projection returns a transposed view; copied once here, it is not copied in every norm.
        tokens = embed_patches(self.encoder, images).contiguous()
        if config.positions == "rope":
            rope = self._rotary(config, 1.0)
        else:
            tokens = tokens + positions_on(config.grid, positions_of(self.encoder), self.config)
        tokens = self._with_class_token(tokens)
        layers = layer_outputs(self.encoder.blocks, tokens, mask, recompute=self.recompute, rope=rope)
        patches = tuple(layer[:, q:] for layer in layers)
        prefix = tuple(layer[:, :q] for layer in layers) if q else ()
        return Encoded(self.encoder.norm(patches[-1]), patches, prefix, has_class_token=bool(q))

    @property
    def final_norm(self) -> nn.Module:
        """The encoder's norm after the last layer."""
        return self.encoder.norm

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every layer in the backward pass instead of keeping its activations."""
        self.recompute = enable

    def _geometry_at(self, config: ModelConfig, *, leaks: bool) -> Geometry:
        """Tables for a size, on the model's device; the buffers if it is the model's own size."""
        if config is self.config:
            return Geometry(self.patches_of_blocks, self.orders, self.mask, self.predictor_mask)
        return _geometry(config, leaks, self._device)

    def _config_at(
        self, images: Tensor, *, predicting: bool = True, blocks_matter: bool = True
    ) -> ModelConfig:
        """The settings at the size of these images; `self.config` if they have its size."""
        if not images.is_floating_point():
            why = "divide by 255, subtract the mean and divide by the deviation"
            raise UsageError(f"images are {images.dtype}; {why}")
        channels = self.config.in_chans
        if images.shape[1] != channels:
            raise UsageError(f"images have {counted(images.shape[1], 'channel')}, the model takes {channels}")
        # Only shapes are checked: they are constants in a compiled graph and need no GPU synchronisation.
        size = (images.shape[2], images.shape[3])
        if size == pair(self.config.image_size):
            return self.config
        # `replace` validates the settings again: blocks must divide the image. Without a mask blocks do not
        # matter, and blocks of one patch divide every grid.
        block_size = self.config.block_size if blocks_matter else 1
        predictor = self.config.predictor if predicting else None
        return replace(self.config, image_size=size, block_size=block_size, predictor=predictor)

    def _check_arguments(
        self,
        config: ModelConfig,
        batch: int,
        order: Tensor | None,
        lengths: Tensor | None,
        drop_path: Tensor | None,
    ) -> None:
        k = config.num_blocks
        if order is not None:
            check_order(order, k, batch)
        if lengths is not None:
            if lengths.shape != (batch,):
                shape = tuple(lengths.shape)
                raise UsageError(f"prefix_lengths has shape {shape}; give one length per image, ({batch},)")
            is_plain = config.encoder_attention == "block_causal" and config.predictor_attention == "native"
            if not is_plain or config.class_token or config.mask_ratio or config.predict_visible:
                raise UsageError("the attention masks of this model have no prefix; leave prefix_lengths out")
            # Values are checked only if that neither waits for a GPU nor breaks a compiled graph.
            visible = not torch.compiler.is_compiling() and lengths.device.type == "cpu"
            if visible and not all(0 <= length < k for length in lengths.tolist()):
                raise UsageError(
                    f"prefix_lengths must be in 0..{k - 1} (an image has {k} blocks and the last one must "
                    f"be predicted), got {lengths.tolist()}"
                )
        if drop_path is not None and drop_path.shape != (batch, 2 * config.depth):
            shape, wanted = tuple(drop_path.shape), (batch, 2 * config.depth)
            raise UsageError(f"drop_path has shape {shape}; give two numbers per layer, {wanted}")


def check_predicts(config: ModelConfig, *, leaks: bool) -> None:
    """Raise `ValueError` if a model of these settings cannot predict, or must not because its masks leak."""
    config.check_predicts()
    if leaks:
        raise UsageError(
            f"under model.encoder_attention {config.encoder_attention} and model.predictor_attention "
            f"{config.predictor_attention} tokens see the blocks they should predict, so training would "
            "learn to copy; use block_causal and native"
        )


def masks_leak(config: ModelConfig) -> bool:
    """Whether any token sees a later block, in the encoder or the predictor."""
    if config.predictor is None or config.num_blocks == 1:
        return False
    # A predictor's mask leaks if it allows what the block staircase forbids. The loss would fall to zero
    # without learning anything, so such a model encodes and draws pictures, but cannot be trained.
    own = _predictor_mask(config)
    if config.encoder_attention == "full" or own is None:
        return config.encoder_attention == "full"
    # In raster order, the only order that a predictor's own mask supports.
    with torch.device("cpu"):
        table = patches_of_blocks(config.grid, pair(config.block_size))
        allowed = raster_mask(table, torch.arange(len(table)))
    return bool((own & ~allowed).any())


def _geometry(config: ModelConfig, leaks: bool, device: torch.device) -> Geometry:
    """Tables for a size; on the CPU if the model is built on the meta device."""
    with torch.device("cpu"):
        mask = None
        # The last block is skipped unless some mask lets an earlier token see it.
        if config.encoder_attention == "block_causal" and config.mask_ratio is None:
            seen = config.num_blocks if leaks else config.num_blocks - 1
            positions = torch.arange(seen).repeat_interleave(config.patches_per_block)
            mask = may_attend(pad(positions, (int(config.class_token), 0), value=-1))
        table = patches_of_blocks(config.grid, pair(config.block_size))
        orders = block_orders(config.order, config.block_grid, config.order_seed)
        tables: list[Any] = [table, orders, mask, _predictor_mask(config)]
    # No file stores these tables, so loading would not fill them: they are never on the meta device.
    target = torch.device("cpu") if device.type == "meta" else device
    moved: list[Any] = [t if t is None else t.to(target, non_blocking=True) for t in tables]
    return Geometry(*moved)


def _predictor_mask(config: ModelConfig) -> Bool[Tensor, "n n"] | None:
    """The predictor's own mask in raster order (True: may attend); None if it uses the encoder's."""
    if config.predictor_attention == "native":
        return None
    n = config.num_patches
    with torch.device("cpu"):
        if config.predictor_attention == "full":
            return torch.ones(n, n, dtype=torch.bool)
        # Plain causal attention is the block mask with one patch per block.
        size = 1 if config.predictor_attention == "causal" else config.predictor_block_size
        table = patches_of_blocks(config.grid, pair(config.block_size if size is None else size))
        return raster_mask(table, torch.arange(len(table)))


def _zero_unless(kept: Bool[Tensor, "b steps"], values: Shaped[Tensor, "b steps *p"]) -> Tensor:
    # masked_fill, not a product: NaN times 0 is NaN, and the gradient of a filled row is exactly 0.
    return values.masked_fill(~kept.view(*kept.shape, *[1] * (values.ndim - 2)), 0)
