"""`nextblock info` and `convert`: describe a model, or write it in another format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nextblock.atomic import RUN_FILES
from nextblock.cli.arguments import Parser, parse_settings
from nextblock.cli.output import end_with_json, print_table, say
from nextblock.config import Attention, Size, pair
from nextblock.logs import counted
from nextblock.settings import Auto, Count, Natural, Positive, check_types, to_dict

if TYPE_CHECKING:
    from nextblock.interop.load import Found

MAX_TENSORS = 12
"""Tensors to list of a file that is not a model."""
STAND_INS = {"num_heads": 1, "probe_layers": (0,)}
"""Values for opening a file that does not record these settings; they are reported as unknown."""

# ------------------------------------------------------------------------------------------------------- info


def info(argv: Sequence[str]) -> int:
    """Describe anything that `nextblock.load` reads; list the tensors of other weight files."""
    parser = Parser("info")
    add, given = parser.add_argument, ("head", "num_heads", "image_size")
    add("file", type=str, help="run, checkpoint, weight file, hf:USER/NAME[/FILE] or timm:NAME")
    add("--head", type=str | None, help="file of an AIM classifier's head")
    add("--num_heads", type=Count | None, help="attention heads, if the file does not record them")
    add("--image_size", type=Size | None, help="pixels, or rows,columns, of AIM's images")
    options = parser.parse(argv)

    from nextblock.checkpoint import UnknownFormatError
    from nextblock.evaluate.features import classifier_directory
    from nextblock.interop.files import LoadOptions
    from nextblock.interop.load import read

    known = {name: getattr(options, name) for name in given}
    try:
        found = read(classifier_directory(options.file), LoadOptions(**known, fallback=STAND_INS))
    except UnknownFormatError as error:
        values = _tensors(error.path, error.content, str(error))
        shapes = values.get("tensors", {}).items()
        facts = [("what", values["kind"]), ("why", values["why"])]
        facts += [(name, "x".join(map(str, shape)) or "a number") for name, shape in shapes]
        if "further_tensors" in values:
            facts.append(("more", counted(values["further_tensors"], "tensor")))
    else:
        values, facts = _model(found, options.file)
    if options.json:
        end_with_json(values)
    else:
        print_table((), facts)
    return 0


def _model(found: Found, src: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Describe a model: values for JSON, and the rows of the table."""
    from nextblock.interop.cards import UNSPECIFIED
    from nextblock.interop.convert import provenance_of
    from nextblock.models import NextBlockModel
    from nextblock.models.heads import ImageClassifier
    from nextblock.models.timm_encoder import TimmConfig
    from nextblock.report import read_run
    from nextblock.train.run_dir import recorded_config
    from nextblock.visualize.words import BASELINE_WORDS

    def by(size: int | tuple[int, int]) -> str:
        return "x".join(map(str, pair(size)))

    def millions(number: int) -> str:
        return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}"

    model, encoder_model, assumed = found.model, found.encoder_model, found.assumed
    config = encoder_model.config
    can_predict = isinstance(encoder_model, NextBlockModel) and encoder_model.predictor is not None
    kind, what = ("model", "encoder with predictor") if can_predict else ("encoder", "encoder alone")
    head = None
    if isinstance(model, ImageClassifier):
        kind, head = "classifier", to_dict(model.head_config)
        layers = "" if "probe_layers" in assumed else f" on layer {', '.join(map(str, head['layers']))}"
        what = (
            f"classifier of {counted(head['num_classes'], 'class', 'classes')}, {head['kind']} head{layers}"
        )
    numbers = [sum(w.numel() for w in part.parameters()) for part in (encoder_model.encoder, model)]
    values: dict[str, Any] = {
        "kind": kind,
        "format": found.format,
        "encoder_params": numbers[0],
        "total_params": numbers[1],
        "config": to_dict(config),
        "assumed": dict(assumed),
        **({} if head is None else {"head": head}),
    }
    # Stand-ins do not come from the file.
    if "num_heads" in assumed:
        values["config"]["num_heads"] = None
    if head is not None and "probe_layers" in assumed:
        head["layers"] = None
    facts = [
        ("what", what),
        ("format", found.format + (f", {found.path}" if found.path else "")),
        ("image", f"{by(config.image_size)} px, {counted(config.in_chans, 'channel')}"),
    ]
    size = f"{config.embed_dim} wide, {counted(config.depth, 'layer')}"
    if isinstance(config, TimmConfig):
        facts.append(("encoder", f"{config.architecture}, {size}"))
    else:
        values |= {"grid": list(config.grid), "blocks": config.num_blocks}
        blocks = f"{config.num_blocks:,} ({by(config.block_grid)}) of {by(config.block_size)} patches"
        prefix = ", with a random prefix" if config.prefix else ""
        trained = f"{config.encoder_attention.replace('_', '-')}{prefix} in pre-training"
        target = config.target
        if config.mask_ratio is not None:
            trained, target = "full in pre-training", f"{target} of {config.mask_ratio:.0%} masked blocks"
        if config.teacher is not None:
            target += f" of {config.teacher} (weights {config.teacher_digest})"
        heads = "" if "num_heads" in assumed else f", {counted(config.num_heads, 'head')}"
        facts += [
            ("patches", f"{config.num_patches:,} ({by(config.grid)}) of {by(config.patch_size)} px"),
            ("blocks", f"{blocks}, {by(config.block_px)} px, order {config.order}"),
            ("attention", f"{trained}; {config.feature_attention} for features"),
            *([("predicts", target)] if can_predict else []),
            ("encoder", size + heads),
        ]
    facts.append(("parameters", "{} in the encoder, {} in total".format(*map(millions, numbers))))
    path = (found.path or Path()).absolute()
    places = (path, *path.parents[:3]) if found.format == "nextblock" else ()
    for place in [path for path in places if all((path / file).is_file() for file in RUN_FILES)][:1]:
        run, settings = read_run(place), recorded_config(place)
        # An earlier checkpoint gets its own step and loss, not the run's latest.
        match = re.search(r"checkpoints/step_(\d+)", str(found.path))
        last = run.train[-1]["step"] if run.train else 0
        step = int(match[1]) if match else run.heartbeat.get("step", last)
        loss = next((line["loss"] for line in reversed(run.train) if line["step"] <= step), None)
        values |= {"steps": step, "loss": loss}
        whole = f" of {run.heartbeat['total_steps']:,}" if run.heartbeat.get("total_steps") else ""
        where = f" on {', '.join(settings.data.train_specs)}" if settings else ""
        baselines = (f"{BASELINE_WORDS.get(name, name)} {value:.4f}" for name, value in run.baselines.items())
        facts += [
            ("trained", f"{counted(step, 'step')}{whole}{where}"),
            ("loss", "not logged yet" if loss is None else "; ".join((f"{loss:.4f}", *baselines))),
        ]
        if (val_loss := run.last("val_loss")) is not None:
            facts.append(("val loss", "{:.4f} at step {:,}".format(*val_loss)))
    uses = {"classifier": ["classify", "eval"], "model": ["predict", "pretrain --model.init"]}.get(kind, [])
    uses += ["probe", "knn", "fewshot", "finetune", "embed", "search", "convert"]
    provenance = provenance_of(found, src)
    licence = "" if provenance.license == UNSPECIFIED else f"; licence: {provenance.license}"
    facts += [("good for", ", ".join(uses)), ("came from", provenance.origin + licence)]
    return values, facts + [(f"{name}?", why) for name, why in assumed.items()]


def _tensors(path: Path, content: Any, why: str) -> dict[str, Any]:
    """Describe a file of tensors that is not a model, such as the head of a classifier."""
    from nextblock.checkpoint import is_safetensors, read_metadata
    from nextblock.interop.aim import is_aim_head
    from nextblock.interop.files import unwrapped

    if not isinstance(content, Mapping):
        return {"kind": "no weights", "why": why}
    shapes = {name: list(value.shape) for name, value in content.items() if hasattr(value, "shape")}
    kind = "head of an AIM classifier" if is_aim_head(unwrapped(content)) else "tensors"
    values: dict[str, Any] = {"kind": kind, "why": why, "tensors": dict(list(shapes.items())[:MAX_TENSORS])}
    if len(shapes) > MAX_TENSORS:
        values["further_tensors"] = len(shapes) - MAX_TENSORS
    if path.is_file() and is_safetensors(path) and read_metadata(path):
        values["metadata"] = read_metadata(path)
    return values


# ---------------------------------------------------------------------------------------------------- convert


@dataclass(frozen=True, kw_only=True)
class _ConvertConfig:
    """Settings of `convert`."""

    to: Literal["nextblock", "timm", "onnx"] | Auto = None
    """Format to write; auto: onnx for DST.onnx, else nextblock."""
    image_size: Size | Auto = None
    """Pixels, or rows,columns: the size to write (timm, onnx), or the image size of an AIM file."""
    layers: tuple[Natural, ...] | None = None
    """Layers whose outputs an ONNX file also returns, counted from 0."""
    attention: Attention | None = None
    """Attention mask of the written encoder (timm, onnx); none: native."""
    head: str | None = None
    """File of an AIM classifier's head, if SRC is its backbone."""
    num_heads: Count | None = None
    """Attention heads of the encoder, if the file does not record them."""
    probe_layers: Literal["last", "best"] | tuple[Natural, ...] | None = None
    """Layers that an AIM head averages, if its file lacks them: last, best, or numbers from 0."""
    norm_eps: Positive | None = None
    """Epsilon of the norms of an AIM file."""
    license: str | None = None
    """Licence of the weights, for the model card."""
    origin: str | None = None
    """Where the weights come from, for the model card."""

    def __post_init__(self) -> None:
        check_types(self)


def convert(argv: Sequence[str]) -> int:
    """Convert a model, and print one line about the result."""
    parser = Parser("convert")
    parser.add_argument("src", type=str, help="run, weight file, timm directory, timm:NAME or hf:USER/NAME")
    parser.add_argument("dst", type=str, help="a new path, or hf:USER/NAME")
    given, is_json = parse_settings(parser, _ConvertConfig, argv)

    from nextblock.interop import convert as interop

    done = interop.convert(**given)
    checked = "" if done.difference is None else f", onnxruntime within {done.difference:.0e} of torch"
    say(f"{done.to}: {done.place} ({done.num_bytes / 1e6:.1f} MB{checked})")
    if is_json:
        end_with_json(done._asdict())
    return 0
