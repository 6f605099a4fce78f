"""Read what a run achieved from its files: accuracies, speed, losses with their references, pictures.

Imports no torch, so that a report starts quickly. What a run does not have yet is empty, not an error.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from nextblock.atomic import is_locked
from nextblock.config import MonitorConfig
from nextblock.errors import UsageError
from nextblock.logs import clock, label_words
from nextblock.presets import DEFAULT_PRESET, PRESETS
from nextblock.settings import flatten, to_dict, typed

VERBS = ("probe", "knn", "fewshot", "finetune", "eval")
"""The results that are reported, in this order."""
_SKIPPED_FOLDERS = {"checkpoints", "tensorboard", "wandb", "pictures"}

SILENT_S = 300.0
"""A run with an older heartbeat has failed: it beats every ten seconds."""
LATE_S = 30.0
"""From this age on, also check the lock, if the run is on this machine."""
MAX_POINTS = 400
"""Points of a drawn curve."""
KNN_SAMPLES = MonitorConfig().knn_samples


class Measured(NamedTuple):
    """One accuracy from a result below a run."""

    method: str
    """The head, or how it was measured."""
    on: str
    """The images it was measured on."""
    encoder: str
    """The model, one of its baselines, or another model."""
    top1: float
    top1_se: float | None
    labels: str | None
    """The labelled images that the head or kNN learned from; None if nothing was learned."""
    file: str
    """The result file, relative to the run."""

    @property
    def where(self) -> str:
        """The images, and the labels and file if they are known."""
        labels = self.labels and f"labels from {self.labels}"
        return ", ".join(filter(None, (f"on {self.on}", labels, self.file)))


class Status(NamedTuple):
    """What a run is doing: running, stopped, finished or failed."""

    word: str
    message: str | None = None
    """Why it failed."""
    age_s: float | None = None
    """Age of its last heartbeat."""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What the files of a run say."""

    run_dir: Path
    training_dir: Path
    """The directory of the training files: the run itself, or `model` in a fine-tuning."""
    train: tuple[dict[str, Any], ...]
    """Logged training lines, in order: step, loss, lr, images_per_s, ..."""
    val: tuple[dict[str, Any], ...]
    """Validation lines: step, val_loss."""
    monitor: tuple[dict[str, Any], ...]
    """What monitors measured: step, and their own names."""
    baselines: dict[str, float]
    """Losses without a model, by the names of `BASELINE_WORDS`."""
    starts: tuple[dict[str, Any], ...]
    """Versions and hardware of each start."""
    heartbeat: dict[str, Any]
    """Status, step and time that the run wrote last."""
    results: tuple[Measured, ...]
    """The accuracies of all results below the run."""
    notes: tuple[str, ...]
    """Warnings in these results that the model does not beat its baselines."""
    pictures: tuple[Path, ...]
    """Predictions of the same images by step: pictures/step_00000100.png."""
    drawn: Path | None
    """The latest picture of `nextblock predict`."""

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.run_dir.name

    @property
    def picture(self) -> Path | None:
        """The latest picture of predictions: one of `nextblock predict`, else the monitor's last."""
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

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of the logged lines that hold a finite number under `name`."""
        kept = [line for line in (*self.train, *self.val, *self.monitor) if is_number(line.get(name))]
        return [line["step"] for line in kept], [line[name] for line in kept]

    def last(self, name: str) -> tuple[float, int] | None:
        """The last finite value logged under `name`, and its step."""
        steps, values = self.series(name)
        return (values[-1], steps[-1]) if values else None

    @property
    def monitored(self) -> tuple[Measured, ...]:
        """The latest kNN accuracy during training as a result; empty if there is none."""
        knn = self.last("knn/top1")
        if knn is None:
            return ()
        train, val = (
            self.settings.get(f"monitor.knn_{name}") or self.settings.get(f"data.{name}")
            for name in ("train", "val")
        )
        on, most = typed(val or "unknown images"), self.settings.get("monitor.knn_samples", KNN_SAMPLES)
        if most != KNN_SAMPLES:  # the number of images changes what is measured
            on += f" (up to {most:,} images)"
        labels = typed(train) if train else None
        return (Measured("kNN while training", on, "model", knn[0], None, labels, "metrics.jsonl"),)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings, by dotted name."""
        import yaml

        path = self.training_dir / "config.yaml"
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError) as error:
            raise UsageError(f"{path} is not YAML ({' '.join(str(error).split())}); restore it") from error
        return flatten(settings) if isinstance(settings, dict) else {}

    @property
    def is_tuned(self) -> bool:
        """Whether this is a fine-tuning, which has a classifier and predicts no blocks."""
        return any(name.startswith("finetune.") for name in self.settings)

    @property
    def preset(self) -> str:
        """The name of the preset."""
        return self.settings.get("preset") or DEFAULT_PRESET

    @property
    def changed(self) -> dict[str, tuple[Any, Any]]:
        """The settings that differ from the preset, as (preset's value, run's value)."""
        preset = PRESETS.get(self.preset)
        usual = flatten(to_dict(preset.config)) if preset else {}
        return {
            name: (usual.get(name), value)
            for name, value in self.settings.items()
            if name != "preset" and usual.get(name) != value
        }

    @cached_property
    def unreadable(self) -> dict[str, list[dict[str, Any]]]:
        """The unreadable images (name and reason), by the file that lists them."""
        lists = [path for path in _files_below(self.run_dir) if path.name == "quarantine.jsonl"]
        return {str(path.relative_to(self.run_dir)): _read_lines(path) for path in lists}

    @cached_property
    def status(self) -> Status:
        """Running, stopped, finished or failed, as of now."""
        beat = self.heartbeat
        if "time" not in beat:
            return Status("running" if is_locked(self.training_dir) else "stopped")
        age_s = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(beat["time"])).total_seconds())
        if beat["status"] != "running":
            return Status(beat["status"], beat.get("message"), age_s)
        # A killed process cannot write that it failed. Its lock tells at once, but only on its own machine.
        # Checking takes the lock for an instant, so only do it when the heartbeat is late.
        is_late = age_s > LATE_S and beat["host"] == platform.node()
        if age_s > SILENT_S or (is_late and is_locked(self.training_dir) is False):
            silent = " ".join(clock(age_s).split()[:2])
            return Status("failed", f"no heartbeat for {silent}", age_s)
        return Status("running", None, age_s)

    @property
    def step(self) -> int:
        """Steps done so far."""
        return self.heartbeat.get("step", self.train[-1]["step"] if self.train else 0)

    @cached_property
    def batch_size(self) -> int:
        """Images per step, at most those of an epoch; 0 if unknown."""
        source = read_json(self.training_dir / "source.json").get("train", {})
        epoch = self.settings.get("data.epoch_samples") or source.get("num_images")
        batch = self.settings.get("train.batch_size", 0)
        return min(batch, epoch) if epoch else batch

    @property
    def flops(self) -> float | None:
        """Operations of the model for all images so far, without recomputation; None if not logged."""
        # TFLOP/s and images/s are logged together, so their quotient is free of the speed at that time.
        per_image = [
            1e12 * line["tflops"] / line["images_per_s"]
            for line in self.train
            if is_number(line.get("tflops")) and is_number(line.get("images_per_s")) and line["images_per_s"]
        ]
        images = self.step * self.batch_size
        return statistics.median(per_image) * images if per_image and self.batch_size else None

    @cached_property
    def encoder_parameters(self) -> int | None:
        """Number of the encoder's parameters in the latest checkpoint; None without one."""
        for path in sorted(self.training_dir.glob("checkpoints/step_*/model.safetensors"), reverse=True):
            with suppress(OSError, SafetensorError), safe_open(path, "np") as file:
                names = [name for name in file.keys() if name.startswith("encoder.")]  # noqa: SIM118 - no dict
                return sum(math.prod(file.get_slice(name).get_shape()) for name in names) or None
        return None


# -------------------------------------------------------------------------------------------------- reading


def read_run(run_dir: Path) -> RunSummary:
    """Read a run, or what `nextblock finetune --out` wrote; `UsageError` for anything else, or damage."""
    if run_dir.name == "model" and _is_tuned(run_dir):
        run_dir = run_dir.parent
    training = run_dir if (run_dir / "config.yaml").is_file() else run_dir / "model"
    if training != run_dir and not _is_tuned(training):
        why = "is not a run: it has no config.yaml" if run_dir.exists() else "does not exist"
        raise UsageError(f"{run_dir} {why}; give a directory that `nextblock pretrain --out` wrote")
    # The report names these paths in commands, which may be typed in another directory.
    run_dir, training = run_dir.absolute(), training.absolute()
    lines = _read_lines(training / "metrics.jsonl")
    kinds = {
        kind: tuple(line for line in lines if line.get("kind") == kind)
        for kind in ("train", "val", "monitor")
    }
    results = {path: read_json(path) for path in _result_files(run_dir)}
    pictures = [
        path for path in (training / "pictures").glob("step_*.png") if re.fullmatch(r"step_[0-9]+", path.stem)
    ]
    drawn = sorted(run_dir.glob("predict*/predictions.png"), key=lambda path: (path.stat().st_mtime_ns, path))
    return RunSummary(
        run_dir=run_dir,
        training_dir=training,
        **kinds,
        baselines=read_json(training / "baselines.json"),
        starts=tuple(read_json(training / "environment.json")),
        heartbeat=read_json(training / "heartbeat.json"),
        results=tuple(one for path, values in results.items() for one in _measured(run_dir, path, values)),
        notes=tuple(
            f"{path.relative_to(run_dir)}: {note}"
            for path, values in results.items()
            for note in values.get("notes", ())
            if "not clearly better" in note
        ),
        pictures=tuple(sorted(pictures)),
        drawn=drawn[-1] if drawn else None,
    )


def _is_tuned(training: Path) -> bool:
    """Whether a directory holds the training of a fine-tuning."""
    config = training / "config.yaml"
    return config.is_file() and "\nfinetune:" in config.read_text(encoding="utf-8", errors="replace")


def _files_below(folder: Path) -> list[Path]:
    """All files below a run except those of its training, in order."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        found += [Path(place) / file for file in sorted(files)]
    return found


def _result_files(run_dir: Path) -> list[Path]:
    """The results below a run, by verb and then by path."""
    files = [path for path in _files_below(run_dir) if path.suffix == ".json" and path.stem in VERBS]
    files.sort(key=lambda path: (VERBS.index(path.stem), path))
    # `eval` also writes the result of each method in folders below its own, unless it scored a classifier.
    folders = {path.parent for path in files if path.name != "eval.json"}
    return [
        path
        for path in files
        if path.name != "eval.json" or not any(path.parent in folder.parents for folder in folders)
    ]


def read_json(path: Path) -> Any:
    """The content of a JSON file; an empty object if there is no file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}, line {error.lineno}, is not JSON ({error.msg}); remove the file"
        ) from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file without a last one that is being written; none if there is no file."""
    text, lines = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "", []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}, line {number}, is not JSON ({error.msg}); remove that line") from error
    return lines


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def thinned(x: Sequence[float], y: Sequence[float]) -> dict[str, list[float]]:
    """A curve's points; if there are more than `MAX_POINTS`, the means and the range of as many parts."""
    if len(x) <= MAX_POINTS:
        return {"x": list(x), "y": list(y)}
    # Parts of equal length, to within one point; none is empty, as there are more points than parts.
    bounds = [len(x) * part // MAX_POINTS for part in range(MAX_POINTS + 1)]
    parts = [slice(*pair) for pair in pairwise(bounds)]
    return {
        "x": [x[part][-1] for part in parts],
        "y": [math.fsum(y[part]) / len(y[part]) for part in parts],
        "low": [min(y[part]) for part in parts],
        "high": [max(y[part]) for part in parts],
    }


def _measured(run_dir: Path, path: Path, values: dict[str, Any]) -> Iterator[Measured]:
    """The accuracies in a result; for kNN, only those of the setting that was fixed beforehand."""
    try:
        verb, sources = values["verb"], values.get("sources", {})
        labels = sources["train"]["spec"] if sources else None
        if "test" in sources:
            on = sources["test"]["spec"]
        elif sources:
            on = f"{labels}, {'each by the others' if verb == 'knn' else 'held out'}"
        else:  # a classifier that `eval` scored
            on = values["settings"]["test"]
        file = str(path.relative_to(run_dir))
        for row in values["rows"]:
            method = row.get("head") or row.get("method") or verb
            if verb == "fewshot":
                method = label_words(row["shots"])
            elif verb == "knn":
                if not row["is_default"]:
                    continue
                method = f"kNN, k {row['k']}"
            encoder = row["encoder"]
            if verb != "finetune" and encoder in ("model", "untrained"):
                other = _other_model(row.get("model") or values.get("settings", {}).get("model"), run_dir)
                if other is not None:
                    encoder = other if encoder == "model" else f"{encoder} {other}"
            yield Measured(method, on, encoder, float(row["top1"]), row.get("top1_se"), labels, file)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is damaged or of an older release ({error!r}); measure again") from error


def _other_model(model: Any, run_dir: Path) -> str | None:
    """The name of a model that is not the run's own; None if it is, or if the path is gone: the run moved."""
    model = model[0] if isinstance(model, list) and len(model) == 1 else model
    if not isinstance(model, str):
        return None
    if model.startswith(("timm:", "hf:")):
        return model
    place, run = Path(model).resolve(), run_dir.resolve()
    if place == run or not place.exists():
        return None
    return str(place.relative_to(run)) if run in place.parents else model
