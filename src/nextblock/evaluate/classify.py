"""Classify images with a trained classifier, and measure its accuracy if they have labels."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from nextblock.atomic import write_aside
from nextblock.checkpoint import digest_of
from nextblock.evaluate.evaluation import evaluation
from nextblock.evaluate.files import pyarrow, write_parquet
from nextblock.evaluate.metrics import Measures, Tally
from nextblock.evaluate.results import TOP, Result
from nextblock.evaluate.settings import ClassifySettings
from nextblock.evaluate.splits import match_classes
from nextblock.evaluate.table import FeatureTable
from nextblock.logs import counted
from nextblock.settings import from_dict
from nextblock.tables import Column, Row, image, percent, safe_cell

CHUNK = 4096
"""Images whose logits are read at a time."""
SHOWN = 10
PLACES = ("likeliest", "second", "third")


def classify(**settings: Any) -> Result:
    """Classify images; `settings` are the fields of `ClassifySettings`.

    Rows of the result: the first images, with index, name, classes and probabilities (likeliest first), and
    true_class if the source has labels. `out` contains all images. `facts["measures"]` has the accuracies if
    the classifier knows all classes of the source. OUT.about.json records how `out` was made; repeating the
    same call reads it. Raises `UsageError` if `out` is another file.
    """
    config = from_dict(ClassifySettings, settings)
    with evaluation(config) as opened:
        source, classifier = opened.open_source(config.data), opened.classifier
        assert classifier is not None
        num_classes = classifier.head_config.num_classes
        names = classifier.class_names or tuple(map(str, range(num_classes)))
        top = min(config.top, num_classes)
        logits = cache(lambda: opened.logits("data", source))

        def rows() -> Iterator[dict[str, Any]]:
            indices = logits().readable()
            for chosen in np.split(indices, range(CHUNK, len(indices), CHUNK)):
                likeliest = logits().read(chosen).softmax(dim=-1).topk(top, dim=-1)
                pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
                for index, (numbers, probabilities) in zip(chosen.tolist(), pairs, strict=True):
                    yield {
                        "index": index,
                        "name": source.name(index),
                        "classes": [names[number] for number in numbers],
                        "probabilities": probabilities,
                        "true_class": source.class_names[source.labels[index]] if source.has_labels else None,
                    }

        def measure() -> Result:
            facts = {
                "num_classes": num_classes,
                "num_images": len(logits().readable()),
                "bad_images": opened.bad_counts(),
                "measures": None,
            }
            if source.has_labels and classifier.class_names is not None:
                labels, unknown = match_classes(source, classifier.class_names)
                if not unknown:
                    facts["measures"] = measure_logits(logits(), labels, num_classes).row()
            notes = tuple(_notes(config, facts, has_labels=source.has_labels))
            return Result(verb="classify", rows=tuple(islice(rows(), SHOWN)), notes=notes, facts=facts)

        return opened.result(
            "classify",
            {"data": source},
            _columns(top),
            measure,
            save=lambda out, _: _write(out, rows(), top),
            made_from={"classifier": digest_of(classifier)},
        )


def measure_logits(table: FeatureTable, labels: Int64[np.ndarray, " n"], num_classes: int) -> Measures:
    """Measure a table of logits on its readable images; `labels` are those of all images."""
    tally, indices = Tally(num_classes, confusion=False), table.readable()
    for chosen in np.split(indices, range(CHUNK, len(indices), CHUNK)):
        tally.add(table.read(chosen), torch.from_numpy(labels[chosen]))
    return tally.measures()


def _columns(top: int) -> tuple[Column, ...]:
    def likeliest(place: int) -> Column:
        def show(names: list[str], row: Row) -> str:
            return f"{names[place]} {percent(row['probabilities'][place], {})} %"

        return Column("classes", PLACES[place], show)

    return (
        Column("name", "image", image),
        *map(likeliest, range(min(top, len(PLACES)))),
        Column("true_class", "true class"),
    )


def _notes(config: ClassifySettings, facts: dict[str, Any], *, has_labels: bool) -> Iterator[str]:
    images, measures = facts["num_images"], facts["measures"]
    if config.out is not None:
        yield f"All {counted(images, 'image')}: {config.out}"
    elif images > SHOWN:
        yield f"{counted(images - SHOWN, 'more image')}; --out FILE.csv writes all"
    if measures is not None:
        top5 = f"top-5 {percent(measures['top5'], {})} %, " if facts["num_classes"] > TOP else ""
        yield (
            f"top-1 {percent(measures['top1'], measures, 'top1')} %, {top5}balanced "
            f"{percent(measures['balanced'], {})} % of {counted(measures['images'], 'labelled image')}"
        )
    elif has_labels:
        yield "No accuracy: the classifier does not know all of these images' classes."


def _write(out: Path, rows: Iterator[dict[str, Any]], top: int) -> None:
    if out.suffix == ".parquet":
        pa = pyarrow()
        chunks = iter(lambda: list(islice(rows, CHUNK)), [])
        write_parquet(out, map(pa.Table.from_pylist, chunks), {})
        return
    with write_aside(out) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        if out.suffix == ".json":
            for number, row in enumerate(rows):
                file.write((",\n" if number else "[\n") + json.dumps(row))
            file.write("\n]\n")
            return
        writer = csv.writer(file, lineterminator="\n")
        places = [f"{what}_{place}" for place in range(1, top + 1) for what in ("class", "probability")]
        writer.writerow(["index", "name", *places, "true_class"])
        for row in rows:
            pairs = zip(row["classes"], row["probabilities"], strict=True)
            ranked = [value for name, p in pairs for value in (safe_cell(name), f"{p:.6f}")]
            writer.writerow(
                [row["index"], safe_cell(row["name"]), *ranked, safe_cell(row["true_class"] or "")]
            )
