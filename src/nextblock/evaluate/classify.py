"""Classify images with a trained classifier, and measure its accuracy if they have labels."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from nextblock.atomic import write_aside, write_text
from nextblock.checkpoint import digest_of
from nextblock.data import Source, open_source
from nextblock.errors import UsageError
from nextblock.evaluate.evaluation import TOP, Result, evaluation, stored_result
from nextblock.evaluate.files import pyarrow, write_parquet
from nextblock.evaluate.metrics import Tally
from nextblock.evaluate.settings import ClassifySettings
from nextblock.evaluate.table import FeatureTable
from nextblock.logs import counted
from nextblock.models.heads import ImageClassifier
from nextblock.settings import from_dict
from nextblock.tables import Column, end_of, percent, safe_cell

log = logging.getLogger(__name__)

CHUNK = 4096
SHOWN, SHOWN_CLASSES, NAME_LETTERS = 10, 3, 60


def classify(**settings: Any) -> Result:
    """Classify images; `settings` are the fields of `ClassifySettings`.

    Rows of the result: the first images, with index, name, classes and probabilities (likeliest first), and
    true_class if the source has labels. `out` contains all images. `facts["measures"]` has the accuracies if
    the classifier knows all classes of the source. OUT.about.json records how `out` was made; repeating the
    same call reads it. Raises `UsageError` if `out` is another file.
    """
    config = from_dict(ClassifySettings, settings)
    with evaluation(config, classifier=True) as opened:
        source = open_source(config.data, opened.data)
        classifier = opened.classifier
        assert classifier is not None
        out = None if config.out is None else Path(config.out)
        identity = opened.identity({"data": source}) | {"classifier": digest_of(classifier)}
        if out is not None and out.exists() and not config.overwrite:
            about = _about(out)
            with opened.group.together():
                if not about.is_file():
                    raise UsageError(f"{out} exists; choose another --out, or give --overwrite")
                result = stored_result(about, "classify", identity)
            log.info("%s has these classes already", out)
            return replace(result, columns=_columns(len(result.rows[0]["classes"])))
        with opened.working(out) as finish:
            table = opened.logits("data", source)
            indices = table.readable()
            rows = _Rows(table, classifier, source, config.top)
            truth = classes_of(source, classifier.class_names)
            num_classes = classifier.head_config.num_classes
            facts = {
                "num_classes": num_classes,
                "num_images": len(indices),
                "bad_images": opened.bad_counts(),
                "measures": None,
            }
            if truth is not None:
                tally = Tally(num_classes, confusion=False)
                for chosen in np.array_split(indices, -(-len(indices) // CHUNK)):
                    tally.add(table.read(chosen), torch.from_numpy(truth[chosen]))
                facts["measures"] = tally.measures().row()
            result = Result(
                verb="classify",
                rows=tuple(rows.of(indices[:SHOWN])),
                notes=tuple(_notes(config, facts, has_labels=source.has_labels)),
                facts=facts,
                identity=identity,
                columns=_columns(rows.top),
            )
            with opened.group.together():
                if opened.group.is_main:
                    opened.report_bad(None)
                    if out is not None:
                        _about(out).unlink(missing_ok=True)  # it describes the file that is replaced
                        _write(out, rows, indices)
                        write_text(_about(out), json.dumps(result.as_dict(), indent=1) + "\n")
                    finish()
            return result


def _about(out: Path) -> Path:
    """The JSON file that records how `out` was made, its first rows and the accuracies."""
    return out.with_name(f"{out.name}.about.json")


def classes_of(source: Source, names: Sequence[str] | None) -> Int64[np.ndarray, " n"] | None:
    """Labels as indices of the classifier's classes; None if it does not know all classes by name."""
    if names is None or not source.has_labels or not set(source.class_names) <= set(names):
        return None
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[name] for name in source.class_names], dtype=np.int64)[source.labels]


class _Rows:
    """The rows of images, made lazily."""

    def __init__(self, table: FeatureTable, classifier: ImageClassifier, source: Source, top: int) -> None:
        self._table, self._source = table, source
        self._names = classifier.class_names or tuple(map(str, range(classifier.head_config.num_classes)))
        self.top = min(top, len(self._names))

    def of(self, indices: Int64[np.ndarray, " n"]) -> Iterator[dict[str, Any]]:
        source = self._source
        for chosen in np.split(indices, range(CHUNK, len(indices), CHUNK)):
            likeliest = self._table.read(chosen).softmax(dim=-1).topk(self.top, dim=-1)
            pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
            for index, (numbers, probabilities) in zip(chosen.tolist(), pairs, strict=True):
                true = source.class_names[source.labels[index]] if source.has_labels else None
                yield {
                    "index": index,
                    "name": source.name(index),
                    "classes": [self._names[number] for number in numbers],
                    "probabilities": probabilities,
                    "true_class": true,
                }


def _columns(top: int) -> tuple[Column, ...]:
    def likeliest(place: int, title: str) -> Column:
        return Column(
            "classes",
            title,
            lambda names, row: f"{names[place]} {percent(row['probabilities'][place], {})} %",
        )

    titles = ("likeliest", "second", "third")[: min(top, SHOWN_CLASSES)]
    return (
        Column("name", "image", lambda name, _: end_of(name, NAME_LETTERS)),
        *(likeliest(place, title) for place, title in enumerate(titles)),
        Column("true_class", "true class"),
    )


def _notes(config: ClassifySettings, facts: dict[str, Any], *, has_labels: bool) -> Iterator[str]:
    more = facts["num_images"] - SHOWN
    if config.out is not None:
        yield f"All {counted(facts['num_images'], 'image')}: {config.out}"
    elif more > 0:
        yield f"{counted(more, 'more image')}; --out FILE.csv writes all"
    measures = facts["measures"]
    if measures is not None:
        top5 = f"top-5 {percent(measures['top5'], {})} %, " if facts["num_classes"] > TOP else ""
        yield (
            f"top-1 {percent(measures['top1'], measures, 'top1')} %, {top5}balanced "
            f"{percent(measures['balanced'], {})} % of {counted(measures['images'], 'labelled image')}"
        )
    elif has_labels:
        yield "No accuracy: the classifier does not know all of these images' classes."


def _write(out: Path, rows: _Rows, indices: Int64[np.ndarray, " n"]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".parquet":
        pa = pyarrow()
        chunks = np.split(indices, range(CHUNK, len(indices), CHUNK))
        write_parquet(out, (pa.Table.from_pylist(list(rows.of(chunk))) for chunk in chunks), {})
        return
    with write_aside(out) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        if out.suffix == ".json":
            for number, row in enumerate(rows.of(indices)):
                file.write(("[\n" if not number else ",\n") + json.dumps(row))
            file.write("\n]\n")
            return
        writer = csv.writer(file, lineterminator="\n")
        places = [f"{what}_{place}" for place in range(1, rows.top + 1) for what in ("class", "probability")]
        writer.writerow(["index", "name", *places, "true_class"])
        for row in rows.of(indices):
            pairs = zip(row["classes"], row["probabilities"], strict=True)
            ranked = [value for name, p in pairs for value in (safe_cell(name), f"{p:.6f}")]
            writer.writerow(
                [row["index"], safe_cell(row["name"]), *ranked, safe_cell(row["true_class"] or "")]
            )
