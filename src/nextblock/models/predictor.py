"""The predictor: from the encoder's tokens to the prediction of a block.

It consists of a projection to the predictor's width, its own positions, layers and a norm. Then one output
map ("block MLP") per predicted distance maps a block's joined tokens to the prediction.

    transformer   layers under the attention mask: a patch sees the patches before it (XTRA)
    mlp           residual MLPs on each patch separately (AIM)
    linear        no projection and no layers: the output map on the encoder's tokens
    identity      the encoder's tokens are the prediction (NEPA)
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from jaxtyping import Bool, Float
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from nextblock.config import ModelConfig
from nextblock.models.vit import Layer, fresh_positions, init_linear, layer_norm, layer_outputs


class ResidualMlp(nn.Module):
    """A layer of AIM's prediction head: x + mlp(norm2(x)).

    With `predictor_extra_norm`, x + norm1(x) comes first, in place of a transformer layer's attention, as in
    Apple's training code.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.predictor_dim
        norm = layer_norm(config)
        self.norm1 = norm(width) if config.predictor_extra_norm else None
        self.norm2 = norm(width)
        self.mlp = Mlp(width, int(width * config.predictor_mlp_ratio), bias=config.bias)

    def forward(self, tokens: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """Apply the layer to each token separately."""
        if self.norm1 is not None:
            tokens = tokens + self.norm1(tokens)
        return tokens + self.mlp(self.norm2(tokens))


class Predictor(nn.Module):
    """Turns the tokens of block i into the prediction of the next block; no query names the target position.

    `outputs` is the number of values predicted per block.
    """

    def __init__(self, config: ModelConfig, outputs: int) -> None:
        super().__init__()
        self.mixes_tokens = config.predictor == "transformer"
        """Whether tokens attend to each other; if not, each token can be computed separately."""
        # A linear predictor has output maps only; its other parts exist and do nothing.
        self.projection: nn.Module = nn.Identity()
        self.register_parameter("pos_embed", None)
        self.register_parameter("target_embed", None)
        self.blocks, width = nn.Sequential(), config.embed_dim
        self.norm: nn.Module = nn.Identity()
        if config.predictor in ("transformer", "mlp"):
            width = config.predictor_dim
            self.projection = _mlp(config.embed_dim, config.projection_dim, width, bias=False)
            self.pos_embed = fresh_positions(config, width)
            if config.target_positions:
                self.target_embed = fresh_positions(config, width)
            # Keep this order: each module draws its weights from the global generator.
            layer = _transformer_layer if self.mixes_tokens else ResidualMlp
            self.blocks = nn.Sequential(*[layer(config) for _ in range(config.predictor_depth)])
            self.norm = layer_norm(config)(width)
        joined = width * config.patches_per_block
        # One map per predicted distance; all distances share the tokens.
        if config.predictor == "identity":
            maps = [Rearrange("... (d m) -> ... (m d)", m=config.patches_per_block)]  # see join_blocks
        else:
            maps = [_mlp(joined, config.block_mlp_dim, outputs) for _ in config.distances]
        self.block_mlps = nn.ModuleList(maps)
        init_linear(self, config)

    def forward(
        self,
        tokens: Float[Tensor, "*rows e"],
        positions: Float[Tensor, "*places d"] | None,
        mask: Bool[Tensor, "*b n n"] | None = None,
        *,
        fp32: bool = False,
        recompute: bool = False,
    ) -> Float[Tensor, "*rows d"]:
        """Apply projection, layers and norm; `fp32` runs the layers without autocast."""
        hidden = self.projection(tokens)
        # Like the official code: positions, layers and norm run in fp32, as fp16 overflows there. The
        # projection before them and the block MLPs after them stay under autocast.
        with torch.autocast(hidden.device.type, enabled=False) if fp32 else nullcontext():
            hidden = hidden.float() if fp32 else hidden
            hidden = hidden if positions is None else hidden + positions
            return self.norm((hidden, *layer_outputs(self.blocks, hidden, mask, recompute=recompute))[-1])


def join_blocks(tokens: Float[Tensor, "*rows m d"]) -> Float[Tensor, "*rows dm"]:
    """Join the tokens of a block into one vector, channel-major: all patches of a channel are adjacent."""
    # The official block MLP was trained on this order. Patch-major fits too, but permutes its inputs.
    return rearrange(tokens, "... m d -> ... (d m)")


def _mlp(inputs: int, hidden: int | None, outputs: int, *, bias: bool = True) -> nn.Module:
    if hidden is None:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs, bias=bias))


def _transformer_layer(config: ModelConfig) -> Layer:
    return Layer(
        config.predictor_dim,
        config.predictor_heads,
        mlp_ratio=config.predictor_mlp_ratio,
        qkv_bias=config.bias,
        proj_bias=config.bias,
        norm_layer=layer_norm(config),
        qk_scale=config.qk_scale,
    )
