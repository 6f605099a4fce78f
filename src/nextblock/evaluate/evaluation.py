"""What every evaluation does: open a model, encode sources into tables, keep one result, stop and resume.

Results: OUT/VERB.json (all of it), VERB.md (the table), VERB.csv (all rows). The same command again reads the
result; another one is refused. One that was stopped resumes from the features that it has encoded.
"""

from __future__ import annotations

import html
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
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from nextblock.atomic import OUTPUT_MARK, RUN_FILES, exclusive, write_aside, write_text
from nextblock.config import DataConfig, pair
from nextblock.data import BadSample, Source, keyed_seed
from nextblock.errors import UsageError
from nextblock.evaluate.features import (
    encoder_extract,
    histogram_extract,
    open_classifier,
    open_model,
    pooled,
    small_pixels_extract,
    untrained,
)
from nextblock.evaluate.metrics import paired
from nextblock.evaluate.results import cut_of, differences, digest_of, encoder_of, identity_of, images_digest
from nextblock.evaluate.settings import EvalSettings, FrozenSettings
from nextblock.evaluate.splits import Labelled, open_labelled
from nextblock.evaluate.table import Extract, FeatureTable
from nextblock.launch import find_world
from nextblock.logs import counted
from nextblock.models import EncoderModel
from nextblock.models.heads import FeatureConfig, ImageClassifier
from nextblock.settings import to_dict
from nextblock.tables import Column, Shown, Table, escape_markdown, finite, write_csv
from nextblock.train.distributed import Group, find_device, process_group
from nextblock.train.runtime import StopRequest, autocast, choose_device, stop_on_signals

log = logging.getLogger(__name__)

MODEL, UNTRAINED, PIXELS, HISTOGRAM = "model", "untrained", "pixels 16x16", "colour histogram"
"""Encoders, as rows of tables name them."""
BASELINES = (UNTRAINED, PIXELS, HISTOGRAM)
NOT_BETTER = "The model is not clearly better than"
WHAT_TO_TRY = (
    ": train it longer, on more images, or start from another model's weights (pretrain --model.init)."
)
SATURATED = (
    "The model and its baselines are all at 100 %: the test is too easy or too small to tell them apart."
)
NOT_SAVED = "nothing was saved; give --out to be able to resume"
TOP = 5
QUARANTINE, RIGHTS = "quarantine.jsonl", "right.npz"
SHOWN_BAD = 3
PROGRESS_EVERY_S = 10.0


class Stopped(RuntimeError):  # noqa: N818 - nothing went wrong
    """A signal stopped an evaluation; what was encoded is kept if there is a place for it."""

    is_told = True
    """All ranks raise it, and rank 0 says so."""

    def __init__(self, by: signal.Signals, message: str) -> None:
        super().__init__(message)
        self.signal = by


@dataclass(frozen=True, kw_only=True)
class Result(Shown):
    """What an evaluation found: rows of plain values, one for each encoder, head, or setting."""

    verb: str
    rows: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()
    """Sentences that belong below the table."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What holds for all rows: classes, numbers of images, unreadable images."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Settings, weights, and images that the result is made from."""
    rights: Sequence[np.ndarray] = field(default=(), repr=False, compare=False)
    """For each row, how often each test image was classified correctly, 0 to 1: for paired differences."""
    columns: Sequence[Column] = field(default=(), repr=False, compare=False)
    """How the rows are shown."""
    all_rows: Sequence[dict[str, Any]] = field(default=(), repr=False, compare=False)
    """What VERB.csv holds, if `rows` are only some of it."""
    picture: Path | None = field(default=None, repr=False, compare=False)
    """What `show` draws in a notebook."""
    brief: Table | None = field(default=None, repr=False, compare=False)
    """What the terminal shows in place of the whole table."""

    def row(self, **values: Any) -> dict[str, Any]:
        """The first row that has these values."""
        for row in self.rows:
            if all(row.get(name) == value for name, value in values.items()):
                return row
        raise LookupError(f"no row of {self.verb} has {values}")

    @property
    def table(self) -> Table:
        """The rows as they are shown; of five classes, each image's is among the five likeliest."""
        has_top5 = self.facts.get("num_classes", TOP + 1) > TOP
        return Table(self.rows, [one for one in self.columns if one.key != "top5" or has_top5])

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        assert not self.identity.keys() & self.facts.keys(), "a fact would hide what the result is made from"
        own = {"verb": self.verb, "rows": list(self.rows), "notes": list(self.notes)}
        return finite({**self.identity, **self.facts, **own})

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return (self.brief or self.table)._repr_html_() + notes

    def markdown(self) -> str:
        """Title, table and notes in Markdown."""
        notes = "".join(f"\n{note}\n" for note in self.notes)
        model = self.identity["settings"]["model"]
        title = model if isinstance(model, str) else ", ".join(model)
        return f"# {self.verb} of {escape_markdown(title)}\n\n{self.table.markdown()}{notes}"

    def write(self, out: Path) -> None:
        """Write VERB.csv, VERB.md and, last, VERB.json."""
        write_text(out / f"{self.verb}.csv", write_csv(self.all_rows or self.rows))
        write_text(out / f"{self.verb}.md", self.markdown())
        text = json.dumps(self.as_dict(), indent=1, allow_nan=False)
        write_text(out / f"{self.verb}.json", text + "\n")


def add_leads(
    rows: Sequence[dict[str, Any]],
    rights: Sequence[Bool[np.ndarray, " n"] | Float[np.ndarray, " n"]],
    match: Sequence[str],
) -> list[str]:
    """Give each baseline's row the model's lead over it; a sentence for each that the model does not beat.

    `rights` say of each row which images were classified correctly, or how often; rows are compared that
    agree in `match`. The lead is "lead" with its paired standard error "lead_se". The sentence is about rows
    marked "is_default" if there are any.
    """

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in match)

    pairs = list(zip(rows, rights, strict=True))
    ours = {key(row): right for row, right in pairs if row["encoder"] == MODEL}
    best: dict[str, tuple[float, float, float]] = {}
    is_marked = any(row.get("is_default") for row in rows)
    for row, right in pairs:
        if row["encoder"] == MODEL:
            continue
        row["lead"], row["lead_se"] = paired(ours[key(row)], right)
        if is_marked and not row["is_default"]:
            continue
        found = (row["lead"] - 2 * row["lead_se"], row["lead"], row["lead_se"])
        best[row["encoder"]] = max(found, best.get(row["encoder"], found))
    unbeaten = [
        f"{encoder} ({100 * lead:+.1f} ± {100 * error:.1f} points)"
        for encoder, (least, lead, error) in best.items()
        if least <= 0
    ]
    if unbeaten and all((right == 1).all() for row, right in pairs if not is_marked or row["is_default"]):
        return [SATURATED]
    return [f"{NOT_BETTER} {' or '.join(unbeaten)}{WHAT_TO_TRY}"] if unbeaten else []


@dataclass
class Evaluation:
    """An open model and the means to evaluate it; made by `evaluation`. All ranks make the same calls."""

    settings: EvalSettings
    model: EncoderModel
    data: DataConfig
    device: torch.device
    group: Group
    stop: StopRequest
    classifier: ImageClassifier | None = None
    bad: dict[str, tuple[Source, tuple[BadSample, ...]]] = field(default_factory=dict)
    """Unreadable images by what their source is for."""

    def __post_init__(self) -> None:
        self._weights = encoder_of(self.model)
        out = None if self.settings.out is None else Path(self.settings.out) / "features"
        self.features_dir = out if self.settings.cache is None else Path(self.settings.cache)
        """Where tables are kept; None: in memory."""

    def identity(self, sources: Mapping[str, Source | Labelled]) -> dict[str, Any]:
        """What makes a result from these sources what it is."""
        plain = {name: one.source if isinstance(one, Labelled) else one for name, one in sources.items()}
        return identity_of(self.settings, self.model, self.data, plain)

    def check_stop(self) -> None:
        """Raise `Stopped` if a signal asked for it; all ranks must call this alike."""
        if not self.group.any(self.stop):
            return
        names = [name for name in self.group.gather(self.stop.signal and self.stop.signal.name) if name]
        kept = "the same command resumes" if self.features_dir else NOT_SAVED
        with self.group.together():
            raise Stopped(signal.Signals[names[0]], f"stopped by {names[0]}; {kept}")

    def extract(
        self, encoder: str, wanted: Sequence[FeatureConfig], seed: int
    ) -> tuple[Extract, list[dict[str, Any]]]:
        """What turns images into the features of an encoder or a baseline, and what these are made from."""
        if encoder in (PIXELS, HISTOGRAM):
            function = small_pixels_extract if encoder == PIXELS else histogram_extract(self.data)
            return function, [{"baseline": encoder}]
        model, origin = self.model, self._weights
        if encoder == UNTRAINED:
            model = untrained(model, keyed_seed(seed, "untrained encoder"))
            origin = {"untrained": seed, "encoder": self._weights["encoder"]}
        chunk = self.settings.images_at_once(self.device.type)
        function = encoder_extract(model, wanted, precision=self.settings.precision, chunk=chunk)
        return function, [
            {**origin, "features": to_dict(one), "precision": self.settings.precision} for one in wanted
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
        """The filled table of an encoder's (or a baseline's) features of a source, or of some of its images.

        Raises `Stopped`, and what `FeatureTable.fill` raises.
        """
        extract, origins = self.extract(encoder, wanted, seed)
        return self.fill(purpose, source, extract, origins, indices)

    def logits(self, purpose: str, source: Source) -> FeatureTable:
        """The filled table of the classifier's logits of a source."""
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
        """A filled table of whatever `extract` gives, each part made from what `origins` say."""
        images = {
            "source": source.fingerprint,
            "sample": None if source.in_memory else images_digest(source),
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

        def show(done: int, images: int) -> None:
            nonlocal shown_s
            now_s = time.monotonic()
            if done and now_s - shown_s >= PROGRESS_EVERY_S and self.group.is_main:
                shown_s, speed = now_s, done / (now_s - started_s)
                left_s = (images - done) / speed
                log.info(
                    "%s: %d of %s encoded, %.0f images/s, %.0f s left",
                    purpose, done, counted(images, "image"), speed, left_s,
                )  # fmt: skip

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
        """Measure and write the result, or read it if `out` holds it; `save` writes what else belongs to it.

        `made_from` is what it is made from besides settings, encoder, and images, ready for JSON. Raises
        `UsageError` if `out` holds something else.
        """
        settings, group = self.settings, self.group
        identity = {**self.identity(sources), **(made_from or {})}
        if settings.out is None:
            found = measure()
            if group.is_main:
                self.report_bad(None)
            return replace(found, identity=identity, columns=columns)
        out = Path(settings.out)
        with group.together():
            there = read_result(out, verb, identity, overwrite=settings.overwrite) if group.is_main else None
        there = group.broadcast(there)
        if there is not None:
            log.info("%s has this result already", out)
            return replace(there, columns=columns)
        with _held(out, group):
            found = replace(measure(), identity=identity, columns=columns)
            with group.together():
                if group.is_main:
                    self.report_bad(out)
                    if save is not None:
                        save(out, found)
                    if found.rights:
                        with write_aside(out / RIGHTS) as aside, aside.open("wb") as file:
                            np.savez_compressed(file, *found.rights)
                    found.write(out)
                    if settings.cache is None:
                        shutil.rmtree(out / "features", ignore_errors=True)
        return found

    @contextmanager
    def working(self, out: Path | None) -> Iterator[Callable[[], None]]:
        """For a result that is one file: features are kept beside it, until what is yielded is called."""
        if out is None or self.settings.cache is not None:
            yield lambda: None
            return
        self.features_dir = out.with_name(f".{out.name}.features")
        with _held(self.features_dir, self.group):
            yield lambda: shutil.rmtree(str(self.features_dir), ignore_errors=True)

    def report_bad(self, out: Path | None) -> None:
        """Name unreadable images: a few in the log, all in quarantine.jsonl."""
        lines = []
        for purpose, (source, bad) in self.bad.items():
            lines += [json.dumps({"source": purpose, **one._asdict()}) for one in bad]
            if bad:
                names = "; ".join(" ".join(f"{one.name}: {one.reason}".split()) for one in bad[:SHOWN_BAD])
                log.warning(
                    "%s of %s (%s) skipped, unreadable: %s%s",
                    counted(len(bad), "image"), source.spec, purpose, names, "; …" * (len(bad) > SHOWN_BAD),
                )  # fmt: skip
        if out is not None and lines:
            write_text(out / QUARANTINE, "\n".join(lines) + "\n")
        elif out is not None:
            (out / QUARANTINE).unlink(missing_ok=True)

    def bad_counts(self) -> dict[str, int]:
        """Numbers of unreadable images, by what their source is for."""
        return {purpose: len(bad) for purpose, (_, bad) in self.bad.items()}


@contextmanager
def evaluation(settings: EvalSettings, *, classifier: bool = False) -> Iterator[Evaluation]:
    """Open the model or classifier that the settings name, frozen, and meet the other processes if any."""
    world = find_world()
    device = find_device(choose_device(settings.device), world)
    with (
        process_group(world, device) as group,
        stop_on_signals(lambda: "finishing this batch", is_quiet=not group.is_main) as stop,
    ):
        found = None
        with group.together():
            if classifier:
                found = open_classifier(settings).to(device).eval().requires_grad_(requires_grad=False)
            model, data = open_model(settings, found)
        model.to(device).eval().requires_grad_(requires_grad=False)
        yield Evaluation(settings, model, data, device, group, stop, found)


@contextmanager
def labelled_evaluation(settings: Any) -> Iterator[tuple[Evaluation, dict[str, Labelled]]]:
    """The same with the labelled sources that the settings name, of train, val, and test."""
    with evaluation(settings) as opened:
        specs = {purpose: getattr(settings, purpose, None) for purpose in ("train", "val", "test")}
        yield opened, open_labelled(specs, opened.data)


def frozen_tables(
    opened: Evaluation,
    config: FrozenSettings,
    sources: Mapping[str, Labelled],
    **some: Int64[np.ndarray, " n"],
) -> Iterator[tuple[str, dict[str, FeatureTable]]]:
    """The tables of all sources for the model and then each baseline, one vector an image.

    `some` names the images that are needed of a source of which not all are.
    """
    wanted = [pooled(config, opened.model.config.depth)]
    for encoder in (MODEL, *(BASELINES if config.baselines else ())):
        yield (
            encoder,
            {
                purpose: opened.table(
                    purpose, one.source, encoder, wanted, indices=some.get(purpose), seed=config.seed
                )
                for purpose, one in sources.items()
            },
        )


@contextmanager
def _held(out: Path, group: Group) -> Iterator[None]:
    """Hold the lock of a directory on rank 0."""
    with ExitStack() as stack:
        with group.together():  # if it is held by another command, all ranks end
            if group.is_main:
                stack.enter_context(exclusive(out))
        yield


def read_result(out: Path, verb: str, identity: Mapping[str, Any], *, overwrite: bool) -> Result | None:
    """The result of this very evaluation if `out` has it; `UsageError` if it holds anything else."""
    path = out / f"{verb}.json"
    if any((out / name).is_file() for name in RUN_FILES):
        raise UsageError(f"{out} is a training run; choose another --out, such as {out / verb}")
    if not path.is_file() and out.is_dir() and not (out / OUTPUT_MARK).is_file():
        foreign = sorted(one.name for one in out.iterdir())
        if foreign:
            raise UsageError(f"{out} holds other files ({', '.join(foreign[:3])}); choose another --out")
    if overwrite or not path.is_file():
        return None
    found = stored_result(path, verb, identity)
    rights: list[np.ndarray] = []
    if (out / RIGHTS).is_file():
        with np.load(out / RIGHTS, allow_pickle=False) as file:
            rights = [file[name] for name in file.files]
    return replace(found, rights=rights)


def stored_result(path: Path, verb: str, identity: Mapping[str, Any]) -> Result:
    """The result in a JSON file; `UsageError` if it is damaged or of another evaluation."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        different = differences(values, identity)
        own = {"verb": verb, "rows": tuple(values["rows"]), "notes": tuple(values["notes"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged ({error}); remove it, or give --overwrite") from error
    if different:
        raise UsageError(
            f"{path} holds another result ({'; '.join(different[:3])}); choose another --out, or --overwrite"
        )
    facts = {name: value for name, value in values.items() if name not in {*identity, *own}}
    return Result(**own, facts=facts, identity=dict(identity))
