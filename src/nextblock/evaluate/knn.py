"""Weighted kNN on cosine similarity (Wu et al., arXiv 1805.01978); nothing is trained.

Each of the k nearest training images votes for its class with weight exp(similarity / temperature).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from jaxtyping import Float, Int64
from torch import Tensor

from nextblock.errors import UsageError
from nextblock.evaluate.evaluation import Evaluation, frozen_tables, labelled_evaluation
from nextblock.evaluate.metrics import accuracies
from nextblock.evaluate.results import Result, add_leads
from nextblock.evaluate.settings import DEFAULT_K, DEFAULT_TEMPERATURE, KnnSettings
from nextblock.evaluate.splits import Labelled, source_notes
from nextblock.logs import counted
from nextblock.settings import from_dict
from nextblock.tables import Column, lead, number, share

QUERIES, NEIGHBOURS = 1024, 65_536
"""Queries and training images per matrix of similarities, which takes a quarter of a gigabyte."""


class Nearest(NamedTuple):
    """The nearest neighbours of each query, nearest first."""

    similarity: Float[Tensor, "q k"]
    """Cosine similarity."""
    rows: Int64[Tensor, "q k"]


def nearest_neighbours(
    queries: Float[Tensor, "q d"],
    neighbours: Float[Tensor, "n d"],
    k: int,
    *,
    itself: Int64[Tensor, " q"] | None = None,
    chunk: int = NEIGHBOURS,
) -> Nearest:
    """Find the k nearest of `neighbours`, or all if there are fewer, in chunks of `chunk` neighbours.

    `neighbours` must have unit length. `itself` is each query's own row in `neighbours`, which is excluded.
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
        # The best of all rows so far are among the best before and the best of this chunk.
        together = torch.cat([best.similarity, values], dim=1)
        kept = together.topk(min(k, together.shape[1]), dim=-1)
        best = Nearest(kept.values, torch.cat([best.rows, rows + start], dim=1).gather(1, kept.indices))
    return best


def predict_all(
    queries: Float[Tensor, "q d"] | None,
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    num_classes: int,
    settings: Sequence[tuple[int, float]],
    device: torch.device,
) -> list[Int64[Tensor, " q"]]:
    """Predict classes for every (k, temperature), on the CPU, from one search for all settings.

    A prediction is the class with the largest sum of the k nearest neighbours' weights, or of all if there
    are fewer. Without queries, each of `features` is classified by the others (leave-one-out).
    """
    neighbours, labels = F.normalize(features.to(device), dim=-1), labels.to(device)
    most = max(k for k, _ in settings)
    parts: list[list[Tensor]] = [[] for _ in settings]
    rows = None if queries is not None else torch.arange(len(features), device=device)
    for start in range(0, len(features if queries is None else queries), QUERIES):
        some = slice(start, start + QUERIES)
        chunk = neighbours[some] if queries is None else queries[some].to(device)
        nearest = nearest_neighbours(chunk, neighbours, most, itself=None if rows is None else rows[some])
        for part, (k, temperature) in zip(parts, settings, strict=True):
            similarity = nearest.similarity[:, :k]
            votes = similarity.new_zeros(len(similarity), num_classes)
            # Subtracting the largest similarity scales all weights alike, and avoids overflow at low
            # temperatures.
            weights = ((similarity - similarity[:, :1]) / temperature).exp()
            votes.scatter_add_(1, labels[nearest.rows[:, :k]], weights)
            part.append(votes.argmax(dim=-1).cpu())
    return [torch.cat(part) for part in parts]


COLUMNS = (
    Column("encoder", "features"),
    Column("k", "k", lambda k, row: f"{k}{' *' if row['is_default'] else ''}"),
    number("temperature", "temperature"),
    share("top1", "top-1 %"),
    share("balanced", "balanced %"),
    lead("the model's lead"),
)


def knn(**settings: Any) -> Result:
    """Measure a model's features by their nearest neighbours; `settings` are the fields of `KnnSettings`.

    Rows: encoder, k, temperature, top1 and its standard error, balanced (mean accuracy of the classes),
    is_default (the setting fixed beforehand). Raises `UsageError` if `out` contains another result, labels
    are missing, or test has classes that train lacks.
    """
    config = from_dict(KnnSettings, settings)
    with labelled_evaluation(config) as (opened, sources):
        return opened.result("knn", sources, COLUMNS, lambda: _measure(opened, config, sources))


def _measure(opened: Evaluation, config: KnnSettings, sources: dict[str, Labelled]) -> Result:
    train, settings = sources["train"], list(product(config.k, config.temperature))
    names, rows, rights = train.source.class_names, [], []
    images: dict[str, int] = {}
    for encoder, tables in frozen_tables(opened, config, sources):
        chosen = tables["train"].readable()
        queries, truth = None, train.labels[chosen]
        features, labels = tables["train"].read(chosen), torch.from_numpy(truth)
        if "test" in sources:
            numbers = tables["test"].readable()
            queries, truth = tables["test"].read(numbers), sources["test"].labels[numbers]
        elif len(chosen) < 2:
            raise UsageError(f"{config.train} has one readable image, so it has no neighbour; give --test")
        images = {"train": len(chosen), "test": len(truth)}
        predictions = predict_all(queries, features, labels, len(names), settings, opened.device)
        for (k, temperature), predicted in zip(settings, predictions, strict=True):
            rights.append(predicted.numpy() == truth)
            rows.append(
                {
                    "encoder": encoder,
                    "k": k,
                    "temperature": temperature,
                    **accuracies(rights[-1], truth),
                    "is_default": (k, temperature) == (DEFAULT_K, DEFAULT_TEMPERATURE),
                }
            )
    train_images = counted(images["train"], "training image")
    about = f"{train_images}, each classified by the others (leave-one-out)."
    if "test" in sources:
        about = f"{counted(images['test'], 'test image')}, classified by {train_images}."
    default = f"k {DEFAULT_K}, temperature {DEFAULT_TEMPERATURE:g}"
    if any(row["is_default"] for row in rows):
        about += f" Report the row marked * ({default}): it was fixed before anything was measured."
    else:
        about += f" The setting fixed beforehand, {default}, is not among these."
    verdict = add_leads(rows, rights, match=("k", "temperature"))
    facts = {"num_classes": len(names), "num_images": images, "bad_images": opened.bad_counts()}
    notes = (about, *verdict, *source_notes(sources))
    return Result(verb="knn", rows=tuple(rows), notes=notes, facts=facts, rights=rights)
