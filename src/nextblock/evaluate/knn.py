"""How good features are without training anything: accuracy of their nearest neighbours, also as a monitor.

Weighted kNN on cosine similarity (Wu et al., arXiv 1805.01978): each of the k nearest training images votes
for its class with weight exp(similarity / temperature).
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from einops import reduce
from jaxtyping import Float, Int64
from torch import Tensor

from nextblock.config import DataConfig, Size
from nextblock.data import Source
from nextblock.data.keyed import keyed_permutation
from nextblock.evaluate.features import check_same_classes, collect_features, iterate_features
from nextblock.models.next_block import NextBlockModel
from nextblock.settings import Duration
from nextblock.train.monitor import MonitorEvent

__all__ = ["KnnMonitor", "knn_accuracy", "knn_predict"]

QUERIES = 1024
"""So many images at a time are compared with all training images."""


def knn_predict(
    queries: Float[Tensor, "q d"],
    neighbours: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    num_classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Int64[Tensor, " q"]:
    """Predict a class for each query from its k nearest neighbours (all of them, where there are fewer)."""
    similarity = F.normalize(queries, dim=-1) @ F.normalize(neighbours, dim=-1).T
    nearest, rows = similarity.topk(min(k, len(neighbours)), dim=-1)
    votes = queries.new_zeros(len(queries), num_classes)
    # exp of the difference to the best: the same winner, and no overflow at low temperatures.
    votes.scatter_add_(1, labels[rows], ((nearest - nearest[:, :1]) / temperature).exp())
    return votes.argmax(dim=-1)


def knn_accuracy(
    model: NextBlockModel,
    train_source: Source,
    val_source: Source,
    data: DataConfig,
    *,
    k: int = 20,
    temperature: float = 0.07,
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
    known, asked = (
        collect_features(
            iterate_features(
                extract,
                source,
                data,
                size,
                batch_size=batch_size,
                indices=_chosen(len(source), max_samples, seed, purpose),
                device=device,
            )
        )
        for source, purpose in ((train_source, "knn train"), (val_source, "knn val"))
    )
    labels = torch.from_numpy(train_source.labels)[known.samples].to(device)
    truth = torch.from_numpy(val_source.labels)[asked.samples].to(device)
    predict = partial(
        knn_predict,
        neighbours=known.features[0].to(device),
        labels=labels,
        num_classes=len(train_source.class_names),
        k=k,
        temperature=temperature,
    )
    predicted = torch.cat([predict(queries.to(device)) for queries in asked.features[0].split(QUERIES)])
    return {
        "top1": float((predicted == truth).float().mean()),
        "train_images": len(labels),
        "val_images": len(truth),
        "bad": len(known.bad) + len(asked.bad),
    }


def _mean_tokens(images: Float[Tensor, "b c h w"], *, model: NextBlockModel) -> tuple[Float[Tensor, "b d"]]:
    return (reduce(model.encode(images).tokens.float(), "b n d -> b d", "mean"),)


def _chosen(count: int, max_samples: int, seed: int, purpose: str) -> Int64[np.ndarray, " n"]:
    """At most `max_samples` of `count` indices, in rising order."""
    return np.sort(keyed_permutation(seed, count, purpose)[:max_samples])


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
        """Measure the model as it is now."""
        return {"knn/top1": self._measure(model, device=event.device)["top1"]}
