"""XTRA as one would write it from the paper, in one file of plain torch: what step.py compares with.

Parameter names are those of `NextBlockModel`, so its `state_dict` loads as it is and both give the same loss.
All blocks go through encoder and predictor, in raster order, under a dense block-causal mask; the last
block's prediction is dropped at the end. Settings that XTRA does not need are not implemented, so they give
another loss.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from nextblock.config import ModelConfig, pair


class Attention(nn.Module):
    """Self-attention under a mask."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "n n"]) -> Float[Tensor, "b n d"]:
        """Let every token gather from those it may attend to."""
        q, k, v = rearrange(self.qkv(x), "b n (t h e) -> t b h n e", t=3, h=self.num_heads)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(rearrange(out, "b h n e -> b n (h e)"))


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, eps: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        layers = {"fc1": nn.Linear(dim, hidden), "act": nn.GELU(), "fc2": nn.Linear(hidden, dim)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "n n"]) -> Float[Tensor, "b n d"]:
        """Attend, then transform."""
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """A vision transformer without a class token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, size, eps = config.embed_dim, config.patch_size, config.norm_eps
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(config.in_chans, dim, size, stride=size)})
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_patches, dim))
        self.blocks = nn.ModuleList(
            Layer(dim, config.num_heads, config.mlp_ratio, eps) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "n n"]) -> Float[Tensor, "b n d"]:
        """Encode images."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed
        for layer in self.blocks:
            x = layer(x, mask)
        return self.norm(x)


class Predictor(nn.Module):
    """Projection, block-causal decoder, and the MLP from a block's tokens to the next block's pixels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.projection_dim and config.block_mlp_dim, "the plain model has MLPs there"
        dim, eps = config.predictor_dim, config.norm_eps
        self.block_grid, self.block = config.block_grid, pair(config.block_size)
        self.projection = nn.Sequential(
            nn.Linear(config.embed_dim, config.projection_dim),
            nn.GELU(),
            nn.Linear(config.projection_dim, dim, bias=False),
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_patches, dim))
        self.blocks = nn.ModuleList(
            Layer(dim, config.predictor_heads, config.predictor_mlp_ratio, eps)
            for _ in range(config.predictor_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=eps)
        block_mlp = nn.Sequential(
            nn.Linear(dim * config.patches_per_block, config.block_mlp_dim),
            nn.GELU(),
            nn.Linear(config.block_mlp_dim, config.block_values),
        )
        self.block_mlps = nn.ModuleList([block_mlp])

    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "n n"]) -> Float[Tensor, "b k p"]:
        """Predict, from every block, the pixels of the one after it."""
        x = self.projection(x) + self.pos_embed
        for layer in self.blocks:
            x = layer(x, mask)
        (rows, _), (i, j) = self.block_grid, self.block
        joined = rearrange(self.norm(x), "b (r i q j) d -> b (r q) (d i j)", r=rows, i=i, j=j)
        return self.block_mlps[0](joined)


class PlainModel(nn.Module):
    """The whole; its forward pass returns the loss."""

    may_attend: Bool[Tensor, "n n"]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.block_px = config.block_px
        self.encoder = Encoder(config)
        self.predictor = Predictor(config)
        # The block of every patch in raster order; a patch may attend to its own block and those before it.
        height, width = pair(config.block_size)
        rows, columns = torch.arange(config.grid[0]) // height, torch.arange(config.grid[1]) // width
        blocks = (rows[:, None] * config.block_grid[1] + columns).flatten()
        self.register_buffer("may_attend", blocks[:, None] >= blocks, persistent=False)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
        """Mean squared error of every block but the first, predicted from those before it."""
        predictions = self.predictor(self.encoder(images, self.may_attend), self.may_attend)
        # A block's pixels, normalised by their own mean and deviation.
        height, width = self.block_px
        pixels = rearrange(images, "b c (r h) (q w) -> b (r q) (c h w)", h=height, w=width)
        mean, variance = pixels.mean(-1, keepdim=True), pixels.var(-1, keepdim=True)
        targets = (pixels - mean) / (variance + 1e-6).sqrt()
        return F.mse_loss(predictions[:, :-1].float(), targets[:, 1:])


def plain_optimizer(
    model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float], eps: float, *, fused: bool
) -> torch.optim.AdamW:
    """AdamW that does not decay biases and norms; unless `fused`, in torch's default implementation."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused or None)
