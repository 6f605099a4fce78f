"""The predictor: from the encoder's tokens to the prediction of a block.

A projection to the predictor's width, positions of its own, layers and a norm; then one output map ("block
MLP") of a block's joined tokens for each predicted distance.

    transformer   layers under a mask: a patch's output knows the patches before it (XTRA)
    mlp           residual MLPs, each patch alone (AIM)
    linear        neither projection nor layers: the output map on the encoder's tokens
    identity      the encoder's tokens themselves (NEPA)
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

    With `extra_norm` it begins with x + norm1(x), as Apple's training code does where a transformer layer
    would attend.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.predictor_dim
        norm = layer_norm(config)
        self.norm1 = norm(width) if config.predictor_extra_norm else None
        self.norm2 = norm(width)
        self.mlp = Mlp(width, int(width * config.predictor_mlp_ratio), bias=config.bias)

    def forward(self, tokens: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """Each token by itself."""
        if self.norm1 is not None:
            tokens = tokens + self.norm1(tokens)
        return tokens + self.mlp(self.norm2(tokens))


class Predictor(nn.Module):
    """There is no query for the predicted place: the tokens of block i become the prediction of the next.

    `outputs` is how many numbers are predicted of a block.
    """

    def __init__(self, config: ModelConfig, outputs: int) -> None:
        super().__init__()
        self.mixes_tokens = config.predictor == "transformer"
        """Whether layers let tokens attend to each other; else each token can be computed alone."""
        # A linear predictor is its output maps alone: the other parts are there, and do nothing.
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
            # Built in this order, as each module draws its weights from the global generator.
            layer = _transformer_layer if self.mixes_tokens else ResidualMlp
            self.blocks = nn.Sequential(*[layer(config) for _ in range(config.predictor_depth)])
            self.norm = layer_norm(config)(width)
        joined = width * config.patches_per_block
        # One map for each predicted distance: the tokens are shared, what is read from them is not.
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
        """Projection, layers and norm; with `fp32` the layers leave autocast, as officially."""
        hidden = self.projection(tokens)
        # The official code runs its decoder (positions, layers, norm) in fp32, as fp16 overflows there; the
        # projection before it and the block MLPs behind it stay under autocast.
        with torch.autocast(hidden.device.type, enabled=False) if fp32 else nullcontext():
            hidden = hidden.float() if fp32 else hidden
            hidden = hidden if positions is None else hidden + positions
            return self.norm((hidden, *layer_outputs(self.blocks, hidden, mask, recompute=recompute))[-1])


def join_blocks(tokens: Float[Tensor, "*rows m d"]) -> Float[Tensor, "*rows dm"]:
    """The tokens of a block as one vector, channel-major: for each channel its patches."""
    # The official block MLP was trained on this order; the other one would fit, and permute its inputs.
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
