"""Monitor of feature quality during pre-training: kNN accuracy, and RankMe, which needs no labels."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch
from einops import reduce
from torch import Tensor

from nextblock.config import DataConfig, Size
from nextblock.data import Source
from nextblock.data.random import keyed_permutation
from nextblock.errors import UsageError
from nextblock.evaluate.knn import predict_all
from nextblock.evaluate.settings import DEFAULT_K, DEFAULT_TEMPERATURE
from nextblock.evaluate.splits import match_classes
from nextblock.evaluate.table import FeatureTable, NoFeaturesError, NonFiniteFeaturesError
from nextblock.models.next_block import NextBlockModel
from nextblock.settings import Duration, require
from nextblock.train import MonitorEvent
from nextblock.train.monitors import rankme

log = logging.getLogger(__name__)


def missing_classes(train: Source, val: Source) -> list[str]:
    """Names of the classes of `val` that `train` lacks."""
    return sorted(set(val.class_names) - set(train.class_names))


class FeatureMonitor:
    """Logs RankMe as `rankme` and, if `train` is given, kNN accuracy as `knn/top1`.

    Both use the mean patch of the final tokens of images of `source`, under the model's native attention.
    kNN classifies them by images of `train`. At most `max_samples` images of each are used, drawn by `seed`.
    Every rank encodes its share, and rank 0 returns the values.
    """

    def __init__(
        self,
        source: Source,
        data: DataConfig,
        *,
        train: Source | None = None,
        image_size: Size,
        every: str,
        max_samples: int = 10_000,
        seed: int = 0,
        k: int = DEFAULT_K,
        batch_size: int = 128,
    ) -> None:
        Duration.parse(every)
        require(k >= 1, f"k is {k}; use at least 1")
        if train is not None and len(missing_classes(train, source)) == len(source.class_names):
            raise UsageError(f"{train.spec} and {source.spec} have no class in common")
        self.every = every
        self._source, self._train, self._data, self._image_size = source, train, data, image_size
        self._max_samples, self._seed, self._k, self._batch_size = max_samples, seed, k, batch_size

    def __call__(self, model: NextBlockModel, event: MonitorEvent) -> dict[str, float]:
        """Measure the model now; empty if its features cannot be used, or if the run should stop."""
        found: list[tuple[Tensor, np.ndarray]] = []  # features and indices of the images of each source
        chosen = [
            (source, np.sort(keyed_permutation(self._seed, len(source), purpose)[: self._max_samples]))
            for source, purpose in ((self._source, "knn val"), (self._train, "knn train"))
            if source is not None
        ]
        total, before = sum(len(indices) for _, indices in chosen), 0

        def progress(done: int, _: int) -> None:
            if event.progress is not None:
                event.progress(before + done, total)

        for source, indices in chosen:
            table = FeatureTable(
                lambda images: (reduce(model.encode(images).tokens.float(), "b n d -> b d", "mean"),),
                source,
                replace(self._data, max_bad_fraction=1.0),  # the run itself counts them
                self._image_size,
                batch_size=self._batch_size,
                device=event.device,
                group=event.group,
            )
            try:
                if not table.fill(indices, should_stop=event.should_stop, progress=progress):
                    return {}
            except (NonFiniteFeaturesError, NoFeaturesError) as error:
                log.warning("kNN and RankMe are not measured at step %d: %s", event.step, error)
                return {}
            readable = table.readable(indices)
            found.append((table.read(readable), readable))
            before += len(indices)
        if not event.group.is_main:
            return {}
        (queries, asked), *others = found
        values = {"rankme": rankme(queries)}
        if self._train is not None:
            ((features, known),) = others
            # -1 matches no prediction: an image of a class that train lacks counts as wrong.
            truth, _ = match_classes(self._source, self._train.class_names)
            labels, classes = torch.from_numpy(self._train.labels[known]), len(self._train.class_names)
            settings = [(self._k, DEFAULT_TEMPERATURE)]
            (guess,) = predict_all(queries, features, labels, classes, settings, event.device)
            values["knn/top1"] = float((guess.numpy() == truth[asked]).mean())
        return values
