"""`nextblock presets`: the named runs and model sizes."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Sequence
from typing import Any

from nextblock.cli.output import end_with_json, say
from nextblock.config import ModelConfig, RunConfig, pair
from nextblock.presets import PRESETS, Preset, get_preset
from nextblock.settings import flatten, to_dict

_TABLES = {
    "size": "Sizes for any folder of images (from so many images on: a rule of thumb)",
    "recipe": "Recipes: published runs",
    "small": "Small folders and trials",
    "ablation": "Ablations: what is varied",
}


def run(argv: Sequence[str]) -> int:
    """Print the presets in short tables, or all about one of them."""
    from nextblock.cli.arguments import Parser

    parser = Parser("presets", "List the named runs and model sizes.")
    parser.add_argument("name", type=str, nargs="?", help="show all about this one")
    parser.add_argument("--all", action="store_true", help="list the ablations too")
    parser.add_argument("--json", action="store_true", help="print JSON, ablations included")
    options = parser.parse(argv)
    chosen = [get_preset(options.name)] if options.name else list(PRESETS.values())
    if options.json:
        end_with_json([_values(preset) for preset in chosen])
    elif options.name:
        _print_one(chosen[0])
    else:
        for group, title in _TABLES.items():
            if group != "ablation" or options.all:
                _print_table(title, [preset for preset in chosen if preset.group == group])
        say(
            "params M: millions, with the predictor. step GB: an estimate, one micro-batch.",
            "nextblock presets NAME shows one with its command; --all adds the ablations.",
        )
    return 0


@functools.cache
def parameters_m(model: ModelConfig) -> tuple[float, float]:
    """Trainable parameters in millions, of the encoder and of all; built without memory."""
    import torch

    from nextblock.models import NextBlockModel

    with torch.device("meta"):
        network = NextBlockModel(model)
    return tuple(
        sum(p.numel() for p in part.parameters() if p.requires_grad) / 1e6
        for part in (network.encoder, network)
    )  # type: ignore[return-value]


def step_gb(config: RunConfig, total_m: float) -> float:
    """An estimate of the memory of a step: weights, gradients, AdamW's moments, and kept activations."""
    from nextblock.targets import make_targets

    model, train = config.model, config.train
    # About 17 numbers of a layer's width are kept per token: norms, q k v, attention, residuals, MLP at 4x.
    # Within a third of the tensors that autograd keeps on a CPU; what the GPU's allocator adds is not known.
    layer = 9 + 2 * model.mlp_ratio
    kept = layer * model.depth * model.embed_dim
    if model.predictor is not None:
        kept += layer * model.predictor_depth * model.predictor_dim * (model.predictor != "linear")
        kept += 2 * (model.projection_dim or 0)
        kept += (2 * (model.block_mlp_dim or 0) + 2 * make_targets(model).outputs) / model.patches_per_block
    number = 4 if train.precision == "fp32" else 2.5  # bytes; norms and residuals stay fp32
    micro = train.micro_batch_size
    images = micro if isinstance(micro, int) else train.batch_size
    return (18e6 * total_m + number * kept * model.num_patches * images) / 1e9


def _values(preset: Preset) -> dict[str, Any]:
    encoder_m, total_m = parameters_m(preset.config.model)
    names = ("name", "group", "images", "command", "about", "published")
    return {name: getattr(preset, name) for name in names} | {
        "encoder_params_m": round(encoder_m, 2),
        "total_params_m": round(total_m, 2),
        "estimated_step_gb": round(step_gb(preset.config, total_m), 1),
        "config": to_dict(preset.config),
    }


def _print_one(preset: Preset) -> None:
    values, defaults = _values(preset), flatten(to_dict(RunConfig()))
    train = preset.config.train
    say(
        preset.name,
        *textwrap.wrap(preset.about, 79),
        "",
        f"command:    {preset.command}",
        f"published:  {preset.published or 'no confirmed result'}",
        f"parameters: encoder {values['encoder_params_m']} M, with predictor {values['total_params_m']} M",
        f"memory:     about {values['estimated_step_gb']:.1f} GB for a step of "
        f"{train.micro_batch_size or train.batch_size} images (an estimate)",
        "",
        "Settings that differ from the defaults (all: add --print_config to the command):",
    )
    changed = {k: v for k, v in flatten(values["config"]).items() if v != defaults[k] and k != "preset"}
    say(*(f"  {name:<29} {_short(value)}" for name, value in changed.items()))


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_short, value))
    return f"{value:.6g}" if isinstance(value, float) else "null" if value is None else str(value)


def _print_table(title: str, presets: list[Preset]) -> None:
    width = max(len(preset.name) for preset in presets)
    heads = "" if presets[0].group == "ablation" else "  images        px       params M  step GB"
    say(title, *([f"  {'':<{width}}{heads}"] if heads else []))
    for preset in presets:
        if preset.group == "ablation":
            words = preset.about.removeprefix("Ablation: ").partition(";")[0]
            row = textwrap.shorten(words, 75 - width)
        else:
            _, total_m = parameters_m(preset.config.model)
            size = "x".join(map(str, dict.fromkeys(pair(preset.config.model.image_size))))
            row = f"{preset.images:<12}  {size:<7}  {total_m:>8.1f}  {step_gb(preset.config, total_m):>7.1f}"
        say(f"  {preset.name:<{width}}  {row}")
    say("")
