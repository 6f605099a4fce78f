"""From an encoding to classes: the choice of features, probe heads, and the classifier that combines them.

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
"""Any model that can be evaluated: it has `encode`, `final_norm`, and sizes in `config`."""

BATCH_NORM_EPS = 1e-6
QUERY_STD = 0.02

HeadName = Literal["attentive", "linear", "ep"]
Tokens = Literal["patches", "class", "joined", "all"]
"""Patches only; the class token; class token and mean patch, concatenated; all tokens."""

# ----------------------------------------------------------------------------------------------- features


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Which outputs of an encoder are used, and how they are pooled."""

    layers: tuple[int, ...]
    """Layers whose outputs are used, counted from 0."""
    layer_pool: Literal["mean", "concat"] = "mean"
    """Average several layers, or concatenate their channels."""
    norm_layers: bool = False
    """Apply the encoder's final norm to each layer's output first; official code does not."""
    tokens: Tokens = "patches"
    """`patches`, or with a class token `class`, `joined` (class token and mean patch) or `all`."""
    pooled: bool = True
    """Average the tokens to one vector per image; else keep every token."""
    attention: Attention = "native"
    """Attention mask used for features: `native` (as trained for), `causal`, or `full`."""

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 0:
            raise UsageError(
                f"layers are {list(self.layers)}; name at least one encoder layer, counted from 0"
            )
        if self.tokens in ("class", "joined") and not self.pooled:
            raise UsageError(f"tokens {self.tokens} is one vector per image; use patches or all for several")

    def width(self, embed_dim: int) -> int:
        """Number of channels of these features from an encoder of width `embed_dim`."""
        # Averaging keeps the width; concatenation, also of class token and mean patch, adds widths.
        layers = len(self.layers) if self.layer_pool == "concat" else 1
        return embed_dim * layers * (2 if self.tokens == "joined" else 1)

    def check_encoder(self, depth: int, *, has_class_token: bool) -> None:
        """Raise `ValueError` if an encoder lacks these layers or tokens."""
        if max(self.layers) >= depth:
            raise UsageError(
                f"layers {list(self.layers)} of an encoder with {depth}; choose from 0 to {depth - 1}"
            )
        if self.tokens in ("class", "joined") and not has_class_token:
            raise UsageError(f"tokens {self.tokens}: this encoder has no class token; use patches")


def layer_words(layers: Sequence[int]) -> str:
    """Format layers briefly: "6-11" if they are consecutive, else "3, 7"."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))


def last_layers(count: int, depth: int) -> tuple[int, ...]:
    """Indices of the last `count` of `depth` layers."""
    if not 1 <= count <= depth:
        raise UsageError(f"the last {count} layers of an encoder with {depth}: use 1 to {depth}")
    return tuple(range(depth - count, depth))


def pool_features(
    encoded: Encoded, config: FeatureConfig, norm: Callable[[Tensor], Tensor]
) -> Float[Tensor, "b *tokens f"]:
    """Extract the features of an encoding: (b f) if pooled, else (b tokens f).

    `norm` is the encoder's final norm, used if `config.norm_layers` is set.
    """
    config.check_encoder(len(encoded.layers), has_class_token=encoded.has_class_token)

    def pool(outputs: Sequence[Tensor]) -> Tensor:
        chosen = [outputs[layer] for layer in config.layers]
        # Norm each layer before averaging: layers differ in scale, and the last would dominate the mean.
        chosen = [norm(output) for output in chosen] if config.norm_layers else chosen
        return torch.stack(chosen).mean(dim=0) if config.layer_pool == "mean" else torch.cat(chosen, dim=-1)

    if config.tokens in ("class", "joined"):
        # The class token is the first prefix token; registers follow it and are never used alone.
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
    """A head and its features; `pooled` follows from `kind`."""

    kind: HeadName = "attentive"
    """Linear layer on the mean patch (`linear`) or on learned queries' outputs (`attentive`, `ep`)."""
    num_classes: int
    """Number of classes."""
    num_heads: int = 16
    """Attentive head: number of attention heads."""
    num_queries: int = 1
    """Number of learned queries; their outputs are averaged (attentive) or concatenated (ep)."""
    batch_norm: bool = True
    """Normalise the features per channel first (batch norm without affine)."""
    bias: bool = True
    """Give the linear layer a bias; AIM's heads have none."""
    pooled_norm: float | None = None
    """Linear head: epsilon of a LayerNorm on the pooled features, in place of batch norm (NEPA)."""

    def __post_init__(self) -> None:
        for name in ("num_classes", "num_heads", "num_queries"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; use at least 1")
        # The dataclass is frozen. Only a linear head needs pooled features; the others pool themselves.
        object.__setattr__(self, "pooled", self.kind == "linear")
        super().__post_init__()

    @property
    def features(self) -> FeatureConfig:
        """The features without the head, equal for all heads that share them."""
        return FeatureConfig(**{field.name: getattr(self, field.name) for field in fields(FeatureConfig)})


class LinearHead(nn.Module):
    """A norm and one linear layer, on features of width `dim`."""

    def __init__(self, dim: int, config: HeadConfig) -> None:
        super().__init__()
        self.norm = _norm(dim, config)
        self.linear = nn.Linear(dim, config.num_classes, bias=config.bias)

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b classes"]:
        """Logits of the classes."""
        return self.linear(self.norm(features))


class AttentiveHead(nn.Module):
    """Learned queries that attend to all patches, averaged, then one linear layer (AIM, equation 4)."""

    def __init__(self, dim: int, config: HeadConfig) -> None:
        super().__init__()
        check_attention_heads(dim, config.num_heads)
        self.num_heads = config.num_heads
        self.norm = _norm(dim, config)
        self.query = nn.Parameter(torch.empty(1, config.num_queries, dim))
        nn.init.normal_(self.query, std=QUERY_STD)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.linear = nn.Linear(dim, config.num_classes, bias=config.bias)

    def attention(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b qh n"]:
        """Attention weights of each head of each query over the tokens, grouped by query; rows sum to 1."""
        return rearrange(self._weights(normalized(tokens, self.norm)), "b q h n -> b (q h) n")

    def _weights(self, normed: Float[Tensor, "b n d"]) -> Float[Tensor, "b q h n"]:
        query = rearrange(self.query, "1 q (h e) -> q h e", h=self.num_heads)
        key = rearrange(self.key.weight, "(h e) d -> h e d", h=self.num_heads)
        # All images share the queries, so keys are never computed: q·(K x) = (Kᵀq)·x folds the key matrix
        # into the queries. Per patch that costs d·heads·queries products instead of d².
        patch_query = einsum(query, key, "q h e, h e d -> q h d") * key.shape[1] ** -0.5
        return einsum(normed, patch_query, "b n d, q h d -> b q h n").softmax(dim=-1)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b classes"]:
        """Logits of the classes."""
        normed = normalized(tokens, self.norm)
        value = rearrange(self.value.weight, "(h e) d -> h e d", h=self.num_heads)
        # Nor are values computed per patch: the mean of V x over patches is V applied to the mean of x. Each
        # head of each query has its own mean. The value map is linear, so it is applied once, after
        # averaging the queries.
        patch_mean = einsum(self._weights(normed), normed, "b q h n, b n d -> b q h d")
        pooled = einsum(reduce(patch_mean, "b q h d -> b h d", "mean"), value, "b h d, h e d -> b h e")
        return self.linear(rearrange(pooled, "b h e -> b (h e)"))


class EfficientHead(nn.Module):
    """Efficient Probing: learned queries attend to all patches, and each pools its own channels (ICLR 2026).

    It has no key map, one attention over the whole width, and a value map whose rows are divided among the
    queries (billpsomas/efficient-probing, poolings/ep.py). Unlike the original, it normalises tokens first,
    as all heads here do.
    """

    def __init__(self, dim: int, config: HeadConfig) -> None:
        super().__init__()
        queries = config.num_queries
        if dim % queries:
            raise UsageError(
                f"an ep head of {dim} channels cannot have {queries} queries; use a divisor, such as "
                f"{fitting_heads(dim, queries)}"
            )
        self.norm = _norm(dim, config)
        self.query = nn.Parameter(torch.empty(queries, dim))
        nn.init.normal_(self.query, std=QUERY_STD)
        self.value = nn.Linear(dim, dim, bias=False)
        self.linear = nn.Linear(dim, config.num_classes, bias=config.bias)

    def attention(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b q n"]:
        """Attention weights of each query over the tokens; rows sum to 1."""
        return self._weights(normalized(tokens, self.norm))

    def _weights(self, normed: Float[Tensor, "b n d"]) -> Float[Tensor, "b q n"]:
        scores = einsum(normed, self.query, "b n d, q d -> b q n")
        return (scores * normed.shape[-1] ** -0.5).softmax(dim=-1)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b classes"]:
        """Logits of the classes."""
        normed = normalized(tokens, self.norm)
        # The mean of V x is V applied to the mean of x, so values are never computed per patch.
        patch_mean = einsum(self._weights(normed), normed, "b q n, b n d -> b q d")
        value = rearrange(self.value.weight, "(q e) d -> q e d", q=len(self.query))
        pooled = einsum(patch_mean, value, "b q d, q e d -> b q e")
        return self.linear(rearrange(pooled, "b q e -> b (q e)"))


Head = LinearHead | AttentiveHead | EfficientHead


def normalized(features: Float[Tensor, "b *n d"], norm: nn.Module) -> Float[Tensor, "b *n d"]:
    """Apply a batch norm with statistics over all tokens of all images, as in the official code."""
    if features.ndim == 2:
        return norm(features)
    # Split by the fixed number of tokens, so that an exported graph accepts any batch size.
    n = features.shape[1]
    return rearrange(norm(rearrange(features, "b n d -> (b n) d")), "(b n) d -> b n d", n=n)


def fitting_heads(dim: int, most: int) -> int:
    """Largest divisor of `dim` up to `most`: a valid number of attention heads."""
    return max(count for count in range(1, most + 1) if dim % count == 0)


def check_attention_heads(dim: int, num_heads: int) -> None:
    """Raise `ValueError` if `num_heads` does not divide the width of an attentive head."""
    if dim % num_heads:
        raise UsageError(
            f"an attentive head of {dim} channels cannot have {num_heads} attention heads; set "
            f"attentive_heads (--attentive_heads) to a divisor, such as {fitting_heads(dim, num_heads)}"
        )


def create_head(config: HeadConfig, embed_dim: int) -> Head:
    """Build a head for an encoder of width `embed_dim`; its weights come from torch's global generator."""
    kinds = {"linear": LinearHead, "attentive": AttentiveHead, "ep": EfficientHead}
    return kinds[config.kind](config.width(embed_dim), config)


def _norm(dim: int, config: HeadConfig) -> nn.Module:
    if config.pooled_norm is not None:
        return nn.LayerNorm(dim, eps=config.pooled_norm)
    # Without scale and shift, as the linear layer after it has both.
    return nn.BatchNorm1d(dim, affine=False, eps=BATCH_NORM_EPS) if config.batch_norm else nn.Identity()


# --------------------------------------------------------------------------------------------- classifier


class ImageClassifier(nn.Module):
    """An encoder with a head: the result of probes and fine-tuning, and of loading official classifier files.

    `class_names`, if known, follow the order of the logits. Without `head`, a new one is made; its weights
    come from torch's global generator.
    """

    def __init__(
        self,
        encoder_model: EncoderModel,
        head_config: HeadConfig,
        class_names: Sequence[str] | None = None,
        *,
        head: Head | None = None,
    ) -> None:
        super().__init__()
        config, num_classes = encoder_model.config, head_config.num_classes
        # Checked here, so that a wrong layer fails now and not on the first image.
        head_config.check_encoder(config.depth, has_class_token=config.has_class_token)
        if class_names is not None and len(class_names) != num_classes:
            raise UsageError(
                f"{len(class_names)} class names for a head of {num_classes} classes; give one for each"
            )
        self.encoder_model = encoder_model
        self.head_config = head_config
        self.class_names = None if class_names is None else tuple(class_names)
        self.head = create_head(head_config, config.embed_dim) if head is None else head

    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b *patches f"]:
        """Compute the head's input, before its batch norm: (b f) for a linear head, else (b n f)."""
        # The head was trained under its own attention mask, which may differ from the encoder's.
        encoded = self.encoder_model.encode(images, attention=self.head_config.attention)
        return pool_features(encoded, self.head_config, self.encoder_model.final_norm)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Logits of the classes; `images` are normalised."""
        return self.head(self.features(images))
