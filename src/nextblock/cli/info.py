"""`nextblock info`: what a run or a weight file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextblock.cli.output import end_with_json

if TYPE_CHECKING:
    from nextblock.interop.reading import Found, Told

__all__ = ["run"]

MAX_TENSORS = 12
"""How many tensors of a file that is no model are told."""
STAND_INS = {"num_heads": 1, "probe_layers": (0,)}
"""What a file is looked at with where it does not tell a setting; it is said to be untold."""
ASSUMED_SIZE = "Apple's; the file tells none, and the encoder takes any (--image_size)"


def run(argv: Sequence[str]) -> int:
    """Tell what anything is that `nextblock.load` reads, and what other weight files hold."""
    from rich.console import Console
    from rich.table import Table

    from nextblock.cli.arguments import build_parser, parse
    from nextblock.interop.reading import Told

    parser = build_parser("info", "Tell what a run or a weight file holds.")
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
    options = parse(parser, argv)
    given = Told(head=options.head, num_heads=options.num_heads, image_size=options.image_size)
    told = _describe(options.file, given)
    if options.json:
        end_with_json(told)
        return 0
    table = Table(show_header=False)
    for name, value in told.items():
        table.add_row(name, str(value))
    Console().print(table)
    return 0


def _describe(src: str, told: Told) -> dict[str, Any]:
    """What a source is: a model as far as it can be told, else its tensors."""
    from nextblock.checkpoint import MissingSettingError, UnknownFormatError
    from nextblock.interop.reading import read, weight_file

    untold: dict[str, str] = {}
    while True:
        try:
            return _describe_model(read(src, told), untold)
        except MissingSettingError as error:
            if error.setting not in STAND_INS:
                raise
            untold[error.setting] = str(error)
            told = replace(told, **{error.setting: STAND_INS[error.setting]})
        except UnknownFormatError as error:
            return _describe_tensors(weight_file(src), str(error))


def _describe_model(found: Found, untold: Mapping[str, str]) -> dict[str, Any]:
    from nextblock.models import NextBlockModel
    from nextblock.models.heads import ImageClassifier
    from nextblock.models.timm_encoder import TimmConfig
    from nextblock.settings import to_dict

    model = found.model
    is_classifier = isinstance(model, ImageClassifier)
    encoder_model = model.encoder_model if is_classifier else model
    config = encoder_model.config
    if isinstance(config, TimmConfig):
        what, grid = f"timm's {config.architecture}", {}
    else:
        what = "heads not told" if "num_heads" in untold else f"{config.num_heads} heads"
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
    if found.image_size_assumed:
        told["image_size (assumed)"] = ASSUMED_SIZE
    for name, why in untold.items():
        told[f"{name} (untold)"] = why
        section = told["config"] if name in told["config"] else told.get("head", {})
        section["layers" if name == "probe_layers" else name] = None
    return told


def _describe_tensors(path: Path, why: str) -> dict[str, Any]:
    """A file of tensors that is no model: the head of a classifier, or anything."""
    from nextblock.checkpoint import is_safetensors, read_metadata
    from nextblock.interop.aim import is_aim_head
    from nextblock.interop.files import read_content

    content = read_content(path)
    if not isinstance(content, Mapping):
        return {"kind": type(content).__name__, "why": why}
    shapes = {name: list(value.shape) for name, value in content.items() if hasattr(value, "shape")}
    kind = "head of an AIM classifier" if is_aim_head(content) else "tensors"
    told: dict[str, Any] = {"kind": kind, "why": why, "tensors": dict(list(shapes.items())[:MAX_TENSORS])}
    if len(shapes) > MAX_TENSORS:
        told["further_tensors"] = len(shapes) - MAX_TENSORS
    if is_safetensors(path) and read_metadata(path):
        told["metadata"] = read_metadata(path)
    return told
