"""`nextblock doctor` and `data pack | sample | split`: examine images, pack shards, write subsets."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from nextblock.cli.arguments import Parser, built
from nextblock.cli.output import end_with_json, say, write
from nextblock.cli.verbs import VERBS
from nextblock.config import DataConfig, ModelConfig, PackConfig, Size, pair
from nextblock.errors import UsageError
from nextblock.logs import counted
from nextblock.presets import get_preset, resolve
from nextblock.settings import Auto, Count, Natural, Positive, Rule, check_types, nearest_name, require

if TYPE_CHECKING:
    from argparse import Namespace

    from nextblock.data.doctor import Examination

Fraction = Annotated[float, Rule(lambda share: 0 < share <= 1, "above 0 and up to 1")]
SOURCE = "images: a directory, X.tar, hf:NAME,split=train or any other source"
READING = {"channels", "decoder", "background", "max_bad_fraction", "max_pixels", "cache_dir", "cache_gb"}
"""Data settings that `data` commands need to read a source."""
NOT_OF_DOCTOR = {"train", "val", "weights", "epoch_samples", "workers"}
"""Data settings that `doctor` does not use, or calls by other names."""
FIRST_BAD = 10

# ------------------------------------------------------------------------------------ pack, sample and split


def data(argv: Sequence[str]) -> int:
    """Print the help of `nextblock data`; `UsageError` for an unknown command."""
    commands = {
        verb.removeprefix("data "): row.about for verb, row in VERBS.items() if verb.startswith("data ")
    }
    if argv and argv[0] not in ("-h", "--help", "--help-all"):
        raise UsageError(f"unknown command {argv[0]!r}; {nearest_name(argv[0], list(commands))}")
    lines = [f"{VERBS['data'].about}.", "", *(f"  nextblock data {each}" for each in VERBS["data"].examples)]
    lines += ["", "commands:", *(f"  {name:<8}{about}" for name, about in commands.items())]
    write("\n".join([*lines, "", "nextblock data COMMAND --help explains one.\n"]))
    return 0


def pack(argv: Sequence[str]) -> int:
    """Write shards; print their path, unreadable images, and damage."""
    parser = Parser("data pack")
    parser.add_argument("src", type=str, help=SOURCE)
    parser.add_argument("dst", type=str, help="folder to write; repeating the command resumes")
    parser.add_settings(PackConfig)
    options, settings = _parse(parser, argv)
    config = built(PackConfig, options)

    from nextblock.data.pack import pack as pack_images
    from nextblock.data.sources import open_source

    source = open_source(options.src, settings)
    with _progress(source.spec, len(source)) as progress:
        done = pack_images(source, Path(options.dst), config, settings, progress)
    size = f"{counted(done.shards, 'shard')}, {done.num_bytes / 1e6:.2f} MB"
    _say(f"{counted(done.samples, 'image')} in {size}: {done.spec}")
    if done.bad:
        _say(f"{done.bad} of {done.images} cannot be read: {done.place}/quarantine.jsonl")
    _say(*(f"incomplete: {damage}" for damage in done.damage))
    if options.json:
        end_with_json(done._asdict())
    return 0


def sample(argv: Sequence[str]) -> int:
    """Write a list of randomly drawn images."""
    parser = Parser("data sample")
    add = parser.add_argument
    add("src", type=str, help=SOURCE)
    add("out", type=str, help="file to write the list to")
    add("--fraction", type=Fraction | None, help="share of the images, up to 1")
    add("--count", type=Natural | None, help="number of images")
    add("--per_class", type=Natural | None, help="number of images of each class")
    add("--seed", type=int, default=0, help="the same seed draws the same images (default: 0)")
    options, settings = _parse(parser, argv)
    fraction, count, per_class = options.fraction, options.count, options.per_class
    require([fraction, count, per_class].count(None) == 2, "give one of --fraction, --count and --per_class")

    from nextblock.data.sources import open_source
    from nextblock.data.subsets import draw, draw_per_class, write_subsets

    source = open_source(options.src, settings)
    if per_class is not None:
        numbers = draw_per_class(source, per_class, options.seed)
    else:
        count = count if fraction is None else max(1, round(fraction * len(source)))
        numbers = draw(source, count, options.seed)
    (spec,) = write_subsets(source, {Path(options.out): numbers})
    _say(f"{len(numbers)} of {counted(len(source), 'image')}: {spec}")
    if options.json:
        end_with_json({"spec": spec, "images": len(numbers), "of": len(source)})
    return 0


def split(argv: Sequence[str]) -> int:
    """Write one list per part."""
    parser = Parser("data split")
    add = parser.add_argument
    add("src", type=str, help=SOURCE)
    add("--parts", type=str, required=True, help="names and shares, such as train=0.8,val=0.2")
    add("--out", type=str, required=True, help="folder for the lists, NAME.txt each")
    add("--seed", type=int, default=0, help="the same seed makes the same parts (default: 0)")
    add("--stratify", action="store_true", help="keep the shares within every class")
    options, settings = _parse(parser, argv)
    parts: dict[str, float] = {}
    for item in options.parts.split(","):
        match = re.fullmatch(r"([\w-]+)=(\d*\.?\d+)", item)
        if match is None or match[1] in parts:
            raise UsageError(f"--parts {options.parts}: {item!r} is wrong; write train=0.8,val=0.2")
        parts[match[1]] = float(match[2])

    from nextblock.data import subsets
    from nextblock.data.sources import open_source

    source = open_source(options.src, settings)
    divided = subsets.split(source, parts, options.seed, stratify=options.stratify)
    lists = {Path(options.out) / f"{name}.txt": numbers for name, numbers in divided.items()}
    specs = subsets.write_subsets(source, lists)
    written = [
        {"part": name, "spec": spec, "images": len(divided[name])}
        for name, spec in zip(divided, specs, strict=True)
    ]
    whole = counted(len(source), "image")
    _say(*("{part}: {images} of {whole}: {spec}".format(**part, whole=whole) for part in written))
    left_out = len(source) - sum(part["images"] for part in written)
    if left_out:
        _say(f"not in any part: {counted(left_out, 'image')}")
    if options.json:
        end_with_json({"parts": written, "of": len(source), "left_out": left_out})
    return 0


def _parse(parser: Parser, argv: Sequence[str]) -> tuple[Namespace, DataConfig]:
    """Parse all options, and the settings for reading the source."""
    parser.add_settings(DataConfig, "data", skip=DataConfig.__dataclass_fields__.keys() - READING)
    options = parser.parse(argv)
    return options, built(DataConfig, options, "data")


def _say(*lines: str) -> None:
    """Print lines; control characters and undecodable bytes of a path are escaped."""
    from nextblock.data.sources.base import text

    say(*(text(os.fsencode(line)) for line in lines))


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal; yields a function of the number of images done."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(escape(what), total=total)
        yield lambda done: bar.update(task, completed=done)


# ----------------------------------------------------------------------------------------------------- doctor


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Settings of `doctor`."""

    val: str | None = None
    """Validation images, to examine and to compare with the training images."""
    model: str = "xtra-b16"
    """Model size or preset to check the images for: its image size, patches, blocks and data settings."""
    image_size: Size | Auto = None
    """Image size in pixels: 64 (square), or rows and columns as 32,64 or 32x64; auto: the model's."""
    patch_size: Count | Auto = None
    """Side of a patch in pixels; auto: the model's."""
    block_size: Size | Auto = None
    """Patches along a block's side: 4, or rows and columns as 2,4 or 2x4; auto: the model's."""
    samples: Count | None = None
    """Examine this many images, drawn at random; none: all."""
    workers: Natural | Auto = None
    """Processes that read; auto: one less than the cores, at most 8; 0: the main process."""
    images_per_s: Positive | None = None
    """Images that your GPU trains on per second, to compute how many workers it needs."""
    out: str | None = None
    """JSON file for the full report, including every unreadable file."""

    def __post_init__(self) -> None:
        check_types(self)


def doctor(argv: Sequence[str]) -> int:
    """Examine images and print a report; return 1 if something would stop a run or spoil its results."""
    parser = Parser("doctor")
    parser.add_argument("src", type=str, nargs="+", help="images to train on; several form one mixture")
    parser.add_settings(DoctorConfig)
    parser.add_settings(DataConfig, "data", skip=NOT_OF_DOCTOR)
    options = parser.parse(argv)
    config = built(DoctorConfig, options)
    # As in `pretrain`: the preset's data settings, and what follows from the given ones.
    given = {name: value for name, value in vars(options).items() if name.startswith("data.")}
    run = resolve(get_preset(config.model).config, given)
    settings, model, size_problem = run.data, run.model, None

    from nextblock.atomic import make_directory, write_text

    out = None if config.out is None else Path(config.out)
    if out is not None:
        # Refuse a bad path now, not after hours of reading.
        make_directory(out.parent)
        is_writable = os.access(out.parent, os.W_OK) and not out.is_dir()
        require(is_writable, f"--out {out} cannot be written; name another file")
        is_report = out.is_file() and out.read_bytes().startswith(b'{\n "verdict":')
        require(is_report or not out.exists(), f"--out {out} exists and is no report; name another file")

    from nextblock.data import open_source, open_sources, resolve_workers
    from nextblock.data.doctor import check, crops_per_core_s, examine

    sides = {name: getattr(config, name) for name in ("image_size", "patch_size", "block_size")}
    try:
        model = replace(model, **{name: value for name, value in sides.items() if value is not None})
    except UsageError as error:
        size_problem = str(error)
    sources = [open_sources(options.src, settings)]
    sources += [] if config.val is None else [open_source(config.val, settings)]
    examined: list[Examination] = []
    for source in sources:
        workers = resolve_workers(config.workers, source)
        with _progress(source.spec, min(len(source), config.samples or len(source))) as progress:
            examined.append(examine(source, settings, config.samples, workers, progress))
    train, val, *_ = *examined, None
    report = check(
        train,
        val,
        settings,
        model,
        size_problem=size_problem,
        per_core_s=crops_per_core_s(train.source, settings, model.image_size) if len(train.images) else None,
        images_per_s=config.images_per_s,
    )
    if out is not None:
        write_text(out, json.dumps(report, indent=1) + "\n")
    _say(*_lines(report, config.model, None if size_problem else model))
    if options.json:
        end_with_json(report)
    return 0 if report["fit"] else 1


def _lines(report: dict[str, Any], name: str, model: ModelConfig | None) -> Iterator[str]:
    """Lines of the report: summary, findings, advice, verdict."""
    yield from _summary("training", report["train"])
    if report["per_core_s"] is not None:
        cores = counted(report["cores"], "core")
        yield f"  speed       {report['per_core_s']:,.0f} training crops/s per core; {cores}"
    if model is not None:
        sides = (model.image_size, model.grid, model.block_size)
        size, grid, block = ("x".join(map(str, pair(side))) for side in sides)
        blocks = f"{counted(model.num_blocks, 'block')} of {block}"
        yield f"  model       {name}, {size} px, {grid} patches of {model.patch_size} px in {blocks}"
    if report["val"] is not None:
        yield from _summary("validation", report["val"])
    yield from ("{severity}: {what}: {text}".format(**finding) for finding in report["findings"])
    if report["advice"]:
        yield from ("", "advice for nextblock pretrain:")
        width = max(map(len, report["advice"]))
        yield from (f"  {flags:<{width}}  # {why}" for flags, why in report["advice"].items())
    yield from ("", report["verdict"])


def _summary(name: str, found: dict[str, Any]) -> Iterator[str]:
    bad, examined = found["bad"], found["examined"]
    yield f"{name}: {found['spec']}"
    yield f"  images      {examined:,} of {found['images']:,} examined, {len(bad):,} unreadable"
    yield from ("    {name}: {reason}".format(**sample) for sample in bad[:FIRST_BAD])
    if len(bad) > FIRST_BAD:
        yield f"    ... and {len(bad) - FIRST_BAD:,} more; --out FILE.json lists all"
    if len(bad) == examined:
        return
    yield f"  kinds       {', '.join(f'{kind} {count:,}' for kind, count in found['kinds'].most_common())}"
    for side, (low, median, high) in found["sides_px"].items():
        yield f"  {side.removesuffix('er') + ' side':<12}{low:,.0f} to {high:,.0f} px, median {median:,.0f}"
    if counts := found["class_counts"].values():
        each = " to ".join(f"{number:,}" for number in sorted({min(counts), max(counts)}))
        images = "image" if max(counts) == 1 else "images"
        yield f"  classes     {len(counts):,}, with {each} {images} each"
    yield f"  duplicates  {sum(len(group) - 1 for group in found['duplicates']):,}"
    mean, std = (", ".join(f"{value:.3f}" for value in values) for values in found["mean_std"])
    yield f"  pixels      mean {mean}; deviation {std}"
