"""The heads that compete in a probe: every kind with every learning rate, decay and choice of features."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from nextblock.config import Attention, ModelConfig
from nextblock.errors import UsageError
from nextblock.evaluate.layers import layer_choices
from nextblock.evaluate.probe.config import HeadName, ProbeConfig, recipe_of
from nextblock.evaluate.probe.recipes import Recipe
from nextblock.interop.aim import BEST_LAYERS_OF_SIZE
from nextblock.models import EncoderModel
from nextblock.models.heads import FeatureConfig, HeadConfig, Tokens, check_attention_heads, fitting_heads
from nextblock.models.timm_encoder import TimmConfig

__all__ = ["Candidate", "encoder_candidates", "has_choice", "pixel_candidates"]

log = logging.getLogger(__name__)

ATTENTION_HEADS = 16
"""Of official XTRA's attentive heads, at every width."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A head to train."""

    head: HeadName
    config: HeadConfig | None
    """None on raw pixels."""
    lr: float
    weight_decay: float

    @property
    def features(self) -> FeatureConfig | None:
        """What it sees of the encoder; None: raw pixels."""
        return None if self.config is None else self.config.features


def encoder_candidates(config: ProbeConfig, model: EncoderModel, num_classes: int) -> tuple[Candidate, ...]:
    """All heads to train on an encoder, a kind after the other.

    Raises `ValueError` where the encoder has not got what the config asks for.
    """
    recipe, encoder = recipe_of(config), model.config
    _check_tokens(config, encoder)
    num_heads = _attentive_heads(config, model) if "attentive" in config.heads else 1
    found = []
    for head in config.heads:
        for features in _features(config, recipe, encoder, head):
            made = HeadConfig(
                kind=head,
                num_classes=num_classes,
                layers=features.layers,
                attention=features.attention,
                tokens=features.tokens,
                num_heads=num_heads,
                num_queries=config.attentive_queries,
                bias=recipe.bias,
            )
            found += [
                Candidate(head=head, config=made, lr=lr, weight_decay=decay)
                for decay, lr in product(recipe.weight_decay[head], recipe.lr)
            ]
    return tuple(found)


def pixel_candidates(config: ProbeConfig) -> tuple[Candidate, ...]:
    """The linear heads to train on raw pixels: learning rates and decays."""
    recipe = recipe_of(config)
    return tuple(
        Candidate(head="linear", config=None, lr=lr, weight_decay=decay)
        for decay, lr in product(recipe.weight_decay["linear"], recipe.lr)
    )


def has_choice(candidates: Sequence[Candidate]) -> bool:
    """Whether any kind of head has more than one candidate."""
    kinds = [candidate.head for candidate in candidates]
    return len(set(kinds)) < len(kinds)


# ------------------------------------------------------------------------------------------------ features


def _features(
    config: ProbeConfig, recipe: Recipe, encoder: ModelConfig | TimmConfig, head: HeadName
) -> list[FeatureConfig]:
    tokens: tuple[Tokens, ...] = config.tokens
    if head == "attentive":
        tokens = tuple(one for one in tokens if one in ("patches", "all"))
    layers = [
        chosen
        for word in recipe.layers[head]
        for chosen in _layers(word, encoder, was_asked_for=config.layers is not None)
    ]
    return [
        FeatureConfig(layers=chosen, tokens=one, pooled=head != "attentive", attention=attention)
        for attention, one, chosen in product(_attentions(config, encoder), tokens, dict.fromkeys(layers))
    ]


def _attentions(config: ProbeConfig, encoder: ModelConfig | TimmConfig) -> tuple[Attention, ...]:
    """Of attention native and full, which in timm's encoders are the same, the one that comes first."""
    if not isinstance(encoder, TimmConfig):
        return config.attention
    one_of = [name for name in config.attention if name in ("native", "full")][:1]
    return tuple(name for name in config.attention if name in (*one_of, "causal"))


def _layers(
    word: str, encoder: ModelConfig | TimmConfig, *, was_asked_for: bool
) -> tuple[tuple[int, ...], ...]:
    """The choices that a word means; of "best", unless it was asked for, none where that is not known."""
    best = BEST_LAYERS_OF_SIZE.get((encoder.embed_dim, encoder.depth))
    if word != "best" or best is not None:
        return layer_choices(word, encoder.depth, best)
    if was_asked_for:
        sizes = ", ".join(f"{width} x {layers}" for width, layers in BEST_LAYERS_OF_SIZE)
        raise UsageError(
            f"layers best is known of AIM's sizes (width x layers: {sizes}), not of an encoder "
            f"{encoder.embed_dim} wide with {encoder.depth} layers; use each to find out, or name them: 3+4+5"
        )
    log.info("which layers are the best is known of AIM's own sizes only: left out")
    return ()


def _check_tokens(config: ProbeConfig, encoder: ModelConfig | TimmConfig) -> None:
    class_tokens = [one for one in config.tokens if one in ("class", "joined")]
    has_class_token = isinstance(encoder, TimmConfig) and encoder.has_class_token
    if class_tokens and not has_class_token:
        raise UsageError(f"tokens {class_tokens[0]}: this encoder has no class token; use patches")
    if "attentive" in config.heads and len(class_tokens) == len(config.tokens):
        raise UsageError(
            f"an attentive head sees many tokens, not tokens {' or '.join(class_tokens)}; "
            "add --tokens patches, or leave it out: --heads linear"
        )


def _attentive_heads(config: ProbeConfig, model: EncoderModel) -> int:
    """How many attention heads an attentive head has; `ValueError` where a given number cannot be."""
    width = model.config.embed_dim
    given = config.attentive_heads
    if given is not None:
        check_attention_heads(width, given)
        return given
    wanted = ATTENTION_HEADS
    if recipe_of(config).encoder_heads:
        wanted = _encoder_heads(model) or ATTENTION_HEADS
    fitting = fitting_heads(width, wanted)
    if fitting != wanted:
        log.info(
            "%d channels cannot be divided among %d attention heads: the attentive head has %d",
            width,
            wanted,
            fitting,
        )
    return fitting


def _encoder_heads(model: EncoderModel) -> int | None:
    """The encoder's own attention heads, where they can be told."""
    if isinstance(model.config, ModelConfig):
        return model.config.num_heads
    found = (getattr(module, "num_heads", None) for module in model.encoder.modules())
    return next((number for number in found if isinstance(number, int)), None)
