"""Which of an encoder's outputs are features: layers, tokens, and how they are pooled. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from nextblock.config import Attention

__all__ = ["Encoded", "FeatureConfig", "Tokens", "last_layers", "pool_features", "pool_layers"]

Tokens = Literal["patches", "class", "joined", "all"]
"""Patches alone; the class token; class token and mean patch, joined channel by channel; all tokens."""


class Encoded(NamedTuple):
    """What `encode` returns, in raster order."""

    tokens: Float[Tensor, "b n d"]
    """After the final norm."""
    layers: tuple[Float[Tensor, "b n d"], ...]
    """What each layer returns, before the final norm."""
    prefix: tuple[Float[Tensor, "b q d"], ...] = ()
    """Class token (first) and register tokens of each layer; empty where an encoder has patches only."""
    has_class_token: bool = False
    """Whether the first token of the prefix is one; some encoders have registers alone."""


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """What is taken of an encoder: of which layers, which tokens, pooled or not."""

    layers: tuple[int, ...]
    """Layers whose outputs are used, counted from 0."""
    layer_pool: Literal["mean", "concat"] = "mean"
    """Several layers are averaged, or joined channel by channel."""
    norm_layers: bool = False
    """Apply the encoder's final norm to each layer's output first."""
    tokens: Tokens = "patches"
    pooled: bool = True
    """The mean over the tokens, one vector an image; else every token."""
    attention: Attention = "native"

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 0:
            raise ValueError(
                f"layers are {list(self.layers)}; name at least one encoder layer, counted from 0"
            )
        if self.tokens in ("class", "joined") and not self.pooled:
            raise ValueError(f"tokens {self.tokens} is one vector an image; use patches or all for several")

    def width(self, embed_dim: int) -> int:
        """Channels of these features, of an encoder `embed_dim` wide."""
        layers = len(self.layers) if self.layer_pool == "concat" else 1
        return embed_dim * layers * (2 if self.tokens == "joined" else 1)


def last_layers(count: int, depth: int) -> tuple[int, ...]:
    """Name the last `count` of `depth` layers, counted from 0."""
    if not 1 <= count <= depth:
        raise ValueError(f"the last {count} layers of an encoder with {depth}: use 1 to {depth}")
    return tuple(range(depth - count, depth))


def pool_layers(
    outputs: Sequence[Float[Tensor, "b n d"]],
    layers: Sequence[int],
    layer_pool: Literal["mean", "concat"],
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "b n f"]:
    """Average the chosen layers' outputs (counted from 0), or join them channel by channel.

    `outputs` are an encoding's `layers`; `norm`, if given, is applied to each chosen one first.
    """
    chosen = [outputs[layer] if norm is None else norm(outputs[layer]) for layer in layers]
    return torch.stack(chosen).mean(dim=0) if layer_pool == "mean" else torch.cat(chosen, dim=-1)


def pool_features(
    encoded: Encoded, config: FeatureConfig, norm: Callable[[Tensor], Tensor]
) -> Float[Tensor, "b *tokens f"]:
    """Take of an encoding what `config` asks for: (b f) if pooled, else (b tokens f).

    `norm` is the encoder's final norm, used only where the config asks for it. Raises `ValueError` where
    there is no class token, or a layer is asked for that is not there.
    """
    if max(config.layers) >= len(encoded.layers):
        raise ValueError(
            f"layers {list(config.layers)} of an encoder with {len(encoded.layers)}; choose among 0 to "
            f"{len(encoded.layers) - 1}"
        )
    use_norm = norm if config.norm_layers else None

    def pool(outputs: Sequence[Tensor]) -> Tensor:
        return pool_layers(outputs, config.layers, config.layer_pool, use_norm)

    if config.tokens in ("class", "joined"):
        if not encoded.has_class_token:
            raise ValueError(f"tokens {config.tokens}: this encoder has no class token; use patches")
        class_token = pool(encoded.prefix)[:, 0]
        if config.tokens == "class":
            return class_token
        return torch.cat([class_token, reduce(pool(encoded.layers), "b n f -> b f", "mean")], dim=-1)
    tokens = pool(encoded.layers)
    if config.tokens == "all" and encoded.prefix:
        tokens = torch.cat([pool(encoded.prefix), tokens], dim=1)
    return reduce(tokens, "b n f -> b f", "mean") if config.pooled else tokens
