"""The run directory: the files of one training, its lock, and the check that it contains the same run.

RUN/config.yaml        all settings, resolved
    source.json        number of images and fingerprint of their list, also per part of a mixture
    environment.json   a list with one entry per start: versions, device, git commit, command
    baselines.json     losses of predictions that need no model, on this data
    metrics.jsonl      one JSON object per line
    heartbeat.json     step and state of the run, at most seconds old
    loggers.json       each logger's id of the run
    quarantine.jsonl   unreadable images
    best.json          the best checkpoint and its value, if checkpoint.keep_best is set
    checkpoints/       step_00001234/{model.safetensors, optimizer/, state.json, checksums.json}
    logs/              warnings of all processes except the first
    pictures/  tensorboard/  wandb/
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from nextblock.atomic import OUTPUT_MARK, RUN_FILES, WriteError, exclusive, remove, write_text
from nextblock.config import RunConfig
from nextblock.data import Source, jpeg_decoder
from nextblock.errors import UsageError
from nextblock.settings import from_dict, to_dict, typed
from nextblock.train.distributed import Group, is_lost
from nextblock.train.runtime import device_name

T = TypeVar("T", bound=RunConfig)

PACKAGES = ("nextblock", "torch", "torchvision", "timm", "torchcodec", "numpy", "pillow", "safetensors")
OTHER_FILES = (
    "baselines.json",
    "heartbeat.json",
    "loggers.json",
    "metrics.jsonl",
    "quarantine.jsonl",
    "best.json",
    "checkpoints",
    "pictures",
    "tensorboard",
    "logs",
    "wandb",
)
HEARTBEAT_EVERY_S = 10.0
MESSAGE_LETTERS = 300
LOG_FILES = ("*.out", "*.err", "*.log", "slurm-*")
"""Files that a scheduler may create in a directory before the run starts."""
LOST = "restore it from a copy, or train on from the weights here: --model.init RUN with another --out"


class RunDirError(UsageError):
    """`--out` contains something other than this run."""


class DamagedRunError(RuntimeError):
    """A file of a run cannot be read."""


class RunDir:
    """Paths and records of a run. Only the process inside `locked` may write to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.quarantine = path / "quarantine.jsonl"
        self.logs = path / "logs"
        self.starts_over = False
        """Whether `begin` will remove the existing run."""
        self.last_steps: dict[str, int] = {}
        """Last step of each kind of metrics that was ever written, by `read_metrics`."""

    def is_run(self) -> bool:
        """Whether the directory contains a run."""
        return all((self.path / name).is_file() for name in RUN_FILES)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory for this process; a new directory is removed again if no run starts in it.

        Raises `RunDirError` if it contains something else, `InUseError` if another process trains in it.
        """
        # Checked before locking, as that creates the directory and files in it.
        is_new = not self.path.exists()
        if not is_new and not self.is_run() and not self._is_free():
            missing = [name for name in RUN_FILES if not (self.path / name).is_file()]
            if self.checkpoints.is_dir() and len(missing) < len(RUN_FILES):
                raise DamagedRunError(f"{self.path} is a run that lacks {', '.join(missing)}; {LOST}")
            raise RunDirError(f"{self.path} exists and is not a run; choose another --out, or empty it")
        with ExitStack() as stack:
            stack.enter_context(exclusive(self.path))
            try:
                yield
            finally:
                if is_new and not self.is_run() and self._is_free():
                    remove(self.path)

    def _is_free(self) -> bool:
        """Whether the directory contains at most log files and leftovers of a run killed at its start."""
        # config.yaml is written last, so it is no leftover: it may belong to another project.
        return self.path.is_dir() and all(
            entry.name.startswith((".writing-", OUTPUT_MARK))
            or entry.name in RUN_FILES[:2]
            or any(entry.match(pattern) for pattern in LOG_FILES)
            for entry in self.path.iterdir()
        )

    # -------------------------------------------------------------------------------- the same run, or not

    def check(self, config: RunConfig, sources: dict[str, Source], *, overwrite: bool) -> RunConfig:
        """Return the settings to train with; `RunDirError` if this is another run, or has other images.

        With `overwrite`, `begin` removes the existing run. But if that is this run, started with --overwrite
        and unfinished, the command was repeated to resume it, so it is kept.
        """
        if not self.is_run():
            return config
        if not overwrite:
            return self._checked(config, sources)
        # Nothing is removed before `begin`, as the new run may still be refused.
        try:
            config_here = self._checked(config, sources)
            starts = self._read_starts()
        except (RunDirError, DamagedRunError):
            self.starts_over = True
            return config
        self.starts_over = not starts[0].get("overwrite") or bool(starts[-1].get("complete"))
        return config if self.starts_over else config_here

    def _checked(self, config: RunConfig, sources: dict[str, Source]) -> RunConfig:
        settings = self._read("config.yaml", LOST, lambda text: _mapping(yaml.safe_load(text)))
        try:
            recorded_here = from_dict(type(config), settings)
        except ValueError as error:
            raise RunDirError(
                f"{self.path}/config.yaml is not of this version of nextblock: {error}; choose another --out"
            ) from error
        # A run keeps what "auto" was at its first start, on any device.
        for name in ("precision", "micro_batch_size"):
            if getattr(config.train, name) == "auto":
                kept = {name: getattr(recorded_here.train, name)}
                config = replace(config, train=replace(config.train, **kept))
        # Settings that do not affect the weights, such as workers and paths, are not compared.
        if differences := config.differences(recorded_here):
            listed = "; ".join(
                f"{name}: {typed(old)} there, {typed(new)} now" for name, (new, old) in differences.items()
            )
            # The schedule depends on the duration, so a longer run differs from the first step on.
            longer = (
                f". To train longer from its weights: --model.init {self.path} with another --out"
                if "train.duration" in differences
                else ""
            )
            raise RunDirError(
                f"{self.path} holds another run ({listed}); choose another --out, the same settings to "
                f"resume, or --overwrite to start over{longer}"
            )
        # The run also depends on the list of images, for their order, and on the decoder, for their pixels.
        recorded = self._read("source.json", LOST, _sources)
        decoder = jpeg_decoder(config.data.decoder)
        if recorded.get("decoder", decoder) != decoder:
            raise RunDirError(
                f"{self.path} was decoding JPEG with {recorded['decoder']}, but this installation uses "
                f"{decoder}, so some pixels would differ; install the same decoder, or "
                "start a new run with another --out"
            )
        if "val" in recorded and "val" not in sources:
            raise RunDirError(
                f"{self.path} validates on {recorded['val']['spec']!r}; name these images again: "
                f"--{config.flag('data.val')}"
            )
        for kind, source in sources.items():
            then = recorded.get(kind)
            if then is None:
                raise RunDirError(
                    f"{self.path} was started without {config.flag(f'data.{kind}')}; leave it out to "
                    "resume, or start a new run with another --out"
                )
            if then["fingerprint"] == source.fingerprint:
                continue
            # In a mixture, name the first part that changed; if none did, the number of parts changed.
            parts = zip(source.parts, then.get("parts", []), strict=False)
            changed = (pair for pair in parts if pair[0].fingerprint != pair[1]["fingerprint"])
            part, then = next(changed, (source, then))
            raise RunDirError(
                f"{config.flag(f'data.{kind}')} {part.spec!r} has changed since this run started: "
                f"{then.get('num_images')} images then, {len(part)} now, or other names; the order of "
                "samples would not be the same. "
                "Restore the images, or start a new run with another --out"
            )
        return config

    # --------------------------------------------------------------------------------------------- records

    def begin(
        self,
        config: RunConfig,
        sources: dict[str, Source],
        device: torch.device,
        step: int,
        group: Group,
        *,
        overwrite: bool,
    ) -> None:
        """Record the run and its start from `step`; with `overwrite`, remove the existing run first."""
        if self.starts_over:  # by --overwrite
            # Remove only a run's own files, and RUN_FILES last: if killed here, the command can be repeated.
            for name in (*OTHER_FILES, *RUN_FILES):
                remove(self.path / name)
            self.starts_over = False
        # config.yaml is written last: without it the directory is not a run, so a kill leaves it free.
        starts = self._read_starts() if self.is_run() else []
        processes = {"processes": group.size, "launcher": group.world.launcher}
        starts.append(
            {**_environment(device), **processes, "step": step, "overwrite": overwrite, "complete": False}
        )
        described: dict[str, Any] = {kind: _describe(source) for kind, source in sources.items()}
        described["decoder"] = jpeg_decoder(config.data.decoder)
        self.write("source.json", described)
        self.write("environment.json", starts)
        write_text(self.path / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))

    def complete(self) -> None:
        """Record that the run is complete."""
        # If a command with --overwrite is repeated, it resumes an incomplete run and replaces a complete one.
        starts = self._read_starts()
        if not starts[-1].get("complete"):
            starts[-1]["complete"] = True
            self.write("environment.json", starts)

    def _read_starts(self) -> list[dict[str, Any]]:
        remedy = "remove it and put an empty list, [], in its place"
        return self._read("environment.json", remedy, lambda text: [*map(_mapping, json.loads(text))]) or [{}]

    def check_present(self) -> None:
        """Raise `WriteError` if the run was removed during training: a checkpoint alone cannot be resumed."""
        if not self.is_run():
            raise WriteError(
                f"{self.path} was removed or emptied while the run was training; its content is lost. "
                "Run the same command again to start over"
            )

    def read_metrics(self, last_step: int) -> list[dict[str, Any]]:
        """Lines of metrics up to a step, without an incomplete last line."""

        def parse(text: str) -> list[dict[str, Any]]:
            whole = text.split("\n")[:-1]  # an incomplete line has no line end
            lines = [_mapping(json.loads(line)) for line in whole]
            self.last_steps = {line["kind"]: line["step"] for line in lines}
            return [line for line in lines if line["step"] <= last_step]

        remedy = "move it away to resume without the loss curve so far"
        return self._read(self.metrics.name, remedy, parse) if self.metrics.exists() else []

    def write_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Replace the lines of metrics, if there are any."""
        if self.metrics.exists():
            write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in lines))

    def read_baselines(self) -> dict[str, float]:
        """Reference losses measured in the first step; empty before."""

        def parse(text: str) -> dict[str, float]:
            return {name: float(value) for name, value in _mapping(json.loads(text)).items()}

        name, remedy = "baselines.json", "remove it: it is then measured again"
        return self._read(name, remedy, parse) if (self.path / name).exists() else {}

    def write(self, name: str, values: Any) -> None:
        """Write a record as JSON."""
        write_text(self.path / name, json.dumps(values, indent=1))

    def _read(self, name: str, remedy: str, parse: Callable[[str], Any]) -> Any:
        """Read a file of the run; errors in reading or parsing it become a `DamagedRunError`."""
        path = self.path / name
        try:
            return parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, LookupError, TypeError, RecursionError, yaml.YAMLError) as error:
            cause = " ".join(str(error).split())
            raise DamagedRunError(f"{path} is damaged ({cause}); {remedy}") from error

    @contextmanager
    def heartbeat(self, step: Callable[[], int], total_steps: int) -> Iterator[None]:
        """Update heartbeat.json regularly, and record at the end how the run ended."""

        def beat(status: str, message: str | None = None) -> None:
            values = {
                "status": status,
                "step": step(),
                "total_steps": total_steps,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "host": platform.node(),
                "pid": os.getpid(),
                "message": message,
            }
            # Replaced atomically for readers, but not flushed to disk. A failure must not end the run.
            aside = self.path / ".writing-heartbeat.json"
            with suppress(OSError):
                aside.write_text(json.dumps(values), encoding="utf-8")
                aside.replace(self.path / "heartbeat.json")

        # In a thread, as a step on a CPU or a validation can take longer than a reader would wait.
        is_over = threading.Event()

        def keep_beating() -> None:
            while not is_over.wait(HEARTBEAT_EVERY_S):
                beat("running")

        thread = threading.Thread(target=keep_beating, name="heartbeat", daemon=True)
        beat("running")
        thread.start()
        # Stays "failed" for every exception, also SystemExit and KeyboardInterrupt.
        status, message = "failed", None
        try:
            yield
            status = "finished" if step() == total_steps else "stopped"
        except BaseException as error:
            what = "another process of the run died" if is_lost(error) else str(error)
            message = textwrap.shorten(what or type(error).__name__, MESSAGE_LETTERS, placeholder=" …")
            raise
        finally:
            is_over.set()
            thread.join()
            beat(status, message)


def _mapping(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise TypeError(f"{str(values)[:40]!r} is not a mapping of names to values")
    return values


def _sources(text: str) -> dict[str, Any]:
    """Content of source.json, if it has the form that `RunDir.begin` writes."""
    recorded = _mapping(json.loads(text))
    for kind in {"train", "val"} & {"train", *recorded}:
        for part in (recorded[kind], *_mapping(recorded[kind]).get("parts", ())):
            if not {"spec", "num_images", "fingerprint"} <= _mapping(part).keys():
                raise ValueError(f"{kind} is not described")
    return recorded


def recorded_config(path: Path, kind: type[T] = RunConfig) -> T | None:
    """Settings of the run in a directory; None if there is no run, or if this version cannot read it."""
    if not RunDir(path).is_run():
        return None
    try:
        return from_dict(kind, _mapping(yaml.safe_load((path / "config.yaml").read_text("utf-8"))))
    except (ValueError, TypeError, yaml.YAMLError):
        return None  # `RunDir.check` reports the error


def _describe(source: Source) -> dict[str, Any]:
    """Properties that identify a source."""
    described = {"spec": source.spec, "num_images": len(source), "fingerprint": source.fingerprint}
    parts = source.parts
    return described if len(parts) == 1 else {**described, "parts": [_describe(part) for part in parts]}


def _environment(device: torch.device) -> dict[str, Any]:
    """Time, host, versions, device, git commit of the working directory, and command of a start."""
    versions = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    commit = None
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "device": device_name(device),
        "git_commit": commit,
        "command": sys.argv,
    }
