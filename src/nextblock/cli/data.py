"""`nextblock data pack | sample | split`: shards of a source, and parts of it by list."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nextblock.cli.output import end_with_json
from nextblock.config import DataConfig
from nextblock.settings import nearest_name

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from nextblock.data import Source

__all__ = ["run"]

WHATS = {
    "pack": "write a source as tar shards: bytes kept, re-encoded, or cut into tiles",
    "sample": "draw a part of a source: a fraction, a number, or as many of each class",
    "split": "divide a source into parts, such as train, val and test",
}
SETTINGS = ("channels", "decoder", "max_bad_fraction", "max_pixels", "cache_dir", "cache_gb")
"""Settings of data that reading a source needs."""


def run(argv: Sequence[str]) -> int:
    """Pack, sample or split; print what was written."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    what, rest = argv[0], argv[1:]
    if what not in WHATS:
        raise ValueError(f"unknown command data {what!r}; {nearest_name(what, list(WHATS))}")
    return {"pack": _pack, "sample": _sample, "split": _split}[what](rest)


def _pack(argv: Sequence[str]) -> int:
    from nextblock.data.pack import PackConfig, pack

    parser = _parser("pack", "Write the images of a source as tar shards, with an index beside each.")
    parser.add_argument("dst", type=str, help="folder to write; the same command again goes on")
    parser.add_class_arguments(PackConfig, None)
    options, data = _parse(parser, argv)
    names = [name for name in PackConfig.__dataclass_fields__ if name in options]
    config = PackConfig(**{name: options[name] for name in names})
    source = _open(options.src, data)
    with _progress(source.spec, len(source)) as progress:
        done = pack(source, Path(options.dst).expanduser(), config, data, progress)
    shards = f"{done.shards} shard{'s' * (done.shards != 1)}, {done.num_bytes / 1e6:.2f} MB"
    sys.stdout.write(f"{done.samples} images in {shards}: {done.spec}\n")
    if done.bad:
        listed = Path(done.place) / "quarantine.jsonl"
        sys.stdout.write(f"{done.bad} of {done.images} left out, as they cannot be read: {listed}\n")
    for damage in done.damage:
        sys.stdout.write(f"not whole: {damage}\n")
    if options.json:
        end_with_json(done._asdict())
    return 0


def _sample(argv: Sequence[str]) -> int:
    parser = _parser("sample", "Draw a part of a source, by a seed, and write it as a list.")
    parser.add_argument("out", type=str, help="file to write the list to")
    parser.add_argument("--fraction", type=float | None, default=None, help="share of the images, up to 1")
    parser.add_argument("--count", type=int | None, default=None, help="number of images")
    parser.add_argument("--per_class", type=int | None, default=None, help="number of images of each class")
    parser.add_argument("--seed", type=int, default=0, help="what is drawn is a function of it")
    options, data = _parse(parser, argv)

    from nextblock.data.sources.subsets import draw, draw_per_class, write_subset

    given = [name for name in ("fraction", "count", "per_class") if options[name] is not None]
    if len(given) != 1:
        raise ValueError(
            f"{' and '.join(f'--{name}' for name in given) or 'nothing'} given; give one of --fraction, "
            "--count and --per_class"
        )
    if options.fraction is not None and not 0 < options.fraction <= 1:
        raise ValueError(f"--fraction is {options.fraction}; use above 0, up to 1")
    source = _open(options.src, data)
    if options.per_class is not None:
        numbers = draw_per_class(source, options.per_class, options.seed)
    else:
        count = options.count or max(1, round((options.fraction or 0) * len(source)))
        numbers = draw(source, count if options.count is None else options.count, options.seed)
    spec = write_subset(Path(options.out).expanduser(), source, numbers)
    sys.stdout.write(f"{len(numbers)} of {len(source)} images: {spec}\n")
    if options.json:
        end_with_json({"spec": spec, "images": len(numbers), "of": len(source)})
    return 0


def _split(argv: Sequence[str]) -> int:
    parser = _parser("split", "Divide a source into parts, by a seed, and write each as a list.")
    parser.add_argument(
        "--parts", type=str, help="names and shares: train=0.8,val=0.1,test=0.1", required=True
    )
    parser.add_argument("--out", type=str, help="folder for the lists, NAME.txt each", required=True)
    parser.add_argument("--seed", type=int, default=0, help="the division is a function of it")
    parser.add_argument("--stratify", action="store_true", help="keep the shares within every class")
    options, data = _parse(parser, argv)

    from nextblock.data.sources.subsets import split, write_subset

    parts = _shares(options.parts)
    folder = Path(options.out).expanduser()
    there = [name for name in parts if (folder / f"{name}.txt").exists()]
    if there:
        raise ValueError(f"{folder / there[0]}.txt is there already; remove it, or give another --out")
    source = _open(options.src, data)
    divided = split(source, parts, options.seed, stratify=options.stratify)
    told = []
    for name, numbers in divided.items():
        spec = write_subset(folder / f"{name}.txt", source, numbers)
        told.append({"part": name, "spec": spec, "images": len(numbers)})
        sys.stdout.write(f"{name}: {len(numbers)} of {len(source)} images: {spec}\n")
    left_out = len(source) - sum(map(len, divided.values()))
    if left_out:
        sys.stdout.write(f"{left_out} images are in no part\n")
    if options.json:
        end_with_json({"parts": told, "of": len(source), "left_out": left_out})
    return 0


def _shares(text: str) -> dict[str, float]:
    """Read NAME=SHARE,NAME=SHARE."""
    shares: dict[str, float] = {}
    for item in text.split(","):
        name, _, share = item.partition("=")
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        if not name.replace("_", "").replace("-", "").isalnum() or not 0 < value <= 1:
            raise ValueError(f"--parts {text}: {item!r} is no name and share; write train=0.8,val=0.2")
        if name in shares:
            raise ValueError(f"--parts {text}: {name} is named twice; name each once")
        shares[name] = value
    return shares


# --------------------------------------------------------------------------------------------------- parts


def _parser(what: str, about: str) -> ArgumentParser:
    from nextblock.cli.arguments import build_parser

    parser = build_parser(f"data {what}", about)
    parser.add_argument("src", type=str, help="a directory, X.tar, hf:NAME,split=train or any other source")
    return parser


def _parse(parser: ArgumentParser, argv: Sequence[str]) -> tuple[Namespace, DataConfig]:
    from nextblock.cli.arguments import parse

    others: set[str | int] = {name for name in DataConfig.__dataclass_fields__ if name not in SETTINGS}
    parser.add_class_arguments(DataConfig, "data", skip=others)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parse(parser, argv)
    values = parser.instantiate(options)
    return options, DataConfig(**vars(values["data"]))


def _open(spec: str, data: DataConfig) -> Source:
    from nextblock.data import open_source

    return open_source(spec, data)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's standard error; elsewhere nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def _help() -> str:
    whats = "\n".join(f"  {name:<10}{about}" for name, about in WHATS.items())
    return (
        "usage: nextblock data pack SRC DST [--SETTING VALUE ...]\n"
        "       nextblock data sample SRC OUT.txt --fraction 0.01 | --count N | --per_class K\n"
        "       nextblock data split SRC --parts train=0.8,val=0.2 --out DIR\n\n"
        f"commands:\n{whats}\n\n"
        "nextblock data COMMAND --help lists its settings.\n"
    )
