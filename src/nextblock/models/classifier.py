"""An encoder with a head: what probes and fine-tuning make, and what official classifier files load as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from nextblock.models import EncoderModel, NextBlockModel
from nextblock.models.features import pool_features
from nextblock.models.heads import HeadConfig, create_head
from nextblock.models.timm_encoder import TimmConfig, TimmEncoder

__all__ = ["AnyClassifier", "Classifier", "ImageClassifier", "TimmClassifier", "create_classifier"]

E = TypeVar("E", NextBlockModel, TimmEncoder)


class Classifier(nn.Module, Generic[E]):
    """An encoder and a head on it; `class_names`, where known, are in the order of the logits."""

    def __init__(
        self, encoder_model: E, head_config: HeadConfig, class_names: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        config, num_classes = encoder_model.config, head_config.num_classes
        if max(head_config.layers) >= config.depth:
            raise ValueError(
                f"the head uses layers {list(head_config.layers)}, but the encoder has only {config.depth}; "
                f"choose among 0 to {config.depth - 1}"
            )
        has_class_token = isinstance(config, TimmConfig) and config.has_class_token
        if head_config.tokens in ("class", "joined") and not has_class_token:
            raise ValueError(f"tokens {head_config.tokens}: this encoder has no class token; use patches")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(
                f"{len(class_names)} class names for a head of {num_classes} classes; give one for each"
            )
        self.encoder_model: E = encoder_model
        self.head_config = head_config
        self.class_names = None if class_names is None else tuple(class_names)
        self.head = create_head(head_config, config.embed_dim)

    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b *patches f"]:
        """Compute what the head sees before its batch norm: (b n f) if attentive, else (b f)."""
        encoded = self.encoder_model.encode(images, attention=self.head_config.attention)
        return pool_features(encoded, self.head_config.features, self.encoder_model.final_norm)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Logits of the classes, from normalised images."""
        return self.head(self.features(images))


class ImageClassifier(Classifier[NextBlockModel]):
    """A classifier on this package's own model, which every format can hold."""


class TimmClassifier(Classifier[TimmEncoder]):
    """A classifier on another of timm's encoders."""


AnyClassifier = ImageClassifier | TimmClassifier


def create_classifier(
    encoder_model: EncoderModel, head_config: HeadConfig, class_names: Sequence[str] | None = None
) -> AnyClassifier:
    """A classifier on either kind of encoder; the head's weights come from torch's global generator."""
    if isinstance(encoder_model, TimmEncoder):
        return TimmClassifier(encoder_model, head_config, class_names)
    return ImageClassifier(encoder_model, head_config, class_names)
