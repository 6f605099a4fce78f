"""How much arithmetic a training step needs, counted from the settings: matrix products only.

Counted is what the loss can see: all tokens but the last block's, in patch embedding, encoder, projection,
predictor and block MLP. A multiplication and its addition are two operations. Attention counts all pairs of
these tokens, also those that the mask forbids, as is the custom. Norms, activations and softmax count
nothing. The backward pass needs every product twice more, once for each factor's gradient; only the patch
embedding's is needed once, as images want no gradient.
"""

from __future__ import annotations

from nextblock.config import ModelConfig

__all__ = ["encode_flops", "forward_flops", "step_flops"]


def forward_flops(config: ModelConfig) -> dict[str, int]:
    """Floating-point operations of one image's forward pass, by part, where transformer layers predict."""
    assert config.predictor == "transformer", "the flops of other predictors are not counted"
    assert not config.prefix, "a prefix takes some predictions away"
    assert config.tokenizer is None, "a tokenizer's own work is not counted"
    steps = config.num_blocks - 1
    seen = steps * config.patches_per_block
    patch_values = config.in_chans * config.patch_size**2
    width = config.predictor_dim
    projection = _mlp(config.embed_dim, config.projection_dim, width)
    block_mlp = _mlp(width * config.patches_per_block, config.block_mlp_dim, config.block_values)
    return {
        "patch_embed": 2 * seen * patch_values * config.embed_dim,
        "encoder": config.depth * _layer(seen, config.embed_dim, config.mlp_ratio),
        "projection": 2 * seen * projection,
        "predictor": config.predictor_depth * _layer(seen, width, config.predictor_mlp_ratio),
        "block_mlp": sum(
            2 * (steps + 1 - distance) * block_mlp for distance in range(1, config.num_predicted_blocks + 1)
        ),
    }


def encode_flops(config: ModelConfig) -> int:
    """Floating-point operations of one image's way through the encoder alone, all of its patches."""
    patches = config.num_blocks * config.patches_per_block
    patch_values = config.in_chans * config.patch_size**2
    embed = 2 * patches * patch_values * config.embed_dim
    return embed + config.depth * _layer(patches, config.embed_dim, config.mlp_ratio)


def step_flops(config: ModelConfig) -> int:
    """Floating-point operations of one image's forward and backward pass."""
    forward = forward_flops(config)
    return 3 * sum(forward.values()) - forward["patch_embed"]


def _mlp(inputs: int, hidden: int | None, outputs: int) -> int:
    """Multiplications of an MLP on one input; without a hidden width, of one linear map."""
    return inputs * outputs if hidden is None else hidden * (inputs + outputs)


def _layer(tokens: int, width: int, mlp_ratio: float) -> int:
    """One transformer layer: qkv and output projections, scores and weighted sums, MLP."""
    linear = 4 * width * width + 2 * width * int(width * mlp_ratio)
    return 2 * tokens * linear + 4 * tokens * tokens * width
