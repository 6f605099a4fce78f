"""`nextblock data pack | sample | split`: a source as shards, and lists of some of its images."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nextblock.cli.output import end_with_json
from nextblock.config import DataConfig
from nextblock.errors import UsageError
from nextblock.settings import nearest_name

if TYPE_CHECKING:
    from argparse import Namespace

    from nextblock.cli.arguments import Parser

HELP = """\
usage: nextblock data pack SRC DST [--SETTING VALUE ...]
       nextblock data sample SRC OUT.txt --fraction 0.01 | --count N | --per_class K
       nextblock data split SRC --parts train=0.8,val=0.2 --out DIR

commands:
  pack      write a source as tar shards: bytes kept, re-encoded, or cut into tiles
  sample    draw some images of a source: a fraction, a number, or as many of each class
  split     divide a source into parts, such as train, val and test

nextblock data COMMAND --help lists its settings.
"""
SETTINGS = ("channels", "decoder", "background", "max_bad_fraction", "max_pixels", "cache_dir", "cache_gb")
"""Settings of data that reading a source needs."""


def run(argv: Sequence[str]) -> int:
    """Pack, sample or split; print what was written."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0
    commands = {"pack": _pack, "sample": _sample, "split": _split}
    if argv[0] not in commands:
        raise UsageError(f"unknown command data {argv[0]!r}; {nearest_name(argv[0], list(commands))}")
    return commands[argv[0]](argv[1:])


def _pack(argv: Sequence[str]) -> int:
    from nextblock.cli.arguments import built
    from nextblock.data.pack import PackConfig, pack
    from nextblock.data.sources import open_source

    parser = _parser("pack", "Write the images of a source as tar shards, with an index beside each.")
    parser.add_argument("dst", type=str, help="folder to write; the same command again resumes or reads it")
    parser.add_settings(PackConfig)
    options, data = _parse(parser, argv)
    config = built(PackConfig, options)
    source = open_source(options.src, data)
    with _progress(source.spec, len(source)) as progress:
        done = pack(source, Path(options.dst).expanduser(), config, data, progress)
    size = f"{done.shards} shard{'s' * (done.shards != 1)}, {done.num_bytes / 1e6:.2f} MB"
    lines = [f"{done.samples} images in {size}: {done.spec}"]
    if done.bad:
        lines.append(f"{done.bad} of {done.images} cannot be read: {done.place}/quarantine.jsonl")
    _say(*lines, *(f"not whole: {damage}" for damage in done.damage))
    if options.json:
        end_with_json(done._asdict())
    return 0


def _sample(argv: Sequence[str]) -> int:
    from nextblock.data.sources import open_source
    from nextblock.data.subsets import draw, draw_per_class, write_subset

    parser = _parser("sample", "Draw some images of a source, and write them as a list.")
    parser.add_argument("out", type=str, help="file to write the list to")
    parser.add_argument("--fraction", type=float | None, default=None, help="share of the images, up to 1")
    parser.add_argument("--count", type=int | None, default=None, help="number of images")
    parser.add_argument("--per_class", type=int | None, default=None, help="number of images of each class")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds draw equal images")
    options, data = _parse(parser, argv)
    fraction, count, per_class = options.fraction, options.count, options.per_class
    if [fraction, count, per_class].count(None) != 2:
        raise UsageError("give one of --fraction, --count and --per_class")
    if fraction is not None and not 0 < fraction <= 1:
        raise UsageError(f"--fraction is {fraction}; use above 0, up to 1")
    source = open_source(options.src, data)
    if per_class is not None:
        numbers = draw_per_class(source, per_class, options.seed)
    else:
        count = count if fraction is None else max(1, round(fraction * len(source)))
        numbers = draw(source, count, options.seed)
    spec = write_subset(Path(options.out).expanduser(), source, numbers)
    _say(f"{len(numbers)} of {len(source)} images: {spec}")
    if options.json:
        end_with_json({"spec": spec, "images": len(numbers), "of": len(source)})
    return 0


def _split(argv: Sequence[str]) -> int:
    from nextblock.data.sources import open_source
    from nextblock.data.subsets import split, write_subset

    parser = _parser("split", "Divide a source into parts, and write each as a list.")
    parser.add_argument("--parts", type=str, required=True, help="names and shares: train=0.8,val=0.2")
    parser.add_argument("--out", type=str, required=True, help="folder for the lists, NAME.txt each")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds make equal parts")
    parser.add_argument("--stratify", action="store_true", help="keep the shares within every class")
    options, data = _parse(parser, argv)
    parts: dict[str, float] = {}
    for item in options.parts.split(","):
        match = re.fullmatch(r"([\w-]+)=(\d*\.?\d+)", item)
        if match is None or match[1] in parts:
            raise UsageError(f"--parts {options.parts}: {item!r} is wrong; write train=0.8,val=0.2")
        parts[match[1]] = float(match[2])
    lists = {name: Path(options.out).expanduser() / f"{name}.txt" for name in parts}
    source = open_source(options.src, data)
    written = []
    for name, numbers in split(source, parts, options.seed, stratify=options.stratify).items():
        spec = write_subset(lists[name], source, numbers)
        written.append({"part": name, "spec": spec, "images": len(numbers)})
        _say(f"{name}: {len(numbers)} of {len(source)} images: {spec}")
    left_out = len(source) - sum(part["images"] for part in written)
    if left_out:
        _say(f"{left_out} images are in no part")
    if options.json:
        end_with_json({"parts": written, "of": len(source), "left_out": left_out})
    return 0


def _parser(what: str, about: str) -> Parser:
    from nextblock.cli.arguments import Parser

    parser = Parser(f"data {what}", about)
    parser.add_argument("src", type=str, help="a directory, X.tar, hf:NAME,split=train or any other source")
    return parser


def _parse(parser: Parser, argv: Sequence[str]) -> tuple[Namespace, DataConfig]:
    from nextblock.cli.arguments import built

    others = {name for name in DataConfig.__dataclass_fields__ if name not in SETTINGS}
    parser.add_settings(DataConfig, "data", skip=others)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse(argv)
    return options, built(DataConfig, options, "data")


def _say(*lines: str) -> None:
    """Print lines; bytes of a path that are no text appear escaped."""
    from nextblock.data.sources.names import text

    sys.stdout.writelines(text(os.fsencode(line)) + "\n" for line in lines)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's standard error; elsewhere nothing."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(escape(what), total=total)
        yield lambda done: bar.update(task, completed=done)
