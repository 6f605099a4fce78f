"""Shared steps of evaluations: open a model, encode sources into tables, store a result, stop and resume.

Repeating a command reads its result; a different command is refused. An interrupted command resumes from the
features already encoded.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from nextblock.atomic import exclusive, remove, write_text
from nextblock.checkpoint import digest_of
from nextblock.config import DataConfig, pair
from nextblock.data import BadSample, Source, keyed_seed, open_source
from nextblock.evaluate.features import (
    check_one_head,
    classifier_directory,
    encoder_extract,
    histogram_extract,
    open_model,
    pooled,
    small_pixels_extract,
    untrained,
)
from nextblock.evaluate.results import (
    BASELINES,
    HISTOGRAM,
    MODEL,
    PIXELS,
    UNTRAINED,
    Result,
    cut_of,
    encoder_of,
    identity_of,
    images_digest,
    read_result,
    result_file,
)
from nextblock.evaluate.settings import EvalSettings, FrozenSettings, ScoreSettings
from nextblock.evaluate.splits import Labelled, open_labelled
from nextblock.evaluate.table import Extract, FeatureTable
from nextblock.interop import load_classifier
from nextblock.launch import find_world
from nextblock.logs import counted
from nextblock.models import EncoderModel
from nextblock.models.heads import FeatureConfig, ImageClassifier
from nextblock.settings import to_dict
from nextblock.tables import Column
from nextblock.train.distributed import Group, find_device, process_group
from nextblock.train.runtime import StopRequest, autocast, choose_device, stop_on_signals

log = logging.getLogger(__name__)

NOT_SAVED = "nothing was saved; give --out to be able to resume"
QUARANTINE = "quarantine.jsonl"
SHOWN_BAD = 3
PROGRESS_EVERY_S = 10.0


class Stopped(RuntimeError):  # noqa: N818 - nothing went wrong
    """A signal stopped an evaluation; encoded features are kept if it has a directory."""

    is_reported = True
    """All ranks raise it, and only rank 0 prints it."""

    def __init__(self, by: signal.Signals, message: str) -> None:
        super().__init__(message)
        self.signal = by


@dataclass
class Evaluation:
    """An open model with its device and processes, made by `evaluation`. All ranks make the same calls."""

    settings: EvalSettings
    model: EncoderModel
    data: DataConfig
    device: torch.device
    group: Group
    stop: StopRequest
    classifier: ImageClassifier | None = None
    bad: dict[str, tuple[Source, tuple[BadSample, ...]]] = field(default_factory=dict)
    """Each source with its unreadable images, by purpose."""

    def __post_init__(self) -> None:
        self._weights = encoder_of(self.model)
        self.out = None if self.settings.out is None else Path(self.settings.out)
        self._directory, self._scratch = self.out, self.out and self.out / "features"
        """`out`, if it is a directory; where features are kept until the result is written."""
        if self.out is not None and self.settings.out_is_file:
            self._directory, self._scratch = None, self.out.with_name(f".{self.out.name}.features")
        self.features_dir = self._scratch if self.settings.cache is None else Path(self.settings.cache)
        """Directory of the feature tables; None: in memory."""

    def open_source(self, spec: str) -> Source:
        """Open images, cut as the model takes them."""
        return open_source(spec, self.data)

    def identity(self, sources: Mapping[str, Source | Labelled]) -> dict[str, Any]:
        """Everything that a result from these sources depends on."""
        plain = {name: one.source if isinstance(one, Labelled) else one for name, one in sources.items()}
        return identity_of(self.settings, self.model, self.data, plain)

    def check_stop(self) -> None:
        """Raise `Stopped` if any rank received a signal; a collective call."""
        if not self.group.any(self.stop):
            return
        names = [name for name in self.group.gather(self.stop.signal and self.stop.signal.name) if name]
        kept = "the same command resumes" if self.features_dir else NOT_SAVED
        with self.group.together():
            raise Stopped(signal.Signals[names[0]], f"stopped by {names[0]}; {kept}")

    def extract(
        self, encoder: str, wanted: Sequence[FeatureConfig], seed: int
    ) -> tuple[Extract, list[dict[str, Any]]]:
        """The function from images to features of an encoder or a baseline, and the features' identities."""
        if encoder in (PIXELS, HISTOGRAM):
            function = small_pixels_extract if encoder == PIXELS else histogram_extract(self.data)
            return function, [{"baseline": encoder}]
        model, origin = self.model, self._weights
        if encoder == UNTRAINED:
            model = untrained(model, keyed_seed(seed, "untrained encoder"))
            # Its weights follow from architecture and seed, so all models of an architecture share its table.
            origin = {"untrained": seed, "encoder": self._weights["encoder"]}
        chunk = self.settings.images_at_once(self.device.type)
        function = encoder_extract(model, wanted, precision=self.settings.precision, chunk=chunk)
        return function, [
            {**origin, "features": to_dict(config), "precision": self.settings.precision} for config in wanted
        ]

    def table(
        self,
        purpose: str,
        source: Source,
        encoder: str,
        wanted: Sequence[FeatureConfig],
        *,
        indices: Any = None,
        seed: int = 0,
    ) -> FeatureTable:
        """Fill the table of a source's features from an encoder or baseline; `indices` select images.

        Raises `Stopped`, and the errors of `FeatureTable.fill`.
        """
        extract, origins = self.extract(encoder, wanted, seed)
        return self.fill(purpose, source, extract, origins, indices)

    def logits(self, purpose: str, source: Source) -> FeatureTable:
        """Fill the table of the classifier's logits for a source."""
        classifier, precision = self.classifier, self.settings.precision
        assert classifier is not None, "a classifier was opened"

        def extract(images: Tensor) -> tuple[Tensor, ...]:
            with autocast(images.device, precision):
                return (classifier(images).float(),)

        origin = {
            "classifier": digest_of(classifier),
            "head": to_dict(classifier.head_config),
            "precision": precision,
        }
        return self.fill(purpose, source, extract, [origin])

    def fill(
        self,
        purpose: str,
        source: Source,
        extract: Extract,
        origins: list[dict[str, Any]],
        indices: Any = None,
    ) -> FeatureTable:
        """Fill a table with the outputs of `extract`; `origins` are their identities, in the same order."""
        # Features are keyed by all that they depend on, so a cache never gives those of other weights or
        # pixels.
        images = {
            "source": source.fingerprint,
            "sample": images_digest(source),
            "image_size": list(pair(self.model.config.image_size)),
            **cut_of(self.data),
        }
        table = FeatureTable(
            extract,
            source,
            self.data,
            self.model.config.image_size,
            batch_size=self.settings.images_at_once(self.device.type),
            device=self.device,
            group=self.group,
            directory=self.features_dir,
            keys=[{**origin, **images} for origin in origins],
        )
        started_s = shown_s = time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal shown_s
            now_s = time.monotonic()
            if done and now_s - shown_s >= PROGRESS_EVERY_S and self.group.is_main:
                shown_s, speed = now_s, done / (now_s - started_s)
                words = "%s: %d of %s encoded, %.0f images/s, %.0f s left"
                log.info(words, purpose, done, counted(total, "image"), speed, (total - done) / speed)

        if not table.fill(indices, should_stop=lambda: self.group.any(self.stop), progress=show):
            self.check_stop()
        self.bad[purpose] = (source, table.bad)
        return table

    def result(
        self,
        verb: str,
        sources: Mapping[str, Source | Labelled],
        columns: Sequence[Column],
        measure: Callable[[], Result],
        *,
        save: Callable[[Path, Result], None] | None = None,
        made_from: Mapping[str, Any] | None = None,
    ) -> Result:
        """Measure and write the result, or read it from `out`; `save` writes further files.

        `made_from` extends the identity, ready for JSON. Raises `UsageError` if `out` has another result.
        """
        out, group, is_file = self.out, self.group, self.settings.out_is_file
        identity, stored = {**self.identity(sources), **(made_from or {})}, None
        with group.together():
            if group.is_main and out is not None:
                overwrite = self.settings.overwrite
                stored = read_result(out, verb, identity, overwrite=overwrite, is_file=is_file)
        stored = group.broadcast(stored)
        if stored is not None:
            log.info("%s has this result already", out)
            return replace(stored, columns=columns)
        # Locked from here on only: reading a finished result needs no lock.
        with self.locked():
            result = replace(measure(), identity=identity, columns=columns)
            with group.together():
                if group.is_main:
                    self.report_bad()
                if group.is_main and out is not None:
                    # The old JSON describes files that are now replaced.
                    result_file(out, verb, is_file=is_file).unlink(missing_ok=True)
                    if save is not None:
                        save(out, result)
                    result.write(out, is_file=is_file)
                    self.forget_features()
        return result

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock `out`, or the directory of features beside it if it is a single file."""
        place = self._directory or self._scratch
        with ExitStack() as stack:
            with self.group.together():  # if another command holds the lock, all ranks raise
                if self.group.is_main and place is not None:
                    stack.enter_context(exclusive(place))
            yield

    def forget_features(self) -> None:
        """Remove the features that were kept to resume; those in a cache stay."""
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def report_bad(self) -> None:
        """Report unreadable images: a few in the log, all in OUT/quarantine.jsonl."""
        lines: list[str] = []
        for purpose, (source, found) in self.bad.items():
            bad = sorted(found)  # training finds them in the order of its batches
            lines += [json.dumps({"source": purpose, **sample._asdict()}) for sample in bad]
            if bad:
                names = "; ".join(" ".join(f"{s.name}: {s.reason}".split()) for s in bad[:SHOWN_BAD])
                more = "; …" if len(bad) > SHOWN_BAD else ""
                which = f"{counted(len(bad), 'image')} of {source.spec} ({purpose})"
                log.warning("%s skipped, unreadable: %s%s", which, names, more)
        if self._directory is not None:
            remove(self._directory / QUARANTINE)
            if lines:
                write_text(self._directory / QUARANTINE, "\n".join(lines) + "\n")

    def bad_counts(self) -> dict[str, int]:
        """Numbers of unreadable images by the purpose of their source."""
        return {purpose: len(bad) for purpose, (_, bad) in self.bad.items()}


@contextmanager
def evaluation(settings: EvalSettings) -> Iterator[Evaluation]:
    """Join the process group, and open the settings' model, frozen; for `ScoreSettings`, a classifier."""
    world = find_world()
    device = find_device(choose_device(settings.device), world)
    with (
        process_group(world, device) as group,
        stop_on_signals(lambda: "finishing this batch", is_quiet=not group.is_main) as stop,
    ):
        loaded = None
        with group.together():
            if isinstance(settings, ScoreSettings):
                check_one_head(settings.model, "model")
                loaded = load_classifier(
                    classifier_directory(settings.model),
                    settings.head,
                    num_heads=settings.num_heads,
                    probe_layers=settings.probe_layers,
                )
                loaded.to(device).eval().requires_grad_(requires_grad=False)
            model, data = open_model(settings, loaded)
        model.to(device).eval().requires_grad_(requires_grad=False)
        yield Evaluation(settings, model, data, device, group, stop, loaded)


@contextmanager
def labelled_evaluation(settings: Any) -> Iterator[tuple[Evaluation, dict[str, Labelled]]]:
    """Open an evaluation and its labelled sources, those of train, val and test that the settings name."""
    with evaluation(settings) as opened:
        specs = {purpose: getattr(settings, purpose, None) for purpose in ("train", "val", "test")}
        yield opened, open_labelled(specs, opened.data)


def frozen_tables(
    opened: Evaluation,
    config: FrozenSettings,
    sources: Mapping[str, Labelled],
    **some: Int64[np.ndarray, " n"],
) -> Iterator[tuple[str, dict[str, FeatureTable]]]:
    """Yield the tables of all sources for the model and then each baseline, one vector per image.

    `some` selects images by purpose; by default all images of a source are encoded.
    """
    wanted = [pooled(config, opened.model.config.depth)]
    for encoder in (MODEL, *(BASELINES if config.baselines else ())):
        yield (
            encoder,
            {
                purpose: opened.table(
                    purpose, labelled.source, encoder, wanted, indices=some.get(purpose), seed=config.seed
                )
                for purpose, labelled in sources.items()
            },
        )
