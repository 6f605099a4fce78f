"""`nextblock presets`: the named runs and model sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nextblock.cli.output import end_with_json, say
from nextblock.presets import PRESETS, Preset, get_preset
from nextblock.settings import to_dict

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Print every preset with its sizes and published result, or all about one of them."""
    from rich.console import Console

    from nextblock.cli.arguments import build_parser, parse

    parser = build_parser("presets", "List the named runs and model sizes.")
    parser.add_argument("name", type=str, nargs="?", help="tell all about this one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parse(parser, argv)
    chosen = [get_preset(options.name)] if options.name else list(PRESETS.values())
    if options.json:
        end_with_json([_values(preset) for preset in chosen])
    elif options.name:
        _print_one(Console(), chosen[0])
    else:
        _print_table(Console(), chosen)
    return 0


def _values(preset: Preset) -> dict[str, Any]:
    return {
        "name": preset.name,
        "command": preset.command,
        "about": preset.about,
        "published": preset.published,
        "encoder_params_m": preset.encoder_params_m,
        "total_params_m": preset.total_params_m,
        "config": to_dict(preset.config),
    }


def _print_one(console: Console, preset: Preset) -> None:
    import yaml

    console.print(f"{preset.name}\n{preset.about}\n", highlight=False)
    say(f"command:    {preset.command}")
    console.print(f"published:  {preset.published or 'no confirmed result'}", highlight=False)
    console.print(
        f"parameters: encoder {preset.encoder_params_m:.2f} M, "
        f"with predictor {preset.total_params_m:.2f} M\n",
        highlight=False,
    )
    console.print(yaml.safe_dump(to_dict(preset.config), sort_keys=False), highlight=False)


def _print_table(console: Console, presets: list[Preset]) -> None:
    from rich.table import Table

    table = Table("preset", "encoder", "with predictor", "published", "what")
    for preset in presets:
        sizes = f"{preset.encoder_params_m:.1f} M", f"{preset.total_params_m:.1f} M"
        table.add_row(preset.name, *sizes, preset.published or "-", preset.about.split(". ")[0])
    console.print(table)
    console.print("nextblock presets NAME tells all about one.", highlight=False)
