"""Classes of images by a trained classifier: the likeliest of each, with probabilities; and how often right.

Whether it is right can be told where the source has labels whose classes the classifier knows by name.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nextblock.atomic import write_aside, write_text
from nextblock.checkpoint import MODEL_FILE
from nextblock.config import DataConfig
from nextblock.data import BadSample, Source, open_source
from nextblock.errors import UsageError
from nextblock.evaluate.classify_config import ClassifyConfig
from nextblock.evaluate.embed.files import check_writable, parquet_package
from nextblock.evaluate.features import check_bad, evaluation_data, iterate_features
from nextblock.evaluate.metrics import Measures, Tally
from nextblock.interop import load_classifier
from nextblock.models.heads import ImageClassifier
from nextblock.train.runtime import autocast, choose_device

__all__ = ["ClassifiedImage", "ClassifyResult", "classify", "classify_images"]


@dataclass(frozen=True, kw_only=True)
class ClassifiedImage:
    """An image's likeliest classes, likeliest first."""

    index: int
    """In the source."""
    name: str
    classes: tuple[str, ...]
    """By name; by number, from 0, where the classifier knows no names."""
    probabilities: tuple[float, ...]
    true_class: str | None
    """As the source says, if it says."""


@dataclass(frozen=True, kw_only=True)
class ClassifyResult:
    """The classes of all readable images, in the order of the source."""

    rows: tuple[ClassifiedImage, ...]
    measures: Measures | None
    """Of labelled images; None where there are no labels, or their classes are not the classifier's."""
    bad: tuple[BadSample, ...]
    """Unreadable images, left out."""


def classify(config: ClassifyConfig) -> ClassifyResult:
    """Classify the images of `config.data`, and write `config.out` if given.

    Raises `CheckpointError` where the model has no head, `ValueError` where `out` is there already, and
    `TooManyBadImages`.
    """
    if config.out is not None:
        out = Path(config.out)
        if out.exists() and not config.overwrite:
            raise UsageError(f"{out} is there already; give another --out, or --overwrite")
        check_writable(out)
    model = _model_of(config.model)
    classifier = load_classifier(
        model, config.head, num_heads=config.num_heads, probe_layers=config.probe_layers
    )
    data = evaluation_data(
        model,
        classifier.encoder_model.config,
        workers=config.workers,
        max_bad_fraction=config.max_bad_fraction,
    )
    result = classify_images(classifier, config, open_source(config.data, data), data)
    if config.out is not None:
        _write(Path(config.out), result)
    return result


def _model_of(spec: str) -> str:
    """Of the directory of a fine-tuning its classifier; else what was given."""
    tuned = Path(spec).expanduser() / "classifier"
    return str(tuned) if (tuned / MODEL_FILE).is_file() else spec


def classify_images(
    classifier: ImageClassifier, config: ClassifyConfig, source: Source, data: DataConfig
) -> ClassifyResult:
    """Classify as `classify` does with all opened; the classifier is moved, frozen and set to eval."""
    device = choose_device(config.device)
    classifier = classifier.to(device).eval().requires_grad_(requires_grad=False)
    num_classes = classifier.head_config.num_classes
    names = classifier.class_names or tuple(map(str, range(num_classes)))
    truth = _truth(source, classifier.class_names)
    tally = None if truth is None else Tally(num_classes)
    rows: list[ClassifiedImage] = []
    bad: list[BadSample] = []
    batches = iterate_features(
        partial(_logits, classifier=classifier, config=config),
        source,
        data,
        classifier.encoder_model.config.image_size,
        batch_size=config.batch_size(device.type),
        device=device,
    )
    for batch in batches:
        bad += batch.bad
        check_bad(bad, source, data)
        if not batch.features:
            continue
        rows += _rows(batch.features[0], batch.samples.tolist(), source, names, config.top)
        if tally is not None and truth is not None:
            tally.add(batch.features[0], truth[batch.samples])
    if not rows:
        raise UsageError(f"none of the {len(source)} images of {source.spec} could be read")
    return ClassifyResult(
        rows=tuple(rows), measures=None if tally is None else tally.measures(), bad=tuple(bad)
    )


def _logits(
    images: Float[Tensor, "b c h w"], *, classifier: ImageClassifier, config: ClassifyConfig
) -> tuple[Float[Tensor, "b classes"]]:
    with autocast(images.device, config.precision):
        return (classifier(images).float(),)


def _truth(source: Source, class_names: Sequence[str] | None) -> Tensor | None:
    """The source's labels as the classifier counts its classes; None where it does not know them all."""
    if class_names is None or not source.has_labels or not set(source.class_names) <= set(class_names):
        return None
    numbers = {name: number for number, name in enumerate(class_names)}
    ours = torch.tensor([numbers[name] for name in source.class_names], dtype=torch.int64)
    return ours[torch.as_tensor(source.labels)]


def _rows(
    logits: Float[Tensor, "b classes"],
    samples: Sequence[int],
    source: Source,
    names: tuple[str, ...],
    top: int,
) -> list[ClassifiedImage]:
    likeliest = logits.softmax(dim=-1).topk(min(top, logits.shape[1]), dim=-1)
    return [
        ClassifiedImage(
            index=index,
            name=source.name(index),
            classes=tuple(names[number] for number in numbers),
            probabilities=tuple(probabilities),
            true_class=source.class_names[int(source.labels[index])] if source.has_labels else None,
        )
        for index, numbers, probabilities in zip(
            samples, likeliest.indices.tolist(), likeliest.values.tolist(), strict=True
        )
    ]


# -------------------------------------------------------------------------------------------------- writing


def to_json(result: ClassifyResult) -> dict[str, Any]:
    """Rows, measures and unreadable images, ready for JSON."""
    return {
        "rows": [asdict(row) for row in result.rows],
        "measures": None if result.measures is None else asdict(result.measures),
        "bad": [bad._asdict() for bad in result.bad],
    }


def _write(out: Path, result: ClassifyResult) -> None:
    if out.suffix == ".csv":
        write_text(out, _as_csv(result))
    elif out.suffix == ".json":
        write_text(out, json.dumps(to_json(result)) + "\n")
    else:
        pa, parquet = parquet_package("pyarrow"), parquet_package("pyarrow.parquet")
        schema = pa.schema(
            [
                ("index", pa.int64()),
                ("name", pa.string()),
                ("classes", pa.list_(pa.string())),
                ("probabilities", pa.list_(pa.float32())),
                ("true_class", pa.string()),
            ]
        )
        table = pa.Table.from_pylist([asdict(row) for row in result.rows], schema=schema)
        with write_aside(out) as aside:
            parquet.write_table(table, aside)


def _as_csv(result: ClassifyResult) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    count = len(result.rows[0].classes)
    further = [f"{what}_{place}" for place in range(2, count + 1) for what in ("class", "probability")]
    has_truth = result.rows[0].true_class is not None
    writer.writerow(
        ("index", "name", "class", "probability", *further, *(["true_class"] if has_truth else []))
    )
    for row in result.rows:
        pairs = zip(row.classes, row.probabilities, strict=True)
        ranked = [value for name, probability in pairs for value in (name, f"{probability:.6f}")]
        writer.writerow((row.index, row.name, *ranked, *([row.true_class] if has_truth else [])))
    return text.getvalue()
