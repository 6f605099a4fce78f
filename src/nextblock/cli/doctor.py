"""`nextblock doctor`: examine images before training."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nextblock.cli.output import end_with_json, say
from nextblock.config import DataConfig, Size, pair
from nextblock.presets import model_config
from nextblock.settings import check_types, require

if TYPE_CHECKING:
    from nextblock.data.advice import Checkup
    from nextblock.data.doctor import Examination

NOT_HERE = {"train", "val", "weights", "epoch_samples", "workers"}
"""Settings of data that have other names here, or no meaning."""
FIRST_BAD = 10


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What to examine, and for which model."""

    val: str | None = None
    """Images to validate on: also examined, and compared with the training images."""
    model: str = "xtra-b16"
    """Model size or preset to check the image size, patches and blocks of."""
    image_size: Size | None = None
    """Side of the square image in pixels, or (rows, columns); null: the model's."""
    patch_size: int | None = None
    """Side of a patch in pixels; null: the model's."""
    block_size: Size | None = None
    """Patches along a block's side, or (rows, columns); null: the model's."""
    samples: int | None = None
    """Examine this many images, drawn at random; null: all."""
    workers: int | None = None
    """Processes that read; null: up to 8, one less than there are cores; 0: the main process."""
    images_per_s: float | None = None
    """Images that your GPU takes in a second, to work out how many workers it needs."""
    out: str | None = None
    """JSON file for everything that was found, including every unreadable file."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("image_size", "patch_size", "block_size", "samples", "workers"):
            value, least = getattr(self, name), int(name != "workers")
            require(value is None or min(pair(value)) >= least, f"{name} is {value}; use at least {least}")
        rate = self.images_per_s
        require(rate is None or 0 < rate < math.inf, f"images_per_s is {rate}; use a number above 0")


def run(argv: Sequence[str]) -> int:
    """Examine, print what was found; 1 if something would stop a run or spoil its results."""
    from nextblock.atomic import write_text
    from nextblock.cli.arguments import Parser, built

    parser = Parser("doctor", "Examine images before training; the exit code is 1 if a run would fail.")
    parser.add_argument("src", type=str, nargs="+", help="images to train on; several are one mixture")
    parser.add_settings(DoctorConfig)
    parser.add_settings(DataConfig, "data", skip=NOT_HERE)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse(argv)
    config, data = built(DoctorConfig, options), built(DataConfig, options, "data")
    out = None if config.out is None else Path(config.out).expanduser()
    if out is not None:
        # Refused now, and not after hours of reading.
        existing = next(path for path in (out, *out.parents) if path.exists())
        is_writable = os.access(existing, os.W_OK) and (existing != out) == existing.is_dir()
        require(is_writable, f"--out {out} cannot be written; name another file")
        out.parent.mkdir(parents=True, exist_ok=True)
    checkup = _examine(config, data, options.src)
    say(*_lines(checkup, config.model))
    report = checkup.report()
    if out is not None:
        write_text(out, json.dumps(report, indent=1) + "\n")
    if options.json:
        end_with_json(report)
    return 0 if report["fit"] else 1


def _examine(config: DoctorConfig, data: DataConfig, src: Sequence[str]) -> Checkup:
    """Everything that takes time."""
    from nextblock.data import open_source, open_sources, resolve_workers
    from nextblock.data.advice import Checkup
    from nextblock.data.doctor import crops_per_core_s, examine

    model, size_problem = model_config(config.model), None
    given = {name: getattr(config, name) for name in ("image_size", "patch_size", "block_size")}
    try:
        model = replace(model, **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        size_problem = str(error)
    train = open_sources(src, data)
    sources = [train] if config.val is None else [train, open_source(config.val, data)]
    found: list[Examination] = []
    for source in sources:
        workers = resolve_workers(config.workers, source)
        with progress_bar(min(len(source), config.samples or len(source))) as progress:
            found.append(examine(source, data, samples=config.samples, workers=workers, progress=progress))
    return Checkup(
        train=found[0],
        val=found[1] if len(found) > 1 else None,
        data=data,
        model=model,
        size_problem=size_problem,
        per_core_s=crops_per_core_s(train, data, model.image_size) if len(found[0].images) else None,
        images_per_s=config.images_per_s,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, with the number of unreadable files."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), "{task.completed} done, {task.fields[bad]} unreadable")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, bad=0)
        yield lambda examined, bad: bar.update(task, completed=examined, bad=bad)


def _lines(checkup: Checkup, name: str) -> Iterator[str]:
    """The report: what there is, what is wrong, what to set, the verdict."""
    yield from _summary("training", checkup.train)
    if checkup.per_core_s is not None:
        cores = "1 core" if checkup.cores == 1 else f"{checkup.cores} cores"
        yield f"  speed       {checkup.per_core_s:,.0f} training crops/s per core; {cores}"
    if checkup.size_problem is None:
        model = checkup.model
        sides = (model.image_size, model.grid, model.block_size)
        size, grid, block = ("x".join(map(str, pair(side))) for side in sides)
        patches = f"{grid} patches of {model.patch_size} px in {model.num_blocks} blocks of {block}"
        yield f"  model       {name}, {size} px, {patches}"
    if checkup.val is not None:
        yield from _summary("validation", checkup.val)
    yield from (f"{finding.severity}: {finding.what}: {finding.text}" for finding in checkup.findings)
    if checkup.advice:
        yield "\nadvice for nextblock pretrain:"
        width = max(map(len, checkup.advice))
        yield from (f"  {flags:<{width}}  # {why}" for flags, why in checkup.advice.items())
    yield f"\n{checkup.verdict}"


def _summary(name: str, found: Examination) -> Iterator[str]:
    bad = found.bad
    yield f"{name}: {found.spec}"
    yield f"  images      {found.examined:,} of {len(found.source):,} examined, {len(bad):,} unreadable"
    yield from (" ".join(f"    {it.name}: {it.reason}".split("\n")) for it in bad[:FIRST_BAD])
    if len(bad) > FIRST_BAD:
        yield f"    ... and {len(bad) - FIRST_BAD:,} more; --out FILE.json lists all"
    if not len(found.images):
        return
    yield f"  kinds       {', '.join(f'{kind} {count:,}' for kind, count in found.kinds.most_common())}"
    for side, (low, median, high) in found.sides_px.items():
        yield f"  {side.removesuffix('er') + ' side':<12}{low:,.0f} to {high:,.0f} px, median {median:,.0f}"
    if found.class_counts:
        counts = found.class_counts.values()
        each = " to ".join(f"{number:,}" for number in sorted({min(counts), max(counts)}))
        yield f"  classes     {len(counts):,}, with {each} images each"
    yield f"  duplicates  {sum(len(group) - 1 for group in found.duplicates):,}"
    mean, std = (", ".join(f"{value:.3f}" for value in values) for values in found.mean_std)
    yield f"  pixels      mean {mean}; deviation {std}"
