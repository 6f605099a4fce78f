"""How much arithmetic a training step needs, counted from the settings as `nextblock plan` does.

But only what the loss can see is counted: all tokens except the last block's, in the patch embedding too,
where the model computes them before it leaves them out.
"""

from __future__ import annotations

from nextblock import plan
from nextblock.config import ModelConfig

__all__ = ["encode_flops", "forward_flops", "step_flops"]


def forward_flops(config: ModelConfig) -> dict[str, float]:
    """Floating-point operations of one image's forward pass, by part, where transformer layers predict."""
    assert config.predictor == "transformer", "the flops of other predictors are not counted"
    assert not config.prefix, "a prefix takes some predictions away"
    assert config.tokenizer is None, "a tokenizer's own work is not counted"
    parts = plan.forward_flops(config)
    del parts["tokenizer"]
    k = config.num_blocks
    return parts | {"patch_embed": parts["patch_embed"] * (k - 1) // k}


def encode_flops(config: ModelConfig) -> float:
    """Floating-point operations of one image's way through the encoder alone, all of its patches."""
    n, width, hidden = config.num_patches, config.embed_dim, int(config.embed_dim * config.mlp_ratio)
    embed = 2 * n * config.in_chans * config.patch_size**2 * width
    layers = plan.Stack(config.depth, n, width, hidden, config.num_heads, 2)
    return embed + layers.depth * layers.flops


def step_flops(config: ModelConfig) -> float:
    """Floating-point operations of one image's forward and backward pass."""
    forward = forward_flops(config)
    return 3 * sum(forward.values()) - forward["patch_embed"]
