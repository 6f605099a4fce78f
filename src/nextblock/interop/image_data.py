"""How the images of a model are cut and normalised, as far as what holds its weights tells."""

from __future__ import annotations

from pathlib import Path

from nextblock.checkpoint import read_data
from nextblock.config import DataConfig, Size, pair
from nextblock.interop.hub import fetch, is_hub_spec
from nextblock.interop.load import own_file
from nextblock.interop.timm import is_timm_directory
from nextblock.interop.timm_spec import TIMM_SPEC, read_timm_data


def recorded_data(src: str | Path) -> DataConfig | None:
    """How a source of weights says that its images are cut and normalised; None where it is silent.

    A run's own settings say more, and are read by whoever knows runs.
    """
    place = fetch(str(src)) if is_hub_spec(src) else src
    path, is_timm = Path(place), str(place).startswith(TIMM_SPEC)
    own = None if is_timm or is_timm_directory(path) else own_file(path)
    if own is not None:
        return read_data(own)
    return read_timm_data(place) if is_timm or path.exists() else None


def official_data(image_size: Size, channels: int) -> DataConfig:
    """What official evaluation does: ImageNet's mean and deviation, and a resize that hangs on the size.

    The shorter side to 300 px for images of 256 px (XTRA-B), else to 8/7 of the image (256 px for 224, XTRA-H
    and AIM).
    """
    size = max(pair(image_size))
    resize_px = 300 if size == 256 else round(size * 8 / 7)
    if channels == 3:
        return DataConfig(val_resize_px=resize_px)
    half = (0.5,) * channels  # nobody has trained officially on other than colour
    return DataConfig(val_resize_px=resize_px, channels=channels, mean=half, std=half)
