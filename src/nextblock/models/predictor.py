"""What predicts the next block: XTRA's projection, its block-causal decoder, and one MLP for all blocks."""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import Parameter

from nextblock.config import ModelConfig
from nextblock.models.encoder import INIT_STD, init_linear

__all__ = ["Predictor"]


class Predictor(nn.Module):
    """From the encoder's tokens to the pixels of the next block; the model runs its layers.

    There is no query for the place that is predicted: what the tokens of block i become *is* the prediction
    of the block after it. One block MLP a predicted distance.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.predictor_dim
        self.projection = nn.Sequential(
            nn.Linear(config.embed_dim, config.projection_dim),
            nn.GELU(),
            nn.Linear(config.projection_dim, width, bias=False),
        )
        self.pos_embed = Parameter(
            nn.init.trunc_normal_(torch.empty(1, config.num_patches, width), std=INIT_STD)
        )
        norm_layer = partial(nn.LayerNorm, eps=config.norm_eps)
        self.blocks = nn.Sequential(
            *[
                Block(
                    width,
                    config.predictor_heads,
                    mlp_ratio=config.predictor_mlp_ratio,
                    qkv_bias=True,
                    norm_layer=norm_layer,  # type: ignore[arg-type] # timm calls it like a class
                )
                for _ in range(config.predictor_depth)
            ]
        )
        self.norm = norm_layer(width)
        self.block_mlps = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width * config.patches_per_block, config.block_mlp_dim),
                nn.GELU(),
                nn.Linear(config.block_mlp_dim, config.block_values),
            )
            for _ in range(config.num_predicted_blocks)
        )
        self.apply(init_linear)

    def join_blocks(self, tokens: Float[Tensor, "b n d"], patches_per_block: int) -> Float[Tensor, "b k dm"]:
        """The normed tokens of a block as one vector, channel-major: for each channel its patches."""
        return rearrange(self.norm(tokens), "b (k m) d -> b k (d m)", m=patches_per_block)
