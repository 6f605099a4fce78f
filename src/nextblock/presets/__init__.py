"""The one registry of runs and model sizes.

A preset is data: the settings of a run, the command that starts it, what it was published to reach, and how
many parameters it has.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from nextblock.config import ModelConfig
from nextblock.presets import aim, xtra
from nextblock.presets.preset import Preset
from nextblock.settings import nearest_name

__all__ = ["PRESETS", "SIZES", "Preset", "get_preset", "list_presets", "model_config"]

SIZES: dict[str, ModelConfig] = {**xtra.SIZES, **aim.SIZES}

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (*xtra.PRESETS, *aim.PRESETS)}


def list_presets() -> list[str]:
    """Names of all presets."""
    return list(PRESETS)


def get_preset(name: str) -> Preset:
    """The preset of this name; another is refused with the nearest known one."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; {nearest_name(name, list(PRESETS))}")
    return PRESETS[name]


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The network's settings of a size ("xtra-b16") or a preset, with any field changed."""
    known = sorted(field.name for field in fields(ModelConfig))
    for field_name in overrides:
        if field_name not in known:
            raise ValueError(f"unknown model setting {field_name!r}; {nearest_name(field_name, known)}")
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in overrides.items()}
    return replace(get_preset(name).config.model, **plain)
