"""How good features are without training anything: accuracy of their nearest neighbours.

Weighted kNN on cosine similarity (Wu et al., arXiv 1805.01978): each of the k nearest training images votes
for its class with weight exp(similarity / temperature).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from jaxtyping import Float, Int64
from torch import Tensor

from nextblock.errors import UsageError
from nextblock.evaluate.features import (
    Features,
)
from nextblock.evaluate.frozen import (
    Opened,
    Subject,
    feature_config,
    markdown_table,
    measured,
    open_all,
    subjects,
)
from nextblock.evaluate.knn_config import DEFAULT_K, DEFAULT_TEMPERATURE, KnnConfig, KnnResult, KnnRow
from nextblock.evaluate.probe.config import EncoderName

__all__ = [
    "Nearest",
    "comparison",
    "knn",
    "knn_opened",
    "knn_predict",
    "nearest_neighbours",
    "predict_all",
    "summary",
]

log = logging.getLogger(__name__)

QUERIES, NEIGHBOURS = 1024, 65_536
"""So many images at a time are compared with so many training images: a quarter of a gigabyte."""


# ------------------------------------------------------------------------------------------------ the vote


class Nearest(NamedTuple):
    """Of each query the most similar neighbours, the most similar first."""

    similarity: Float[Tensor, "q k"]
    """Cosine."""
    rows: Int64[Tensor, "q k"]


def nearest_neighbours(
    queries: Float[Tensor, "q d"],
    neighbours: Float[Tensor, "n d"],
    k: int,
    *,
    itself: Int64[Tensor, " q"] | None = None,
    chunk: int = NEIGHBOURS,
) -> Nearest:
    """Find the k nearest of `neighbours` (all of them, where there are fewer), `chunk` of these at a time.

    `neighbours` must be of length 1. `itself` is the row of each query among them, which is not looked at.
    """
    k = min(k, len(neighbours) - (itself is not None))
    queries = F.normalize(queries, dim=-1)
    best = Nearest(queries.new_empty(len(queries), 0), torch.empty_like(queries[:, :0], dtype=torch.int64))
    for start in range(0, len(neighbours), chunk):
        similarity = queries @ neighbours[start : start + chunk].T
        if itself is not None:
            (here,) = torch.where((itself >= start) & (itself < start + chunk))
            similarity[here, itself[here] - start] = -math.inf
        values, rows = similarity.topk(min(k, similarity.shape[1]), dim=-1)
        together = torch.cat([best.similarity, values], dim=1)
        kept = together.topk(min(k, together.shape[1]), dim=-1)
        best = Nearest(kept.values, torch.cat([best.rows, rows + start], dim=1).gather(1, kept.indices))
    return best


def _vote(
    nearest: Nearest, labels: Int64[Tensor, " n"], num_classes: int, k: int, temperature: float
) -> Int64[Tensor, " q"]:
    """Let the first k of the nearest vote."""
    similarity, rows = nearest.similarity[:, :k], nearest.rows[:, :k]
    votes = similarity.new_zeros(len(similarity), num_classes)
    # exp of the difference to the best: the same winner, and no overflow at low temperatures.
    votes.scatter_add_(1, labels[rows], ((similarity - similarity[:, :1]) / temperature).exp())
    return votes.argmax(dim=-1)


def knn_predict(
    queries: Float[Tensor, "q d"],
    neighbours: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    num_classes: int,
    *,
    k: int = DEFAULT_K,
    temperature: float = DEFAULT_TEMPERATURE,
) -> Int64[Tensor, " q"]:
    """Predict a class for each query from its k nearest neighbours (all of them, where there are fewer)."""
    nearest = nearest_neighbours(queries, F.normalize(neighbours, dim=-1), k)
    return _vote(nearest, labels, num_classes, k, temperature)


def predict_all(
    asked: Float[Tensor, "q d"] | None,
    known: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    num_classes: int,
    settings: Sequence[tuple[int, float]],
    device: torch.device,
) -> list[Int64[Tensor, " q"]]:
    """A prediction for every (k, temperature), on the CPU; with nothing asked, of each known one by the rest.

    The neighbours stay on the device; so many queries at a time are compared with them, once for all
    settings.
    """
    neighbours, labels = F.normalize(known.to(device), dim=-1), labels.to(device)
    most = max(k for k, _ in settings)
    parts: list[list[Tensor]] = [[] for _ in settings]
    rows = None if asked is not None else torch.arange(len(known), device=device)
    for start in range(0, len(known if asked is None else asked), QUERIES):
        some = slice(start, start + QUERIES)
        queries = neighbours[some] if asked is None else asked[some].to(device)
        nearest = nearest_neighbours(queries, neighbours, most, itself=None if rows is None else rows[some])
        for part, (k, temperature) in zip(parts, settings, strict=True):
            part.append(_vote(nearest, labels, num_classes, k, temperature).cpu())
    return [torch.cat(part) for part in parts]


# ------------------------------------------------------------------------------------------- the evaluation


def knn(config: KnnConfig) -> KnnResult:
    """Measure a model by nearest neighbours, and write knn.json, knn.csv and knn.md where `out` is given.

    Raises `ValueError` where `out` holds another result, labels are missing, or the classes differ.
    """
    advice = "leave out --val to compare each image of train with the others"
    opened = open_all(config, {"val": config.val}, advice=advice)
    return measured(opened, config, "knn", knn_opened, _markdown)


def knn_opened(opened: Opened, config: KnnConfig) -> KnnResult:
    """Measure an open model on open sources: "train", and "val" unless one is left out at a time."""
    started_at_s = time.perf_counter()
    rows: list[KnnRow] = []
    features: dict[str, Features] = {}
    for subject in subjects(opened, config):
        features = subject.features
        rows += _rows(subject, opened, config)
    return KnnResult(
        rows=tuple(rows),
        split="val" if "val" in features else "leave-one-out",
        num_classes=len(opened.sources["train"].class_names),
        train_images=len(features["train"].samples),
        measured_images=len(features.get("val", features["train"]).samples),
        layers=feature_config(config, opened.model.config).layers,
        bad_images={purpose: len(found.bad) for purpose, found in features.items()},
        elapsed_s=time.perf_counter() - started_at_s,
    )


def _rows(subject: Subject, opened: Opened, config: KnnConfig) -> list[KnnRow]:
    """One row for every k and temperature."""
    labels = {
        purpose: torch.from_numpy(opened.sources[purpose].labels)[found.samples]
        for purpose, found in subject.features.items()
    }
    if "val" not in labels and len(labels["train"]) < 2:
        raise UsageError(f"{config.train} has one readable image: left out, none is near it; give --val")
    settings = list(product(config.k, config.temperature))
    predictions = predict_all(
        subject.features["val"].features[0] if "val" in labels else None,
        subject.features["train"].features[0],
        labels["train"],
        len(opened.sources["train"].class_names),
        settings,
        next(opened.model.parameters()).device,
    )
    rows = []
    for (k, temperature), predicted in zip(settings, predictions, strict=True):
        top1, balanced = _accuracies(predicted, labels.get("val", labels["train"]))
        is_default = (k, temperature) == (DEFAULT_K, DEFAULT_TEMPERATURE)
        rows.append(
            KnnRow(
                encoder=subject.encoder,
                k=k,
                temperature=temperature,
                top1=top1,
                balanced=balanced,
                is_default=is_default,
            )
        )
    return rows


def _accuracies(predicted: Int64[Tensor, " q"], truth: Int64[Tensor, " q"]) -> tuple[float, float]:
    """Share of right ones: of all images, and in the mean over the classes that have images."""
    images = torch.bincount(truth)
    right = torch.bincount(truth[predicted == truth], minlength=len(images))
    of_class = right[images > 0].double() / images[images > 0]
    return int(right.sum()) / len(truth), float(of_class.mean())


def summary(result: KnnResult) -> str:
    """Say what was compared with what, and which row to report."""
    leave_one_out = result.split == "leave-one-out"
    images, neighbours = result.measured_images, result.train_images - leave_one_out
    among = (
        f"{images} images of train, each by its nearest among the other {neighbours} (leave-one-out)"
        if leave_one_out
        else f"{images} images of val, by their nearest among {neighbours} of train"
    )
    most = max(row.k for row in result.rows)
    fewer = f" For k {most} all {neighbours} vote." if most > neighbours else ""
    default = f"k {DEFAULT_K}, temperature {DEFAULT_TEMPERATURE:g}"
    advice = (
        f"The row marked * ({default}) is the setting fixed beforehand: report that one."
        if any(row.is_default for row in result.rows)
        else f"The setting fixed beforehand, {default}, is not among these."
    )
    several = len({(row.k, row.temperature) for row in result.rows}) > 1
    caution = (
        " All rows were measured on the same images, so the best of them is chosen on what it is measured on."
        if several
        else ""
    )
    return f"{among}; {result.num_classes} classes. {advice}{caution}{fewer}"


def comparison(result: KnnResult) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a table: a line for every k and temperature, top-1 of every encoder in %."""
    encoders: list[EncoderName] = list(dict.fromkeys(row.encoder for row in result.rows))
    first = [row for row in result.rows if row.encoder == encoders[0]]
    lines = [
        [
            f"{row.k}{' *' if row.is_default else ''}",
            f"{row.temperature:g}",
            *(f"{100 * result.row(encoder, row.k, row.temperature).top1:.2f}" for encoder in encoders),
        ]
        for row in first
    ]
    return ["k", "temperature", *encoders], lines


def _markdown(result: KnnResult, identity: Mapping[str, Any]) -> str:
    settings, sources = identity["settings"], identity["sources"]
    train, val = sources["train"]["spec"], sources.get("val", sources["train"])["spec"]
    seen = "" if train == val else f", val {val}"
    return "\n".join(
        [
            f"# Nearest neighbours of {settings['model']}",
            "",
            f"Train {train}{seen}. {summary(result)}",
            "",
            f"Top-1 in %. Features: tokens {settings['tokens']}, layers {', '.join(map(str, result.layers))} "
            f"after the final norm, attention {settings['attention']}; unreadable images "
            f"left out: {sum(result.bad_images.values())}. Encoder weights {identity['weights']}.",
            "",
            *markdown_table(*comparison(result)),
            "",
        ]
    )
