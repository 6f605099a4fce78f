"""`nextblock presets`: the named runs and model sizes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from nextblock.cli.arguments import Parser
from nextblock.cli.output import end_with_json, say
from nextblock.config import ModelConfig, RunConfig, pair
from nextblock.presets import PRESETS, Preset, get_preset, resolve
from nextblock.settings import Natural, flatten, listed, require, to_dict, typed

_TABLES = {
    "size": "Sizes for any folder of images (images: at least this many, as a rule of thumb)",
    "recipe": "Recipes: published runs",
    "small": "Small folders and trials",
    "ablation": "Ablations: what is varied",
}


def run(argv: Sequence[str]) -> int:
    """Print the presets in short tables, or one of them in detail."""
    parser = Parser("presets")
    parser.add_argument("name", type=str, nargs="?", help="preset to show in detail")
    parser.add_argument("--all", action="store_true", help="list the ablations too")
    parser.add_argument("--draw", type=str | None, help="PNG to write: block order and attention mask")
    parser.add_argument(
        "--prefix", type=Natural | None, help="with --draw: blocks that all patches attend to"
    )
    parser.add_settings(ModelConfig, "model")
    options = parser.parse(argv)
    chosen = [get_preset(options.name)] if options.name else list(PRESETS.values())
    changes = {name: value for name, value in vars(options).items() if name.startswith("model.")}
    if options.draw is not None:
        require(options.name is not None, "--draw needs a preset: nextblock presets NAME --draw FILE.png")
        require(options.draw.endswith(".png"), f"--draw {options.draw} must be a name that ends in .png")
        from nextblock.visualize.orders import draw_order

        config = resolve(chosen[0].config, changes)
        say(f"picture: {draw_order(config, options.draw, options.prefix)}")
        if options.json:
            end_with_json({"picture": options.draw})
        return 0
    for_draw = [f"--{name}" for name in changes] + ["--prefix"] * (options.prefix is not None)
    require(not for_draw, f"give --draw FILE.png with {listed(for_draw)}")
    if options.json:
        end_with_json([_values(preset) for preset in chosen])
    elif options.name:
        _print_one(chosen[0])
    else:
        for group, title in _TABLES.items():
            if group != "ablation" or options.all:
                _print_group(title, [preset for preset in chosen if preset.group == group])
        say(
            "params M: millions, with the predictor. step GB: an estimate, one micro-batch.",
            "nextblock presets NAME shows one with its command; --all adds the ablations.",
        )
    return 0


def _values(preset: Preset) -> dict[str, Any]:
    from nextblock.plan import GPUS, plan

    planned = plan(preset.config, GPUS["h100"], 1, mfu=1)  # as `nextblock plan --gpu h100` prints it
    names = ("name", "group", "images", "command", "about", "published")
    return {name: getattr(preset, name) for name in names} | {
        "encoder_params_m": round(planned["parameters"]["encoder"] / 1e6, 2),
        "total_params_m": round(planned["parameters"]["trained"] / 1e6, 2),
        "estimated_step_gb": round(planned["layouts"][0]["total"] / 1e9, 1),
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
    shown = ((k, f"{v:.6g}" if isinstance(v, float) else typed(v)) for k, v in changed.items())
    say(*(f"  {name:<29} {value}" for name, value in shown))


def _print_group(title: str, presets: list[Preset]) -> None:
    width = max(len(preset.name) for preset in presets)
    heads = "" if presets[0].group == "ablation" else "  images        px       params M  step GB"
    say(title, *([f"  {'':<{width}}{heads}"] if heads else []))
    for preset in presets:
        if preset.group == "ablation":
            words = preset.about.removeprefix("Ablation: ").partition(";")[0]
            row = textwrap.shorten(words, 75 - width)
        else:
            values = _values(preset)
            size = "x".join(map(str, dict.fromkeys(pair(preset.config.model.image_size))))
            row = f"{preset.images:<12}  {size:<7}  {values['total_params_m']:>8.1f}"
            row += f"  {values['estimated_step_gb']:>7.1f}"
        say(f"  {preset.name:<{width}}  {row}")
    say("")
