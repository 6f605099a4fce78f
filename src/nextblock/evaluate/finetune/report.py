"""What fine-tuning finds: the result, as JSON and back, and as a page to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from nextblock.evaluate.metrics import Measures

__all__ = ["FinetuneResult", "FinetuneRow", "finetune_markdown", "result_from_dict"]

Split = Literal["val", "test", "held-out"]
WeightsName = Literal["last", "averaged"]

SHOWN_CLASSES = 20


@dataclass(frozen=True, kw_only=True)
class FinetuneRow:
    """The classifier measured on one set of images."""

    split: Split
    weights: WeightsName
    """Those of the last step, or their average over steps (EMA)."""
    measures: Measures


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What fine-tuning found, or where it was stopped."""

    rows: tuple[FinetuneRow, ...]
    """Set by set, the last one test if there is one, of each the averaged weights last; empty where it was
    stopped."""
    class_names: tuple[str, ...]
    train_images: int
    """Images to train on, unreadable ones among them."""
    bad_images: Mapping[str, int]
    """Unreadable images, which were left out, by split."""
    step: int
    """Optimizer steps done."""
    total_steps: int
    trained_parameters: int
    parameters: int
    """Of the encoder (adapters merged) and the head."""
    stopped_by: str | None
    """The signal that asked it to stop; None: it is complete."""

    @property
    def reported(self) -> FinetuneRow:
        """The row to report: on test if there is one, of the weights that are kept."""
        return self.rows[-1]


def result_from_dict(values: Mapping[str, Any]) -> FinetuneResult:
    """The result that finetune.json holds, beside other entries."""
    known = {name: values[name] for name in (field.name for field in fields(FinetuneResult))}
    rows = tuple(
        FinetuneRow(split=row["split"], weights=row["weights"], measures=_measures(row["measures"]))
        for row in known["rows"]
    )
    return FinetuneResult(**{**known, "rows": rows, "class_names": tuple(known["class_names"])})


def _measures(values: Mapping[str, Any]) -> Measures:
    confusion = values["confusion"]
    return Measures(
        **{
            **values,
            "per_class": tuple(values["per_class"]),
            "confusion": None if confusion is None else tuple(map(tuple, confusion)),
        }
    )


def finetune_markdown(
    result: FinetuneResult, identity: Mapping[str, Any], classifier: Path, *, batch_size: int
) -> str:
    """A page with the measures of every row, and the classes that are told worst.

    `batch_size` is the one in use: a source of fewer images than the settings' batch is one batch.
    """
    sources, settings = identity["sources"], identity["settings"]
    rank = settings["lora"]["rank"]
    what = f"adapters of rank {rank} and the head" if rank else "the whole network"
    lines = [
        f"# Fine-tuning of {settings['model']}",
        "",
        f"Trained: {what}, {result.trained_parameters:,} of {result.parameters:,} parameters, on "
        f"{result.train_images} images of {sources['train']['spec']}, {len(result.class_names)} classes, "
        f"{settings['epochs']} epochs ({result.total_steps} steps of {batch_size} images), "
        f"{settings['head']} head, seed {settings['seed']}; unreadable images left out: "
        f"{sum(result.bad_images.values())}. Encoder weights before: {identity['weights']}. The last epoch "
        f"is what is measured; no epoch was chosen. The classifier: {classifier}.",
        "",
        "| weights | measured on | images | top-1 % | top-5 % | balanced % | loss | calibration error % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in result.rows]
    return "\n".join([*lines, *_worst(result)]) + "\n"


def _line(row: FinetuneRow) -> str:
    m = row.measures
    return (
        f"| {row.weights} | {row.split} | {m.images} | {100 * m.top1:.2f} | {100 * m.top5:.2f} "
        f"| {100 * m.balanced:.2f} | {m.loss:.4f} | {100 * m.calibration_error:.2f} |"
    )


def _worst(result: FinetuneResult) -> list[str]:
    row = result.reported
    known = [
        (accuracy, name)
        for name, accuracy in zip(result.class_names, row.measures.per_class, strict=True)
        if accuracy is not None
    ]
    shown = sorted(known, key=lambda pair: pair[0])[:SHOWN_CLASSES]
    title = "The classes" if len(shown) == len(known) else f"The {len(shown)} classes told worst"
    return [
        "",
        f"{title}, on {row.split} with the {row.weights} weights:",
        "",
        "| class | accuracy % |",
        "|---|---|",
        *(f"| {name} | {100 * accuracy:.2f} |" for accuracy, name in shown),
    ]
