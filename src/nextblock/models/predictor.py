"""What predicts the next block from the encoder's tokens.

All kinds are made of the same parts: an entry (projection and positions), layers, and for each predicted
distance one output map of a block's joined tokens.

    transformer   layers under the encoder's mask: a patch's output knows the patches before it (XTRA)
    mlp           residual MLPs, each patch alone (AIM)
    linear        neither entry nor layers: the output map on the encoder's tokens
"""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from nextblock.config import ModelConfig
from nextblock.models.encoder import fresh_positions, init_linear, layer_norm

__all__ = ["Predictor", "ResidualMlp"]


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
        """Every token for itself."""
        if self.norm1 is not None:
            tokens = tokens + self.norm1(tokens)
        return tokens + self.mlp(self.norm2(tokens))


class Predictor(nn.Module):
    """From the encoder's tokens to the next block; the model runs its layers.

    There is no query for the place that is predicted: what the tokens of block i become *is* the prediction
    of the block after it. One output map ("block MLP") a predicted distance.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mixes_tokens = config.predictor == "transformer"
        """Whether layers let tokens attend to each other; else each token can be computed alone."""
        self.projection = nn.Identity()
        self.register_parameter("pos_embed", None)
        self.blocks = nn.Sequential()
        self.norm = nn.Identity()
        width = config.embed_dim
        if config.predictor != "linear":
            width = config.predictor_dim
            self.projection = _projection(config)
            self.pos_embed = fresh_positions(config, width)
            layer = _transformer_layer if self.mixes_tokens else ResidualMlp
            self.blocks = nn.Sequential(*[layer(config) for _ in range(config.predictor_depth)])
            self.norm = layer_norm(config)(width)
        self.block_mlps = nn.ModuleList(
            _block_mlp(width * config.patches_per_block, config) for _ in range(config.num_predicted_blocks)
        )
        init_linear(self, config)

    def join_blocks(self, tokens: Float[Tensor, "*rows m d"]) -> Float[Tensor, "*rows dm"]:
        """The normed tokens of a block as one vector, channel-major: for each channel its patches."""
        return rearrange(self.norm(tokens), "... m d -> ... (d m)")


def _projection(config: ModelConfig) -> nn.Module:
    if config.projection_dim is None:
        return nn.Linear(config.embed_dim, config.predictor_dim)
    return nn.Sequential(
        nn.Linear(config.embed_dim, config.projection_dim),
        nn.GELU(),
        nn.Linear(config.projection_dim, config.predictor_dim, bias=False),
    )


def _transformer_layer(config: ModelConfig) -> Block:
    return Block(
        config.predictor_dim,
        config.predictor_heads,
        mlp_ratio=config.predictor_mlp_ratio,
        qkv_bias=config.bias,
        proj_bias=config.bias,
        norm_layer=layer_norm(config),
    )


def _block_mlp(joined_dim: int, config: ModelConfig) -> nn.Module:
    if config.block_mlp_dim is None:
        return nn.Linear(joined_dim, config.outputs_per_block)
    return nn.Sequential(
        nn.Linear(joined_dim, config.block_mlp_dim),
        nn.GELU(),
        nn.Linear(config.block_mlp_dim, config.outputs_per_block),
    )
