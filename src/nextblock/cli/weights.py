"""`nextblock info`, `convert` and `predict`: what a model is, in another format, and what it predicts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nextblock.atomic import RUN_FILES
from nextblock.cli.arguments import Parser, parse_settings
from nextblock.cli.output import end_with_json, print_table, say
from nextblock.config import Attention, Size, pair
from nextblock.errors import UsageError
from nextblock.logs import counted
from nextblock.prediction import PredictConfig
from nextblock.settings import Auto, Count, Natural, Positive, check_types, to_dict

if TYPE_CHECKING:
    from nextblock.interop.load import Found
    from nextblock.visualize.report import RunSummary

MAX_TENSORS = 12
"""How many tensors of a file that is no model are listed."""
STAND_INS = {"num_heads": 1, "probe_layers": (0,)}
"""Values to look at a file with if it does not record a setting; they are reported as unknown."""

# ------------------------------------------------------------------------------------------------------- info


def info(argv: Sequence[str]) -> int:
    """Describe anything that `nextblock.load` reads, and list the tensors of other weight files."""
    parser = Parser("info")
    add, given = parser.add_argument, ("head", "num_heads", "image_size")
    add("file", type=str, help="run, checkpoint, weight file, hf:USER/NAME[/FILE] or timm:NAME")
    add("--head", type=str | None, help="file of an AIM classifier's head")
    add("--num_heads", type=Count | None, help="attention heads, if the file does not record them")
    add("--image_size", type=Size | None, help="pixels, or rows,columns, of AIM's images")
    options = parser.parse(argv)

    from nextblock.checkpoint import UnknownFormatError
    from nextblock.interop.files import LoadOptions
    from nextblock.interop.load import read

    known = {name: getattr(options, name) for name in given}
    try:
        found = read(options.file, LoadOptions(**known, fallback=STAND_INS))
    except UnknownFormatError as error:
        values = _tensors(error.path, error.content, str(error))
        shapes = values.get("tensors", {}).items()
        facts = [("what", values["kind"]), ("why", values["why"])]
        facts += [(name, "x".join(map(str, shape)) or "a number") for name, shape in shapes]
        if "further_tensors" in values:
            facts.append(("more", counted(values["further_tensors"], "tensor")))
    else:
        run = _run_of(found)
        values, facts = _model(found, run), list(_facts(found, run, options.file))
    if options.json:
        end_with_json(values)
    else:
        print_table((), facts)
    return 0


def _run_of(found: Found) -> RunSummary | None:
    """What a run's files say of it, if the model is a run's."""
    from nextblock.visualize.report import read_run

    path = (found.path or Path()).absolute()
    places = (path, *path.parents[:3]) if found.format == "nextblock" else ()
    runs = (place for place in places if all((place / file).is_file() for file in RUN_FILES))
    return next(map(read_run, runs), None)


def _facts(found: Found, run: RunSummary | None, src: str) -> Iterator[tuple[str, str]]:
    """The rows of the table, from what it is to where it came from."""
    from nextblock.interop.cards import UNSPECIFIED
    from nextblock.interop.convert import provenance_of
    from nextblock.models.timm_encoder import TimmConfig
    from nextblock.train.run_dir import recorded_config
    from nextblock.visualize.words import BASELINE_WORDS

    def by(size: int | tuple[int, int]) -> str:
        return "x".join(map(str, pair(size)))

    values = _model(found, run)
    head, kind, config = values.get("head"), values["kind"], found.encoder_model.config
    what = "encoder with predictor" if kind == "model" else "encoder alone"
    if head is not None:
        layers = "" if head["layers"] is None else f" on layer {', '.join(map(str, head['layers']))}"
        classes = counted(head["num_classes"], "class", "classes")
        what = f"classifier of {classes}, {head['kind']} head{layers}"
    yield "what", what
    yield "format", f"{found.format}" + (f", {found.path}" if found.path else "")
    yield "image", f"{by(config.image_size)} px, {counted(config.in_chans, 'channel')}"
    if isinstance(config, TimmConfig):
        yield "encoder", f"{config.architecture}, {config.embed_dim} wide, {counted(config.depth, 'layer')}"
    else:
        yield "patches", f"{config.num_patches:,} ({by(config.grid)}) of {by(config.patch_size)} px"
        blocks = f"{config.num_blocks:,} ({by(config.block_grid)}) of {by(config.block_size)} patches"
        yield "blocks", f"{blocks}, {by(config.block_px)} px, order {config.order}"
        prefix = ", with a random prefix" if config.prefix else ""
        trained = f"{config.encoder_attention.replace('_', '-')}{prefix} in pre-training"
        yield "attention", f"{trained}; {config.feature_attention} for features"
        heads = "" if "num_heads" in found.assumed else f", {counted(config.num_heads, 'head')}"
        yield "encoder", f"{config.embed_dim} wide, {counted(config.depth, 'layer')}{heads}"
    numbers = (values["encoder_params"], values["total_params"])
    sizes = (f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}" for number in numbers)
    yield "parameters", "{} in the encoder, {} in all".format(*sizes)
    if run is not None:
        settings, loss, total = recorded_config(run.run_dir), values["loss"], run.heartbeat.get("total_steps")
        whole = f" of {total:,}" if total else ""
        where = f" on {', '.join(settings.data.train_specs)}" if settings else ""
        yield "trained", f"{counted(values['steps'], 'step')}{whole}{where}"
        baselines = (f"{BASELINE_WORDS.get(name, name)} {value:.4f}" for name, value in run.baselines.items())
        yield "loss", "not logged yet" if loss is None else "; ".join((f"{loss:.4f}", *baselines))
        if run.final_val_loss is not None:
            yield "val loss", f"{run.final_val_loss[0]:.4f} at step {run.final_val_loss[1]:,}"
    uses = {"classifier": ["classify"], "model": ["predict", "pretrain --model.init"]}.get(kind, [])
    uses += ["probe", "knn", "fewshot", "finetune", "embed", "search", "convert"]
    yield "good for", ", ".join(uses)
    provenance = provenance_of(found, src)
    licence = "" if provenance.license == UNSPECIFIED else f"; licence: {provenance.license}"
    yield "came from", provenance.origin + licence
    yield from ((f"{name}?", why) for name, why in found.assumed.items())


def _model(found: Found, run: RunSummary | None) -> dict[str, Any]:
    """All that is known of a model, for JSON."""
    from nextblock.models import NextBlockModel
    from nextblock.models.heads import ImageClassifier
    from nextblock.models.timm_encoder import TimmConfig

    model, encoder_model = found.model, found.encoder_model
    config, is_classifier = encoder_model.config, isinstance(model, ImageClassifier)
    can_predict = isinstance(encoder_model, NextBlockModel) and encoder_model.predictor is not None
    values: dict[str, Any] = {
        "kind": "classifier" if is_classifier else "model" if can_predict else "encoder",
        "format": found.format,
        "encoder_params": sum(p.numel() for p in encoder_model.encoder.parameters()),
        "total_params": sum(p.numel() for p in model.parameters()),
        "config": to_dict(config),
        "assumed": dict(found.assumed),
    }
    if not isinstance(config, TimmConfig):
        values |= {"grid": list(config.grid), "blocks": config.num_blocks}
    if is_classifier:
        values["head"] = to_dict(model.head_config)
    if run is not None:
        # A checkpoint before the last has steps and loss of its own.
        named = re.search(r"checkpoints/step_(\d+)", str(found.path))
        step = (
            int(named[1]) if named else run.heartbeat.get("step", run.train[-1]["step"] if run.train else 0)
        )
        loss = next((line["loss"] for line in reversed(run.train) if line["step"] <= step), None)
        values |= {"steps": step, "loss": loss}
    # A stand-in is not what the file holds.
    for name in found.assumed.keys() & STAND_INS.keys():
        section = values["config"] if name in values["config"] else values.get("head", {})
        section["layers" if name == "probe_layers" else name] = None
    return values


def _tensors(path: Path, content: Any, why: str) -> dict[str, Any]:
    """A file of tensors that is no model: the head of a classifier, or anything."""
    from nextblock.checkpoint import is_safetensors, read_metadata
    from nextblock.interop.aim import is_aim_head

    if not isinstance(content, Mapping):
        return {"kind": "no weights", "why": why}
    shapes = {name: list(value.shape) for name, value in content.items() if hasattr(value, "shape")}
    kind = "head of an AIM classifier" if is_aim_head(content) else "tensors"
    values: dict[str, Any] = {"kind": kind, "why": why, "tensors": dict(list(shapes.items())[:MAX_TENSORS])}
    if len(shapes) > MAX_TENSORS:
        values["further_tensors"] = len(shapes) - MAX_TENSORS
    if path.is_file() and is_safetensors(path) and read_metadata(path):
        values["metadata"] = read_metadata(path)
    return values


# ---------------------------------------------------------------------------------------------------- convert


@dataclass(frozen=True, kw_only=True)
class _ConvertConfig:
    """What to write, and what the source does not record."""

    to: Literal["nextblock", "timm", "onnx"] | Auto = None
    """Format to write; auto: onnx for DST.onnx, else nextblock."""
    image_size: Size | Auto = None
    """Pixels, or rows,columns: the size to write (timm, onnx), or that of an AIM file's images."""
    layers: tuple[Natural, ...] | None = None
    """Layers whose outputs an ONNX file gives as well, counted from 0."""
    attention: Attention | None = None
    """Attention mask of the encoder that is written (timm, onnx); none: native."""
    head: str | None = None
    """File of an AIM classifier's head, if SRC is its backbone."""
    num_heads: Count | None = None
    """Attention heads of the encoder, if the file does not record them."""
    probe_layers: tuple[str, ...] | None = None
    """Layers that an AIM head averages: last, best, or numbers from 0; if its file does not say."""
    norm_eps: Positive | None = None
    """Epsilon of the norms of an AIM file."""
    license: str | None = None
    """Licence of the weights, for the model card."""
    origin: str | None = None
    """Where the weights come from, for the model card."""

    def __post_init__(self) -> None:
        check_types(self)


def convert(argv: Sequence[str]) -> int:
    """Convert; print one line of what was written."""
    parser = Parser("convert")
    parser.add_argument("src", type=str, help="run, weight file, timm directory, timm:NAME or hf:USER/NAME")
    parser.add_argument("dst", type=str, help="a new path, or hf:USER/NAME")
    given, is_json = parse_settings(parser, _ConvertConfig, argv)

    from nextblock.interop import convert as interop

    layers = given.pop("probe_layers")
    if layers in (("last",), ("best",)):
        (layers,) = layers
    elif layers is not None:
        if not all(word.isdecimal() for word in layers):
            words = " ".join(layers)
            raise UsageError(f"--probe_layers {words}: give last, best, or numbers of layers from 0")
        layers = tuple(map(int, layers))
    done = interop.convert(**given, probe_layers=layers)
    checked = "" if done.difference is None else f", onnxruntime within {done.difference:.0e} of torch"
    say(f"{done.to}: {done.place} ({done.num_bytes / 1e6:.1f} MB{checked})")
    if is_json:
        end_with_json(done._asdict())
    return 0


# ---------------------------------------------------------------------------------------------------- predict


def predict(argv: Sequence[str]) -> int:
    """Draw predictions; print a table of losses."""
    values, is_json = parse_settings(Parser("predict"), PredictConfig, argv)

    from nextblock import prediction
    from nextblock.visualize.words import BASELINE_WORDS

    result = prediction.predict(**values)
    head = ["image", "loss", *(BASELINE_WORDS[name] for name in result.rows[0].baselines)]
    losses = ((row.loss, *row.baselines.values()) for row in result.rows)
    rows = [
        (row.name, *(f"{value:.3f}" for value in numbers))
        for row, numbers in zip(result.rows, losses, strict=True)
    ]
    print_table(head, rows)
    say(f"picture: {result.picture}")
    if result.bad:
        named = [" ".join(f"{sample.name}: {sample.reason}".split()) for sample in result.bad[:3]]
        more = ["..."] if len(result.bad) > len(named) else []
        chosen = counted(len(result.rows) + len(result.bad), "image")
        say(f"{len(result.bad)} of {chosen} could not be read: " + "; ".join(named + more))
    if is_json:
        bad = [{"name": sample.name, "reason": sample.reason} for sample in result.bad]
        rows = [row.as_dict() for row in result.rows]
        picture = {"picture": str(result.picture), "mean_loss": result.mean_loss}
        end_with_json({**picture, "rows": rows, "bad": bad})
    return 0
