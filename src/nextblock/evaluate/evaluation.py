"""Shared steps of evaluations: open a model, encode sources into tables, store a result, stop and resume.

Files: OUT/VERB.json (everything), VERB.md (the table), VERB.csv (all rows). Repeating a command reads its
result; a different command is refused. An interrupted command resumes from the features already encoded.
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
"""Names of encoders in the rows of tables."""
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
    """A signal stopped an evaluation; encoded features are kept if it has a directory."""

    is_told = True
    """All ranks raise it, and only rank 0 prints it."""

    def __init__(self, by: signal.Signals, message: str) -> None:
        super().__init__(message)
        self.signal = by


@dataclass(frozen=True, kw_only=True)
class Result(Shown):
    """Result of an evaluation: rows of plain values, one per encoder, head, or setting."""

    verb: str
    rows: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()
    """Sentences below the table."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Values shared by all rows: classes, numbers of images, unreadable images."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Settings, weights, and images that the result depends on."""
    rights: Sequence[np.ndarray] = field(default=(), repr=False, compare=False)
    """Per row, how often each test image was classified correctly, 0 to 1; used for paired differences."""
    columns: Sequence[Column] = field(default=(), repr=False, compare=False)
    """Columns of the table."""
    all_rows: Sequence[dict[str, Any]] = field(default=(), repr=False, compare=False)
    """Rows of VERB.csv, if it has more than `rows`."""
    picture: Path | None = field(default=None, repr=False, compare=False)
    """Picture that `show` displays in a notebook."""
    brief: Table | None = field(default=None, repr=False, compare=False)
    """Table for the terminal, in place of the whole one."""

    def row(self, **values: Any) -> dict[str, Any]:
        """The first row that has these values."""
        for row in self.rows:
            if all(row.get(name) == value for name, value in values.items()):
                return row
        raise LookupError(f"no row of {self.verb} has {values}")

    @property
    def table(self) -> Table:
        """The table of the rows, without top-5 if there are at most five classes."""
        has_top5 = self.facts.get("num_classes", TOP + 1) > TOP
        return Table(self.rows, [column for column in self.columns if column.key != "top5" or has_top5])

    def as_dict(self) -> dict[str, Any]:
        """All values, ready for JSON."""
        assert not self.identity.keys() & self.facts.keys(), "a fact would override the identity"
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
    """Add the model's lead over each baseline to the baseline's row; return a warning if it beats not all.

    `rights` contain, per row, how often each image was classified correctly. Rows with equal `match` are
    compared. "lead" gets its paired standard error "lead_se". If rows are marked "is_default", the warning
    considers only those.
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
        lead = (row["lead"] - 2 * row["lead_se"], row["lead"], row["lead_se"])
        best[row["encoder"]] = max(lead, best.get(row["encoder"], lead))
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
        out = None if self.settings.out is None else Path(self.settings.out) / "features"
        self.features_dir = out if self.settings.cache is None else Path(self.settings.cache)
        """Directory of the feature tables; None: in memory."""

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
        """Measure and write the result, or read it from `out`; `save` writes further files.

        `made_from` extends the identity, ready for JSON. Raises `UsageError` if `out` has another result.
        """
        settings, group = self.settings, self.group
        identity = {**self.identity(sources), **(made_from or {})}
        if settings.out is None:
            result = measure()
            if group.is_main:
                self.report_bad(None)
            return replace(result, identity=identity, columns=columns)
        out = Path(settings.out)
        with group.together():
            stored = read_result(out, verb, identity, overwrite=settings.overwrite) if group.is_main else None
        stored = group.broadcast(stored)
        if stored is not None:
            log.info("%s has this result already", out)
            return replace(stored, columns=columns)
        with _locked(out, group):
            result = replace(measure(), identity=identity, columns=columns)
            with group.together():
                if group.is_main:
                    self.report_bad(out)
                    if save is not None:
                        save(out, result)
                    if result.rights:
                        with write_aside(out / RIGHTS) as aside, aside.open("wb") as file:
                            np.savez_compressed(file, *result.rights)
                    result.write(out)
                    if settings.cache is None:
                        shutil.rmtree(out / "features", ignore_errors=True)
        return result

    @contextmanager
    def working(self, out: Path | None) -> Iterator[Callable[[], None]]:
        """Keep features beside a result that is one file; call the yielded function to delete them."""
        if out is None or self.settings.cache is not None:
            yield lambda: None
            return
        self.features_dir = out.with_name(f".{out.name}.features")
        with _locked(self.features_dir, self.group):
            yield lambda: shutil.rmtree(str(self.features_dir), ignore_errors=True)

    def report_bad(self, out: Path | None) -> None:
        """Report unreadable images: a few in the log, all in quarantine.jsonl."""
        lines = []
        for purpose, (source, bad) in self.bad.items():
            lines += [json.dumps({"source": purpose, **sample._asdict()}) for sample in bad]
            if bad:
                names = "; ".join(" ".join(f"{s.name}: {s.reason}".split()) for s in bad[:SHOWN_BAD])
                log.warning(
                    "%s of %s (%s) skipped, unreadable: %s%s",
                    counted(len(bad), "image"), source.spec, purpose, names, "; …" * (len(bad) > SHOWN_BAD),
                )  # fmt: skip
        if out is not None and lines:
            write_text(out / QUARANTINE, "\n".join(lines) + "\n")
        elif out is not None:
            (out / QUARANTINE).unlink(missing_ok=True)

    def bad_counts(self) -> dict[str, int]:
        """Numbers of unreadable images by the purpose of their source."""
        return {purpose: len(bad) for purpose, (_, bad) in self.bad.items()}


@contextmanager
def evaluation(settings: EvalSettings, *, classifier: bool = False) -> Iterator[Evaluation]:
    """Join the process group, and open the frozen model or classifier of the settings."""
    world = find_world()
    device = find_device(choose_device(settings.device), world)
    with (
        process_group(world, device) as group,
        stop_on_signals(lambda: "finishing this batch", is_quiet=not group.is_main) as stop,
    ):
        loaded = None
        with group.together():
            if classifier:
                loaded = open_classifier(settings).to(device).eval().requires_grad_(requires_grad=False)
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


@contextmanager
def _locked(out: Path, group: Group) -> Iterator[None]:
    """Lock a directory on rank 0."""
    with ExitStack() as stack:
        with group.together():  # if another command holds the lock, all ranks raise
            if group.is_main:
                stack.enter_context(exclusive(out))
        yield


def read_result(out: Path, verb: str, identity: Mapping[str, Any], *, overwrite: bool) -> Result | None:
    """Read this evaluation's result from `out`, or None; `UsageError` if `out` contains anything else."""
    path = out / f"{verb}.json"
    if any((out / name).is_file() for name in RUN_FILES):
        raise UsageError(f"{out} is a training run; choose another --out, such as {out / verb}")
    if not path.is_file() and out.is_dir() and not (out / OUTPUT_MARK).is_file():
        foreign = sorted(path.name for path in out.iterdir())
        if foreign:
            raise UsageError(f"{out} holds other files ({', '.join(foreign[:3])}); choose another --out")
    if overwrite or not path.is_file():
        return None
    stored = stored_result(path, verb, identity)
    rights: list[np.ndarray] = []
    if (out / RIGHTS).is_file():
        with np.load(out / RIGHTS, allow_pickle=False) as file:
            rights = [file[name] for name in file.files]
    return replace(stored, rights=rights)


def stored_result(path: Path, verb: str, identity: Mapping[str, Any]) -> Result:
    """Read a result from a JSON file; `UsageError` if it is damaged or from another evaluation."""
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
