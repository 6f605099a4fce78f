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
        geometry, device = self._geometry_at(config, leaks=leaks), images.device
        k, m, front = config.num_blocks, config.patches_per_block, int(config.class_token)
        hidden = config.steps(0).number if self.mask_token is not None else 0
        # Validation and pictures pass no order and always get the same one, so their numbers are comparable.
        order = geometry.orders[0] if block_order is None else block_order
        order = order.to(device, non_blocking=True)

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
            rows = needed.flatten().nonzero().flatten().to(device, non_blocking=True)
            prefix = prefix_lengths.to(device, non_blocking=True)
            mask = may_attend(torch.arange(k - 1, device=device).repeat_interleave(m), prefix)

        # Each token carries its position, so the sequence can be permuted: attention treats it as a set, and
        # only the mask defines what comes first.
        embedded = embed_patches(self.encoder, images)
        tokens = take(embedded, patches)
        if self.mask_token is not None:
            masked = self.mask_token.to(tokens.dtype).expand(len(images), hidden * m, -1)
            tokens = torch.cat([tokens[:, : (k - hidden) * m], masked], dim=1)
        tokens = self._run_encoder(tokens, config, mask, patches, drop_path, rope_scale)[-1]
        tokens = self.encoder.norm(tokens)

        predictor, positions, predictor_mask = self.predictor, None, mask
        # The predictor's own mask is in raster order. Indexing with patches as a column and as a row permutes
        # its rows and columns to the order of the sequence.
        if geometry.predictor_mask is not None:
            predictor_mask = geometry.predictor_mask[patches[:, None], patches]
        # The predictor treats the class token as a block before the first, so it is repeated m times.
        if front and m > 1:
            tokens = torch.cat([tokens[:, :1].expand(-1, m, -1), tokens[:, 1:]], dim=1)
            predictor_mask = may_attend(torch.arange(k, device=device).repeat_interleave(m))
        # The predictor adds its own positions, as the encoder has mixed the tokens it receives.
        if predictor.pos_embed is not None:
            own = positions_on(config.grid, predictor.pos_embed, self.config)
            positions = pad(take(own, patches), (0, 0, front * m, 0))
        # A row predicts the next block of the order, so target positions are shifted by one block.
        if predictor.target_embed is not None and positions is not None:
            ahead = positions_on(config.grid, predictor.target_embed, self.config)
            ahead = take(ahead, geometry.patches_of_blocks[order[..., 1 - front :]].flatten(-2))
            positions = positions + ahead
        settings = {"fp32": self.predictor_fp32, "recompute": self.recompute}
        if predictor.mixes_tokens:
            tokens = predictor(tokens, positions, predictor_mask, **settings)
        # Rows are picked after the last attention, as every token is a key there. `rows` index (b k).
        blocks = rearrange(tokens, "b (k m) d -> b k m d", m=m)
        blocks = blocks if rows is None else blocks.flatten(0, 1).index_select(0, rows)
        if not predictor.mixes_tokens:
            # Without attention each token is computed separately, so the layers need only the picked ones. If
            # positions are the same for all images, row r of (b k) is block r mod k of the sequence.
            if positions is not None:
                positions = rearrange(positions, "b (k m) d -> b k m d", m=m)
                if rows is not None:
                    positions = positions.flatten(0, 1)
                    positions = positions.index_select(0, rows % len(positions))
            blocks = predictor(blocks, positions, **settings)
        joined = join_blocks(blocks)

        # Each distance has its own output map on the same joined tokens.
        all_targets = self.targets.of_blocks(images, order, embedded)
        distances: list[Further] = []
        for distance, block_mlp in zip(config.distances, predictor.block_mlps, strict=True):
            row, position, steps = config.steps(distance)
            targets = all_targets[:, position : position + steps]
            if rows is None or prefix is None:
                outputs = block_mlp(joined[:, row : row + steps])
                kept = torch.ones(len(images), steps, dtype=torch.bool, device=device)
            else:
                # The MLP sees only the picked rows; its outputs are scattered back to (b k-1). A row that
                # only another distance needs is zeroed: its own target is in the prefix or past the end.
                picked, kept = block_mlp(joined), kept_rows(steps, distance, prefix)
                outputs = picked.new_zeros(len(images) * (k - 1), picked.shape[-1])
                outputs = rearrange(outputs.index_copy(0, rows, picked), "(b k) p -> b k p", k=k - 1)
                outputs, targets = _zero_unless(kept, outputs[:, :steps]), _zero_unless(kept, targets)
            predictions = self.targets.shaped(outputs)
            losses = _zero_unless(kept, self.targets.losses(predictions, targets))
            distances.append(Further(predictions, targets, losses, kept))
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

    def _run_encoder(
        self,
        tokens: Float[Tensor, "b n d"],
        config: ModelConfig,
        mask: Bool[Tensor, "*b s s"] | None,
        patches: Int64[Tensor, "... n"] | None = None,
        drop_path: Float[Tensor, "b draws"] | None = None,
        rope_scale: Tensor | float | None = None,
    ) -> tuple[Float[Tensor, "b s d"], ...]:
        """Each layer's output for embedded patches, in raster order unless their indices are given."""
        device, rope = tokens.device, None
        if config.positions == "rope":
            with torch.autocast(device.type, enabled=False):
                scale = 1.0 if rope_scale is None else rope_scale
                rope = rotary_positions(config.grid, config.embed_dim // config.num_heads, scale)
            rope = rope.to(device, non_blocking=True)
            if patches is not None:
                rope = rope[patches] if patches.ndim == 1 else rope[patches][:, None]
        else:
            own = positions_on(config.grid, positions_of(self.encoder), self.config)
            tokens = tokens + (own if patches is None else take(own, patches))
        # The residual stream is fp32. Under autocast, patches are not, unless learned positions were added.
        tokens = tokens.to(self.encoder.patch_embed.proj.weight.dtype)
        if self.encoder.cls_token is not None:
            first = self.encoder.cls_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
            tokens = torch.cat([first, tokens], dim=1)
        if drop_path is not None:
            drop_path = drop_path.to(device, non_blocking=True)
        return layer_outputs(
            self.encoder.blocks, tokens, mask, recompute=self.recompute, drop_path=drop_path, rope=rope
        )

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
        mask, q = None, int(config.class_token)
        if kind == "causal" and config.encoder_attention == "block_causal":
            geometry = self._geometry_at(config, leaks=False)
            mask = raster_mask(geometry.patches_of_blocks, geometry.orders[0])
            # All tokens see the class token, which sees only itself.
            mask = pad(pad(mask, (0, 0, q, 0), value=False), (q, 0), value=True)
        # The patch projection returns a transposed view; copied once here, it is not copied in every norm.
        layers = self._run_encoder(embed_patches(self.encoder, images).contiguous(), config, mask)
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
            is_plain = config.encoder_attention == "block_causal" and config.predictor_attention == "native"
            if not is_plain or config.class_token or config.mask_ratio or config.predict_visible:
                raise UsageError("the attention masks of this model have no prefix; leave prefix_lengths out")
            # Values are checked only if that neither waits for a GPU nor breaks a compiled graph.
            visible = not torch.compiler.is_compiling() and lengths.device.type == "cpu"
            values = lengths.tolist() if visible else []
            if lengths.shape != (batch,) or not all(0 <= length < k for length in values):
                raise UsageError(
                    f"prefix_lengths must be one number in 0..{k - 1} for each of {counted(batch, 'image')} "
                    f"(an image has {k} blocks), got {values or tuple(lengths.shape)}"
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
