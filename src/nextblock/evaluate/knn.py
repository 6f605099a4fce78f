"""How good features are without training anything: accuracy of their nearest neighbours, also as a monitor.

Weighted kNN on cosine similarity (Wu et al., arXiv 1805.01978): each of the k nearest training images votes
for its class with weight exp(similarity / temperature).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from einops import reduce
from jaxtyping import Float, Int64
from torch import Tensor

from nextblock.config import DataConfig, Size
from nextblock.data import Source
from nextblock.data.random import keyed_permutation
from nextblock.evaluate.features import (
    Features,
    NonFiniteFeaturesError,
    check_same_classes,
    collect_features,
    iterate_features,
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
from nextblock.models.next_block import NextBlockModel
from nextblock.settings import Duration
from nextblock.train import MonitorEvent

__all__ = [
    "KnnMonitor",
    "Nearest",
    "comparison",
    "knn",
    "knn_accuracy",
    "knn_opened",
    "knn_predict",
    "nearest_neighbours",
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


def _predictions(
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
        raise ValueError(f"{config.train} has one readable image: left out, none is near it; give --val")
    settings = list(product(config.k, config.temperature))
    predictions = _predictions(
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


# -------------------------------------------------------------------------------------------- as a monitor


def knn_accuracy(
    model: NextBlockModel,
    train_source: Source,
    val_source: Source,
    data: DataConfig,
    *,
    k: int = DEFAULT_K,
    temperature: float = DEFAULT_TEMPERATURE,
    max_samples: int = 10_000,
    seed: int = 0,
    device: torch.device,
    batch_size: int = 128,
    image_size: Size | None = None,
) -> dict[str, float]:
    """Top-1 accuracy of kNN on the mean over patches of the model's final tokens, under its native attention.

    At most `max_samples` images of each source are used, chosen by `seed`. Also returned: how many images
    of each were used, and how many could not be read. The model should be in evaluation mode.
    """
    if k < 1 or temperature <= 0:
        raise ValueError(f"k is {k} and temperature {temperature}; use k from 1 on and a temperature above 0")
    check_same_classes(train_source, val_source)
    extract = partial(_mean_tokens, model=model)
    size = model.config.image_size if image_size is None else image_size
    found: list[Features] = []
    for source, purpose in ((train_source, "knn train"), (val_source, "knn val")):
        # in rising order
        indices = np.sort(keyed_permutation(seed, len(source), purpose)[:max_samples])
        batches = iterate_features(
            extract, source, data, size, batch_size=batch_size, indices=indices, device=device
        )
        found.append(collect_features(batches))
    known, asked = found
    labels = torch.from_numpy(train_source.labels)[known.samples]
    truth = torch.from_numpy(val_source.labels)[asked.samples]
    classes = len(train_source.class_names)
    (predicted,) = _predictions(
        asked.features[0], known.features[0], labels, classes, [(k, temperature)], device
    )
    return {
        "top1": float((predicted == truth).float().mean()),
        "train_images": len(labels),
        "val_images": len(truth),
        "bad": len(known.bad) + len(asked.bad),
    }


def _mean_tokens(images: Float[Tensor, "b c h w"], *, model: NextBlockModel) -> tuple[Float[Tensor, "b d"]]:
    return (reduce(model.encode(images).tokens.float(), "b n d -> b d", "mean"),)


class KnnMonitor:
    """Measures kNN accuracy while a model is pre-trained, logged as `knn/top1`; no features are kept."""

    def __init__(
        self,
        train_source: Source,
        val_source: Source,
        data: DataConfig,
        *,
        image_size: Size,
        every: str,
        max_samples: int = 10_000,
        seed: int = 0,
        k: int = 20,
        batch_size: int = 128,
    ) -> None:
        Duration.parse(every)
        check_same_classes(train_source, val_source)
        self.every = every
        self._measure = partial(
            knn_accuracy,
            train_source=train_source,
            val_source=val_source,
            data=data,
            image_size=image_size,
            max_samples=max_samples,
            seed=seed,
            k=k,
            batch_size=batch_size,
        )

    def __call__(self, model: NextBlockModel, event: MonitorEvent) -> dict[str, float]:
        """Measure the model as it is now; nothing where its features are no numbers, which is told."""
        try:
            return {"knn/top1": self._measure(model, device=event.device)["top1"]}
        except NonFiniteFeaturesError as error:
            log.warning("no kNN accuracy at step %d: %s", event.step, error)
            return {}
