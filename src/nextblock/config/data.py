"""The settings of images: where they are, how they are cut and normalised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nextblock.settings import check_types, require, require_range

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "DataConfig", "ValCrop"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ValCrop = Literal["center", "squash", "border"]
"""How a picture is brought to the size of a validation crop."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are and how they are cut and normalised."""

    train: str | tuple[str, ...] | None = None
    """Images to train on: a directory, `torchvision:CIFAR10,root=DIR,split=train`, or `digits`; given several
    times, a mixture."""
    weights: tuple[float, ...] | None = None
    """Share of each source of a mixture in an epoch, in proportion; null: by their numbers of images."""
    epoch_samples: int | None = None
    """Samples that count as an epoch, exact for every source of a mixture; null: as many as there are
    images."""
    val: str | None = None
    """Images to validate on, same grammar; none by default."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Share of the image's area that a training crop covers, drawn uniformly."""
    crop_ratio: tuple[float, float] = (0.75, 1.5)
    """Width over height of a training crop, drawn log-uniformly."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: tuple[float, float, float, float] | None = None
    """Largest change of brightness, contrast, saturation and hue in training; null: none."""
    color_jitter_prob: float = 0.8
    """Probability that a training image's colours are changed at all."""
    val_resize_px: int = 300
    """Shorter side after resizing for validation; the centre of model.image_size is then cut out."""
    val_crop: ValCrop = "center"
    """How a picture is resized for validation: center keeps its shape, squash gives it that of
    model.image_size; border fits it in whole and fills the rest with data.mean."""
    background: Literal["white", "grey", "black"] = "white"
    """What lies under the transparent parts of an image."""
    channels: int = 3
    """Channels of an image: 3 for colour, 1 for grey, or as many as the files have (TIFF, PNG)."""
    normalize: Literal["given", "auto"] = "given"
    """Normalise by data.mean and data.std, or by those of a seeded sample of data.train, kept by the run."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean per channel, of pixels in [0, 1], that is subtracted."""
    std: tuple[float, ...] = IMAGENET_STD
    """Deviation per channel, of pixels in [0, 1], that is divided by."""
    workers: int | None = None
    """Processes that decode; none given: up to 8, one less than there are cores; 0: in the main process."""
    decoder: Literal["auto", "pillow", "fast"] = "auto"
    """JPEG decoder: auto is torchcodec if it works here, else Pillow; fast decodes large photos at a half, a
    quarter or an eighth of their size for training crops. Fixed for a run."""
    max_bad_fraction: float = 0.01
    """Stop when more than this share of the files cannot be read; one is allowed in any folder, unless this
    is 0."""
    max_pixels: int = 178_956_970
    """An image of more pixels counts as unreadable, whatever its format; the default is Pillow's."""
    cache_dir: str | None = None
    """Where indexes of shards and copies of remote shards are kept; null: ~/.cache/nextblock."""
    cache_gb: float = 100.0
    """Most that copies of remote shards may take, in GB; those used longest ago go first."""

    def __post_init__(self) -> None:
        check_types(self, "data")
        self._check_mixture()
        if self.color_jitter is not None:
            require(
                all(0 <= part <= 1 for part in self.color_jitter) and self.color_jitter[3] <= 0.5,
                f"data.color_jitter is {self.color_jitter}; each must lie in [0, 1], the hue's in [0, 0.5]",
            )
            require(
                self.channels in (1, 3),
                f"data.color_jitter changes colours, data.channels is {self.channels}; set it null",
            )
        require(
            0 <= self.color_jitter_prob <= 1,
            f"data.color_jitter_prob is {self.color_jitter_prob}; it must lie in [0, 1]",
        )
        require_range("data.crop_scale", self.crop_scale, 0, 1)
        require_range("data.crop_ratio", self.crop_ratio, 0, 1e6)
        require(0 <= self.flip <= 1, f"data.flip is {self.flip}; it must lie in [0, 1]")
        require(self.val_resize_px >= 1, f"data.val_resize_px is {self.val_resize_px}; use at least 1")
        require(
            self.val_crop != "border" or self.normalize == "given",
            "data.val_crop border fills with data.mean, which data.normalize auto measures on such crops; "
            "use center or squash, or give data.mean and data.std",
        )
        require(self.channels >= 1, f"data.channels is {self.channels}; use at least 1")
        require(self.cache_gb > 0, f"data.cache_gb is {self.cache_gb}; use more than 0")
        require(
            len(self.mean) == len(self.std),
            f"data.mean has {len(self.mean)} channels and data.std {len(self.std)}; give as many of each",
        )
        require(min(self.std) > 0, f"data.std is {self.std}; each deviation must be above 0")
        require(
            all(0 <= value <= 1 for value in self.mean) and all(0 < value <= 1 for value in self.std),
            f"data.mean is {self.mean} and data.std {self.std}; pixels lie in [0, 1], so divide by 255 what "
            "was measured on bytes",
        )
        require(
            self.workers is None or self.workers >= 0,
            f"data.workers is {self.workers}; use 0 or more processes",
        )
        require(
            0 <= self.max_bad_fraction <= 1,
            f"data.max_bad_fraction is {self.max_bad_fraction}; it must lie in [0, 1]",
        )
        require(self.max_pixels >= 1, f"data.max_pixels is {self.max_pixels}; use at least 1")

    @property
    def train_specs(self) -> tuple[str, ...]:
        """The sources to train on."""
        if self.train is None:
            return ()
        return (self.train,) if isinstance(self.train, str) else self.train

    def _check_mixture(self) -> None:
        specs = self.train_specs
        require(self.train != (), "data.train names no source; name one or several")
        require(
            len(set(specs)) == len(specs), f"data.train names a source twice: {list(specs)}; name each once"
        )
        require(
            self.epoch_samples is None or self.epoch_samples >= 1,
            f"data.epoch_samples is {self.epoch_samples}; use at least 1",
        )
        if self.weights is None:
            return
        require(
            min(self.weights, default=0) > 0 and all(map(math.isfinite, self.weights)),
            f"data.weights are {list(self.weights)}; each must be a finite number above 0",
        )
        require(
            not specs or len(specs) == len(self.weights),
            f"data.train names {len(specs)} source{'s' * (len(specs) > 1)} and data.weights "
            f"{len(self.weights)}; name as many sources (--data.train once for each) as there are weights, "
            "or set data.weights null",
        )
