"""`nextblock info`: what a run or a weight file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextblock.cli.output import end_with_json

if TYPE_CHECKING:
    from nextblock.interop.files import LoadOptions
    from nextblock.interop.load import Found

MAX_TENSORS = 12
"""How many tensors of a file that is no model are told."""
STAND_INS = {"num_heads": 1, "probe_layers": (0,)}
"""Values to look at a file with if it does not tell a setting; they are reported as untold."""


def run(argv: Sequence[str]) -> int:
    """Tell what anything is that `nextblock.load` reads, and what other weight files hold."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from nextblock.cli.arguments import Parser
    from nextblock.interop.files import LoadOptions

    parser = Parser("info", "Show what a run or a weight file holds.")
    parser.add_argument(
        "file", type=str, help="run directory, checkpoint, weight file, hf:USER/NAME[/FILE] or timm:NAME"
    )
    parser.add_argument("--head", type=str | None, default=None, help="head of an AIM classifier")
    parser.add_argument(
        "--num_heads", type=int | None, default=None, help="the encoder's, where the file is silent"
    )
    size = int | tuple[int, int] | None
    parser.add_argument("--image_size", type=size, default=None, help="pixels, or [rows,columns]: AIM's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse(argv)
    given = {name: getattr(options, name) for name in ("head", "num_heads", "image_size")}
    told = _describe(options.file, LoadOptions(**given, fallback=STAND_INS))
    if options.json:
        end_with_json(told)
        return 0
    table = Table(show_header=False)
    for name, value in told.items():
        table.add_row(name, escape("\n".join(_lines(value))))
    Console().print(table)
    return 0


def _lines(value: Any) -> list[str]:
    """A value as YAML would have it: a mapping in a line for each name, a section's names indented."""
    if not isinstance(value, Mapping):
        return ["null" if value is None else str(value)]
    lines: list[str] = []
    for name, part in value.items():
        inner = _lines(part)
        is_section = isinstance(part, Mapping) and part
        lines += [f"{name}:", *(f"  {line}" for line in inner)] if is_section else [f"{name}: {inner[0]}"]
    return lines


def _describe(src: str, options: LoadOptions) -> dict[str, Any]:
    """What a source is: a model as far as it can be told, else its tensors."""
    from nextblock.checkpoint import UnknownFormatError
    from nextblock.interop.load import read

    try:
        return _describe_model(read(src, options))
    except UnknownFormatError as error:
        return _describe_tensors(error.path, error.content, str(error))


def _describe_model(found: Found) -> dict[str, Any]:
    from nextblock.models import NextBlockModel
    from nextblock.models.heads import ImageClassifier
    from nextblock.models.timm_encoder import TimmConfig
    from nextblock.settings import to_dict

    model = found.model
    is_classifier = isinstance(model, ImageClassifier)
    encoder_model = found.encoder_model
    config = encoder_model.config
    if isinstance(config, TimmConfig):
        what, grid = f"timm's {config.architecture}", {}
    else:
        what = "heads not told" if "num_heads" in found.assumed else f"{config.num_heads} heads"
        grid = {
            "grid": list(config.grid),
            "blocks": config.num_blocks,
            "features": f"{config.feature_attention} attention",
        }
    can_predict = isinstance(encoder_model, NextBlockModel) and encoder_model.predictor is not None
    told = {
        "kind": "classifier" if is_classifier else "model" if can_predict else "encoder",
        "format": found.format,
        "encoder": f"{config.embed_dim} wide, {config.depth} layers, {what}",
        "encoder_params": sum(p.numel() for p in encoder_model.encoder.parameters()),
        "total_params": sum(p.numel() for p in model.parameters()),
        **grid,
        **({"head": to_dict(model.head_config)} if is_classifier else {}),
        "config": to_dict(config),
    }
    for name, why in found.assumed.items():
        told[f"{name} ({'assumed' if name == 'image_size' else 'untold'})"] = why
        if name in STAND_INS:
            section = told["config"] if name in told["config"] else told.get("head", {})
            section["layers" if name == "probe_layers" else name] = None
    return told


def _describe_tensors(path: Path, content: Any, why: str) -> dict[str, Any]:
    """A file of tensors that is no model: the head of a classifier, or anything."""
    from nextblock.checkpoint import is_safetensors, read_metadata
    from nextblock.interop.aim import is_aim_head

    if not isinstance(content, Mapping):
        return {"kind": type(content).__name__, "why": why}
    shapes = {name: list(value.shape) for name, value in content.items() if hasattr(value, "shape")}
    kind = "head of an AIM classifier" if is_aim_head(content) else "tensors"
    told: dict[str, Any] = {"kind": kind, "why": why, "tensors": dict(list(shapes.items())[:MAX_TENSORS])}
    if len(shapes) > MAX_TENSORS:
        told["further_tensors"] = len(shapes) - MAX_TENSORS
    if path.is_file() and is_safetensors(path) and read_metadata(path):
        told["metadata"] = read_metadata(path)
    return told
