"""The network that is fine-tuned: an encoder at its size, with a head, drop path and perhaps adapters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from timm.layers import DropPath
from torch import nn

from nextblock.config import DataConfig, ModelConfig, pair
from nextblock.data import keyed_seed
from nextblock.errors import UsageError
from nextblock.evaluate.features import seeded
from nextblock.evaluate.finetune.config import FinetuneConfig
from nextblock.evaluate.finetune.lora import add_lora
from nextblock.evaluate.settings import CROP_RATIO
from nextblock.interop.timm import data_at, encoder_at
from nextblock.models import EncoderModel, NextBlockModel
from nextblock.models.heads import HeadConfig, ImageClassifier, last_layers
from nextblock.models.timm_encoder import TimmConfig
from nextblock.optim import layer_decay_groups

__all__ = ["build_classifier", "images_for", "set_drop_path", "tuning_groups"]

EncoderConfig = ModelConfig | TimmConfig


def build_classifier(
    model: EncoderModel, config: FinetuneConfig, class_names: Sequence[str]
) -> ImageClassifier:
    """A classifier ready to be trained: head and adapters are f(seed), what stays frozen takes no gradient.

    Of our own models the encoder alone, at the image size and for the attention that is asked for: it becomes
    one of that size, whose native attention that is. Raises `ValueError` for what an encoder cannot do.
    """
    encoder_model = _encoder_of(model, config)
    head_config = _head_config(encoder_model, config, len(class_names))
    with seeded(keyed_seed(config.seed, "fine-tuning head")):
        classifier = ImageClassifier(encoder_model, head_config, class_names)
    set_drop_path(encoder_model.encoder, config.actual_drop_path)
    if config.activation_checkpointing:
        _recompute(encoder_model)
    if config.uses_lora:
        rank = config.lora.rank
        assert rank
        add_lora(
            encoder_model.encoder,
            rank=rank,
            alpha=rank if config.lora.alpha is None else config.lora.alpha,
            dropout=config.lora.dropout,
            seed=keyed_seed(config.seed, "adapters"),
        )
    return classifier


def images_for(
    data: DataConfig, before: EncoderConfig, after: EncoderConfig, config: FinetuneConfig
) -> DataConfig:
    """How images are cut: as for the model `before`, the same share of the picture at another size."""
    if isinstance(before, ModelConfig) and isinstance(after, ModelConfig):
        data = data_at(data, before, after)
    return replace(
        data,
        crop_scale=config.actual_crop_scale,
        crop_ratio=CROP_RATIO,
        flip=data.flip if config.flip is None else config.flip,
    )


def tuning_groups(classifier: ImageClassifier, config: FinetuneConfig) -> list[dict[str, Any]]:
    """The optimizer's groups: layer i of L learns at decay^(L + 1 - i) of the rate, norm and head at all."""
    depth = classifier.encoder_model.config.depth
    blocks: Any = getattr(classifier.encoder_model.encoder, "blocks", ())
    if config.actual_layer_decay != 1 and len(blocks) != depth:
        raise UsageError(
            f"layer_decay is {config.actual_layer_decay:g}, but this encoder does not name its layers "
            "blocks; set layer_decay 1"
        )
    return layer_decay_groups(
        classifier,
        config.weight_decay,
        config.actual_layer_decay,
        partial(_layer_of, top=depth + 1),
        depth + 1,
    )


def set_drop_path(encoder: nn.Module, rate: float) -> None:
    """Give a timm encoder's layers this drop path, from 0 at the first to `rate` at the last.

    Raises `ValueError` where layers have none and a rate is asked for.
    """
    blocks: list[Any] = list(getattr(encoder, "blocks", ()))
    if not blocks or not all(
        hasattr(block, "drop_path1") and hasattr(block, "drop_path2") for block in blocks
    ):
        if rate:
            raise UsageError(
                f"drop_path is {rate:g}, but the layers of this {type(encoder).__name__} have no place for "
                "it; set drop_path 0"
            )
        return
    for i, block in enumerate(blocks):
        its_rate = rate * i / max(1, len(blocks) - 1)
        for name in ("drop_path1", "drop_path2"):
            setattr(block, name, DropPath(its_rate) if its_rate else nn.Identity())


# ---------------------------------------------------------------------------------------------------- parts


def _encoder_of(model: EncoderModel, config: FinetuneConfig) -> EncoderModel:
    if isinstance(model, NextBlockModel):
        return _sized(model, config)
    if config.attention == "causal":
        raise UsageError(
            f"{model.config.architecture} was not trained with a causal mask; use attention native or full"
        )
    if config.image_size is not None and pair(config.image_size) != model.config.image_size:
        raise UsageError(
            f"image_size is {config.image_size}, and timm builds {model.config.architecture} at "
            f"{model.config.image_size}; give the size with the name: timm:NAME,img_size=N"
        )
    return model


def _sized(model: NextBlockModel, config: FinetuneConfig) -> NextBlockModel:
    try:
        return encoder_at(model, config.image_size, config.attention)
    except ValueError as error:  # the same, by the settings of this command
        message = str(error).replace("model.image_size", "image_size")
        raise UsageError(message.replace("another patch_size or block_size", "attention full")) from error


def _head_config(model: EncoderModel, config: FinetuneConfig, num_classes: int) -> HeadConfig:
    depth = model.config.depth
    return HeadConfig(
        kind=config.head,
        num_classes=num_classes,
        layers=last_layers(min(config.actual_layers, depth), depth),
        norm_layers=config.head_norm == "layer",
        batch_norm=config.head_norm == "batch",
        num_heads=config.actual_attentive_heads,
        tokens=config.tokens,
    )


def _recompute(model: EncoderModel) -> None:
    if isinstance(model, NextBlockModel):
        model.set_grad_checkpointing()
    else:
        encoder: Any = model.encoder
        encoder.set_grad_checkpointing(True)


def _layer_of(name: str, *, top: int) -> int:
    """Layer i of a classifier's encoder, from 1; `top` for its final norm and the head; 0 for the rest."""
    part = name.removeprefix("encoder_model.encoder.")
    if part == name or re.match(r"(fc_)?norm\.", part):
        return top
    block = re.match(r"blocks\.(\d+)\.", part)
    return 0 if block is None else int(block[1]) + 1
