"""What a run achieved, read from its files: accuracies, speed, losses beside their references, pictures.

Nothing here imports torch, so that a report starts quickly. What a run does not have yet is empty, not an
error.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from nextblock.atomic import is_locked
from nextblock.config import MonitorConfig
from nextblock.errors import UsageError
from nextblock.logs import clock
from nextblock.presets import DEFAULT_PRESET, PRESETS
from nextblock.settings import flatten, to_dict, typed

VERBS = ("probe", "knn", "fewshot", "finetune", "eval")
"""What results below a run are reported, in this order."""
_PASSED_BY = {"checkpoints", "tensorboard", "wandb", "pictures"}
"""Folders of a run that hold no results."""

SILENT_S = 300.0
"""A run whose heartbeat is older has failed: it beats every ten seconds."""
KNN_SAMPLES = MonitorConfig().knn_samples
LATE_S = 30.0
"""From this age on, the lock of a run on this machine is asked for as well."""


class Measured(NamedTuple):
    """An accuracy below a run."""

    method: str
    """The head, or how it was measured."""
    on: str
    """The images it was measured on."""
    encoder: str
    """The model, one of its baselines, or another model that was measured beside it."""
    top1: float
    top1_se: float | None
    labels: str | None
    """The labelled images that the head, or kNN, learned from; None if nothing was learned."""
    file: str
    """The result, from the run's directory."""

    @property
    def where(self) -> str:
        """The images, and what else tells this result from others."""
        labels = self.labels and f"labels from {self.labels}"
        return ", ".join(filter(None, (f"on {self.on}", labels, self.file)))


class Status(NamedTuple):
    """What a run is doing: running, stopped, finished or failed."""

    word: str
    message: str | None = None
    """Why it failed."""
    age_s: float | None = None
    """Age of its last sign of life."""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What the files of a run say."""

    run_dir: Path
    training_dir: Path
    """Where the files of its training lie: the run, or of a fine-tuning its folder `model`."""
    train: tuple[dict[str, Any], ...] = ()
    """Logged training lines, in order: step, loss, lr, images_per_s, ..."""
    val: tuple[dict[str, Any], ...] = ()
    """Validation lines: step, val_loss."""
    monitor: tuple[dict[str, Any], ...] = ()
    """What monitors measured: step, and their own names."""
    baselines: dict[str, float] = field(default_factory=dict)
    """The loss without a model, by the names of `BASELINE_WORDS`; empty where not measured."""
    starts: tuple[dict[str, Any], ...] = ()
    """Versions and hardware of each start."""
    heartbeat: dict[str, Any] = field(default_factory=dict)
    """The run's status, step and time, as it last wrote them; empty if it never did."""
    results: tuple[Measured, ...] = ()
    """The accuracies of every result below the run."""
    notes: tuple[str, ...] = ()
    """What these results say about the model, each with its source."""
    pictures: tuple[Path, ...] = ()
    """The same images as they were predicted at one step after another: pictures/step_00000100.png."""
    drawn: Path | None = None
    """The latest picture that `nextblock predict` drew."""

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.run_dir.name

    @property
    def picture(self) -> Path | None:
        """The latest picture of predictions: what was asked for, else the monitor's of the highest step."""
        return self.drawn or (self.pictures[-1] if self.pictures else None)

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and hardware of the last start."""
        return self.starts[-1] if self.starts else {}

    @property
    def images_per_s(self) -> float | None:
        """Median over the logged steps."""
        _, rates = self.series("images_per_s")
        return statistics.median(rates) if rates else None

    @property
    def final_loss(self) -> tuple[float, int] | None:
        """The last logged training loss that is a number, and its step."""
        return self._last("loss")

    @property
    def final_val_loss(self) -> tuple[float, int] | None:
        """The last validation loss that is a number, and its step."""
        return self._last("val_loss")

    def _last(self, name: str) -> tuple[float, int] | None:
        steps, values = self.series(name)
        return (values[-1], steps[-1]) if values else None

    @property
    def final_knn(self) -> tuple[float, int] | None:
        """The latest kNN accuracy while training, and its step."""
        return self._last("knn/top1")

    @property
    def monitored(self) -> tuple[Measured, ...]:
        """The latest kNN accuracy while training, as a result; empty if there is none."""
        if self.final_knn is None:
            return ()
        train, val = (
            self.settings.get(f"monitor.knn_{name}") or self.settings.get(f"data.{name}")
            for name in ("train", "val")
        )
        on, most = typed(val or "unknown images"), self.settings.get("monitor.knn_samples", KNN_SAMPLES)
        on += f" (up to {most:,} images)" * (most != KNN_SAMPLES)  # fewer images are another measure
        labels, top1 = typed(train) if train else None, self.final_knn[0]
        return (Measured("kNN while training", on, "model", top1, None, labels, "metrics.jsonl"),)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of the logged lines that hold a finite number under `name`."""
        kept = [line for line in (*self.train, *self.val, *self.monitor) if is_number(line.get(name))]
        return [line["step"] for line in kept], [line[name] for line in kept]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings, by dotted name."""
        import yaml

        try:
            settings = yaml.safe_load((self.training_dir / "config.yaml").read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError) as error:
            path = self.training_dir / "config.yaml"
            raise UsageError(f"{path} is not YAML ({' '.join(str(error).split())}); restore it") from error
        return flatten(settings) if isinstance(settings, dict) else {}

    @property
    def is_tuned(self) -> bool:
        """Whether this is a fine-tuning, which has a classifier and predicts no blocks."""
        return any(name.startswith("finetune.") for name in self.settings)

    @property
    def changed(self) -> dict[str, tuple[Any, Any]]:
        """The settings that differ from the preset's, as (the preset's, the run's)."""
        preset = PRESETS.get(self.settings.get("preset") or DEFAULT_PRESET)
        usual = flatten(to_dict(preset.config)) if preset else {}
        return {
            name: (usual.get(name), value)
            for name, value in self.settings.items()
            if name != "preset" and usual.get(name) != value
        }

    @cached_property
    def unreadable(self) -> dict[str, list[dict[str, Any]]]:
        """The images that could not be read, by the list that names them: name and reason."""
        lists = [path for path in _files_below(self.run_dir) if path.name == "quarantine.jsonl"]
        return {str(path.relative_to(self.run_dir)): _read_lines(path) for path in lists}

    @cached_property
    def status(self) -> Status:
        """Running, stopped, finished or failed, as of now."""
        beat = self.heartbeat
        if "time" not in beat:  # by a release that wrote no heartbeat
            if self.environment.get("complete"):
                return Status("finished")
            return Status("running" if is_locked(self.training_dir) else "stopped")
        age_s = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(beat["time"])).total_seconds())
        if beat["status"] != "running":
            return Status(beat["status"], beat.get("message"), age_s)
        # A killed process cannot write that it failed. Its lock tells at once, but on its own machine only.
        # Not asked while the run is heard of: the question takes the lock for an instant.
        is_late = age_s > LATE_S and beat["host"] == platform.node()
        if age_s > SILENT_S or (is_late and is_locked(self.training_dir) is False):
            silent = " ".join(clock(age_s).split()[:2])
            return Status("failed", f"no heartbeat for {silent}", age_s)
        return Status("running", None, age_s)

    @property
    def step(self) -> int:
        """Steps done, as far as is known."""
        return self.heartbeat.get("step", self.train[-1]["step"] if self.train else 0)

    @cached_property
    def batch_size(self) -> int:
        """Images of a step; 0 if it is not known. A source of fewer images makes the batch that size."""
        source = read_json(self.training_dir / "source.json").get("train", {})
        epoch = self.settings.get("data.epoch_samples") or source.get("num_images")
        batch = self.settings.get("train.batch_size", 0)
        return min(batch, epoch) if epoch else batch

    @property
    def flops(self) -> float | None:
        """Operations of the model for all images so far, without recomputation; None if not logged."""
        image = [
            1e12 * line["tflops"] / line["images_per_s"]
            for line in self.train
            if is_number(line.get("tflops")) and is_number(line.get("images_per_s")) and line["images_per_s"]
        ]
        return statistics.median(image) * self.step * self.batch_size if image and self.batch_size else None

    @cached_property
    def encoder_parameters(self) -> int | None:
        """Numbers in the encoder's tensors, from the latest checkpoint; None without one."""
        for path in sorted(self.training_dir.glob("checkpoints/step_*/model.safetensors"), reverse=True):
            with suppress(OSError, SafetensorError), safe_open(path, "np") as file:
                names = [name for name in file.keys() if name.startswith("encoder.")]  # noqa: SIM118 - no dict
                return sum(math.prod(file.get_slice(name).get_shape()) for name in names) or None
        return None


# -------------------------------------------------------------------------------------------------- reading


def read_run(run_dir: Path) -> RunSummary:
    """Read a run, or what `nextblock finetune --out` wrote; `UsageError` on anything else, or damage."""
    if run_dir.name == "model" and _is_tuned(run_dir):  # within what `finetune --out` wrote
        run_dir = run_dir.parent
    training = run_dir
    if not (run_dir / "config.yaml").is_file():
        training = run_dir / "model"
        if not _is_tuned(training):
            why = "is not a run: it has no config.yaml" if run_dir.is_dir() else "does not exist"
            why = "is a file" if run_dir.is_file() else why
            runs = sorted(run_dir.glob("*/config.yaml"))
            meant = f"its runs, such as {runs[0].parent}" if runs else "what `nextblock pretrain --out` wrote"
            raise UsageError(f"{run_dir} {why}; give {meant}")
    # Commands are typed, and pages are read, in other directories.
    run_dir, training = run_dir.absolute(), training.absolute()
    lines = _read_lines(training / "metrics.jsonl")
    files = [path for path in _files_below(run_dir) if path.suffix == ".json" and path.stem in VERBS]
    # What `eval` measured lies method by method below it, unless it scored a classifier.
    folders = {path.parent for path in files if path.name != "eval.json"}
    files = [
        path
        for path in sorted(files, key=lambda path: (VERBS.index(path.stem), path))
        if path.name != "eval.json" or not any(path.parent in folder.parents for folder in folders)
    ]
    results = {path: read_json(path) for path in files}
    pictures = [
        path for path in (training / "pictures").glob("step_*.png") if re.fullmatch(r"step_[0-9]+", path.stem)
    ]
    asked = sorted(run_dir.glob("predict*/predictions.png"), key=lambda path: (path.stat().st_mtime_ns, path))
    return RunSummary(
        run_dir=run_dir,
        training_dir=training,
        **{
            kind: tuple(line for line in lines if line.get("kind") == kind)
            for kind in ("train", "val", "monitor")
        },
        baselines=read_json(training / "baselines.json"),
        starts=_starts(training),
        heartbeat=read_json(training / "heartbeat.json"),
        results=tuple(one for path, values in results.items() for one in _measured(run_dir, path, values)),
        notes=tuple(
            f"{path.relative_to(run_dir)}: {note}"
            for path, values in results.items()
            for note in values.get("notes", ())
            if "not clearly better" in note
        ),
        pictures=tuple(sorted(pictures)),
        drawn=asked[-1] if asked else None,
    )


def _is_tuned(training: Path) -> bool:
    """Whether a directory holds the training of a fine-tuning."""
    config = training / "config.yaml"
    return config.is_file() and "\nfinetune:" in config.read_text(encoding="utf-8", errors="replace")


def _files_below(folder: Path) -> list[Path]:
    """All files below a run but those of its training, in order."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - _PASSED_BY)
        found += [Path(place) / file for file in sorted(files)]
    return found


def read_json(path: Path) -> Any:
    """The content of a JSON file; an empty object if there is no file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path} is not JSON ({error.msg}, line {error.lineno}); remove it or write it again"
        ) from error


def _starts(training: Path) -> tuple[dict[str, Any], ...]:
    """The starts of a run; a dict is from before 0.1.0, when only the first was recorded."""
    starts = read_json(training / "environment.json")
    return tuple(starts) if isinstance(starts, list) else (starts,) * bool(starts)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file, but a last one that is being written; none if there is no file."""
    text, lines = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "", []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UsageError(
                f"line {number} of {path} is not JSON ({error.msg}); remove that line"
            ) from error
    return lines


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def _measured(run_dir: Path, path: Path, values: dict[str, Any]) -> Iterator[Measured]:
    """The accuracies in a result; of kNN those of the setting that was fixed beforehand."""
    try:
        verb, sources = values["verb"], values.get("sources", {})
        labels = sources["train"]["spec"] if sources else None
        on = f"{labels}, {'each by the others' if verb == 'knn' else 'held out'}"
        if "test" in sources or not sources:
            on = sources["test"]["spec"] if sources else values["settings"]["test"]
        for row in values["rows"]:
            method = row.get("head") or row.get("method") or verb
            if verb == "fewshot":
                method = row["shots"] + (" of the labels" if "%" in row["shots"] else " labels a class")
            elif verb == "knn":
                if not row["is_default"]:
                    continue
                method = f"kNN, k {row['k']}"
            model = row.get("model") or values.get("settings", {}).get("model")
            other = _other_model(model, run_dir) if verb != "finetune" else None
            encoder = row["encoder"]
            if other is not None and encoder in ("model", "untrained"):
                encoder = other if encoder == "model" else f"{encoder} {other}"
            file = str(path.relative_to(run_dir))
            yield Measured(method, on, encoder, float(row["top1"]), row.get("top1_se"), labels, file)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged or of an older release ({error!r}); measure again") from error


def _other_model(model: Any, run_dir: Path) -> str | None:
    """The name of a model that was measured below a run and is not the run's; None if it is.

    A checkpoint within the run is one; a copy of the run is not, nor what is no longer there: the run moved.
    """
    model = model[0] if isinstance(model, list | tuple) and len(model) == 1 else model
    if not isinstance(model, str):
        return None
    if not Path(model).exists():
        return model if model.partition(":")[0] in ("timm", "hf") else None
    place, run = Path(model).resolve(), run_dir.resolve()
    if run in place.parents:
        return str(place.relative_to(run))
    # A copy of the run began at the same moment.
    return None if place == run or _starts(place)[:1] == _starts(run)[:1] != () else model
