"""Classification heads on an encoder: linear, attentive (XTRA's and AIM's probes), and an MLP.

All normalise their input per channel without learned scale or shift, so that one learning rate suits any
encoder. The attentive head lets learned queries pick the patches that tell; neither they nor what they pick
are projected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from nextblock.config import Attention
from nextblock.models.features import FeatureConfig, Tokens

__all__ = [
    "AttentiveHead",
    "Head",
    "HeadConfig",
    "LinearHead",
    "MlpHead",
    "check_attention_heads",
    "create_head",
    "fitting_heads",
]

BATCH_NORM_EPS = 1e-6
QUERY_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What a head sees of the encoder, and what it is made of."""

    kind: Literal["linear", "attentive", "mlp"] = "attentive"
    """A linear layer on the mean patch, one on patches pooled by learned queries, or an MLP on the mean."""
    num_classes: int
    """Classes to tell apart."""
    layers: tuple[int, ...]
    """Encoder layers whose outputs are used, counted from 0."""
    layer_pool: Literal["mean", "concat"] = "mean"
    """Several layers are averaged, or joined channel by channel."""
    norm_layers: bool = False
    """Apply the encoder's final norm to each layer's output first; officially not."""
    num_heads: int = 16
    """Attentive head: attention heads."""
    num_queries: int = 1
    """Attentive head: learned queries, averaged."""
    batch_norm: bool = True
    """Normalise the features per channel (batch norm without affine) first."""
    bias: bool = True
    """Give the linear layer a bias; AIM's heads have none."""
    attention: Attention = "native"
    """Attention at encoding: what the checkpoint records for its features, the pre-training mask, or none."""
    tokens: Tokens = "patches"
    """Of encoders with a class token: patches alone, class token, class token and mean patch joined, all."""
    hidden_dim: int = 2048
    """MLP head: its hidden layer."""

    def __post_init__(self) -> None:
        for name in ("num_classes", "num_heads", "num_queries", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use at least 1")
        _ = self.features  # refuses layers and tokens that cannot be

    @property
    def features(self) -> FeatureConfig:
        """What the head sees: every token if attentive, else one vector an image."""
        return FeatureConfig(
            layers=self.layers,
            layer_pool=self.layer_pool,
            norm_layers=self.norm_layers,
            tokens=self.tokens,
            pooled=self.kind != "attentive",
            attention=self.attention,
        )


class LinearHead(nn.Module):
    """Batch norm without affine, then one linear layer."""

    def __init__(self, dim: int, num_classes: int, *, batch_norm: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.norm = _batch_norm(dim) if batch_norm else nn.Identity()
        self.linear = nn.Linear(dim, num_classes, bias=bias)

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b classes"]:
        """Logits of the classes."""
        return self.linear(self.norm(features))


class AttentiveHead(nn.Module):
    """Learned queries that attend to all patches, averaged, then one linear layer (AIM, equation 4).

    The queries are the same for every image, so keys and values of single patches are never formed: the key
    matrix is folded into the queries, and the value matrix applied to each head's weighted mean of patches.
    The function is the same; the work per patch falls from 2·d² to 2·d·heads·queries multiplications.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        num_heads: int = 16,
        num_queries: int = 1,
        batch_norm: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_attention_heads(dim, num_heads)
        self.num_heads = num_heads
        self.norm = _batch_norm(dim) if batch_norm else nn.Identity()
        self.query = nn.Parameter(torch.empty(1, num_queries, dim))
        nn.init.normal_(self.query, std=QUERY_STD)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.linear = nn.Linear(dim, num_classes, bias=bias)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b classes"]:
        """Logits of the classes."""
        normed = rearrange(
            self.norm(rearrange(tokens, "b n d -> (b n) d")), "(b n) d -> b n d", n=tokens.shape[1]
        )
        query = rearrange(self.query, "1 q (h e) -> q h e", h=self.num_heads)
        key = rearrange(self.key.weight, "(h e) d -> h e d", h=self.num_heads)
        value = rearrange(self.value.weight, "(h e) d -> h e d", h=self.num_heads)

        patch_query = einsum(query, key, "q h e, h e d -> q h d") * key.shape[1] ** -0.5
        scores = einsum(normed, patch_query, "b n d, q h d -> b q h n")
        patch_mean = einsum(scores.softmax(dim=-1), normed, "b q h n, b n d -> b q h d")
        pooled = einsum(reduce(patch_mean, "b q h d -> b h d", "mean"), value, "b h d, h e d -> b h e")
        return self.linear(rearrange(pooled, "b h e -> b (h e)"))


class MlpHead(nn.Module):
    """Batch norm without affine, a hidden layer with GELU, then one linear layer."""

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        hidden_dim: int = 2048,
        batch_norm: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.norm = _batch_norm(dim) if batch_norm else nn.Identity()
        self.hidden = nn.Linear(dim, hidden_dim)
        self.linear = nn.Linear(hidden_dim, num_classes, bias=bias)

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b classes"]:
        """Logits of the classes."""
        return self.linear(F.gelu(self.hidden(self.norm(features))))


Head = LinearHead | AttentiveHead | MlpHead


def fitting_heads(dim: int, most: int) -> int:
    """The largest number of attention heads, up to `most`, that `dim` channels can be divided among."""
    return max(count for count in range(1, most + 1) if dim % count == 0)


def check_attention_heads(dim: int, num_heads: int) -> None:
    """Raise `ValueError` where an attentive head of this width cannot have so many attention heads."""
    if dim % num_heads:
        raise ValueError(
            f"an attentive head {dim} channels wide cannot have {num_heads} attention heads; set "
            f"attentive_heads (--attentive_heads) to a divisor, such as {fitting_heads(dim, num_heads)}"
        )


def create_head(config: HeadConfig, embed_dim: int) -> Head:
    """Make a config's head for an encoder `embed_dim` wide, its weights from torch's global generator."""
    width = config.features.width(embed_dim)
    if config.kind == "mlp":
        return MlpHead(
            width,
            config.num_classes,
            hidden_dim=config.hidden_dim,
            batch_norm=config.batch_norm,
            bias=config.bias,
        )
    if config.kind == "linear":
        return LinearHead(width, config.num_classes, batch_norm=config.batch_norm, bias=config.bias)
    return AttentiveHead(
        width,
        config.num_classes,
        num_heads=config.num_heads,
        num_queries=config.num_queries,
        batch_norm=config.batch_norm,
        bias=config.bias,
    )


def _batch_norm(dim: int) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(dim, affine=False, eps=BATCH_NORM_EPS)
