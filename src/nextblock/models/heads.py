"""From an encoding to classes: which outputs are features, the heads on them, and the classifier of both.

All heads normalise their input per channel without learned scale or shift, so that one learning rate suits
any encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from nextblock.config import Attention
from nextblock.errors import UsageError
from nextblock.models.next_block import NextBlockModel
from nextblock.models.timm_encoder import TimmEncoder
from nextblock.models.vit import Encoded

EncoderModel = NextBlockModel | TimmEncoder
"""What can be evaluated: it has `encode`, `final_norm`, and its sizes in `config`."""

BATCH_NORM_EPS = 1e-6
QUERY_STD = 0.02

HeadName = Literal["attentive", "linear", "ep"]
Tokens = Literal["patches", "class", "joined", "all"]
"""Patches alone; the class token; class token and mean patch, joined channel by channel; all tokens."""

# ----------------------------------------------------------------------------------------------- features


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Which of an encoder's outputs are used, and how they are pooled."""

    layers: tuple[int, ...]
    """Layers whose outputs are used, counted from 0."""
    layer_pool: Literal["mean", "concat"] = "mean"
    """Several layers are averaged, or joined channel by channel."""
    norm_layers: bool = False
    """Apply the encoder's final norm to each layer's output first; officially not."""
    tokens: Tokens = "patches"
    """Of encoders with a class token: patches alone, class token, class token and mean patch joined, all."""
    pooled: bool = True
    """The mean over the tokens, one vector an image; else every token."""
    attention: Attention = "native"
    """Attention mask used for features: `native` (as trained for), `causal`, or `full`."""

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 0:
            raise UsageError(
                f"layers are {list(self.layers)}; name at least one encoder layer, counted from 0"
            )
        if self.tokens in ("class", "joined") and not self.pooled:
            raise UsageError(f"tokens {self.tokens} is one vector an image; use patches or all for several")

    def width(self, embed_dim: int) -> int:
        """Channels of these features, of an encoder `embed_dim` wide."""
        # Averaged layers keep their width; joined ones, and a class token with the mean patch, add theirs.
        layers = len(self.layers) if self.layer_pool == "concat" else 1
        return embed_dim * layers * (2 if self.tokens == "joined" else 1)

    def check_encoder(self, depth: int, *, has_class_token: bool) -> None:
        """Raise `ValueError` if an encoder has no such layers or tokens."""
        if max(self.layers) >= depth:
            raise UsageError(
                f"layers {list(self.layers)} of an encoder with {depth}; choose among 0 to {depth - 1}"
            )
        if self.tokens in ("class", "joined") and not has_class_token:
            raise UsageError(f"tokens {self.tokens}: this encoder has no class token; use patches")


def layer_words(layers: Sequence[int]) -> str:
    """Layers in few characters: 6-11 if they follow each other, else 3, 7."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))


def last_layers(count: int, depth: int) -> tuple[int, ...]:
    """Name the last `count` of `depth` layers, counted from 0."""
    if not 1 <= count <= depth:
        raise UsageError(f"the last {count} layers of an encoder with {depth}: use 1 to {depth}")
    return tuple(range(depth - count, depth))


def pool_features(
    encoded: Encoded, config: FeatureConfig, norm: Callable[[Tensor], Tensor]
) -> Float[Tensor, "b *tokens f"]:
    """The features of an encoding: (b f) if pooled, else (b tokens f).

    `norm` is the encoder's final norm, used if the config asks for it.
    """
    config.check_encoder(len(encoded.layers), has_class_token=encoded.has_class_token)

    # The same for patches and prefix tokens, so that both can be joined channel by channel afterwards.
    def pool(outputs: Sequence[Tensor]) -> Tensor:
        chosen = [outputs[layer] for layer in config.layers]
        # Each layer is normed by itself, before the mean: layers differ in scale, and the last would win.
        chosen = [norm(output) for output in chosen] if config.norm_layers else chosen
        # Layers are averaged token by token; joined, a token has the channels of all of them.
        return torch.stack(chosen).mean(dim=0) if config.layer_pool == "mean" else torch.cat(chosen, dim=-1)

    if config.tokens in ("class", "joined"):
        # The class token is the first of the prefix; registers follow it and are never used alone.
        class_token = pool(encoded.prefix)[:, 0]
        if config.tokens == "class":
            return class_token
        return torch.cat([class_token, reduce(pool(encoded.layers), "b n f -> b f", "mean")], dim=-1)
    tokens = pool(encoded.layers)
    if config.tokens == "all" and encoded.prefix:
        tokens = torch.cat([pool(encoded.prefix), tokens], dim=1)
    return reduce(tokens, "b n f -> b f", "mean") if config.pooled else tokens


# -------------------------------------------------------------------------------------------------- heads


@dataclass(frozen=True, kw_only=True)
class HeadConfig(FeatureConfig):
    """A head and the features it sees; `pooled` follows from the kind."""

    kind: HeadName = "attentive"
    """A linear layer on the mean patch, or one on patches pooled by learned queries: attentive, ep."""
    num_classes: int
    """Number of classes."""
    num_heads: int = 16
    """Attentive head: attention heads."""
    num_queries: int = 1
    """Attentive head: learned queries, averaged; ep: learned queries, joined."""
    batch_norm: bool = True
    """Normalise the features per channel (batch norm without affine) first."""
    bias: bool = True
    """Give the linear layer a bias; AIM's heads have none."""
    pooled_norm: float | None = None
    """Linear head: epsilon of a LayerNorm of the pooled features, in place of batch norm (NEPA); none: no
    LayerNorm."""

    def __post_init__(self) -> None:
        for name in ("num_classes", "num_heads", "num_queries"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; use at least 1")
        # Frozen, so set past the guard: only a linear head cannot pool by itself.
        object.__setattr__(self, "pooled", self.kind == "linear")
        super().__post_init__()

    @property
    def features(self) -> FeatureConfig:
        """The features alone, equal for all heads that share them."""
        return FeatureConfig(**{field.name: getattr(self, field.name) for field in fields(FeatureConfig)})


class LinearHead(nn.Module):
    """Batch norm without affine, or LayerNorm of epsilon `pooled_norm`; then one linear layer."""

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        batch_norm: bool = True,
        bias: bool = True,
        pooled_norm: float | None = None,
    ) -> None:
        super().__init__()
        self.norm = _batch_norm(dim) if batch_norm else nn.Identity()
        if pooled_norm is not None:
            self.norm = nn.LayerNorm(dim, eps=pooled_norm)
        self.linear = nn.Linear(dim, num_classes, bias=bias)

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b classes"]:
        """Logits of the classes."""
        return self.linear(self.norm(features))


class AttentiveHead(nn.Module):
    """Learned queries that attend to all patches, averaged, then one linear layer (AIM, equation 4)."""

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

    def attention(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b qh n"]:
        """How each head of each query weighs the tokens of each image, query by query; a row sums to 1."""
        return rearrange(self._weights(normalized(tokens, self.norm)), "b q h n -> b (q h) n")

    def _weights(self, normed: Float[Tensor, "b n d"]) -> Float[Tensor, "b q h n"]:
        query = rearrange(self.query, "1 q (h e) -> q h e", h=self.num_heads)
        key = rearrange(self.key.weight, "(h e) d -> h e d", h=self.num_heads)
        # The queries are the same for every image, so keys of single patches are never formed:
        # q·(K x) = (Kᵀq)·x folds the key matrix into the queries. Per patch that costs d·heads·queries
        # products instead of d².
        patch_query = einsum(query, key, "q h e, h e d -> q h d") * key.shape[1] ** -0.5
        return einsum(normed, patch_query, "b n d, q h d -> b q h n").softmax(dim=-1)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b classes"]:
        """Logits of the classes."""
        normed = normalized(tokens, self.norm)
        value = rearrange(self.value.weight, "(h e) d -> h e d", h=self.num_heads)
        # Nor are values of single patches formed: the mean of V x over patches is V applied to the mean of x.
        # Each head of each query has its own patch mean; queries are averaged before the value map, which is
        # linear, so it is applied once.
        patch_mean = einsum(self._weights(normed), normed, "b q h n, b n d -> b q h d")
        pooled = einsum(reduce(patch_mean, "b q h d -> b h d", "mean"), value, "b h d, h e d -> b h e")
        return self.linear(rearrange(pooled, "b h e -> b (h e)"))


class EfficientHead(nn.Module):
    """Learned queries that attend to all patches, each giving a part of the channels (ICLR 2026, "EP").

    Efficient Probing: no map for keys, one attention over the whole width, and a value map whose rows are
    divided among the queries (billpsomas/efficient-probing, poolings/ep.py). Unlike there, tokens are
    normalised first, as in all heads here.
    """

    def __init__(
        self, dim: int, num_classes: int, *, num_queries: int = 32, batch_norm: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        if dim % num_queries:
            raise UsageError(
                f"an ep head {dim} channels wide cannot have {num_queries} queries; use a divisor, such as "
                f"{fitting_heads(dim, num_queries)}"
            )
        self.norm = _batch_norm(dim) if batch_norm else nn.Identity()
        self.query = nn.Parameter(torch.empty(num_queries, dim))
        nn.init.normal_(self.query, std=QUERY_STD)
        self.value = nn.Linear(dim, dim, bias=False)
        self.linear = nn.Linear(dim, num_classes, bias=bias)

    def attention(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b q n"]:
        """How each query weighs the tokens of each image; a row sums to 1."""
        return self._weights(normalized(tokens, self.norm))

    def _weights(self, normed: Float[Tensor, "b n d"]) -> Float[Tensor, "b q n"]:
        scores = einsum(normed, self.query, "b n d, q d -> b q n")
        return (scores * normed.shape[-1] ** -0.5).softmax(dim=-1)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b classes"]:
        """Logits of the classes."""
        normed = normalized(tokens, self.norm)
        # The mean of V x is V applied to the mean of x: values of single patches are never formed.
        patch_mean = einsum(self._weights(normed), normed, "b q n, b n d -> b q d")
        value = rearrange(self.value.weight, "(q e) d -> q e d", q=len(self.query))
        pooled = einsum(patch_mean, value, "b q d, q e d -> b q e")
        return self.linear(rearrange(pooled, "b q e -> b (q e)"))


Head = LinearHead | AttentiveHead | EfficientHead


def normalized(features: Float[Tensor, "b *n d"], norm: nn.Module) -> Float[Tensor, "b *n d"]:
    """Features after a batch norm, whose statistics are over all tokens of all images, as officially."""
    if features.ndim == 2:
        return norm(features)
    # By the number of tokens, as an exported graph is to take any number of images.
    n = features.shape[1]
    return rearrange(norm(rearrange(features, "b n d -> (b n) d")), "(b n) d -> b n d", n=n)


def fitting_heads(dim: int, most: int) -> int:
    """The largest number of attention heads, up to `most`, that `dim` channels can be divided among."""
    return max(count for count in range(1, most + 1) if dim % count == 0)


def check_attention_heads(dim: int, num_heads: int) -> None:
    """Raise `ValueError` if an attentive head of this width cannot have so many attention heads."""
    if dim % num_heads:
        raise UsageError(
            f"an attentive head {dim} channels wide cannot have {num_heads} attention heads; set "
            f"attentive_heads (--attentive_heads) to a divisor, such as {fitting_heads(dim, num_heads)}"
        )


def create_head(config: HeadConfig, embed_dim: int) -> Head:
    """Make a config's head for an encoder `embed_dim` wide, its weights from torch's global generator."""
    width = config.width(embed_dim)
    common = {"batch_norm": config.batch_norm, "bias": config.bias}
    if config.kind == "attentive":
        attention = {"num_heads": config.num_heads, "num_queries": config.num_queries}
        return AttentiveHead(width, config.num_classes, **attention, **common)
    if config.kind == "ep":
        return EfficientHead(width, config.num_classes, num_queries=config.num_queries, **common)
    return LinearHead(width, config.num_classes, pooled_norm=config.pooled_norm, **common)


def _batch_norm(dim: int) -> nn.BatchNorm1d:
    # Without scale and shift: the linear layer behind it has both already.
    return nn.BatchNorm1d(dim, affine=False, eps=BATCH_NORM_EPS)


# --------------------------------------------------------------------------------------------- classifier


class ImageClassifier(nn.Module):
    """An encoder and a head on it: what probes and fine-tuning make, and official classifier files load as.

    `class_names`, if known, are in the order of the logits. The head's weights come from torch's global
    generator.
    """

    def __init__(
        self, encoder_model: EncoderModel, head_config: HeadConfig, class_names: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        config, num_classes = encoder_model.config, head_config.num_classes
        # Known before a head is built, so a wrong layer is not found only with the first image.
        head_config.check_encoder(config.depth, has_class_token=config.has_class_token)
        if class_names is not None and len(class_names) != num_classes:
            raise UsageError(
                f"{len(class_names)} class names for a head of {num_classes} classes; give one for each"
            )
        self.encoder_model = encoder_model
        self.head_config = head_config
        self.class_names = None if class_names is None else tuple(class_names)
        self.head = create_head(head_config, config.embed_dim)

    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b *patches f"]:
        """Compute what the head sees before its batch norm: (b n f) if attentive, else (b f)."""
        # Under the mask that the head was trained on, which need not be the encoder's own.
        encoded = self.encoder_model.encode(images, attention=self.head_config.attention)
        return pool_features(encoded, self.head_config, self.encoder_model.final_norm)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Logits of the classes, from normalised images."""
        return self.head(self.features(images))
