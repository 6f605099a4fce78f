"""Encoders from timm behind the interface that evaluation uses for our own model.

Class and register tokens stay in the sequence, as the network was trained with them, and are returned
separately from the patches.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
from jaxtyping import Float
from torch import Tensor, nn

from nextblock.config import Attention, ValCrop
from nextblock.errors import UsageError
from nextblock.models.vit import Encoded


@dataclass(frozen=True, kw_only=True)
class TimmConfig:
    """The properties of a timm encoder that evaluation uses."""

    architecture: str
    """timm's name, from which it can be rebuilt."""
    image_size: tuple[int, int]
    in_chans: int
    embed_dim: int
    depth: int
    has_class_token: bool
    arguments: Mapping[str, int] = field(default_factory=dict)
    """Arguments that differ from the architecture's defaults: img_size, in_chans."""
    mean: tuple[float, ...] | None = None
    """Mean of the training images per channel; None if timm does not record it."""
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    """Side of the crop as a fraction of the resized image's side."""
    crop_mode: ValCrop = "center"
    interpolation: str = "bicubic"
    """Interpolation that timm uses; evaluation always uses bicubic."""


class TimmEncoder(nn.Module):
    """A timm transformer that returns every layer; `ValueError` for other networks or mixed widths."""

    def __init__(self, encoder: nn.Module, architecture: str, arguments: Mapping[str, int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = _described(encoder, architecture, arguments)

    @classmethod
    def fresh(cls, config: TimmConfig) -> TimmEncoder:
        """Build the same architecture with weights drawn from torch's global generator."""
        arguments: dict[str, Any] = dict(config.arguments)
        built = timm.create_model(config.architecture, pretrained=False, num_classes=0, **arguments)
        model = cls(built, config.architecture, config.arguments)
        model.config = config  # its crop may differ from the architecture's default
        return model

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last layer, applied to every token here.

        If timm pools by the mean, it calls this norm fc_norm and applies it to that mean.
        """
        # The norm that timm does not use is an Identity or missing.
        norms = (getattr(self.encoder, name, None) for name in ("norm", "fc_norm"))
        used = (norm for norm in norms if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity))
        return next(used, nn.Identity())

    def encode(self, images: Float[Tensor, "b c h w"], attention: Attention = "native") -> Encoded:
        """Encode images; patches are in raster order, class and register tokens are in `prefix`."""
        if attention == "causal":
            raise UsageError(
                f"{self.config.architecture} was not trained with a causal mask; use attention native or full"
            )
        # Without prefix tokens, some timm architectures fail when asked for them, and others return patches
        # only.
        has_prefix = getattr(self.encoder, "num_prefix_tokens", 0) > 0
        outputs = self.encoder.forward_intermediates(  # type: ignore[operator] # `_described` checked it
            images, norm=False, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=has_prefix
        )
        outputs = outputs if has_prefix else [(patches, patches[:, :0]) for patches in outputs]
        patches, prefix = (tuple(parts) for parts in zip(*outputs, strict=True))
        # As in our own encoder, layers come without the final norm; only the tokens have it.
        tokens = self.final_norm(patches[-1])
        return Encoded(tokens, patches, prefix, has_class_token=self.config.has_class_token)


def _described(encoder: nn.Module, architecture: str, arguments: Mapping[str, int]) -> TimmConfig:
    # Plain transformers have one entry per layer, all of one width and resolution, and can return class and
    # register tokens separately. Hierarchical and convolutional networks cannot.
    layers: Any = getattr(encoder, "feature_info", None) or ()
    gives_layers = getattr(encoder, "forward_intermediates", None)
    if (
        gives_layers is None
        or "return_prefix_tokens" not in inspect.signature(gives_layers).parameters
        or len({(layer["num_chs"], layer["reduction"]) for layer in layers}) != 1
    ):
        raise UsageError(
            f"{architecture} is no transformer that returns its layers as tokens; evaluation takes timm's "
            "vision transformers (vit, deit, beit, eva, aimv2, dinov2, ...)"
        )
    # A network from the hub or a directory may be built for another image size or channel count than its
    # architecture's default, although no argument says so. The module itself then provides the arguments.
    settings: Any = encoder.pretrained_cfg
    known = timm.get_pretrained_cfg(architecture)
    usual = settings["input_size"] if known is None else known.input_size
    resolved, (in_chans, *size) = dict(arguments), settings["input_size"]
    built: Any = getattr(getattr(encoder, "patch_embed", None), "img_size", None)
    if "img_size" not in resolved and built is not None and tuple(built) != tuple(usual[1:]):
        resolved |= {"img_size": built[0]} if len(set(built)) == 1 else {}
    if "in_chans" not in resolved and in_chans != usual[0]:
        resolved["in_chans"] = in_chans
    in_chans = resolved.get("in_chans", int(in_chans))
    height, width = (resolved["img_size"],) * 2 if "img_size" in resolved else size
    # Normalisation and crop, unless timm's numbers are for another number of channels.
    mean, std, crop_pct = (settings.get(name) for name in ("mean", "std", "crop_pct"))
    images: dict[str, Any] = {}
    if None not in (mean, std, crop_pct) and len(mean) == in_chans:
        images = {"mean": tuple(mean), "std": tuple(std), "crop_pct": float(crop_pct)}
        images["crop_mode"] = settings.get("crop_mode") or "center"
        images["interpolation"] = settings.get("interpolation") or "bicubic"
    return TimmConfig(
        architecture=architecture,
        image_size=(height, width),
        in_chans=in_chans,
        embed_dim=layers[0]["num_chs"],
        depth=len(layers),
        has_class_token=getattr(encoder, "cls_token", None) is not None,
        arguments=resolved,
        **images,
    )
