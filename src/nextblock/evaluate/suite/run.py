"""Probe a model on the benchmarks, one after another; a failed probe does not stop the others."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nextblock.atomic import exclusive, make_directory, write_text
from nextblock.config import DataConfig
from nextblock.data import open_source
from nextblock.data.sources import absolute_spec
from nextblock.data.sources.folder import SUBSET_HEADER
from nextblock.errors import UsageError
from nextblock.evaluate.evaluation import MODEL, Result, Stopped, evaluation, read_result
from nextblock.evaluate.probe.run import probe
from nextblock.evaluate.results import identity_of
from nextblock.evaluate.suite.settings import (
    BENCHMARKS,
    FIFTEEN,
    PUBLISHED,
    Benchmark,
    SuiteSettings,
    chosen,
)
from nextblock.launch import LaunchError
from nextblock.logs import counted
from nextblock.settings import from_dict, require, typed
from nextblock.tables import Column, Table, number, share
from nextblock.train.runtime import native_precision
from nextblock.visualize.evaluation import draw_suite

log = logging.getLogger(__name__)

MEASURED, MISSING, FAILED, MEAN = "measured", "missing", "failed", "mean"
COLUMNS = (
    Column("title", "benchmark"),
    share("top1", "top-1 %"),
    Column("status", "status", lambda status, _: status if status in (MISSING, FAILED) else ""),
    number("lr", "lr"),
    *(share(label, label) for label in PUBLISHED),
)
LIST_COLUMNS = (
    Column("benchmark", "name"),
    number("classes", "classes", ","),
    number("train_images", "train", ","),
    number("test_images", "test", ","),
    Column("terms", "terms"),
    Column("found", "found", lambda found, _: {True: "yes", False: "no"}.get(found, "")),
)
DRAWN = ("MAE H/14", "AIM-0.6B", "DINOv2 g/14", "XTRA H/14", "XTRA B/16")
"""Published models in the picture and in the terminal."""
OF_THE_PROBE = ("top1", "top1_se", "top5", "lr", "weight_decay", "layers", "elapsed_s")


def suite(**settings: Any) -> Result:
    """Probe a model on the benchmarks below a directory; `settings` are the fields of `SuiteSettings`.

    Rows, in the order of AIM's table: benchmark (its name, or "mean" of the fifteen), title, status
    ("measured", "missing", "failed", or None if not requested), why (it is missing or failed), top1 and its
    standard error, top5, lr, weight_decay, layers, classes, train_images, test_images, bad_images; published
    accuracies under the models' names. Raises `UsageError` if `out` has another result, `Stopped` after a
    signal. Repeating the call resumes, and retries missing and failed benchmarks.
    """
    config = from_dict(SuiteSettings, settings)
    require(Path(config.root).is_dir(), f"there is no directory {config.root} (--root)")
    out, rows, sources = Path(config.out), {}, {}
    with ExitStack() as stack:
        with evaluation(config) as opened:
            if config.precision == "auto":
                config = replace(config, precision=native_precision(opened.device))
            identity, is_main = identity_of(config, opened.model, opened.data, {}), opened.group.is_main
            with opened.group.together():
                if is_main:
                    stored = read_result(out, "suite", identity, overwrite=config.overwrite)
                    stack.enter_context(exclusive(out))
                    old_rows = stored.rows if stored else ()
                    rows = {row["benchmark"]: row for row in old_rows if row["status"] == MEASURED}
                    for bench in config.benchmarks:
                        if config.overwrite:
                            (out / bench.name / "probe.json").unlink(missing_ok=True)
                        if bench.name not in rows:
                            try:
                                sources[bench.name] = sources_of(bench, config.root, out / "lists")
                            except (ValueError, OSError) as error:
                                rows[bench.name] = _problem(bench, error)
            rows, sources = opened.group.broadcast((rows, sources))
            del opened  # each probe opens the model again; two copies need not be in memory
        result = _result(config, identity, rows, out if is_main else None)
        wanted = [bench for bench in config.benchmarks if bench.name in sources]
        for i, bench in enumerate(wanted, start=1):
            log.info("%s, %d of %d", bench.title, i, len(wanted))
            try:
                probed = probe(**config.probe(bench, *sources[bench.name]))
            except (Stopped, LaunchError):
                raise
            except (ValueError, RuntimeError, OSError) as error:
                rows[bench.name] = _problem(bench, error)
            else:
                row, images = probed.row(encoder=MODEL), probed.identity["sources"]
                rows[bench.name] = {
                    "status": MEASURED,
                    **{name: row[name] for name in OF_THE_PROBE},
                    "classes": probed.facts["num_classes"],
                    "train_images": images["train"]["images"],
                    "test_images": images["test"]["images"],
                    "bad_images": sum(probed.facts["bad_images"].values()),
                }
            result = _result(config, identity, rows, out if is_main else None)
    return result


def _problem(bench: Benchmark, error: Exception) -> dict[str, Any]:
    status, why = MISSING if isinstance(error, FileNotFoundError) else FAILED, " ".join(str(error).split())
    if status == FAILED:  # notes below the table list what is missing
        log.warning("%s: %s: %s", bench.name, status, why)
    return {"status": status, "why": why}


def sources_of(bench: Benchmark, root: str, lists: Path) -> list[str]:
    """Sources of a benchmark's training and test images; lists of images are written to `lists`.

    Raises `FileNotFoundError` if the folder does not exist, `UsageError` if annotations cannot be read.
    """
    place = Path(root).absolute()
    folder, how = place / bench.at, bench.how_to_get(str(place))
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no {folder}; {how}")
    if isinstance(bench.source, str):
        return [bench.source.format(root=place, split=split) for split in (bench.train, bench.test)]
    train = bench.train.split("+")
    try:
        images = list(bench.source(folder))
        missing = {*train, bench.test} - {split for split, _, _ in images}
        require(not missing, f"no image of {', '.join(sorted(missing))}")
    except (OSError, LookupError, ValueError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UsageError(f"cannot read the annotations in {folder} ({why}); {how}") from error
    # Splits are subsets of one list of all images, so that train and test have the same classes.
    make_directory(lists)
    everything = lists / f"{bench.name}.txt"
    write_text(everything, "".join(f"{folder}/{path}\t{label}\n" for _, path, label in images))
    specs = []
    for purpose, splits in (("train", train), ("test", (bench.test,))):
        numbers = (str(i) for i, (split, _, _) in enumerate(images) if split in splits)
        lines = (SUBSET_HEADER.decode(), f"# of: {absolute_spec(f'files:{everything}')}", *numbers)
        subset = lists / f"{bench.name}-{purpose}.txt"
        write_text(subset, "\n".join(lines))
        specs.append(f"subset:{subset}")
    return specs


def _result(
    config: SuiteSettings, identity: dict[str, Any], rows: Mapping[str, dict[str, Any]], out: Path | None
) -> Result:
    """Make the table of all benchmarks, and write it to `out`."""
    titles = {bench.name: bench.title for bench in chosen(FIFTEEN)} | {MEAN: "mean of fifteen"}
    titles |= {bench.name: bench.title for bench in BENCHMARKS}
    measured = [rows[name]["top1"] for name in FIFTEEN if "top1" in rows.get(name, ())]
    means = {MEAN: {"top1": sum(measured) / 15}} if len(measured) == 15 else {}
    table = []
    for i, (name, title) in enumerate(titles.items()):
        published = {label: round(cells[i] / 100, 3) for label, cells in PUBLISHED.items() if i < len(cells)}
        own = {"status": None, "top1": None, **rows.get(name, means.get(name, {}))}
        table.append({"benchmark": name, "title": title, **own, **published})
    notes = tuple(_notes(config, rows))
    requested = {bench.name for bench in config.benchmarks} | ({MEAN} if config.only is None else set())
    brief = Table(
        [row for row in table if row["benchmark"] in requested],
        [column for column in COLUMNS if column.key in DRAWN or column.key not in PUBLISHED],
    )
    result = Result(
        verb="suite", rows=tuple(table), notes=notes, identity=identity, columns=COLUMNS, brief=brief
    )
    if out is not None:
        result.write(out)
        dots = {label: [row.get(label) for row in table[:15]] for label in ("top1", *DRAWN)}
        dots = {Path(config.model).name: dots.pop("top1"), **dots}
        draw_suite([row["title"] for row in table[:15]], dots, out / "suite.png")
    return result


def _notes(config: SuiteSettings, rows: Mapping[str, dict[str, Any]]) -> list[str]:
    """Sentences about what is missing, and what differs from the official measurements."""
    notes = []
    for bench in BENCHMARKS:
        row = rows.get(bench.name, {})
        if "why" in row:
            notes.append(f"{bench.title} {'is ' * (row['status'] == MISSING)}{row['status']}: {row['why']}")
        elif row:
            notes += bench.unlike_the_papers(row["classes"], row["train_images"], row["test_images"])
        if row.get("bad_images"):
            notes.append(f"{bench.title}: {counted(row['bad_images'], 'unreadable image')} skipped.")
    changed = [
        f"{name} {typed(value)}"
        for name in ("augment", "epochs", "attention", "lr", "layers")
        if (value := getattr(config, name)) != getattr(SuiteSettings, name)
    ]
    return [
        *notes,
        *([f"Not official: {', '.join(changed)}."] if changed else []),
        "The best learning rate is chosen on a tenth of train, held out; test is measured once. It is not "
        "known which rate and epoch XTRA's paper reports, nor how AIM trained its heads.",
        f"Precision: encoder {config.precision}, heads fp32; officially both bf16-mixed.",
        "As in the official code, batches of 4,096 are accumulated: a batch norm sees at most 1,024 images.",
        "Published: AIM's Table 6, XTRA's code. Pre-trained on ImageNet-1k (DINO, MAE H/14, XTRA B/16), "
        "ImageNet-21k (iBOT, BEiT, XTRA H/14), LVD (DINOv2, at 516 px), IG-3B (MAE 2B/14), DFN-2B+ (AIM).",
    ]


def list_benchmarks(root: str | None, only: tuple[str, ...] | None) -> Result:
    """List the benchmarks; with a root, also whether each is found and how it differs from the papers'."""
    require(root is None or Path(root).is_dir(), f"there is no directory {root} (--root)")
    rows, notes = [], []
    for bench in chosen(only):
        found = None if root is None else (Path(root) / bench.at).is_dir()
        row = {"benchmark": bench.name, "classes": bench.classes, "train_images": bench.images[0]}
        row |= {"test_images": bench.images[1], "terms": bench.terms, "found": found}
        rows.append({**row, "at": bench.at, "get": bench.how_to_get(root or "ROOT")})
        if not found:
            notes.append(f"{bench.name}: {rows[-1]['get']}")
        elif not str(bench.source).startswith("hf:"):  # copies of the hub need a slow conversion first
            with TemporaryDirectory() as lists:
                try:
                    specs = sources_of(bench, str(root), Path(lists))
                    train, test = (open_source(spec, DataConfig(workers=0)) for spec in specs)
                    # PCAM's labels are only known by reading its images.
                    classes = None if bench.name == "pcam" else len(train.class_names)
                    notes += bench.unlike_the_papers(classes, len(train), len(test))
                except (ValueError, RuntimeError, OSError) as error:
                    notes.append(f"{bench.name}: {error}")
    return Result(verb="suite", rows=tuple(rows), notes=tuple(notes), columns=LIST_COLUMNS)
