"""An encoder with a head: what probes and fine-tuning make, and what official classifier files load as."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor, nn

from nextblock.models.heads import HeadConfig, create_head
from nextblock.models.next_block import NextBlockModel

__all__ = ["ImageClassifier", "head_features", "pool_layers"]


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


def head_features(
    outputs: Sequence[Float[Tensor, "b n d"]], config: HeadConfig, norm: Callable[[Tensor], Tensor]
) -> Float[Tensor, "b *patches f"]:
    """Pool an encoding's `layers` to what a head sees: patches (b n f) if attentive, (b f) if linear.

    `norm` is the encoder's final norm, used only where the config asks for it.
    """
    tokens = pool_layers(outputs, config.layers, config.layer_pool, norm if config.norm_layers else None)
    return tokens if config.kind == "attentive" else reduce(tokens, "b n f -> b f", "mean")


class ImageClassifier(nn.Module):
    """A model's encoder and a head on it; `class_names`, where known, are in the order of the logits."""

    def __init__(
        self, encoder_model: NextBlockModel, head_config: HeadConfig, class_names: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        depth, num_classes = encoder_model.config.depth, head_config.num_classes
        if max(head_config.layers) >= depth:
            raise ValueError(
                f"the head uses layers {list(head_config.layers)}, but the encoder has only {depth}; "
                f"choose among 0 to {depth - 1}"
            )
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(
                f"{len(class_names)} class names for a head of {num_classes} classes; give one for each"
            )
        self.encoder_model = encoder_model
        self.head_config = head_config
        self.class_names = None if class_names is None else tuple(class_names)
        self.head = create_head(head_config, encoder_model.config.embed_dim)

    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b *patches f"]:
        """Compute what the head sees before its batch norm: (b n f) if attentive, (b f) if linear."""
        outputs = self.encoder_model.encode(images, attention=self.head_config.attention).layers
        return head_features(outputs, self.head_config, self.encoder_model.encoder.norm)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Logits of the classes, from normalised images."""
        return self.head(self.features(images))
