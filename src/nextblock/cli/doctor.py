"""`nextblock doctor`: examine images before training."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextblock.config import DataConfig, ModelConfig, Size, pair
from nextblock.presets import model_config
from nextblock.settings import check_types, require

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from nextblock.data.diagnosis import Checkup, Finding
    from nextblock.data.doctor import Examination, Progress

__all__ = ["DoctorConfig", "run"]

OURS = ("train", "val", "weights", "epoch_samples", "workers")
"""Settings of data that have other names here, or no meaning."""
FIRST_BAD = 10


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What to examine, and for which model."""

    val: str | None = None
    """Images to validate on: examined too, and searched for images that are also trained on."""
    model: str = "xtra-b16"
    """Size or preset whose image size, patches and blocks are checked."""
    image_size: Size | None = None
    """Side of the square image in pixels, or (rows, columns); null: the model's."""
    patch_size: int | None = None
    """Side of a patch in pixels; null: the model's."""
    block_size: Size | None = None
    """Patches along a block's side, or (rows, columns); null: the model's."""
    samples: int | None = None
    """Examine as many images, drawn at random; null: all."""
    workers: int | None = None
    """Processes that read; null: up to 8, one less than there are cores; 0: in the main process."""
    images_per_s: float | None = None
    """Images that the GPU takes in a second: tells how many workers that needs."""
    out: str | None = None
    """JSON file for all that was found, every broken file included."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("patch_size", "samples"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} is {value}; use at least 1")
        for name in ("image_size", "block_size"):
            value = getattr(self, name)
            require(value is None or min(pair(value)) >= 1, f"{name} is {value}; use at least 1")
        require(self.workers is None or self.workers >= 0, f"workers is {self.workers}; use 0 or more")
        require(
            self.images_per_s is None or self.images_per_s > 0,
            f"images_per_s is {self.images_per_s}; use a number above 0",
        )

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes that were asked for."""
        named = {name: getattr(self, name) for name in ("image_size", "patch_size", "block_size")}
        return {name: value for name, value in named.items() if value is not None}


def run(argv: Sequence[str]) -> int:
    """Examine, print what was found; 1 where something would stop or spoil a run."""
    from rich.console import Console

    from nextblock.cli.arguments import build_parser, parse

    parser = build_parser(
        "doctor", "Examine images before training; the exit code is 1 where a run would fail."
    )
    parser.add_argument("src", type=str, nargs="+", help="images to train on; several are one mixture")
    parser.add_class_arguments(DoctorConfig, None)
    parser.add_class_arguments(DataConfig, "data", skip=set(OURS))
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parse(parser, argv)
    values = vars(parser.instantiate(options))
    data: DataConfig = DataConfig(**vars(values.pop("data")))
    src, as_json = values.pop("src"), values.pop("json")
    config = DoctorConfig(**values)

    from nextblock.data.diagnosis import diagnose, report

    out = None if config.out is None else _writable(Path(config.out))
    checkup = _examine(config, data, src, Console(stderr=True))
    findings, told = diagnose(checkup), report(checkup)
    _print(Console(), checkup, findings)
    if out is not None:
        out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if as_json:
        sys.stdout.write(json.dumps(told) + "\n")
    return 0 if told["healthy"] else 1


def _writable(path: Path) -> Path:
    """The file, made now: not after hours of reading should it turn out that it cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written: {error.strerror}; name another file") from error
    return path


def _examine(config: DoctorConfig, data: DataConfig, src: Sequence[str], console: Console) -> Checkup:
    """Everything that takes time."""
    from nextblock.data import open_source, open_sources, resolve_workers
    from nextblock.data.diagnosis import Checkup, geometry_finding
    from nextblock.data.doctor import examine, images_per_core_s

    model = model_config(config.model)
    geometry = geometry_finding(model, **config.sizes)
    model = model if geometry is not None else replace(model, **config.sizes)
    sources = {"train": open_sources(src, data)}
    if config.val is not None:
        sources["val"] = open_source(config.val, data)
    found: dict[str, Examination] = {}
    for name, source in sources.items():
        with _progress(console, source.spec, min(len(source), config.samples or len(source))) as progress:
            found[name] = examine(
                source,
                data,
                samples=config.samples,
                workers=resolve_workers(config.workers, source),
                progress=progress,
            )
    return Checkup(
        train=found["train"],
        val=found.get("val"),
        data=data,
        model=model,
        geometry=geometry,
        per_core_s=_rate(images_per_core_s, found["train"], data, model),
        images_per_s=config.images_per_s,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


def _rate(
    measure: Callable[..., float | None], found: Examination, data: DataConfig, model: ModelConfig
) -> float | None:
    """Training crops a second and core, if anything can be read at all."""
    return measure(found.source, data, model.image_size) if found.num_readable else None


@contextmanager
def _progress(console: Console, what: str, total: int) -> Iterator[Progress]:
    """A bar on a terminal, with the number of files that cannot be read."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[bad]} unreadable"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, bad=0)
        yield lambda examined, bad: bar.update(task, completed=examined, bad=bad)


# ----------------------------------------------------------------------------------------------- printing


def _print(console: Console, checkup: Checkup, findings: Sequence[Finding]) -> None:
    from rich.table import Table

    for title, found in (("", checkup.train), ("validation: ", checkup.val)):
        if found is None:
            continue
        table = Table(title=f"{title}{found.source.spec}", show_header=False, title_justify="left")
        for name, value in _rows(found):
            table.add_row(name, value)
        if found is checkup.train:
            _add_model_rows(table, checkup)
        console.print(table)
        _print_bad(console, found)
    for finding in findings:
        console.print(
            f"{finding.severity}: {finding.what}: {finding.text}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    decisive = next((finding for finding in findings if finding.severity == "problem"), None)
    verdict = "healthy" if decisive is None else f"not fit for training, because of: {decisive.what}"
    console.print(verdict, highlight=False, markup=False, soft_wrap=True)


def _rows(found: Examination) -> Iterator[tuple[str, str]]:
    from nextblock.data.diagnosis import size_summary
    from nextblock.data.doctor import duplicates

    rate = found.examined / max(found.elapsed_s, 1e-9)
    yield "images", f"{len(found.source):,}"
    yield "examined", f"{found.examined:,} in {found.elapsed_s:,.1f} s ({rate:,.0f} images/s)"
    yield "unreadable", f"{found.num_bad:,} ({found.num_bad / max(1, found.examined):.2%})"
    yield "formats", _counted(found.formats)
    yield "modes", _counted(found.modes)
    yield "among them", _counted(found.traits)
    for name, (low, middle, high) in (size_summary(found) or {}).items():
        yield f"{name} px", f"{low:,.0f} to {high:,.0f}, median {middle:,.0f}"
    repeats = duplicates(found.digests, found.readable)
    yield "duplicates", f"{repeats.surplus:,} in {len(repeats):,} groups"
    counts = found.class_counts()
    if counts is not None:
        yield "classes", f"{len(counts):,} of {counts.min():,} to {counts.max():,} images"
    if found.statistics is not None:
        yield "mean", ", ".join(f"{value:.4f}" for value in found.statistics.mean)
        yield "deviation", ", ".join(f"{value:.4f}" for value in found.statistics.std)


def _add_model_rows(table: Table, checkup: Checkup) -> None:
    if checkup.geometry is None:
        model = checkup.model
        grid, block = "x".join(map(str, model.grid)), "x".join(map(str, pair(model.block_size)))
        table.add_row("grid", f"{grid} patches in {model.num_blocks} blocks of {block}")
    if checkup.per_core_s is not None:
        table.add_row("training crops", f"{checkup.per_core_s:,.0f} images/s and core")
    if checkup.workers_needed is not None:
        table.add_row("workers", f"{checkup.workers_needed} for {checkup.images_per_s:,.0f} images/s")


def _counted(counts: Mapping[str, int]) -> str:
    by_number = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count:,}" for name, count in by_number) or "-"


def _print_bad(console: Console, found: Examination) -> None:
    """The first files that cannot be read; --out lists all."""
    for bad in islice(found.bad(), FIRST_BAD):
        line = " ".join(f"unreadable: {bad.name}: {bad.reason}".split())
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if found.num_bad > FIRST_BAD:
        console.print(
            f"... and {found.num_bad - FIRST_BAD:,} more; --out FILE.json lists all", highlight=False
        )
